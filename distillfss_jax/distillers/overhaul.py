"""Overhaul: features before their ReLU, above a margin (1904.01866).

Six maps: of the four stages, of ASPP and of the decoder. A connector brings the
student's to the teacher's channels. What the teacher has below a margin counts
as the margin; where the teacher is negative and the student below it, too,
nothing is asked for.
"""

import jax
import jax.numpy as jnp

from distillfss_jax.distillers import base

# What the squared differences of each map are divided by.
_SHARES = {
  'stage1': 8, 'stage2': 4, 'stage3': 2, 'stage4': 1, 'aspp': 1, 'decoder': 16,
}  # fmt: skip


class Overhaul(base.Distiller):
  """A term for each map.

  Args:
    teacher: the network that is imitated.
    student: the one that learns.
    weight: of the terms, which are sums over a map.
    rngs: of the initialisation.
  """

  reads = ('features',)

  def __init__(self, teacher, student, *, weight=1e-5, rngs):
    base.check(
      'overhaul', teacher, student, features=tuple(_SHARES), normed=True
    )
    self.weight = weight
    self.connectors = base.connectors(
      *(base.channels(x, tuple(_SHARES)) for x in (student, teacher)), rngs
    )

  def __call__(self, taught, learnt, labels, items, teacher):
    terms = {}
    for name, share in _SHARES.items():
      norm = teacher.features[name][1]
      x = self.connectors[name](learnt.features[name], items)
      each = partial_l2(
        base.alike(x, taught.features[name]),
        taught.features[name],
        margins(norm.scale[...], norm.bias[...]),
      )
      terms[name] = self.weight / share * each
    return base.Terms(terms)


def margins(scale, bias):
  """The mean of what a norm's channels have below 0, [c] (equation 4)."""
  spread = jnp.maximum(jnp.abs(scale), 1e-12)
  below = jax.scipy.stats.norm.cdf(-bias / spread)
  mean = bias - spread * jnp.exp(-jnp.square(bias / spread) / 2) / (
    (2 * jnp.pi) ** 0.5 * jnp.maximum(below, 1e-12)
  )
  return jnp.where(below > 1e-3, mean, -3 * spread)


def partial_l2(learnt, taught, margin):
  """Sums of squared differences [b] of maps [b, h, w, c] (equation 3)."""
  raised = jnp.maximum(taught, margin)
  asked = (learnt > raised) | (raised > 0)
  square = jnp.square(learnt - raised)
  return jnp.where(asked, square, 0).sum((1, 2, 3))


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  return Overhaul(teacher, student, rngs=rngs, **fields)
