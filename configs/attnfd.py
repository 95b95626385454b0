"""AttnFD and the distillers it is compared with, on DeepLabv3+ (2403.05451).

    python -m distillfss_jax.main --config configs/attnfd.py:data=synthetic,teacher=runs/teacher

The teacher is a run of configs/deeplab.py, or a file of the original. Arguments
after the colon: data=pascal|cityscapes|camvid|synthetic, teacher=<run or file>,
distiller=attnfd|none|kd|overhaul|dist|cirkd|ad|sp|ickd|aicsd|lad,
backbone=resnet18|mobilenet_v2|lite0 of the student, teacher_backbone=resnet101|
resnet18|lite0, recipe=released|repaired, train=voc|aug (1464 images of
pascal, or 10582 with SBD), select=validation|test (what checkpoints are chosen
on; the originals do it on test images), seed=N, smoke.

released is what the code does: in the first epoch only the connectors learn,
and then only the student; attention to channels never does; the teacher's norms
go by the batch and its dropout acts; lengths are those of a whole batch.
repaired is ours: all learns together, a teacher as it was tested, each image by
itself, cross-entropy without the second division.
"""  # noqa: E501

import itertools

from configs import common

DISTILLERS = (
  'attnfd', 'none', 'kd', 'overhaul', 'dist', 'cirkd', 'ad', 'sp', 'ickd',
  'aicsd', 'lad',
)  # fmt: skip


def get_config(arg=None):
  """The released settings; see the module's docstring for `arg`."""
  arg = common.parse(
    arg,
    **common.DENSE,
    distiller=DISTILLERS,
    teacher=str,
    backbone=('resnet18', 'mobilenet_v2', 'lite0'),
    teacher_backbone=('resnet101', 'resnet18', 'lite0'),
    recipe=('released', 'repaired'),
  )
  released = arg.recipe == 'released'
  config = common.segmentation(common.base())
  config.name = 'attnfd'
  attention = 'learned' if arg.distiller == 'attnfd' else 'none'
  common.deeplab(config.model, arg.backbone, attention=attention)
  # Of these the original trains the connectors first, and then the student.
  first = released and arg.distiller in ('attnfd', 'overhaul')
  common.of_streets(config, arg, begin='1 epochs' if first else '')
  if arg.distiller != 'none':
    _taught(config, arg, attention, released)
  if not released:
    common.undivided(config, arg)
  if arg.data == 'synthetic':
    common.small_deeplab(config.model, arg.backbone)
    if arg.distiller != 'none':
      common.small_deeplab(config.teacher, arg.teacher_backbone)
    config.epochs = 8.0
    if arg.distiller == 'cirkd':
      config.distiller.fields.update(queued_pixels=512, queued_regions=128)
  return common.dense_done(config, arg)


def _taught(config, arg, attention, released):
  """Sets a teacher and a distiller."""
  common.deeplab(config.teacher, arg.teacher_backbone, attention=attention)
  config.teacher.init = arg.teacher
  common.distiller(config, arg.distiller)
  # Parity: with a teacher, nothing is dropped after ASPP.
  config.model.fields.dropout = (0.0, 0.5, 0.1)
  config.teacher.fields.dropout = (0.0, 0.5, 0.1)
  if arg.distiller in ('attnfd', 'overhaul', 'lad', 'cirkd'):
    # Parity: AttnFD's connectors stand still after the first epoch; Overhaul's
    # go on at ten times the rate, and here have it in the first, too.
    stops = released and arg.distiller == 'attnfd'
    factor = 1.0 if arg.distiller == 'attnfd' else 10.0
    end = '1 epochs' if stops else ''
    config.optim.groups = (
      ('distiller/.*', factor, None, '0' if end else '', end),
      *config.optim.groups,
    )
  if released and arg.distiller in ('attnfd', 'overhaul'):
    config.teacher.statistics, config.teacher.noise = 'batch', True
  if arg.distiller == 'attnfd':
    config.distiller.fields.norm = 'batch' if released else 'sample'
    if released:
      config.optim.trainable = ('convolutions', 'distiller/.*')
  elif arg.distiller in ('cirkd', 'aicsd'):
    config.distiller.fields.released = released


def sweep():
  """The rows of AttnFD's and AICSD's tables, three seeds each."""
  for distiller, seed in itertools.product(DISTILLERS, range(3)):
    yield {'distiller': distiller, 'seed': seed}
