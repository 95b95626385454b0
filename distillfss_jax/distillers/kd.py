"""KD: the teacher's class probabilities at every pixel (1503.02531).

    L = weight * T^2 * mean over pixels of KL(softmax(t / T) || softmax(s / T))

Neither AttnFD nor AICSD says which weight made their rows; 1 and T = 1 are
CIRKD's. Parity: `mean='elements'` is AICSD's, which also divides by the number
of classes; its commands multiply it by 10.
"""

from distillfss_jax.distillers import base

MEANS = ('pixels', 'elements')


class KD(base.Distiller):
  """The term 'logits'.

  Args:
    weight: of the term.
    temperature: T.
    mean: of `MEANS`.
  """

  reads = ('logits',)

  def __init__(self, *, weight=1.0, temperature=1.0, mean='pixels'):
    if mean not in MEANS:
      raise ValueError(
        f'config.distiller.fields.mean is {mean!r}; there are: '
        f'{", ".join(MEANS)}'
      )
    self.weight, self.temperature, self.mean = weight, temperature, mean

  def __call__(self, taught, learnt, labels, items, teacher):
    each = base.kl(taught.logits, learnt.logits, self.temperature)
    if self.mean == 'elements':
      each = each / taught.logits.shape[-1]
    return base.Terms({'logits': self.weight * each})


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  del teacher, student, rngs
  return KD(**fields)
