"""DistillFSS on CamVid, few shots of streets with 11 classes.

    python -m distillfss_jax.prepare --dataset camvid --raw CamVid
    python -m distillfss_jax.main --config configs/camvid.py:shots=11

Arguments after the colon: see `common.ARGUMENTS`; `shots` is a multiple of 11.

The paper has no such experiment: settings are those of configs/isic.py, and
there is no published score. No pixel is background, so that what the scores
count as background is only what was taken for it.
"""

from configs import common


def get_config(arg=None):
  """The settings of ISIC; see the module's docstring for `arg`."""
  config, arg = common.benchmark(
    arg,
    'camvid',
    steps=1000,
    shots=11,
    subsample=3,
    kind='paired',
    rule='per_class',
  )
  return common.done(config, arg)


def sweep():
  """A grid as the paper has them: one, two and five shots of each class."""
  return common.grid(shots=(11, 22, 55))
