#!/usr/bin/env bash
# Patient-level stratified folds; each patient is tested once.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/hag_mil/settings.sh

$PYTHON create_splits_seq.py --csv_path "$LABELS" --label_dict "$LABEL_DICT" --k "$FOLDS" \
  --scheme kfold --val_frac 0.2 --seed 1 --splits_root "$OUT/splits" --split_dir cohort "$@"
