#!/usr/bin/env bash
# Tissue and patch coordinates of a cohort, by an array of CPU tasks that share one output folder.
#
#   cd <checkout of milwright>
#   job=$(SLIDES=/data/slides OUT=/data/run1 sbatch --parsable scripts/cluster/slurm_patches.sh)
#   SLIDES=/data/slides OUT=/data/run1 sbatch --dependency=afterany:$job --array=0 scripts/cluster/slurm_patches.sh
#
# Every task runs the same command over all slides: a lock a slide says who works on it, so nothing
# is done twice and tasks may start, stop or be preempted at any time. The process list and the
# report are whole files of whichever task wrote last; the second submission above finds the slides
# done, does what is missing and writes both for the whole cohort. Its log ends with what failed.
# A node that vanished leaves its locks: the report then says "process N on host H", and once that
# host is known to be gone the .lock file may be deleted. Flags after the script's name go on to
# create_patches_fp.py, e.g. "scripts/cluster/slurm_patches.sh --preset tcga.csv".
#
#SBATCH --job-name=mw-patches
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a.log
set -euo pipefail

SLIDES=${SLIDES:?folder with the slides, the same path on every node}
OUT=${OUT:?folder for the results, the same path on every node}
PATCH_SIZE=${PATCH_SIZE:-256}
SLIDE_TIMEOUT=${SLIDE_TIMEOUT:-1800}  # seconds; a slide whose disk hangs fails, the others go on
MILWRIGHT=${MILWRIGHT:-${SLURM_SUBMIT_DIR:-$PWD}}  # SLURM runs a copy of this file elsewhere
PYTHON=${PYTHON:-.venv/bin/python}

cd "$MILWRIGHT"
export OMP_NUM_THREADS=1  # the workers are the parallelism

# srun passes the SIGTERM of a preemption or time limit on to Python, which ends cleanly.
srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  $PYTHON create_patches_fp.py --source "$SLIDES" --save_dir "$OUT" \
  --patch_size "$PATCH_SIZE" --step_size "$PATCH_SIZE" --seg --patch --stitch \
  --workers "${SLURM_CPUS_PER_TASK:-1}" --slide_timeout "$SLIDE_TIMEOUT" "$@"
