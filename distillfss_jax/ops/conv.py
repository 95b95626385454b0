"""Convolutions: the plain one, and one over an upsampled image without it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distillfss_jax.ops import resize

Array = jax.Array


def conv2d(
  x: Array, kernel: Array, *, stride: int = 1, padding: int | None = None
) -> Array:
  """Convolves [..., h, w, c] with a [k, k, c, c'] kernel, padding with zeros.

  `padding` is the same on all four sides, as in PyTorch; by default half the
  kernel, which keeps the size at stride 1.
  """
  size = kernel.shape[0]
  padding = size // 2 if padding is None else padding
  if (size, stride, padding) == (1, 1, 0):
    return x @ kernel[0, 0]  # a matrix product over all pixels
  flat = x.reshape(-1, *x.shape[-3:])
  if jax.default_backend() == 'cpu':
    y = _conv_for_cpu(flat, kernel, stride, padding)
  else:
    y = _conv(flat, kernel, stride, ((padding, padding),) * 2)
  return y.reshape(*x.shape[:-3], *y.shape[1:])


def _conv(x, kernel, stride, pads):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    pads,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_for_cpu(x, kernel, stride, padding):
  """A convolution whose gradients are fast on a CPU, in loops too.

  XLA's own gradient convolutions are up to forty times slower than the forward
  one inside a loop. As matrix products and a forward convolution they run at
  the machine's rate everywhere.
  """
  return _conv(x, kernel, stride, ((padding, padding),) * 2)


def _conv_for_cpu_fwd(x, kernel, stride, padding):
  return _conv_for_cpu(x, kernel, stride, padding), (x, kernel)


def _conv_for_cpu_bwd(stride, padding, residuals, dy):
  x, kernel = residuals
  size, _, c, d = kernel.shape
  # To x: dy, spread out, convolved with the turned kernel. The barrier keeps
  # XLA from folding the turn into the convolution, which would be slow.
  turned = jax.lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
  pads = []
  for n, m in zip(x.shape[1:3], dy.shape[1:3], strict=True):
    low = size - 1 - padding
    pads.append((low, n + size - 2 - low - (m - 1) * stride))
  gap = (0, 0, stride - 1)
  spread = jax.lax.pad(
    dy, jnp.zeros((), dy.dtype), ((0, 0, 0), gap, gap, (0, 0, 0))
  )
  dx = _conv(spread, turned, 1, pads)
  if stride == 1 and 2 * padding == size - 1 and (d < c or c >= 1024):
    # One product with all shifts of the narrower side next to each other.
    shifts = _shifts(dy, size, 1, padding, dy.shape[1:3])
    wide = jnp.concatenate(shifts[::-1], -1)
    dk = x.reshape(-1, c).T @ wide.reshape(-1, size * size * d)
    return dx, dk.reshape(c, size, size, d).transpose(1, 2, 0, 3)
  flat = dy.reshape(-1, d)
  shifts = _shifts(x, size, stride, padding, dy.shape[1:3])
  dk = jnp.stack([shift.reshape(-1, c).T @ flat for shift in shifts])
  return dx, dk.reshape(kernel.shape)


_conv_for_cpu.defvjp(_conv_for_cpu_fwd, _conv_for_cpu_bwd)


def _shifts(x, size, stride, padding, out):
  """What each tap of a kernel reads of x, row by row: size**2 arrays."""
  x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  rows, cols = ((n - 1) * stride + 1 for n in out)
  return [
    x[:, i : i + rows : stride, j : j + cols : stride]
    for i in range(size)
    for j in range(size)
  ]


def conv_of_upsampled(
  x: Array, kernel: Array, sizes: Sequence[tuple[int, int]]
) -> Array:
  """Equals resizing x to `sizes` in turn, then conv2d, for much less work.

  Bilinear upsampling acts on pixels and a convolution's tap on channels, so
  the two commute: every tap is a matrix product at the low resolution, and the
  nine results are interpolated into their shifted places and summed. From
  640 to 128 channels at twice the size that is a third of the multiplications,
  and the kernel's gradient becomes a matrix product too.

  Args:
    x: [b, h, w, c].
    kernel: [3, 3, c, c'].
    sizes: (H, W) after each bilinear resize (corners aligned).

  Returns:
    [b, H, W, c'].
  """
  b, h, w, c = x.shape
  up_h = _shifted_resizes(h, [size[0] for size in sizes]).astype(x.dtype)
  up_w = _shifted_resizes(w, [size[1] for size in sizes]).astype(x.dtype)
  taps = x @ kernel.transpose(2, 0, 1, 3).reshape(c, -1)
  taps = taps.reshape(b, h, w, 3, 3, -1)
  taps = jnp.einsum('vXx,byxuvc->byuXc', up_w, taps)
  return jnp.einsum('uYy,byuXc->bYXc', up_h, taps)


def _shifted_resizes(n: int, sizes: Sequence[int]) -> Array:
  """[3, N, n]: row i of tap t reads resized pixel i + t - 1, zero outside."""
  matrix = np.eye(n, dtype=np.float32)
  for size in sizes:
    matrix = resize.matrix(matrix.shape[0], size, align_corners=True) @ matrix
  padded = np.pad(matrix, ((1, 1), (0, 0)))
  return jnp.asarray(np.stack([padded[:-2], matrix, padded[2:]]))
