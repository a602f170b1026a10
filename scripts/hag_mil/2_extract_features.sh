#!/usr/bin/env bash
# Features of every level in one run.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/hag_mil/settings.sh

$PYTHON extract_features_fp.py --data_h5_dir "$OUT/patches_level_$COARSE" --child_levels $FINER \
  --data_slide_dir "$SLIDES" --slide_ext "$SLIDE_EXT" --feat_dir "$OUT/features_level_$COARSE" \
  --model_name "$ENCODER" "$@"
