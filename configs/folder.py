"""Your own images: a folder of images/ and masks/.

    python -m distillfss_jax.prepare --dataset folder --raw DIR --name mine
    python -m distillfss_jax.main --config configs/folder.py:name=mine,shots=5

Arguments after the colon: name=..., shots=5, seed=0, smoke, and the recipe:

    recipe=ours   a small model on a pretrained backbone, by views (minutes)
    recipe=unet   what else one would take: a U-Net, all of it trained
    recipe=paper  DistillFSS; takes method, backbone and student too. Published
                  weights (--config.model.init) make the difference between a
                  model and a demonstration.

    unlabelled=DIR  a folder of more images, which ours and unet learn from, too
"""

from configs import common


def get_config(arg=None):
  """See the module's docstring."""
  config, arg = common.benchmark(
    arg,
    'folder',
    steps=1000,
    recipes=('ours', 'unet', 'paper'),
    known={'name': str},
  )
  with config.unlocked():
    config.data.args.name = arg.name
  return common.done(config, arg)
