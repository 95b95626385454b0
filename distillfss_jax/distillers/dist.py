"""DIST: correlations of predictions, not their values (2205.10536).

    L = weight * (between * (1 - mean over pixels of r(p_t, p_s) over classes)
                  + within * (1 - mean over classes of r over all pixels))

r is Pearson's correlation and p are class probabilities. The second looks at
the whole batch. AttnFD's tables call it DistKD.
"""

import jax
import jax.numpy as jnp

from distillfss_jax.distillers import base
from distillfss_jax.ops import together

_FEW = 1e-8


class DIST(base.Distiller):
  """The terms 'between' and 'within' classes.

  Args:
    weight: of both.
    between: of the first.
    within: of the second.
    temperature: of the probabilities.
  """

  reads = ('logits',)

  def __init__(self, *, weight=1.0, between=1.0, within=1.0, temperature=1.0):
    self.between, self.within = weight * between, weight * within
    self.temperature = temperature

  def __call__(self, taught, learnt, labels, items, teacher):
    t, s = (
      jax.nn.softmax(x.logits / self.temperature) for x in (taught, learnt)
    )
    each = 1 - _pearson_of_pixels(t, s).mean((1, 2))
    pixels = together.count(items) * t.shape[1] * t.shape[2]

    def total(x):
      return together.total(x.sum((1, 2)), items)

    t, s = (x - total(x) / pixels for x in (t, s))
    length = jnp.sqrt(total(t * t)) * jnp.sqrt(total(s * s))
    within = 1 - (total(t * s) / (length + _FEW)).mean()
    return base.Terms(
      {
        'between': self.between * each,
        'within': self.within * base.of_batch(within, items),
      }
    )


def _pearson_of_pixels(t, s):
  """[b, h, w] of [b, h, w, c]."""
  t, s = (x - x.mean(-1, keepdims=True) for x in (t, s))
  # Equal probabilities have no direction: a root of 0 has no gradient.
  lengths = [jnp.sqrt(jnp.square(x).sum(-1) + 1e-16) for x in (t, s)]
  return (t * s).sum(-1) / (lengths[0] * lengths[1] + _FEW)


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  del teacher, student, rngs
  return DIST(**fields)
