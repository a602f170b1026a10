#!/usr/bin/env bash
# One feature row a patch, by a frozen encoder.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/clam/settings.sh

$PYTHON extract_features_fp.py --data_h5_dir "$OUT/patches" --data_slide_dir "$SLIDES" \
  --slide_ext "$SLIDE_EXT" --csv_path "$OUT/patches/process_list_autogen.csv" \
  --feat_dir "$OUT/features" --model_name "$ENCODER" "$@"
