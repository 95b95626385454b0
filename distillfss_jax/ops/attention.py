"""Attention whose values are masks, streamed over the support in blocks.

DCAMA (2207.08549; eq. 1-3 of DistillFSS) asks of every query token which part
of its attention falls on the support's foreground. The values are therefore
one number per support token and way, so a block of the support costs one
matrix product, an exponential and a weighted sum; the [q, k] matrix never
exists. The softmax is exact: a running maximum, normaliser and weighted sum
are carried from block to block, and the backward pass makes each block again.

One score serves any number of *selections*: a selection is the set of shots a
softmax runs over (those of a way, or of one vote of a way) with its own values.
"""

import functools

import jax
import jax.numpy as jnp

from distillfss_jax.ops import platform, random

Array = jax.Array

_NOTHING = -1e30  # running maximum before any token; finite, so that 0 * is 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
  q: Array, k: Array, values: Array, present: Array, seed: Array, rate: float
) -> Array:
  """The share of each query token's attention that falls on each selection.

  Args:
    q: [b, l, a, q, d] queries, already scaled.
    k: [b, l, a, s, t, d] keys of t tokens of s shots.
    values: [b, s, t, j] the mask each selection sees.
    present: [b, s, j] bool, the shots each softmax runs over.
    seed: [b] uint32 for the dropout of attention weights.
    rate: its rate; 0 is none.

  Returns:
    [b, l, q, j]: softmax over the tokens of the present shots, dropped out,
    times the values, averaged over heads; 0 where no shot is present.
    Differentiable in q and k only: masks are data.
  """
  out, _ = _forward(q, k, values, present, seed, rate)
  return out.mean(2)


def _attend_fwd(q, k, values, present, seed, rate):
  out, lse = _forward(q, k, values, present, seed, rate)
  return out.mean(2), (q, k, values, present, seed, out, lse)


def _attend_bwd(rate, residuals, dout):
  q, k, values, present, seed, out, lse = residuals
  dq, dk = _backward(q, k, values, present, seed, rate, out, lse, dout)
  return dq, dk, None, None, None


attend.defvjp(_attend_fwd, _attend_bwd)


def attend_memory(q: Array, k: Array, values: Array, present: Array) -> Array:
  """`attend` for a batch of queries against one memory (its b is 1).

  The queries are laid side by side, so the keys are read once for all.
  """
  b, l, a, n, d = q.shape
  if b > 1 and k.shape[0] == 1:
    q = q.transpose(1, 2, 0, 3, 4).reshape(1, l, a, b * n, d)
    out = attend(q, k, values, present, jnp.zeros(1, jnp.uint32), 0.0)
    return out.reshape(l, b, n, -1).transpose(1, 0, 2, 3)
  return attend(q, k, values, present, jnp.zeros(b, jnp.uint32), 0.0)


def _product(x: Array, y: Array) -> Array:
  """X @ y, summed in float32 whatever the inputs are."""
  return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _tiles(tokens: int) -> tuple[int, int]:
  """How much to do at once: (heads, tokens of a block).

  On a CPU one head's block should stay in the cache; an accelerator wants
  enough rows to fill it and hides the rest.
  """
  rows, want = (1, 256) if platform.on_cpu() else (16, 1152)
  fits = [i for i in range(1, tokens + 1) if tokens % i == 0 and i <= want]
  block = fits[-1]
  return rows, block if block >= want // 8 else tokens


