#!/usr/bin/env bash
# Tissue and patches of the coarsest level, and the corresponding patches of the finer ones.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/hag_mil/settings.sh

$PYTHON create_patches_fp.py --source "$SLIDES" --save_dir "$OUT/patches_level_$COARSE" \
  --patch_level "$COARSE" --patch_size "$PATCH" --step_size "$PATCH" --child_levels $FINER \
  --preset bwh_biopsy.csv --seg --patch --stitch "$@"
