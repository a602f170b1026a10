#!/usr/bin/env bash
# One model a fold, by the published two-stage settings for sub-typing but for fewer epochs.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx/settings.sh

$PYTHON main.py --config presets/abmilx_subtyping.yaml --csv_path "$LABELS" \
  --label_dict "$LABEL_DICT" --data_root_dir "$OUT/features" --embed_dim "$EMBED_DIM" \
  --k "$FOLDS" --seed 1 --splits_root "$OUT/splits" --split_dir cohort --results_dir "$OUT/results" \
  --exp_code "$EXP" --max_epochs 20 --stop_epoch 10 --patience 5 --log_data "$@"
