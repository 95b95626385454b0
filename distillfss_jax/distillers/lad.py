"""LAD: the direction of features, not their length.

    L = weight * mean over places of (1 - cos(connect(f_s), f_t))

AttnFD's tables have a row of this name without saying what it is. It is older
than the paper whose title has these letters; the angular loss on raw features
(WACV 2024) fits, and is an inference. Of the last stage, before its activation.
"""

import jax.numpy as jnp

from distillfss_jax.distillers import base

FEATURE = 'stage4'


class LAD(base.Distiller):
  """The term 'angle'.

  Args:
    teacher: the network that is imitated.
    student: the one that learns.
    weight: of the term.
    rngs: of the initialisation.
  """

  reads = ('features',)

  def __init__(self, teacher, student, *, weight=1.0, rngs):
    base.check('lad', teacher, student, features=(FEATURE,))
    self.weight = weight
    self.connectors = base.connectors(
      *(base.channels(x, (FEATURE,)) for x in (student, teacher)), rngs
    )

  def __call__(self, taught, learnt, labels, items, teacher):
    t = taught.features[FEATURE].astype(jnp.float32)
    s = self.connectors[FEATURE](learnt.features[FEATURE], items)
    s = base.alike(s.astype(jnp.float32), t)
    cosine = (base.unit(t) * base.unit(s)).sum(-1)
    return base.Terms({'angle': self.weight * (1 - cosine.mean((1, 2)))})


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  return LAD(teacher, student, rngs=rngs, **fields)