def _map_heads(fn, q, rows, *args):
  """Maps fn over (b, l, a), `rows` of them at a time; b also picks args."""
  b, l, a = q[0].shape[:3]
  flat = [x.reshape(b * l * a, *x.shape[3:]) for x in q]
  index = jnp.arange(b * l * a)

  def one(operands):
    i, xs = operands
    return fn(i, *xs, *(x[i // (l * a)] for x in args))

  # A batch of one would keep an axis of one, for which XLA copies all keys.
  batch = min(rows, b * l * a) if rows > 1 else None
  out = jax.lax.map(one, (index, flat), batch_size=batch)
  return jax.tree.map(lambda x: x.reshape(b, l, a, *x.shape[1:]), out)


def _blocks(k, values, present, block):
  """Cuts one head's keys [s, t, d] and its masks into blocks of one shot."""
  s, t, d = k.shape
  j = values.shape[-1]
  per_shot = t // block
  return (
    k.reshape(s * per_shot, block, d),
    values.reshape(s * per_shot, block, j),
    jnp.repeat(present, per_shot, axis=0),
    jnp.arange(s * per_shot) * block,
  )


def _kept(seed, head, tokens, start, block, total, rate):
  """Dropout factors [q, block] of one head's block."""
  row = jnp.arange(tokens, dtype=jnp.uint32)[:, None] * jnp.uint32(total)
  col = jnp.uint32(start) + jnp.arange(block, dtype=jnp.uint32)
  return random.keep(random.fold(seed, head), row + col, rate)


def _forward(q, k, values, present, seed, rate):
  rows, block = _tiles(k.shape[-2])
  heads = q.shape[1] * q.shape[2]
  total = k.shape[3] * k.shape[4]

  def head(i, q, k, values, present, seed):
    tokens, j = q.shape[0], values.shape[-1]

    def step(carry, xs):
      top, norm, acc = carry
      k, v, here, start = xs
      scores = _product(q, k.T)
      peak = scores.max(-1, keepdims=True)
      p = jnp.exp(scores - peak)
      if rate:
        mass = p.sum(-1, keepdims=True)
        p = p * _kept(seed, i % heads, tokens, start, block, total, rate)
        hit = p @ v
      else:
        both = p @ jnp.concatenate([jnp.ones_like(v[:, :1]), v], -1)
        mass, hit = both[:, :1], both[:, 1:]
      new = jnp.where(here, jnp.maximum(top, peak), top)
      old_scale = jnp.exp(top - new)
      new_scale = jnp.where(here, jnp.exp(peak - new), 0)
      return (
        new,
        norm * old_scale + mass * new_scale,
        acc * old_scale + hit * new_scale,
      ), None

    start = (
      jnp.full((tokens, j), _NOTHING),
      jnp.zeros((tokens, j)),
      jnp.zeros((tokens, j)),
    )
    (top, norm, acc), _ = jax.lax.scan(
      step, start, _blocks(k, values, present, block)
    )
    some = norm > 0
    safe = jnp.where(some, norm, 1)
    # An empty softmax gets an infinite normaliser: nothing flows back.
    return acc / safe, jnp.where(some, top + jnp.log(safe), -_NOTHING)

  return _map_heads(head, (q, k), rows, values, present, seed)


def _backward(q, k, values, present, seed, rate, out, lse, dout):
  rows, block = _tiles(k.shape[-2])
  heads = q.shape[1] * q.shape[2]
  total = k.shape[3] * k.shape[4]
  # The mean over heads hands each head its share.
  dout = jnp.broadcast_to(dout[:, :, None] / q.shape[2], out.shape)

  def head(i, q, k, out, lse, dout, values, present, seed):
    tokens = q.shape[0]

    def step(dq, xs):
      k, v, here, start = xs
      scores = _product(q, k.T)
      peak = scores.max(-1, keepdims=True)
      # exp(peak - lse) <= 1 wherever the shot is part of the softmax.
      weight = jnp.where(here, jnp.exp(jnp.minimum(peak - lse, 0)) * dout, 0)
      pull = weight @ v.T
      if rate:
        pull = pull * _kept(seed, i % heads, tokens, start, block, total, rate)
      dscores = jnp.exp(scores - peak) * (
        pull - (weight * out).sum(-1, keepdims=True)
      )
      dscores = dscores.astype(q.dtype)
      return dq + _product(dscores, k), _product(dscores.T, q).astype(k.dtype)

    dq, dk = jax.lax.scan(
      step, jnp.zeros(q.shape, jnp.float32), _blocks(k, values, present, block)
    )
    return dq.astype(q.dtype), dk.reshape(k.shape)

  return _map_heads(head, (q, k, out, lse, dout), rows, values, present, seed)
