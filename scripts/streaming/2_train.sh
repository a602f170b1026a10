#!/usr/bin/env bash
# A network over whole images, from slide labels alone. It rests in the first epochs, in which the
# attention learns on its features. Memory is given, as two folds run side by side.
# Sizes for a CPU and the demo's cohort; the published ones are in presets/streaming_*.yaml.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/streaming/settings.sh

$PYTHON main.py --csv_path "$LABELS" --label_dict "$LABEL_DICT" --k "$FOLDS" --seed 1 \
  --splits_root "$OUT/splits" --split_dir cohort --results_dir "$OUT/results" --exp_code "$EXP" \
  --model_type "streaming_$NETWORK" --head gated_attention --slide_images "$IMAGES" \
  --image_size "$IMAGE_SIZE" --opt adamw --lr 2e-4 --schedule cosine --max_epochs 10 \
  --freeze_epochs 4 --accumulate 4 --stream_memory 4 --fold_workers 2 --log_data "$@"
