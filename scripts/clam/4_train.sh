#!/usr/bin/env bash
# One model a fold.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/clam/settings.sh

$PYTHON main.py --csv_path "$LABELS" --label_dict "$LABEL_DICT" --data_root_dir "$OUT/features" \
  --embed_dim "$EMBED_DIM" --k "$FOLDS" --seed 1 --splits_root "$OUT/splits" --split_dir cohort \
  --results_dir "$OUT/results" --exp_code "$EXP" --model_type clam_sb --drop_out 0.25 --lr 2e-4 \
  --max_epochs 20 --log_data "$@"
