"""DistillFSS on ISIC, few shots of three kinds of skin lesions.

    python -m distillfss_jax.prepare --dataset isic --raw ISIC
    python -m distillfss_jax.main --config configs/isic.py:shots=9

Arguments after the colon: see `common.ARGUMENTS`.

Published test mIoU (the best of a grid, selected on the test set), 9/15/30/60
shots, of which the original uses 6/9/21/45 (rule per_class_reference):
DistillFSS Swin-B 13.3/16.0/19.3/23.4, ResNet-50 11.2/12.5/12.4/12.2;
TransferFSS Swin-B 14.4 (9) and 22.2 (60).
Those start from DCAMA weights trained on PASCAL (--config.model.init).
"""

from configs import common


def get_config(arg=None):
  """The paper's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg,
    'isic',
    steps=1000,
    shots=9,
    subsample=3,
    kind='paired',
    rule='per_class',
  )
  return common.done(config, arg)


def sweep():
  """The grid behind the paper's row."""
  return common.grid(shots=(9, 15, 30, 60))
