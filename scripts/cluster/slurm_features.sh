#!/usr/bin/env bash
# Features of a cohort, by an array of tasks with one GPU each that share one output folder.
#
#   cd <checkout of milwright>
#   job=$(SLIDES=/data/slides OUT=/data/run1 sbatch --parsable scripts/cluster/slurm_features.sh)
#   SLIDES=/data/slides OUT=/data/run1 sbatch --dependency=afterany:$job --array=0 scripts/cluster/slurm_features.sh
#
# OUT is that of slurm_patches.sh. As there, every task runs the same command and locks keep them
# apart; the second submission does what is missing and writes the report of the whole cohort.
# Slides are copied to the node's own disk ahead of the reading (CACHE; empty: read where they are).
# Nodes with several GPUs: one task a GPU as here is simplest; within one task, --gpus N does the
# same. Flags after the script's name go on to extract_features_fp.py.
#
#SBATCH --job-name=mw-features
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

SLIDES=${SLIDES:?folder with the slides, the same path on every node}
OUT=${OUT:?results of slurm_patches.sh, the same path on every node}
FEATURES=${FEATURES:-$OUT/features}
SLIDE_EXT=${SLIDE_EXT:-.svs}
ENCODER=${ENCODER:-resnet50_trunc}
BATCH_SIZE=${BATCH_SIZE:-256}
PRECISION=${PRECISION:-bf16}  # fp32 for results that do not depend on the kind of GPU
CACHE=${CACHE-${TMPDIR:-/tmp}/milwright}
MILWRIGHT=${MILWRIGHT:-${SLURM_SUBMIT_DIR:-$PWD}}  # SLURM runs a copy of this file elsewhere
PYTHON=${PYTHON:-.venv/bin/python}

cd "$MILWRIGHT"
export OMP_NUM_THREADS=1  # the reading threads are the parallelism

# srun passes the SIGTERM of a preemption or time limit on to Python, which ends cleanly.
srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  $PYTHON extract_features_fp.py --data_h5_dir "$OUT" --data_slide_dir "$SLIDES" \
  --slide_ext "$SLIDE_EXT" --csv_path "$OUT/process_list_autogen.csv" --feat_dir "$FEATURES" \
  --model_name "$ENCODER" --batch_size "$BATCH_SIZE" --precision "$PRECISION" \
  --workers "${SLURM_CPUS_PER_TASK:-1}" ${CACHE:+--cache_dir "$CACHE"} "$@"
