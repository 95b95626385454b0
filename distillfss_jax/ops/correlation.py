"""What a query's places have in common with a support's, block by block.

At 473 pixels a query and a shot have 3600 places each, at 633 pixels 6400; a
matrix of both, for every shot and head, is what the originals run out of memory
with. Here the support comes in blocks, and no such matrix exists, forwards or
backwards.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

_BLOCK = 1024  # support places at once


def best_cosine(query: Array, support: Array) -> Array:
  """The largest cosine of each query place with any support place.

  PFENet's prior mask (2008.01449), of a support that is zero outside
  its mask: a place there has cosine 0.

  Args:
    query: [q, c].
    support: [k, c].

  Returns:
    [q] float32. Its gradient flows through the pair that is largest.
  """
  pairs = _best(*map(jax.lax.stop_gradient, (query, support)))
  best = support[pairs]
  dot = jnp.einsum('qc,qc->q', query, best, preferred_element_type=jnp.float32)
  return dot / (_norm(query) * _norm(best) + 1e-7)


def _best(query, support):
  """[q] int32: which support place has the largest cosine."""
  blocks, here = _blocks(support)
  size = blocks.shape[1]
  lengths = _norm(query)[:, None]

  def step(carry, xs):
    top, pick = carry
    start, keys, here = xs
    cosine = jnp.matmul(query, keys.T, preferred_element_type=jnp.float32)
    cosine = cosine / (lengths * _norm(keys) + 1e-7)
    cosine = jnp.where(here, cosine, -jnp.inf)
    peak = cosine.max(-1)
    place = start + cosine.argmax(-1).astype(jnp.int32)
    return (
      jnp.maximum(top, peak),
      jnp.where(peak > top, place, pick),
    ), None

  start = (
    jnp.full(query.shape[0], -jnp.inf),
    jnp.zeros(query.shape[0], jnp.int32),
  )
  starts = jnp.arange(len(blocks), dtype=jnp.int32) * size
  (_, pick), _ = jax.lax.scan(step, start, (starts, blocks, here))
  return pick


def match(query: Array, keys: Array, values: Array, mask: Array) -> Array:
  """Every support place hands out its value over the query's places.

  HDMNet's matching (2303.14652): a softmax over the *query* for each support
  place, so that each foreground place gives exactly one value away.

  Args:
    query: [a, q, d], scaled.
    keys: [a, k, d].
    values: [a, k, d'].
    mask: [k] in {0, 1}; a place outside it gives nothing.

  Returns:
    [a, q, d'].
  """
  keys, values, mask = (
    _blocks(jnp.moveaxis(x, -2, 0))[0]
    for x in (keys, values, jnp.broadcast_to(mask[:, None], (mask.size, 1)))
  )

  # Made again in the backward pass, instead of kept for all blocks.
  @jax.checkpoint
  def given(query, k, v, m):
    logits = jnp.einsum(
      'aqd,kad->aqk', query, k, preferred_element_type=jnp.float32
    )
    share = jax.nn.softmax(logits, axis=1) * m[:, 0]
    return jnp.einsum('aqk,kae->aqe', share.astype(v.dtype), v)

  def step(total, xs):
    return total + given(query, *xs), None

  start = jnp.zeros((*query.shape[:2], values.shape[-1]), values.dtype)
  total, _ = jax.lax.scan(step, start, (keys, values, mask))
  return total


def alike_mean(x: Array, chosen: Array) -> Array:
  """What the chosen places say of each place: their mean by likeness.

  SSP's adaptive self-support prototypes (2207.11549): a softmax over the
  chosen places of twice the cosine. Places come in blocks, so that no matrix
  of all pairs exists, forwards or backwards.

  Args:
    x: [a, p, c].
    chosen: [a, j, p] bool, of each of j choices; some place of each is chosen.

  Returns:
    [a, j, p, c] float32.
  """
  values = x.astype(jnp.float32)
  units = values / _length(values)
  blocks, _ = _blocks(jnp.moveaxis(units, 1, 0))

  @jax.checkpoint
  def of_block(block):  # [m, a, c]
    cosine = jnp.einsum('mac,apc->amp', block, units)
    odds = jnp.where(chosen[:, :, None], 2 * cosine[:, None], -jnp.inf)
    return jnp.einsum('ajmp,apc->majc', jax.nn.softmax(odds), values)

  found = jax.lax.map(of_block, blocks)
  found = found.reshape(-1, *found.shape[2:])[: x.shape[1]]
  return jnp.moveaxis(found, 0, 2)


def cosine(x: Array, y: Array) -> Array:
  """Cosines of vectors [..., c] that broadcast, in float32; 0 of a zero."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return (x * y).sum(-1) / (_length(x) * _length(y))[..., 0]


def _length(x):
  """Lengths [..., 1], at least 1e-8, with a gradient even at zero."""
  return jnp.maximum(_norm(x), 1e-8)[..., None]


def _blocks(x):
  """[k, ...] in blocks [n, m, ...] filled up with zeros; what is there."""
  size = min(_BLOCK, x.shape[0])
  count = -(-x.shape[0] // size)
  size = -(-x.shape[0] // count)  # as equal as can be
  short = count * size - x.shape[0]
  x = jnp.pad(x, ((0, short), *((0, 0),) * (x.ndim - 1)))
  here = jnp.arange(count * size) < count * size - short
  return x.reshape(count, size, *x.shape[1:]), here.reshape(count, size)


def _norm(x):
  """Lengths of vectors [..., c] in float32; that of zero has no gradient."""
  square = jnp.square(x.astype(jnp.float32)).sum(-1)
  some = square > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
