"""DistillFSS on lung nodules in CT, few shots.

    python -m distillfss_jax.prepare --dataset lung --raw lungcancer
    python -m distillfss_jax.main --config configs/lung.py:shots=5

Arguments after the colon: see `common.ARGUMENTS`.

Published test mIoU (the best of a grid, selected on the test set), 5/10/25/50
shots: DistillFSS Swin-B 3.3/3.5/3.4/4.9, ResNet-50 8.9/11.7/16.6/20.0;
TransferFSS Swin-B 3.4 (5) and 2.5 (50).
Those start from DCAMA weights trained on PASCAL (--config.model.init).
"""

from configs import common


def get_config(arg=None):
  """The paper's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(arg, 'lung', steps=200, transfer_steps=250)
  return common.done(config, arg)


def sweep():
  """The grid behind the paper's row."""
  return common.grid(shots=(5, 10, 25, 50))
