"""DistillFSS on COCO-20i, few shots of 20 of 80 kinds of everyday things.

    python -m distillfss_jax.prepare --dataset coco --raw COCO2014
    python -m distillfss_jax.main --config configs/coco.py:shots=100,fold=0

Arguments after the colon: fold=0|1|2|3, which twenty classes, rule=interleaved
or contiguous, how the folds are made, and `common.ARGUMENTS`. Shots are shared
among the classes: a multiple of 20, at least 40 to have pairs of each.

No score was published: the paper adapts to none of these folds. Weights from
episodes on COCO (--config.model.init) were held back from the classes of their
own fold alone: take the one that they name, by the same rule.
"""

from configs import common


def get_config(arg=None):
  """The settings of Industrial, also 20 classes; see the module's docstring."""
  config, arg = common.benchmark(
    arg,
    'coco',
    steps=1000,
    shots=100,
    subsample=3,
    kind='paired',
    rule='per_class',
    known={
      'fold': ('0', '1', '2', '3'),
      'rule': ('interleaved', 'contiguous'),
    },
  )
  with config.unlocked():
    config.data.args.fold = int(arg.fold)
    config.data.args.rule = arg.rule
  return common.done(config, arg)


def sweep():
  """Both systems on all folds, with 2, 5 and 10 shots of each class."""
  return common.grid(shots=(40, 100, 200), fold=(0, 1, 2, 3))
