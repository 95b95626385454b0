"""KDAS: attention of rows, and symmetric maps (2312.08555).

Of a teacher and a student with two binary heads, whose logits M [H, W] are read
as H tokens of W numbers:

    attend(M) = softmax over columns of (M M^T / sqrt(W)) M / T
    sym(M)    = M + M^T
    L = weight * (T^2 * (KL of both heads) + mean (sym(S1) - sym(T1))^2)

Parity, `mode='released'`: the student's side of KL is a softmax over an axis of
one, which is 1: the KL terms move nothing, and are NaN as soon as the teacher's
attention is negative. What is left of the loss is the last term. They are in
the log, of the attention's amount, for what they are. `mode='repaired'` is ours
(the published formulas are not to be had): both sides attend, and KL compares
distributions over all places of a head.
"""

import jax
import jax.numpy as jnp

from distillfss_jax.distillers import base

MODES, GUIDES = ('released', 'repaired'), ('mse', 'l1')


class KDAS(base.Distiller):
  """The terms 'symmetric' and, repaired, 'attention'.

  Args:
    teacher: the network that is imitated.
    student: the one that learns.
    weight: of the terms (alpha); the labels have the rest.
    temperature: T.
    mode: of `MODES`.
    guide: of `GUIDES`, how symmetric maps are compared.
  """

  reads = ('sides',)

  def __init__(
    self,
    teacher,
    student,
    *,
    weight=0.3,
    temperature=2.0,
    mode='released',
    guide='mse',
  ):
    base.check('kdas', teacher, student, heads=2)
    for key, value, known in (('mode', mode, MODES), ('guide', guide, GUIDES)):
      if value not in known:
        raise ValueError(
          f'config.distiller.fields.{key} is {value!r}; there are: '
          f'{", ".join(known)}'
        )
    self.weight, self.temperature = weight, temperature
    self.mode, self.guide = mode, guide

  def __call__(self, taught, learnt, labels, items, teacher):
    t, s = taught.sides, learnt.sides
    if t.shape[1] != t.shape[2]:
      raise ValueError(
        f'distiller kdas adds a map to its transpose: images must be square, '
        f'these are {t.shape[1]}x{t.shape[2]}'
      )
    apart = symmetric(s[..., 0]) - symmetric(t[..., 0])
    apart = jnp.square(apart) if self.guide == 'mse' else jnp.abs(apart)
    added, seen = {'symmetric': self.weight * apart.mean((1, 2))}, {}
    each = (self._of_head(t[..., i], s[..., i]) for i in range(2))
    found = self.temperature**2 * sum(each)
    if self.mode == 'repaired':
      added['attention'] = self.weight * found
    else:
      seen['attention_without_gradient'] = self.weight * found
    return base.Terms(added, seen)

  def _of_head(self, t, s):
    """[b] of logits [b, H, W]."""
    t = attend(t, self.temperature)
    if self.mode == 'released':
      # The axis of channels, which there is one of.
      s = jax.nn.softmax(s[..., None])[..., 0] / self.temperature
      return released_kl(jnp.abs(t), s)
    s = attend(s, self.temperature)
    t, s = (jax.nn.log_softmax(x.reshape(x.shape[0], -1)) for x in (t, s))
    return (jnp.exp(t) * (t - s)).sum(1)


def attend(x, temperature):
  """[b, H, W] logits, each row a mean of rows that are like it."""
  products = jnp.einsum('bij,bkj->bik', x, x) * x.shape[-1] ** -0.5
  weights = jax.nn.softmax(products)
  return jnp.einsum('bik,bkj->bij', weights, x) / temperature


def symmetric(x):
  """A map [b, H, H] and its transpose."""
  return x + x.swapaxes(1, 2)


def released_kl(taught, learnt):
  """Mean of t log t - t s, [b], as a library has it for log-probabilities s."""
  some = taught > 0
  log_t = jnp.log(jnp.where(some, taught, 1))
  return (taught * (log_t - learnt)).mean((1, 2))


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  del rngs
  return KDAS(teacher, student, **fields)
