"""DistillFSS on Pothole Mix, few shots of damaged road.

    python -m distillfss_jax.prepare --dataset pothole --raw pothole-mix
    python -m distillfss_jax.main --config configs/pothole.py:shots=5

Arguments after the colon: see `common.ARGUMENTS`.

Published test mIoU (the best of a grid, selected on the test set), 5/10/25/50
shots: DistillFSS Swin-B 17.0/17.5/14.5/32.0, ResNet-50 8.1/10.1/11.0/14.3;
TransferFSS Swin-B 17.4 (5) and 31.8 (50).
Those start from DCAMA weights trained on PASCAL (--config.model.init).
"""

from configs import common


def get_config(arg=None):
  """The paper's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg, 'pothole', steps=1000, transfer_steps=2500
  )
  return common.done(config, arg)


def sweep():
  """The grid behind the paper's row."""
  return common.grid(shots=(5, 10, 25, 50))
