#!/usr/bin/env bash
# One run on a TPU pod slice, a process for each of its machines:
#
#   TPU=my-slice ZONE=us-central2-b bash launch/tpu.sh \
#     --config configs/nucleus.py --workdir /shared/runs/nucleus
#
# Before: the project and its environment (launch/setup.sh, and
# `pip install 'jax[tpu]'`) lie in FOLDER on every machine, and --workdir on a
# file system that all of them mount. After a preemption start it again: the run
# goes on. PROJECT is gcloud's, if its default is not meant.
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
FOLDER=${FOLDER:-distillfss_jax}
TRIES=${TRIES:-10} # how often a run that was stopped is started again

command="cd ${FOLDER@Q} && exec .venv/bin/python -u -m distillfss_jax.main"
command+=" --distributed ${*@Q}"
for ((i = 0; i < TRIES; i++)); do
  status=0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" \
    ${PROJECT:+--project "$PROJECT"} --worker=all --command "$command" ||
    status=$?
  case $status in
    75 | 134 | 137 | 143) echo "stopped with $status: starting it again" >&2 ;;
    *) exit "$status" ;;
  esac
  sleep "${PAUSE:-30}"
done
exit "$status"
