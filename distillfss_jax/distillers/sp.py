"""SP: which parts of an image are alike, as AICSD compares it with.

The pair-wise term of structured distillation (1903.04197): the map of ASPP
before its ReLU is reduced to a few parts by the largest of their values, and
the cosines of all pairs of parts are imitated. No weight is published; 10 is
that paper's.
"""

import jax
import jax.numpy as jnp

from distillfss_jax.distillers import base

FEATURE = 'aspp'


class SP(base.Distiller):
  """The term 'pairs'.

  Args:
    teacher: the network that is imitated.
    student: the one that learns.
    weight: of the term.
    part: side of a part, of the map's.
  """

  reads = ('features',)

  def __init__(self, teacher, student, *, weight=10.0, part=0.5):
    base.check('sp', teacher, student, features=(FEATURE,))
    self.weight, self.part = weight, part

  def __call__(self, taught, learnt, labels, items, teacher):
    t, s = (x.features[FEATURE].astype(jnp.float32) for x in (taught, learnt))
    s = base.alike(s, t)
    window = tuple(max(int(n * self.part), 1) for n in t.shape[1:3])
    return base.Terms({'pairs': self.weight * pairs(t, s, window)})


def pairs(t, s, window):
  """Squared differences of cosines of parts, mean over pairs, [b].

  t, s [b, h, w, c]; window is the size of a part, the last ones may be smaller.
  """
  t, s = (_cosines(_largest(x, window)) for x in (t, s))
  return jnp.square(t - s).mean((1, 2))


def _largest(x, window):
  pads = [(0, -n % size) for n, size in zip(x.shape[1:3], window, strict=True)]
  shape = (1, *window, 1)
  return jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, shape, shape, ((0, 0), *pads, (0, 0))
  )


def _cosines(x):
  x = x.reshape(x.shape[0], -1, x.shape[-1])
  # Parity: no gradient through the lengths.
  length = jnp.sqrt(jnp.square(jax.lax.stop_gradient(x)).sum(-1, keepdims=True))
  x = x / (length + 1e-8)
  return jnp.einsum('bpc,bqc->bpq', x, x)


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  del rngs
  return SP(teacher, student, **fields)
