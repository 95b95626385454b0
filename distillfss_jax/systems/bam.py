"""BAM's own training (2203.07615): what not to segment, learnt from episodes.

The released settings; see `models/bam.py` for the method.
"""

from distillfss_jax import models
from distillfss_jax.systems import meta


class BAM(meta.MetaSystem):
  """See `MetaSystem`."""


def build(config, ways, rngs):
  """The system of a config, with a model of its own."""
  return BAM(models.build(config.model, config.data.image_size, rngs), ways)
