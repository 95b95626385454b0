"""Dropout masks from a counter, cheap enough to make twice.

A random bit costs as much as the arithmetic around it when it comes from a
cryptographic stream: drawing the dropout mask of one attention map with
threefry takes eight times as long as the map itself. A mixed counter is enough
for dropout, fuses into the arithmetic that uses it, and can be made again in
the backward pass instead of being stored.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def mix(x: Array) -> Array:
  """Scrambles uint32: every input bit reaches every output bit (murmur3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def seed_of(key: Array) -> Array:
  """A uint32 seed from a JAX key (or one per key of a batch)."""
  data = jax.random.key_data(key)
  return mix(mix(data[..., 0]) ^ data[..., 1])


def fold(seed: Array, value) -> Array:
  """Another seed, from a seed and an integer; both may be arrays."""
  return mix(
    seed ^ mix(jnp.asarray(value, jnp.uint32) + jnp.uint32(0x9E3779B9))
  )


def keep(seed: Array, counter: Array, rate: float) -> Array:
  """What inverted dropout multiplies by: 0 with chance `rate`, else 1/(1-rate).

  `counter` is uint32, distinct for each element under one seed.
  """
  bits = mix(mix(counter ^ seed) + seed)
  kept = bits >= jnp.uint32(min(int(rate * 2**32), 2**32 - 1))
  return jnp.where(kept, 1 / (1 - rate), 0.0)


def dropout(x: Array, seed: Array, rate: float) -> Array:
  """Inverted dropout of x [b, ...] with one seed [b] per episode."""
  if not rate:
    return x
  counter = jnp.arange(x[0].size, dtype=jnp.uint32).reshape(x.shape[1:])
  seeds = seed.reshape(-1, *(1,) * (x.ndim - 1))
  return x * keep(seeds, counter, rate)


def drop_channels(x: Array, seed: Array, rate: float) -> Array:
  """Inverted dropout of whole channels of x [b, h, w, c], a seed [b] each."""
  if not rate:
    return x
  counter = jnp.arange(x.shape[-1], dtype=jnp.uint32)
  kept = keep(seed.reshape(-1, 1, 1, 1), counter, rate)
  return x * kept.astype(x.dtype)
