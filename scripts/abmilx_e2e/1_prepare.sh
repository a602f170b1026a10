#!/usr/bin/env bash
# Patches of two magnifications in one LMDB (the finer ones tile the coarser ones), and splits.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx_e2e/settings.sh

$PYTHON create_patches_fp.py --source "$SLIDES" --save_dir "$OUT/patches" \
  --patch_mpp "$LOW_MPP" --child_mpp "$HIGH_MPP" --patch_size "$PATCH" \
  --preset bwh_biopsy.csv --seg --patch --save_lmdb patches "$@"
bash scripts/clam/3_create_splits.sh
