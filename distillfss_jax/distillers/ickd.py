"""ICKD: how maps of two classes overlap (2103.14475, as AICSD has it).

    L = weight * sum of (u(G_t) - u(G_s))^2 / classes

G [c, c] are products of the classes' logits over an image, u makes its rows of
length 1. No weight is published; 1 here.
"""

import jax.numpy as jnp

from distillfss_jax.distillers import base


class ICKD(base.Distiller):
  """The term 'classes'; `weight` is its weight."""

  reads = ('logits',)

  def __init__(self, *, weight=1.0):
    self.weight = weight

  def __call__(self, taught, learnt, labels, items, teacher):
    t, s = (grams(x.logits) for x in (taught, learnt))
    each = jnp.square(t - s).sum((1, 2)) / t.shape[-1]
    return base.Terms({'classes': self.weight * each})


def grams(logits):
  """[b, c, c], rows of length 1, of logits [b, h, w, c]."""
  return base.unit(jnp.einsum('bhwc,bhwd->bcd', logits, logits))


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  del teacher, student, rngs
  return ICKD(**fields)
