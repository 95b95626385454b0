"""Numbers of a whole batch, whose items several devices may hold."""

from typing import Any

import jax
import jax.numpy as jnp

from distillfss_jax.types import Array, Items


def everywhere(tree: Any, items: Items) -> Any:
  """The items of all devices, in the batch's order; padding comes last."""
  if items.axis is None:
    return tree
  found, places = jax.lax.all_gather(
    (tree, items.places), items.axis, tiled=True
  )
  # Of one process they are in order; several take the items in turns.
  if places is None or jax.process_count() == 1:
    return found
  order = jnp.argsort(jnp.where(places < 0, places.size, places))
  return jax.tree.map(lambda x: x[order], found)


def total(x: Array, items: Items) -> Array:
  """The sum over the items of x [b, ...], on all devices; padding is out."""
  valid = items.valid.reshape(-1, *(1,) * (x.ndim - 1))
  found = jnp.where(valid, x, 0).sum(0)
  return found if items.axis is None else jax.lax.psum(found, items.axis)


def count(items: Items) -> Array:
  """How many items there are, on all devices; at least 1."""
  return jnp.maximum(total(jnp.ones(items.valid.shape), items), 1)


def mean_of_all(sums: Array, counts: Array, items: Items) -> Array:
  """Numbers of items whose mean over a batch is that over all its pixels.

  Args:
    sums: [b], over the pixels of each item.
    counts: [b], how many those are.
    items: of the batch.
  """
  images = total(jnp.ones_like(counts), items)
  return sums * images / jnp.maximum(total(counts, items), 1)
