"""Polyp-PVT: KDAS's teacher, and its student without a teacher (2108.06932).

    python -m distillfss_jax.main --config configs/polyp_pvt.py:data=synthetic --workdir runs/polyp_teacher

Its folder is then a teacher for configs/kdas.py. Arguments after the colon:
data=polyp|kvasir|synthetic, backbone=b2|b0 (and b1, b3 to b5) of PVTv2,
or lite0 (ours: EfficientNet-Lite0 with the ImageNet weights that pip brings),
augmented (the original's default has no augmentation), select=validation|test (what checkpoints are
chosen on; the originals do it on test images), seed=N, smoke.

The settings are the original's: AdamW at a constant rate, gradients clamped to
0.5, every batch of 16 at 256, 352 and 448 pixels, structure loss of both heads
on soft masks. `--config.model.backbone.init` names ImageNet weights.
"""  # noqa: E501

from configs import common


def get_config(arg=None):
  """The released settings; see the module's docstring for `arg`."""
  arg = common.parse(
    arg,
    **common.POLYPS,
    backbone=('b2', 'b0', 'b1', 'b3', 'b4', 'b5', 'lite0'),
  )
  config = common.segmentation(common.base())
  config.name = 'polyp_pvt'
  common.polyp_pvt(config.model, arg.backbone)
  common.of_polyps(config, arg)
  if arg.data == 'synthetic':
    config.epochs, config.optim.lr = 20.0, 5e-4
  return common.dense_done(config, arg)
