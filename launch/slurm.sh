#!/usr/bin/env bash
# One run on several nodes, a process for each GPU:
#
#   sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --time=4:00:00 \
#     launch/slurm.sh --config configs/nucleus.py --workdir runs/nucleus
#
# Submit it where the project lies; --workdir must be a folder that all nodes
# see. For many runs of one GPU each: python -m launch.sweep --via slurm.
# PYTHON (default: .venv's) is the interpreter.
#
#SBATCH --job-name=distillfss
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}"
PYTHON=${PYTHON:-.venv/bin/python}

workdir=''
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --workdir=*) workdir=${!i#*=} ;;
    --workdir) next=$((i + 1)) && workdir=${!next-} ;;
  esac
done
workdir=${workdir%/}
if [[ -z $workdir ]]; then
  echo 'error: give --workdir, a folder that all nodes see' >&2
  exit 1
fi

# What sbatch was given per task, srun does not take over by itself.
if [[ -n ${SLURM_CPUS_PER_TASK-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

newest() {
  ls "$workdir/checkpoints" 2>/dev/null | grep -xE '[0-9]+' | sort -n | tail -n 1
}

# How often in a row, with this time, it was stopped without a new checkpoint.
stalls() {
  if [[ $(newest) == "$step" ]]; then
    echo "$(($(cat "$workdir.stalls" 2>/dev/null || echo 0) + 1))"
  else
    echo 0
  fi
}

# Time is nearly up: all processes are asked to save. With a signal, scancel
# tells the steps and does not end the job.
trap 'waiting=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

step=$(newest)
# srun says the highest code of all processes: an error must be above those of
# the processes that are killed because of it. TERM reaches this shell, too, and
# is for the program alone: bash's `wait` loses a code where both come at once.
run='trap "" TERM
(trap - TERM; exec "$@")
code=$?
exit "$((code == 1 ? 255 : code))"'
waiting=1
srun --kill-on-bad-exit=1 bash -c "$run" run \
  "$PYTHON" -u -m distillfss_jax.main --distributed "$@" &
child=$!
while ((waiting)); do # a signal ends `wait` early
  waiting=0
  wait "$child"
  status=$?
done
((status == 255)) && status=1

# 75: saved, or another process was lost; 134: JAX noticed that first; 137, 143:
# a node went away. All go on from the newest checkpoint, if there are new ones.
case $status in
  75 | 134 | 137 | 143)
    count=$(stalls)
    mkdir -p "$(dirname "$workdir")"
    echo "$count" >"$workdir.stalls"
    if ((count > 3)); then
      echo "error: exit code $status, $count times without a new checkpoint" >&2
    else
      scontrol requeue "$SLURM_JOB_ID"
      exit "$status"
    fi
    ;;
esac
rm -f "$workdir.stalls"
exit "$status"
