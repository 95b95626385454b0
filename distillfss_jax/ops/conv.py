"""Convolutions: the plain one, and one over an upsampled image without it."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from distillfss_jax.ops import platform, resize

Array = jax.Array
Padding = int | None | Literal['SAME']


def conv2d(
  x: Array,
  kernel: Array,
  *,
  stride: int = 1,
  padding: Padding = None,
  dilation: int = 1,
  groups: int = 1,
) -> Array:
  """Convolves [..., h, w, c] with a [k, k, c / groups, c'] kernel.

  Args:
    x: the maps.
    kernel: its taps; those of a group's outputs read the group's inputs.
    stride: pixels from one place of the kernel to the next.
    padding: zeros on all four sides, as in PyTorch; by default as many as keep
      the size at stride 1. 'SAME' is TensorFlow's: h' = ceil(h / stride), and
      of an odd number of zeros the one more comes last.
    dilation: pixels from one tap to the next.
    groups: into how many parts the channels are cut; c for depthwise.

  Returns:
    [..., h', w', c'].
  """
  size = kernel.shape[0]
  reach = dilation * (size - 1)
  if padding == 'SAME':
    pads = tuple(_same(n, reach, stride) for n in x.shape[-3:-1])
  else:
    padding = reach // 2 if padding is None else padding
    pads = ((padding, padding),) * 2
  if size == 1 and groups == 1 and not any(map(any, pads)):
    # A matrix product over pixels.
    return x[..., ::stride, ::stride, :] @ kernel[0, 0]
  flat = x.reshape(-1, *x.shape[-3:])
  form = (stride, pads, dilation, groups)
  if not platform.on_cpu():
    y = _conv(flat, kernel, form)
  else:
    y = _conv_for_cpu(flat, kernel, form)
  return y.reshape(*x.shape[:-3], *y.shape[1:])


def _same(n, reach, stride):
  zeros = max((-(-n // stride) - 1) * stride + reach + 1 - n, 0)
  return zeros // 2, zeros - zeros // 2


def _conv(x, kernel, form):
  stride, pads, dilation, groups = form
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    pads,
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_for_cpu(x, kernel, form):
  """A convolution whose gradients are fast on a CPU, in loops too.

  XLA's own gradient convolutions are up to forty times slower than the forward
  one inside a loop. As matrix products and a forward convolution they run at
  the machine's rate everywhere. Depthwise ones are sums of shifted products,
  a hundredth of the time of XLA's loop. Those of 3 x 3 between many channels
  are Winograd's.
  """
  stride, pads, dilation, groups = form
  size, _, c, d = kernel.shape
  if _by_winograd(x, kernel, form):
    return winograd(x, kernel)
  if not (c == 1 and d == groups):
    return _conv(x, kernel, form)
  out = [
    (n + low + high - dilation * (size - 1) - 1) // stride + 1
    for n, (low, high) in zip(x.shape[1:3], pads, strict=True)
  ]
  shifts = _shifts(x, size, form, out)
  taps = kernel.reshape(size * size, d)
  return sum(shift * tap for shift, tap in zip(shifts, taps, strict=True))


def _conv_for_cpu_fwd(x, kernel, form):
  return _conv_for_cpu(x, kernel, form), (x, kernel)


def _conv_for_cpu_bwd(form, residuals, dy):
  stride, pads, dilation, groups = form
  x, kernel = residuals
  size, _, c, d = kernel.shape  # c inputs of a group, d outputs of all
  reach = dilation * (size - 1)
  # To x: dy, spread out, convolved with the turned kernel. The barrier keeps
  # XLA from folding the turn into the convolution, which would be slow.
  turned = jnp.flip(kernel, (0, 1)).reshape(size, size, c, groups, -1)
  turned = turned.transpose(0, 1, 4, 3, 2).reshape(size, size, -1, groups * c)
  turned = jax.lax.optimization_barrier(turned)
  back = []
  for n, m, (low, _) in zip(x.shape[1:3], dy.shape[1:3], pads, strict=True):
    low = reach - low
    back.append((low, n + reach - 1 - low - (m - 1) * stride))
  gap = (0, 0, stride - 1)
  spread = jax.lax.pad(
    dy, jnp.zeros((), dy.dtype), ((0, 0, 0), gap, gap, (0, 0, 0))
  )
  dx = _conv_for_cpu(spread, turned, (1, tuple(back), dilation, groups))
  if _by_winograd(x, kernel, form):
    return dx, jax.vjp(lambda kernel: winograd(x, kernel), kernel)[1](dy)[0]
  keeps = stride == 1 and all(pad == (reach / 2,) * 2 for pad in pads)
  if groups == 1 and keeps and (d < c or c >= 1024):
    # One product with all shifts of the narrower side next to each other.
    shifts = _shifts(dy, size, form, dy.shape[1:3])
    wide = jnp.concatenate(shifts[::-1], -1)
    dk = x.reshape(-1, c).T @ wide.reshape(-1, size * size * d)
    return dx, dk.reshape(c, size, size, d).transpose(1, 2, 0, 3)
  depthwise = c == 1 and d == groups
  if depthwise and stride == 1 and dy.size >= 2**20:
    return dx, _depthwise_by_rows(x, dy, size, form).reshape(kernel.shape)
  shifts = _shifts(x, size, form, dy.shape[1:3])
  if groups == 1:
    flat = dy.reshape(-1, d)
    dk = jnp.stack([shift.reshape(-1, c).T @ flat for shift in shifts])
  elif depthwise:
    dk = jnp.stack([(shift * dy).sum((0, 1, 2)) for shift in shifts])
  else:
    parts = dy.reshape(-1, groups, d // groups)
    dk = jnp.stack(
      [
        jnp.einsum('ngc,ngd->cgd', shift.reshape(-1, groups, c), parts)
        for shift in shifts
      ]
    )
  return dx, dk.reshape(kernel.shape)


def _depthwise_by_rows(x, dy, size, form):
  """The gradient [size**2, c] of a depthwise kernel: a row of dy at a time.

  Both maps are read once, and not once for each tap: half to a third of the
  time, of maps that are larger than what a CPU's caches hold.
  """
  _, pads, dilation, _ = form
  edges = ((0, 0), *pads, (0, 0))
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(*edge, 0) for edge in edges])
  at, cols = range(0, dilation * size, dilation), dy.shape[2]

  def of(i):
    row = jax.lax.dynamic_index_in_dim(dy, i, 1, keepdims=False)
    read = jax.lax.dynamic_slice_in_dim(x, i, at[-1] + 1, 1)
    taps = [read[:, u, v : v + cols] * row for u in at for v in at]
    return jnp.stack([tap.sum((0, 1)) for tap in taps])

  return jax.lax.map(of, jnp.arange(dy.shape[1])).sum(0)


_conv_for_cpu.defvjp(_conv_for_cpu_fwd, _conv_for_cpu_bwd)


def _by_winograd(x, kernel, form):
  """Whether fewer products are worth what is added and moved for them.

  Measured on two cores, between 64 and 2048 channels and 100 and 10,000 places:
  below 128 channels what is moved decides, with few places the kernel is.
  """
  if not all(isinstance(n, int) for n in x.shape):
    return False  # an export with sizes that are free
  b, h, w, _ = x.shape
  c, d = kernel.shape[2:]
  plain = form == (1, ((1, 1), (1, 1)), 1, 1) and len(kernel) == 3
  tiles = b * -(-h // 2) * -(-w // 2)
  exact = x.dtype == kernel.dtype == jnp.float32  # bfloat16 would lose digits
  return plain and exact and min(c, d, tiles) >= 128


def winograd(x: Array, kernel: Array) -> Array:
  """A 3 x 3 convolution with 4/9 of the multiplications (1509.09308, F(2, 3)).

  Each 4 x 4 tile of x and each kernel are brought to a form in which 2 x 2
  outputs are 16 products per pair of channels, where they are 36 otherwise:
  16 matrix products over all tiles. In float32 results differ from those of
  the plain form by some millionths of the largest.

  Args:
    x: [b, h, w, c].
    kernel: [3, 3, c, c'].

  Returns:
    [b, h, w, c'], as `conv2d` gives it.
  """
  b, h, w, c = x.shape
  down, across = -(-h // 2), -(-w // 2)
  x = jnp.pad(
    x, ((0, 0), (1, 2 * down - h + 1), (1, 2 * across - w + 1), (0, 0))
  )

  def tile(x):
    return x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]

  def tap(k):
    return k[0], (k[0] + k[1] + k[2]) / 2, (k[0] - k[1] + k[2]) / 2, k[2]

  def output(y):
    return y[0] + y[1] + y[2], y[1] - y[2] - y[3]

  # The barriers keep XLA from writing each step into the sixteen that follow,
  # which takes twice as long to compile and is no faster.
  x = jax.lax.optimization_barrier(x)
  rows = tile([x[:, i : i + 2 * down : 2] for i in range(4)])
  rows = jax.lax.optimization_barrier(rows)
  made = [
    [x.reshape(-1, c) @ k for x, k in zip(xs, ks, strict=True)]
    for xs, ks in zip(
      (tile([x[:, :, j : j + 2 * across : 2] for j in range(4)]) for x in rows),
      _along_both(tap, kernel),
      strict=True,
    )
  ]
  zero = jnp.zeros((), x.dtype)
  y = sum(  # outputs 0 and 1 of each tile in turn, over rows and over columns
    jax.lax.pad(
      y.reshape(b, down, across, -1),
      zero,
      ((0, 0, 0), (i, 1 - i, 1), (j, 1 - j, 1), (0, 0, 0)),
    )
    for i, row in enumerate(_along_both(output, made))
    for j, y in enumerate(row)
  )
  return y[:, :h, :w]


def _along_both(change, rows):
  """Changes each row of arrays, and then each column of what comes of it."""
  rows = [change(row) for row in rows]
  columns = [change(column) for column in zip(*rows, strict=True)]
  return list(zip(*columns, strict=True))


def _shifts(x, size, form, out):
  """What each tap of a kernel reads of x, row by row: size**2 arrays."""
  stride, pads, dilation, _ = form
  edges = ((0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0))
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)  # also of less than 0
  rows, cols = ((n - 1) * stride + 1 for n in out)
  return [
    x[:, i : i + rows : stride, j : j + cols : stride]
    for i in range(0, dilation * size, dilation)
    for j in range(0, dilation * size, dilation)
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
