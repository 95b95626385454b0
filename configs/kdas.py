"""KDAS: a small Polyp-PVT learns from a large one (2312.08555).

    python -m distillfss_jax.main --config configs/kdas.py:data=synthetic,teacher=runs/polyp_teacher

The teacher is a run of configs/polyp_pvt.py, or a file of the original.
Arguments after the colon: data=polyp|kvasir|synthetic, teacher=<run or file>,
distiller=kdas|none|kd|dist|ickd|aicsd|lad, teacher_backbone=b2|lite0 (what the
teacher was trained with), recipe=released|repaired, guide=mse|l1 (how symmetric
maps are compared), augmented, select=validation|test (what checkpoints are
chosen on; the originals do it on test images), seed=N, smoke.

released is what the code does: the attention terms have no gradient, so that
what is learnt is 0.7 of the labels' loss and 0.3 of the symmetric maps'. In
repaired both sides attend, and the terms act. The rest is configs/polyp_pvt.py.
"""  # noqa: E501

import itertools

from configs import common

DISTILLERS = ('kdas', 'none', 'kd', 'dist', 'ickd', 'aicsd', 'lad')


def get_config(arg=None):
  """The released settings; see the module's docstring for `arg`."""
  arg = common.parse(
    arg,
    **common.POLYPS,
    distiller=DISTILLERS,
    teacher=str,
    teacher_backbone=('b2', 'lite0'),
    recipe=('released', 'repaired'),
    guide=('mse', 'l1'),
  )
  config = common.segmentation(common.base())
  config.name = 'kdas'
  common.polyp_pvt(config.model, 'b0')
  common.of_polyps(config, arg)
  if arg.distiller != 'none':
    common.polyp_pvt(config.teacher, arg.teacher_backbone)
    config.teacher.init = arg.teacher
    common.distiller(config, arg.distiller)
  if arg.distiller == 'kdas':
    config.loss.labels = 0.7
    config.distiller.fields.update(mode=arg.recipe, guide=arg.guide)
  elif arg.distiller == 'aicsd':
    config.distiller.fields.released = arg.recipe == 'released'
  if arg.data == 'synthetic':
    config.epochs, config.optim.lr = 20.0, 5e-4
  return common.dense_done(config, arg)


def sweep():
  """Every distiller that fits, three seeds each."""
  for distiller, seed in itertools.product(DISTILLERS, range(3)):
    yield {'distiller': distiller, 'seed': seed}
