#!/usr/bin/env bash
# Patches of two magnifications, each packed into an LMDB; splits.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx_e2e/settings.sh

for MPP in "$HIGH_MPP" "$LOW_MPP"; do
  $PYTHON create_patches_fp.py --source "$SLIDES" --save_dir "$OUT/patches_$MPP" \
    --patch_mpp "$MPP" --patch_size "$PATCH" --step_size "$PATCH" --preset bwh_biopsy.csv \
    --seg --patch --save_lmdb patches "$@"
done
bash scripts/clam/3_create_splits.sh
