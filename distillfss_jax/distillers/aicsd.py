"""AICSD: how far apart the maps of two classes lie (2308.04243), and KD.

A class's map becomes a distribution q over places; D [c, c] are divergences of
all pairs, its rows of length 1, and the student imitates D:

    L = weight * mean (D_t - D_s)^2 + logits * KD

Parity, `released=True`: q is a distribution over rows, for each column apart;
the divergence is sum of q_j (log q_j - q_i), for probabilities were given where
logarithms are expected; of the pairs i <= j only, mirrored; over the whole
batch, and divided by its size once more. `released=False` is the paper's: over
all places, KL(q_j || q_i) of all pairs, of each image.

Parity: the published code weights both against the labels by a share that
grows with the epochs, but it is commented out; so are both here, at the weights
of its command (9500, and 10 with KD's mean over all elements).
"""

import jax
import jax.numpy as jnp

from distillfss_jax.distillers import base
from distillfss_jax.ops import together


class AICSD(base.Distiller):
  """The terms 'classes' and 'logits'.

  Args:
    weight: of the first.
    logits: weight of KD, whose mean is over all elements.
    released: see the module's docstring.
  """

  reads = ('logits',)

  def __init__(self, *, weight=9500.0, logits=10.0, released=True):
    self.weight, self.logits, self.released = weight, logits, released

  def __call__(self, taught, learnt, labels, items, teacher):
    if self.released:
      t, s = (released_pairs(x.logits, items) for x in (taught, learnt))
      mean = jnp.square(t - s).mean() / together.count(items)
      each = base.of_batch(mean, items)
    else:
      t, s = (pairs(x.logits) for x in (taught, learnt))
      each = jnp.square(t - s).mean((1, 2))
    soft = base.kl(taught.logits, learnt.logits) / t.shape[-1]
    return base.Terms(
      {'classes': self.weight * each, 'logits': self.logits * soft}
    )


def released_pairs(logits, items):
  """[c, c] of a batch of logits [b, h, w, c]."""
  log_q = jax.nn.log_softmax(logits, 1)
  q = jnp.exp(log_q)
  own = together.total((q * log_q).sum((1, 2)), items)  # [c], of q_j
  both = together.total(jnp.einsum('bhwc,bhwd->bcd', q, q), items)
  above = jnp.triu(own[None] - both)
  return base.unit(above + jnp.triu(above, 1).T)


def pairs(logits):
  """[b, c, c] of logits [b, h, w, c]."""
  flat = logits.reshape(logits.shape[0], -1, logits.shape[-1])
  log_q = jax.nn.log_softmax(flat, 1)
  q = jnp.exp(log_q)
  own = (q * log_q).sum(1)  # [b, c], of q_j
  cross = jnp.einsum('bpj,bpi->bij', q, log_q)
  return base.unit(own[:, None] - cross)


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  del teacher, student, rngs
  return AICSD(**fields)
