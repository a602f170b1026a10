#!/usr/bin/env bash
# Encoder and ABMILX together, one pair a fold. Sizes for a CPU and the demo's cohort (about ten
# minutes on two cores; --k_end 1 --max_epochs 1 for a look); the published ones are in presets/.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx_e2e/settings.sh

$PYTHON main.py --csv_path "$LABELS" --label_dict "$LABEL_DICT" --model_type "$MODEL" \
  --patches "$PATCHES" --patches_low "$PATCHES_LOW" --same_psize 120 --mul_scale_ratio 6 \
  --img_size 96 --img_transform strong --crop_scale 0.8 --train_blocks 3 --inner_dim 256 \
  --opt adamw --lr 1e-4 --schedule cosine --warmup_epochs 1 --max_epochs 12 --ema 0.98 \
  --k "$FOLDS" --seed 1 --split_dir "$PWD/$OUT/splits/cohort" --results_dir "$OUT/results" \
  --exp_code "$EXP" --fold_workers 2 --log_data "$@"
