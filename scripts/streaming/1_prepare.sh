#!/usr/bin/env bash
# One image a slide: its tissue, packed together, at one scale; splits.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/streaming/settings.sh

$PYTHON create_patches_fp.py --source "$SLIDES" --save_dir "$OUT/images" --preset bwh_biopsy.csv \
  --seg --slide_images "$IMAGE_MPP" "$@"
bash scripts/clam/3_create_splits.sh
