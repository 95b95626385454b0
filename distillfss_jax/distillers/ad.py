"""AD: where the teacher's features are large (attention transfer, 1612.03928).

    L = weight * mean over places of (u(a_t) - u(a_s))^2,  a = mean of f^2

over channels; u divides by the length over an image's places. Of the decoder's
map after its ReLU, as AICSD's tables have it; no weight is published: 1000 is
the first paper's.
"""

import jax.numpy as jnp
from flax import nnx

from distillfss_jax.distillers import base

FEATURE = 'decoder'


class AD(base.Distiller):
  """The term 'attention'; `weight` is its weight."""

  reads = ('features',)

  def __init__(self, teacher, student, *, weight=1000.0):
    base.check('ad', teacher, student, features=(FEATURE,))
    self.weight = weight

  def __call__(self, taught, learnt, labels, items, teacher):
    t, s = (nnx.relu(x.features[FEATURE]) for x in (taught, learnt))
    t, s = (attention(x) for x in (t, base.alike(s, t)))
    return base.Terms({'attention': self.weight * ((t - s) ** 2).mean(1)})


def attention(x):
  """[b, h w], of length 1, of maps [b, h, w, c]."""
  a = jnp.square(x.astype(jnp.float32)).mean(-1)
  return base.unit(a.reshape(a.shape[0], -1))


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  del rngs
  return AD(teacher, student, **fields)
