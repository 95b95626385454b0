"""HDMNet's own training (2303.14652): the labels teach the coarsest match.

And every match the next finer one: correlation distillation. The released
settings; see `models/hdmnet.py` for the method.
"""

from distillfss_jax import models
from distillfss_jax.ops import losses
from distillfss_jax.systems import meta


class HDMNet(meta.MetaSystem):
  """`MetaSystem`, and the distillation of its correlations (eq. 9)."""

  def more(self, coarse, labels):
    maps = [x[:, 0, ..., 0] for x in coarse.matches]
    return {'correlation': losses.hierarchical_kl(maps, labels)}


def build(config, ways, rngs):
  """The system of a config, with a model of its own."""
  model = models.build(config.model, config.data.image_size, rngs)
  return HDMNet(model, ways)
