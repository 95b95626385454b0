#!/usr/bin/env bash
# One run of a sweep for each task of a SLURM array. launch/sweep.py puts lines
# in the places of those in braces and gives the whole to sbatch, which keeps a
# copy: what is submitted later changes nothing for tasks that still wait.

# {setup}

case ${SLURM_ARRAY_TASK_ID-} in
# {cells}
  *) echo "error: no run of index ${SLURM_ARRAY_TASK_ID-}" >&2 && exit 1 ;;
esac
export PYTHONUNBUFFERED=1

# The log is locked while its run is under way, here and in a local sweep. The
# run has the lock too, should this shell be killed before it.
exec 9>>"$folder.log" || exit 1
flock -n -E 200 9
if (($? == 200)); then
  echo "$folder is being run by another process"
  exit 0
fi

newest() {
  ls "$folder/checkpoints" 2>/dev/null | grep -xE '[0-9]+' | sort -n | tail -n 1
}

# How often in a row, with this time, it was stopped without a new checkpoint.
stalls() {
  if [[ $(newest) == "$step" ]]; then
    echo "$(($(cat "$folder.stalls" 2>/dev/null || echo 0) + 1))"
  else
    echo 0
  fi
}

fail() {
  printf '%s\n%s\n' "$1" "${command[*]@Q}" >"$folder.failed"
}

# USR1 is the notice that time is nearly up. TERM comes when SLURM ends the
# task: by scancel, which is not to be undone, or for another job, and then
# SLURM queues it again itself.
child='' early='' ended='' waiting=1
forward() {
  waiting=1
  if [[ $child ]]; then kill -TERM "$child" 2>/dev/null; else early=1; fi
}
trap forward USR1
trap 'ended=1; forward' TERM

step=$(newest)
rm -f "$folder.failed"
printf '== %s, %s, task %s: %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$(hostname)" \
  "${SLURM_ARRAY_JOB_ID-}_$SLURM_ARRAY_TASK_ID" "${command[*]@Q}" >&9
"${command[@]}" </dev/null >&9 2>&1 &
child=$!
if [[ $early ]]; then kill -TERM "$child"; fi
# A signal ends `wait` before the run has ended.
while ((waiting)); do
  waiting=0
  wait "$child"
  status=$?
done

if [[ -e $folder/results.json ]]; then
  rm -f "$folder.stalls"
  exit 0
elif [[ $ended ]]; then
  exit "$status"
fi
case $status in
  # Stopped and saved; 143 is a run that was stopped before it could say so.
  75 | 130 | 143)
    count=$(stalls)
    echo "$count" >"$folder.stalls"
    if ((count > 3)); then
      rm -f "$folder.stalls"
      fail "exit code $status, $count times without a new checkpoint"
    else
      # Not $SLURM_JOB_ID: for one task of an array that is the whole array's.
      scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    fi
    ;;
  0) fail 'ended without results.json' && status=1 ;;
  69) echo "$folder is being run by another process" ;;
  *) fail "exit code $status" ;;
esac
exit "$status"
