"""DistillFSS on Kvasir-SEG, few shots of polyps.

    python -m distillfss_jax.prepare --dataset kvasir --raw Kvasir-SEG
    python -m distillfss_jax.main --config configs/kvasir.py:shots=5

Arguments after the colon: see `common.ARGUMENTS`.

Published test mIoU (the best of a grid, selected on the test set), 5/10/25/50
shots: DistillFSS Swin-B 37.3/52.8/61.9/57.1, ResNet-50 29.8/42.7/44.9/46.2;
TransferFSS Swin-B 45.2 (5) and 60.0 (50).
Those start from DCAMA weights trained on PASCAL (--config.model.init).
"""

from configs import common


def get_config(arg=None):
  """The paper's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(arg, 'kvasir', steps=1000)
  return common.done(config, arg)


def sweep():
  """The grid behind the paper's row."""
  return common.grid(shots=(5, 10, 25, 50))
