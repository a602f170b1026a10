#!/usr/bin/env bash
# A two-stage ABMILX on features of the frozen encoder, then encoder and ABMILX together from there,
# each pair for a fold. Sizes for a CPU and the demo's cohort; the published ones are in presets/.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/abmilx_e2e/settings.sh
COMMON=(--csv_path "$LABELS" --label_dict "$LABEL_DICT" --k "$FOLDS" --seed 1 --inner_dim 256
  --splits_root "$OUT/splits" --split_dir cohort --results_dir "$OUT/results" --fold_workers 2 --log_data)

$PYTHON extract_features_fp.py --data_h5_dir "$OUT/patches_$HIGH_MPP" --data_slide_dir "$SLIDES" \
  --slide_ext "$SLIDE_EXT" --csv_path "$OUT/patches_$HIGH_MPP/process_list_autogen.csv" \
  --feat_dir "$OUT/features" --model_name "$ENCODER" --target_patch_size "$SEEN_PX"
$PYTHON main.py "${COMMON[@]}" --model_type abmilx --data_root_dir "$OUT/features" \
  --embed_dim "$EMBED_DIM" --lr 2e-4 --max_epochs 40 --exp_code two_stage
$PYTHON main.py "${COMMON[@]}" --model_type "e2e_${ENCODER}_abmilx" --exp_code "$EXP" \
  --patches "$PATCHES" --patches_low "$PATCHES_LOW" --same_psize 120 --mul_scale_ratio 6 \
  --mil_init "$OUT/results/two_stage_s1" --img_size "$SEEN_PX" --img_transform strong \
  --crop_scale 0.8 --train_blocks 3 --opt adamw --lr 1e-4 --schedule cosine --max_epochs 6 \
  --freeze_epochs 2 --ema 0.98 "$@"
