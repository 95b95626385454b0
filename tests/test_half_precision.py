"""bfloat16 on a CPU: it runs, and stays within a distance of float32.

Eight bits of mantissa are three decimal digits, and a network's layers add
their roundings up. Distances here are of random weights, where nothing has
learnt to be robust.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bam, deeplab, ifa, nucleus, polyp_pvt
from distillfss_jax.measuring import bench

LOGITS = 0.05  # of the largest logit
LOSS = 0.02  # of the loss


class Answers(bench.Bench):
  """Keeps what each program answers, in place of its time."""

  def look(self, case, call, inputs, counted, items, kept=None, before=()):
    self.rows.append(call(*inputs))
    return self.rows[-1], {}


def answers(made, dtype):
  made = made.copy_and_resolve_references()
  made.model.dtype = dtype
  return Answers(made, '', 1, 2, 0, None)


def both(made):
  return [answers(made, dtype) for dtype in ('float32', 'bfloat16')]


def predicted(made):
  """{role: logits} of both."""
  found = both(made)
  for one in found:
    one._predict([2])
  return [{role: x.logits for role, x in one.rows[-1].items()} for one in found]


def test_teacher_and_student():
  made = nucleus.get_config('student=light,smoke')
  whole, half = predicted(made)
  assert set(whole) == {'teacher', 'student'}
  for role, x in whole.items():
    assert half[role].dtype == jnp.float32
    distance = np.abs(half[role] - x).max() / np.abs(x).max()
    assert 0 < distance < LOGITS, role


@pytest.mark.slow
@pytest.mark.parametrize(
  'kind', [bam, deeplab, ifa, polyp_pvt], ids=lambda x: x.__name__
)
def test_other_systems(kind):
  whole, half = predicted(kind.get_config('data=synthetic,smoke'))
  for role, x in whole.items():
    distance = np.abs(half[role] - x).max() / np.abs(x).max()
    assert 0 < distance < LOGITS, role


@pytest.mark.slow
def test_a_training_step():
  made = nucleus.get_config('student=light,smoke')
  made.model.fields.dropout = 0.0
  found = both(made)
  for one in found:
    one._train(one.config)
  (_, whole), (state, half) = (one.rows[-1] for one in found)
  loss, other = (float(log['loss'][0]) for log in (whole, half))
  assert other != loss
  assert other == pytest.approx(loss, rel=LOSS)
  # What is kept is not rounded.
  kept = jax.tree.leaves((state.params, state.opt_state))
  assert jnp.bfloat16 not in {x.dtype for x in kept}
