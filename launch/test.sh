#!/usr/bin/env bash
# Runs the tests.
#
#   bash launch/test.sh                      all but the slow ones
#   bash launch/test.sh tests/test_ops.py -k attention     arguments of pytest
#   bash launch/test.sh -m slow
#   bash launch/test.sh --hypothesis-profile=explore tests/test_archive.py
#   REQUIREMENTS=requirements-cuda.txt bash launch/test.sh     on an NVIDIA GPU
#   REQUIREMENTS=requirements-lock-3.12.txt VENV=.venv-lock bash launch/test.sh
#
# The first call installs what is needed into .venv; see setup.sh for PYTHON
# and VENV.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
prepare_python ${REQUIREMENTS:-} requirements-dev.txt
if [[ $# == 0 ]]; then
  # Most of the time is compiling, which keeps one core busy.
  set -- -n 2 --dist loadfile --durations=15 -m 'not slow'
fi
exec "$python" -m pytest "$@"
