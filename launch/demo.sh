#!/usr/bin/env bash
# Adapts, tests and shows a small model on synthetic nuclei: a few minutes.
#
#   bash launch/demo.sh                      into the folder runs/demo
#   bash launch/demo.sh --workdir runs/long --config.steps=1000
#   REQUIREMENTS=requirements-cuda.txt bash launch/demo.sh     on an NVIDIA GPU
#
# The first call installs what is needed into .venv; see setup.sh for PYTHON
# and VENV. A run that was interrupted goes on where it was; one that is finished
# only says where to look, until its folder is deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
prepare_python ${REQUIREMENTS:-requirements.txt}
exec "$python" -m distillfss_jax.main \
  --config configs/demo.py --workdir runs/demo "$@"
