"""Bilinear resizing, with both conventions of where pixels lie."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def bilinear(
  x: Array, size: tuple[int, int], *, align_corners: bool = True
) -> Array:
  """Resizes [..., h, w, c] to [..., H, W, c] bilinearly, without antialiasing.

  `align_corners` puts the first and last pixel centres of both grids on each
  other (what DCAMA's decoder does); otherwise pixels are squares that tile the
  image (what scoring does). Both are PyTorch's conventions to the digit;
  `jax.image.resize` has only the second, and smooths when it shrinks.
  """
  h, w = x.shape[-3:-1]
  if (h, w) == tuple(size):
    return x
  rows = matrix(h, size[0], align_corners=align_corners).astype(x.dtype)
  cols = matrix(w, size[1], align_corners=align_corners).astype(x.dtype)
  return jnp.einsum('Hh,Ww,...hwc->...HWc', rows, cols, x, optimize='optimal')


def matrix(n: int, size: int, *, align_corners: bool) -> np.ndarray:
  """[size, n] interpolation weights along one axis."""
  if align_corners:
    position = np.arange(size) * ((n - 1) / max(size - 1, 1))
  else:
    position = np.maximum((np.arange(size) + 0.5) * (n / size) - 0.5, 0)
  low = np.minimum(position.astype(np.int64), n - 1)
  high = np.minimum(low + 1, n - 1)
  weights = np.zeros((size, n))
  np.add.at(weights, (np.arange(size), low), 1 - (position - low))
  np.add.at(weights, (np.arange(size), high), position - low)
  return weights.astype(np.float32)


def to_canvas(x: Array, sizes: Array, canvas: tuple[int, int]) -> Array:
  """Resizes each image of a batch to its own size inside one static canvas.

  Args:
    x: [b, h, w, c].
    sizes: [b, 2] int32, the height and width wanted, at most the canvas.
    canvas: (H, W) of the result; what lies outside an image's size repeats its
      border and means nothing.

  Returns:
    [b, H, W, c], bilinear, half-pixel centres, no antialiasing.
  """

  def one(image, size):
    rows = _traced_matrix(image.shape[0], size[0], canvas[0])
    cols = _traced_matrix(image.shape[1], size[1], canvas[1])
    return jnp.einsum('Hh,Ww,hwc->HWc', rows, cols, image, optimize='optimal')

  return jax.vmap(one)(x, sizes)


def _traced_matrix(n: int, size: Array, canvas: int) -> Array:
  """[canvas, n] weights whose first `size` rows resize n pixels to `size`."""
  position = (jnp.arange(canvas) + 0.5) * (n / size) - 0.5
  position = jnp.clip(position, 0, n - 1)
  return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(n)))
