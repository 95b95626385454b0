"""DistillFSS on Cityscapes, few shots of streets with 19 classes.

    python -m distillfss_jax.prepare --dataset cityscapes --raw cityscapes
    python -m distillfss_jax.main --config configs/cityscapes.py:shots=19

Arguments after the colon: see `common.ARGUMENTS`; `shots` is a multiple of 19.

The paper has no such experiment: settings are those of configs/isic.py, and
there is no published score. No pixel is background, so that what the scores
count as background is only what was taken for it.
"""

from configs import common


def get_config(arg=None):
  """The settings of ISIC; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg,
    'cityscapes',
    steps=1000,
    shots=19,
    subsample=3,
    kind='paired',
    rule='per_class',
  )
  return common.done(config, arg)


def sweep():
  """A grid as the paper has them: one, two and five shots of each class."""
  return common.grid(shots=(19, 38, 95))
