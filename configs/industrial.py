"""DistillFSS on Industrial, few shots of 5 of 20 kinds of defects.

    python -m distillfss_jax.prepare --dataset industrial --raw Industrial
    python -m distillfss_jax.main --config configs/industrial.py:shots=10,fold=0

Arguments after the colon: fold=0|1|2|3, which five classes, and
`common.ARGUMENTS`.

Published test mIoU of fold 0 (the best of a grid, selected on the test set),
10/20/40/80 shots, counted otherwise than here: DistillFSS Swin-B
3.5/25.5/40.9/46.1, ResNet-50 1.6/3.5/4.4/4.8; TransferFSS Swin-B 4.1 (10) and
48.2 (80).
Those start from DCAMA weights trained on PASCAL (--config.model.init).
"""

from configs import common


def get_config(arg=None):
  """The paper's settings; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg,
    'industrial',
    steps=1000,
    shots=10,
    subsample=3,
    kind='paired',
    rule='per_class',
    known={'fold': ('0', '1', '2', '3')},
  )
  with config.unlocked():
    config.data.args.fold = int(arg.fold)
  return common.done(config, arg)


def sweep():
  """The grid behind the paper's row, over all folds."""
  return common.grid(shots=(10, 20, 40, 80), fold=(0, 1, 2, 3))
