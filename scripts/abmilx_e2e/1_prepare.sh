#!/usr/bin/env bash
# Patches of two magnifications, each packed into an LMDB; splits.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx_e2e/settings.sh

COMMON=(--source "$SLIDES" --patch_size "$PATCH" --step_size "$PATCH" --preset bwh_biopsy.csv
  --seg --patch --save_lmdb patches)

$PYTHON create_patches_fp.py "${COMMON[@]}" --save_dir "$OUT/patches_$LOW_MPP" \
  --patch_mpp "$LOW_MPP"
$PYTHON create_patches_fp.py "${COMMON[@]}" --save_dir "$OUT/patches_$HIGH_MPP" \
  --patch_mpp "$HIGH_MPP" "$@"
bash scripts/clam/3_create_splits.sh
