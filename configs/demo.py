"""A few minutes on a laptop: synthetic nuclei, a small backbone, all the steps.

    python -m distillfss_jax.main --config configs/demo.py

Data are drawn from a seed, the backbone's weights came with the requirements,
and nothing is downloaded. `:smoke` takes seconds.
"""

from configs import common


def get_config(arg=None):
  """A small DistillFSS run; see the module's docstring for `arg`."""
  arg = common.parse(arg, smoke=False)
  config = common.get_config()
  common.drawn(config)
  config.name = 'demo'
  config.student = 'light'
  config.support.shots = 40
  config.model.backbone.name = config.model.backbone.init = 'lite0'
  # What counts for a backbone that learns, too, is the number of steps, so a
  # step is one random episode instead of all 40.
  config.episodes.kind = 'random'
  config.episodes.draws = 1
  config.loss.scale = 'mean'
  config.optim.schedule = 'cosine'
  config.steps = 600
  config.log_every = 50
  config.checkpoint_every = 200
  config.eval.batch_size = 8
  config.eval.untrained = True
  config.eval.brightness = True
  return common.smoke(config) if arg.smoke else config
