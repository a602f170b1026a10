#!/usr/bin/env bash
# All patches of high magnification: metrics with intervals, plots, report.html.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx_e2e/settings.sh

$PYTHON eval.py --csv_path "$LABELS" --label_dict "$LABEL_DICT" --patches "$PATCHES" \
  --k "$FOLDS" --results_dir "$OUT/results" --models_exp_code "${EXP}_s1" --save_exp_code "$EXP" \
  --output_root "$OUT/eval_results" "$@"
