#!/usr/bin/env bash
# Tissue, patch coordinates, masks and stitched previews.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/clam/settings.sh

$PYTHON create_patches_fp.py --source "$SLIDES" --save_dir "$OUT/patches" \
  --patch_size 256 --step_size 256 --preset bwh_biopsy.csv --seg --patch --stitch "$@"
