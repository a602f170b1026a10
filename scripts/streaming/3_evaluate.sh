#!/usr/bin/env bash
# Metrics with intervals, plots, report.html.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/streaming/settings.sh

$PYTHON eval.py --csv_path "$LABELS" --label_dict "$LABEL_DICT" --slide_images "$IMAGES" \
  --k "$FOLDS" --results_dir "$OUT/results" --models_exp_code "${EXP}_s1" --save_exp_code "$EXP" \
  --output_root "$OUT/eval_results" "$@"
