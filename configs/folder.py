"""DistillFSS on your own images: a folder of images/ and masks/.

    python -m distillfss_jax.prepare --dataset folder --raw DIR --name mine
    python -m distillfss_jax.main --config configs/folder.py:name=mine,shots=5

Arguments after the colon: name=..., and `common.ARGUMENTS`. Published weights
(--config.model.init) make the difference between a model and a demonstration.
"""

from configs import common


def get_config(arg=None):
  """What worked on the paper's datasets; see the module's docstring."""
  config, arg = common.benchmark(arg, 'folder', steps=1000, known={'name': str})
  with config.unlocked():
    config.data.args.name = arg.name
  return common.done(config, arg)
