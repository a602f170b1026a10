#!/usr/bin/env bash
# Tissue and patch coordinates of a cohort on a Dask cluster inside one SLURM job: one run, one
# process list and one report, slides handed out to the workers of all nodes as these get free.
#
#   cd <checkout of milwright>
#   SLIDES=/data/slides OUT=/data/run1 sbatch --nodes=4 --ntasks=64 scripts/cluster/slurm_dask.sh
#
# Needs: pip install 'dask[distributed]'. Against the array of slurm_patches.sh: all tasks must be
# granted at once, but slides are spread evenly and nothing has to be submitted twice. A worker that
# is lost (preempted, out of memory) has its slide done by another; a slide that loses two workers
# fails. Submit the same job again to go on.
#
# A cluster that runs already (dask-jobqueue, Kubernetes, two workstations) serves as well: start its
# workers with PYTHONPATH=<checkout>, see to it that slides and results have the same paths
# everywhere, and give its address: create_patches_fp.py --scheduler tcp://host:8786 ...
# Anyone who reaches the port of a Dask scheduler can run code on its workers: keep it inside.
#
#SBATCH --job-name=mw-dask
#SBATCH --ntasks=16
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=4G
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

SLIDES=${SLIDES:?folder with the slides, the same path on every node}
OUT=${OUT:?folder for the results, the same path on every node}
PATCH_SIZE=${PATCH_SIZE:-256}
SLIDE_TIMEOUT=${SLIDE_TIMEOUT:-1800}  # seconds; a slide whose disk hangs fails, the others go on
MILWRIGHT=${MILWRIGHT:-${SLURM_SUBMIT_DIR:-$PWD}}  # SLURM runs a copy of this file elsewhere
PYTHON=${PYTHON:-.venv/bin/python}
WORKERS=${WORKERS:-${SLURM_NTASKS:-2}}
HOST=${HOST:-$(hostname)}
PORT=${PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}  # so that jobs of one node do not meet
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}}  # of the workers, on each node's own disk

cd "$MILWRIGHT"
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=1  # workers a slide may lose and be tried again
export DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION=1.0  # none waits at a worker, to be lost with it

$PYTHON -m dask scheduler --host "$HOST" --port "$PORT" --no-dashboard \
  --dashboard-address :0 &
scheduler=$!

# Slides are done by children of the workers, so Dask has no memory of theirs to watch; SLURM does.
srun --ntasks="$WORKERS" --cpus-per-task=1 \
  $PYTHON -m dask worker "tcp://$HOST:$PORT" --nthreads 1 --memory-limit 0 --no-dashboard \
  --local-directory "$SCRATCH" --death-timeout 60 &
workers=$!
# One after the other: a worker that loses its scheduler while it closes takes long over it.
trap 'for one in $workers $scheduler; do kill $one 2>/dev/null || true; wait $one || true; done' EXIT

for _ in $(seq 300); do  # until the scheduler listens; create_patches_fp.py then waits for workers
  (: < "/dev/tcp/$HOST/$PORT") 2>/dev/null && break
  sleep 0.2
done
$PYTHON create_patches_fp.py --source "$SLIDES" --save_dir "$OUT" \
  --patch_size "$PATCH_SIZE" --step_size "$PATCH_SIZE" --seg --patch --stitch \
  --scheduler "tcp://$HOST:$PORT" --slide_timeout "$SLIDE_TIMEOUT" "$@"
