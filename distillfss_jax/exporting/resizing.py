"""Images of any size, resized inside a program as Pillow resizes them."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from distillfss_jax.exporting.graph import Graph, type_of

UNIT = 2**22  # into so many parts Pillow cuts the weight of a pixel


def resized(made: Graph, images: str, size: int) -> str:
  """The name of uint8 [b, size, size, 3], the bytes of Pillow's BILINEAR.

  Args:
    made: where the nodes go.
    images: name of uint8 [b, H, W, 3], of any size that only the data say.
    size: height and width of the result.
  """
  # Columns first, and whole numbers in between, as Pillow has it. Whole rows
  # are summed up: what is resized lies in front, and the other side behind it.
  for _ in range(2):
    images = made.emit('Transpose', images, perm=(2, 0, 1, 3))
    images = _resized_rows(made, images, size)
  return made.emit('Transpose', images, perm=(2, 0, 1, 3))


def _resized_rows(made, x, size):
  """The name of uint8 [size, ...] made of the rows x [n, ...] of four axes.

  Each pixel of the result is a mean weighted by a triangle, which reaches as
  far as its neighbours' middles lie, or those of the image's pixels if these
  are farther apart. As in Pillow weights are whole 2**-22, so that ties are
  broken alike, and of a pixel only those that reach it are looked at.
  """

  def node(op, *inputs, **attributes):
    names = [x if isinstance(x, str) else made.weight(x) for x in inputs]
    return made.emit(op, *names, **attributes)

  def cast(name, dtype):
    return node('Cast', name, to=type_of(dtype))

  one, half = np.float64(1), np.float64(0.5)
  n = cast(node('Shape', x, start=0, end=1), np.float64)
  step = node('Div', n, np.float64(size))
  reach = node('Max', step, one)
  middles = node('Mul', np.arange(size)[:, None] + 0.5, step)
  first = node('Floor', node('Add', node('Sub', middles, reach), half))
  first = node('Max', first, np.float64(0))
  taps = node('Add', node('Mul', node('Ceil', reach), np.float64(2)), one)
  taps = node('Range', np.float64(0), node('Squeeze', taps), one)
  places = node('Add', first, taps)  # [size, taps]
  apart = node('Abs', node('Sub', node('Add', places, half), middles))
  weights = node('Relu', node('Sub', one, node('Div', apart, reach)))
  exist = cast(node('Less', places, n), np.float64)
  weights = node('Mul', weights, exist)
  total = node('ReduceSum', weights, np.array([1]), keepdims=1)
  weights = node('Mul', node('Div', weights, total), np.float64(UNIT))
  weights = cast(node('Floor', node('Add', weights, half)), np.int32)
  places = cast(node('Min', places, node('Sub', n, one)), np.int64)
  places, weights = (
    node('Transpose', t, perm=(1, 0)) for t in (places, weights)
  )
  weights = node('Reshape', weights, np.array([0, size, 1, 1, 1]))
  shape = node('Concat', np.array([size]), node('Shape', x, start=1), axis=0)
  begin = node('Expand', np.int32(UNIT // 2), shape)  # rounds to the nearest
  body = Graph(made)
  sums = body.input('sums', np.int32, [None] * 4)
  place = body.input('place', np.int64, [size])
  weight = body.input('weight', np.int32, [size, 1, 1, 1])
  seen = body.emit('Gather', x, place, axis=0)
  seen = body.emit('Cast', seen, to=type_of(np.int32))
  seen = body.emit('Add', sums, body.emit('Mul', seen, weight))
  body.output(seen, 'sums', np.int32, [None] * 4)
  sums = made.emit('Scan', begin, places, weights, body=body, num_scan_inputs=2)
  return cast(node('Div', sums, np.int32(UNIT)), np.uint8)


def by_jax(images, size: int):
  """What `resized` makes, by a function that JAX traces for any size.

  It has to be traced with 64-bit numbers, as Pillow computes weights in them.

  Args:
    images: uint8 [b, H, W, 3]; H and W may be symbols.
    size: height and width of the result.

  Returns:
    uint8 [b, size, size, 3].
  """
  for _ in range(2):
    images = _rows_by_jax(images.transpose(2, 0, 1, 3), size)
  return images.transpose(2, 0, 1, 3)


def _rows_by_jax(x, size):
  """As `_resized_rows`; what a step needs of the weights it computes anew."""
  n = jnp.asarray(x.shape[0], jnp.float64)
  step = n / size
  reach = jnp.maximum(step, 1)
  middles = (jnp.arange(size) + 0.5) * step
  first = jnp.maximum(jnp.floor(middles - reach + 0.5), 0)
  taps = 2 * jnp.ceil(reach).astype(jnp.int32) + 1

  def weights(tap):
    places = first + tap
    apart = jnp.abs(places + 0.5 - middles)
    return jnp.maximum(1 - apart / reach, 0) * (places < n)

  def add(tap, sums):
    share = jnp.floor(weights(tap) / total * UNIT + 0.5).astype(jnp.int32)
    places = jnp.minimum(first + tap, n - 1).astype(jnp.int32)
    return sums + x[places].astype(jnp.int32) * share[:, None, None, None]

  total = lax.fori_loop(
    0, taps, lambda tap, sums: sums + weights(tap), jnp.zeros(size)
  )
  begin = jnp.full((size, *x.shape[1:]), UNIT // 2, jnp.int32)
  return (lax.fori_loop(0, taps, add, begin) // UNIT).astype(jnp.uint8)
