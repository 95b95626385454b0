"""From one binary answer per way, or per vote of a way, to one label map.

Methods are binary: they answer one way at a time. What lies around them is
here: which shots each answer may look at, and how the answers become logits.
"""

import jax.numpy as jnp
from jax import Array

ABSENT = -1e9  # logit of a way without a shot; finite: it is resized and summed


def selections(present: Array, voting: int | None) -> Array:
  """The shots each vote of each way looks at.

  Args:
    present: [b, s, n] bool.
    voting: shots of a vote; None for all of them in one.

  Returns:
    [b, s, n, v] bool. The shots of a way, in order, fall into consecutive
    chunks of `voting`; the last may be shorter, and empty ones have no shot.
  """
  shots = present.shape[1]
  if not voting or shots <= voting:
    return present[..., None]
  votes = -(-shots // voting)
  rank = jnp.cumsum(present, axis=1) - 1
  chunk = rank // voting
  return present[..., None] & (chunk[..., None] == jnp.arange(votes))


def vote(logits: Array, some: Array) -> Array:
  """Takes each pixel's answer from the vote surest of foreground.

  Args:
    logits: [b, n, v, H, W, 2].
    some: [b, n, v] bool, whether the vote has a shot.

  Returns:
    [b, n, H, W, 2], both channels from the chosen vote.
  """
  if logits.shape[2] == 1:
    return logits[:, :, 0]
  sure = jnp.where(some[..., None, None], logits[..., 1], ABSENT)
  best = sure.argmax(2)[:, :, None, ..., None]
  return jnp.take_along_axis(logits, best, axis=2)[:, :, 0]


def merge(logits: Array, some: Array) -> Array:
  """Merges binary answers: each pixel's background is its best way's.

  Args:
    logits: [b, n, H, W, 2], background and foreground of each way.
    some: [b, n] bool, whether the way has a shot.

  Returns:
    [b, H, W, 1+n]. A way without a shot gets `ABSENT`. With c the way of the
    largest foreground logit, the prediction is c where that exceeds c's own
    background logit.
  """
  # Parity: the original writes -inf here and resizes it, which gives NaN
  # wherever an interpolation weight is 0. A finite value predicts the same.
  foreground = jnp.where(some[..., None, None], logits[..., 1], ABSENT)
  background = jnp.where(some[..., None, None], logits[..., 0], ABSENT)
  best = foreground.argmax(1, keepdims=True)
  background = jnp.take_along_axis(background, best, axis=1)
  return jnp.moveaxis(jnp.concatenate([background, foreground], 1), 1, -1)
