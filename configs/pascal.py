"""DistillFSS on PASCAL VOC, few shots of the five classes of a fold.

    python -m distillfss_jax.prepare --dataset pascal --raw VOCdevkit
    python -m distillfss_jax.main --config configs/pascal.py:shots=10,fold=0

Arguments after the colon: fold=0|1|2|3, which five classes, and
`common.ARGUMENTS`. Shots are divided among the classes: a multiple of 5.

No score is published for it, and the original has no settings for either
method on it: these are those of Industrial, its other dataset of folds. The
DCAMA weights of its authors (--config.model.init) are trained on PASCAL's
folds 1 to 3, so that only the classes of fold 0 are new to them. The original
tests on images drawn from all, and counts void as background
(--config.data.args.void=False); here VOC's val is the test.
"""

from configs import common


def get_config(arg=None):
  """The settings of Industrial; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg,
    'pascal',
    steps=1000,
    shots=10,
    subsample=3,
    kind='paired',
    rule='per_class',
    known={'fold': ('0', '1', '2', '3')},
  )
  with config.unlocked():
    config.data.args.fold = int(arg.fold)
    config.data.args.augmented = True  # with SBD's training images
    config.data.args.void = True
  return common.done(config, arg)


def sweep():
  """A grid like that of the paper's tables, over all folds."""
  return common.grid(shots=(10, 25, 50), fold=(0, 1, 2, 3))
