"""AttnFD: maps weighted by attention, as directions (2403.05451).

    L = weight * sum over maps of |u(S) - u(T)|^2

T is a teacher's map through its attention, S the student's through its own and
then a connector; u divides by the length.

Parity: released, `norm='batch'`, is the length of a whole batch's map, and the
sum is divided by the batch. The paper's text reads like 'channel': of each
image's channels, and their mean. 'sample' is of each image's map.
"""

import jax.numpy as jnp

from distillfss_jax.distillers import base
from distillfss_jax.ops import together

NORMS = ('batch', 'sample', 'channel')


class AttnFD(base.Distiller):
  """A term for each map.

  Args:
    teacher: the network that is imitated.
    student: the one that learns.
    weight: of the terms.
    norm: of `NORMS`, what has length 1.
    rngs: of the initialisation.
  """

  reads = ('attended',)

  def __init__(self, teacher, student, *, weight=2.0, norm='batch', rngs):
    base.check('attnfd', teacher, student, attended=True)
    if norm not in NORMS:
      raise ValueError(
        f'config.distiller.fields.norm is {norm!r}; there are: '
        f'{", ".join(NORMS)}'
      )
    both = set(teacher.attended) & set(student.attended)
    if len(both) < len(teacher.attended):
      raise ValueError(
        f'distiller attnfd: the teacher attends to '
        f'{", ".join(teacher.attended)}, the student to '
        f'{", ".join(student.attended)}'
      )
    self.weight, self.norm = weight, norm
    self.connectors = base.connectors(student.attended, teacher.attended, rngs)

  def __call__(self, taught, learnt, labels, items, teacher):
    terms = {}
    for name, t in taught.attended.items():
      s = base.alike(self.connectors[name](learnt.attended[name], items), t)
      terms[name] = self.weight * self._apart(
        t.astype(jnp.float32), s.astype(jnp.float32), items
      )
    return base.Terms(terms)

  def _apart(self, t, s, items):
    """|u(s) - u(t)|^2 [b], which is 2 - 2 cos."""
    if self.norm == 'channel':
      cosine = (base.unit(t, (1, 2)) * base.unit(s, (1, 2))).sum((1, 2))
      return (2 - 2 * cosine).mean(1)
    sums = jnp.stack(
      [(x * y).sum((1, 2, 3)) for x, y in ((t, s), (t, t), (s, s))]
    )
    if self.norm == 'sample':
      return 2 - 2 * _cosine(sums)
    sums = together.total(sums.T, items)
    apart = (2 - 2 * _cosine(sums)) / together.count(items)
    return base.of_batch(apart, items)


def _cosine(sums):
  """Of the products of both, of one with itself, and of the other."""
  both, t, s = sums
  return both / jnp.sqrt(jnp.maximum(t * s, 1e-30))


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  return AttnFD(teacher, student, rngs=rngs, **fields)
