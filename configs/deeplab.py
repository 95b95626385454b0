"""DeepLabv3+: AttnFD's teacher, and its student without a teacher.

    python -m distillfss_jax.main --config configs/deeplab.py:data=synthetic,backbone=resnet101 --workdir runs/teacher

Its folder is then a teacher for configs/attnfd.py. Arguments after the colon:
data=pascal|cityscapes|camvid|synthetic, backbone=resnet101|resnet18|mobilenet_v2|
lite0 (ours: EfficientNet-Lite0 with the ImageNet weights that pip brings),
attention=none|learned (maps for AttnFD beside the answer), recipe=released|
repaired, train=voc|aug (1464 images of
pascal, or 10582 with SBD), select=validation|test (what checkpoints are chosen
on; the originals do it on test images), seed=N, smoke.

The settings are AttnFD's: SGD, poly, 513 pixels, six images, the decoder at ten
times the backbone's rate, cross-entropy divided by the batch. Those of CamVid
are not published; they are VOC's. `--config.model.backbone.init` names ImageNet
weights: without them, scores of the papers are out of reach.
"""  # noqa: E501

from configs import common


def get_config(arg=None):
  """The released settings; see the module's docstring for `arg`."""
  arg = common.parse(
    arg,
    **common.DENSE,
    backbone=('resnet101', 'resnet18', 'mobilenet_v2', 'lite0'),
    attention=('none', 'learned'),
    recipe=('released', 'repaired'),
  )
  config = common.segmentation(common.base())
  config.name = 'deeplab'
  common.deeplab(config.model, arg.backbone, attention=arg.attention)
  common.of_streets(config, arg)
  if arg.recipe == 'repaired':
    common.undivided(config, arg)
  if arg.data == 'synthetic':
    common.small_deeplab(config.model, arg.backbone)
    config.epochs = 12.0
  return common.dense_done(config, arg)
