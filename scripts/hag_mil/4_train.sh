#!/usr/bin/env bash
# One model a fold: a transformer a level, coarse to fine. The published sizes need a GPU and more
# slides (presets/hag_mil_camelyon16.yaml); these suit the demo's cohort on a CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/hag_mil/settings.sh

$PYTHON main.py --csv_path "$LABELS" --label_dict "$LABEL_DICT" --model_type hag_mil \
  --data_root_dir "$OUT/features_level_$COARSE" --child_levels $FINER --embed_dim "$EMBED_DIM" \
  --hidden_dims 128 128 --t_patch 0.5 --v_patch 0.5 --inst_loss svm --lr 1e-4 --max_epochs 20 \
  --k "$FOLDS" --seed 1 --splits_root "$OUT/splits" --split_dir cohort --results_dir "$OUT/results" \
  --exp_code "$EXP" --log_data "$@"
