"""Layers that backbones and models share, and how their parameters start.

Everything computes in the dtype of its input; sums of norms are float32.
Channels are last. An initialiser is called with the random streams, a shape,
and how many inputs and outputs one number of the layer's result has.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax.ops import conv
from distillfss_jax.params import Rules
from distillfss_jax.types import Array

Initialiser = Callable[..., Array]


def _drawn(draw: Callable, rngs, shape) -> Array:
  """Random numbers of a shape, by programs for a few lengths.

  A generator takes longer to compile than to run, and a model has a hundred
  shapes. A number depends on the key and on its place alone: those of a shape
  are the first of a longer row.

  Args:
    draw: key, shape -> numbers, of `jax.random`.
    rngs: the random streams.
    shape: of the result.
  """
  count = math.prod(shape)
  length = 1 << max(10, (count - 1).bit_length())
  return draw(rngs.params(), (length,))[:count].reshape(shape)


def _within(bound, rngs, shape):
  def draw(key, shape):
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

  return _drawn(draw, rngs, shape)


def uniform(rngs, shape, fan_in: int, fan_out: int = 0) -> Array:
  """PyTorch's default of weights and biases: within 1 / sqrt(fan-in)."""
  del fan_out
  return _within(fan_in**-0.5, rngs, shape)


def xavier(rngs, shape, fan_in: int, fan_out: int) -> Array:
  """Uniform, of variance 2 / (fan-in + fan-out) (Glorot and Bengio 2010)."""
  return _within((6 / (fan_in + fan_out)) ** 0.5, rngs, shape)


def he_fan_in(rngs, shape, fan_in: int, fan_out: int = 0) -> Array:
  """Normal, of variance 2 / fan-in (He et al. 2015)."""
  del fan_out
  return _drawn(jax.random.normal, rngs, shape) * (2 / fan_in) ** 0.5


def he_fan_out(rngs, shape, fan_in: int, fan_out: int) -> Array:
  """Normal, of variance 2 / fan-out, as torchvision starts convolutions."""
  del fan_in
  return _drawn(jax.random.normal, rngs, shape) * (2 / fan_out) ** 0.5


def normal(rngs, shape, fan_in: int = 0, fan_out: int = 0) -> Array:
  """Normal, of deviation 0.02.

  The originals of transformers cut it at +-2, a hundred times that deviation.
  """
  del fan_in, fan_out
  return _drawn(jax.random.normal, rngs, shape) * 0.02


def zeros(rngs, shape, fan_in: int = 0, fan_out: int = 0) -> Array:
  """Zeros; draws nothing."""
  del rngs, fan_in, fan_out
  return jnp.zeros(shape)


class Linear(nnx.Module):
  """A matrix product over channels [..., c] -> [..., c'].

  Args:
    inputs: c.
    outputs: c'.
    kernel: initialiser of the [c, c'] matrix.
    bias: initialiser of the bias, or None for none.
    rngs: of the initialisation.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    *,
    kernel: Initialiser = uniform,
    bias: Initialiser | None = uniform,
    rngs,
  ):
    shape = (inputs, outputs)
    self.kernel = nnx.Param(kernel(rngs, shape, *shape))
    self.bias = nnx.Param(bias(rngs, (outputs,), *shape)) if bias else None

  def __call__(self, x: Array) -> Array:
    y = x @ self.kernel[...].astype(x.dtype)
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Conv(nnx.Module):
  """A convolution of square kernels, [..., h, w, c] -> [..., h', w', c'].

  Args:
    inputs: c.
    outputs: c'.
    size: side of the kernel.
    stride, dilation, groups, padding: see `conv.conv2d`; groups=c is depthwise.
    kernel: initialiser of the [size, size, c / groups, c'] kernel.
    bias: initialiser of the bias, or None for none.
    rngs: of the initialisation.

  Raises:
    ValueError: the groups do not divide the channels.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding: conv.Padding = None,
    kernel: Initialiser = uniform,
    bias: Initialiser | None = uniform,
    rngs,
  ):
    if inputs % groups or outputs % groups:
      raise ValueError(
        f'{groups} groups do not divide {inputs} channels into {outputs}'
      )
    fans = (size * size * (inputs // groups), size * size * outputs)
    shape = (size, size, inputs // groups, outputs)
    self.kernel = nnx.Param(kernel(rngs, shape, *fans))
    self.bias = nnx.Param(bias(rngs, (outputs,), *fans)) if bias else None
    self.stride, self.dilation = stride, dilation
    self.groups, self.padding = groups, padding

  def __call__(self, x: Array) -> Array:
    y = conv.conv2d(
      x,
      self.kernel[...].astype(x.dtype),
      stride=self.stride,
      padding=self.padding,
      dilation=self.dilation,
      groups=self.groups,
    )
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer normalisation over channels, in float32."""

  def __init__(self, channels: int, *, epsilon: float = 1e-5):
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))
    self.epsilon = epsilon

  def __call__(self, x: Array) -> Array:
    values = x.astype(jnp.float32)
    values -= values.mean(-1, keepdims=True)
    var = jnp.square(values).mean(-1, keepdims=True)
    y = values * jax.lax.rsqrt(var + self.epsilon) * self.scale[...]
    return (y + self.bias[...]).astype(x.dtype)


class BatchNorm(nnx.Module):
  """Batch normalisation: by running statistics, or by those of the images.

  Attributes:
    scale, bias: [c], learned.
    mean, var: [c], the running statistics; only `train` moves them.
    epsilon: what is added to a variance.
    momentum: share of the newest statistics in the running ones, as PyTorch
      counts it.
  """

  def __init__(
    self, channels: int, *, epsilon: float = 1e-5, momentum: float = 0.1
  ):
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))
    self.mean = nnx.BatchStat(jnp.zeros(channels))
    self.var = nnx.BatchStat(jnp.ones(channels))
    self.epsilon, self.momentum = epsilon, momentum

  def __call__(self, x: Array) -> Array:
    """Normalises x [..., c] by the running statistics."""
    scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
    shift = self.bias[...] - self.mean[...] * scale
    return x * scale.astype(x.dtype) + shift.astype(x.dtype)

  def by_own(self, x: Array, together: int) -> tuple[Array, Array, Array]:
    """Normalises each group of `together` images by its own statistics.

    Args:
      x: [f * together, h, w, c], the images of f forwards.
      together: number of images in a forward.

    Returns:
      The result [f * together, h, w, c], the means [f, c] and the *unbiased*
      variances [f, c], which are what torch's running statistics average.

    Raises:
      ValueError: there is one value per channel, so that none varies.
    """
    n = together * x.shape[1] * x.shape[2]
    _check_count(n, x)
    groups = x.reshape(-1, together, *x.shape[1:])
    values = groups.astype(jnp.float32)
    mean = values.mean((1, 2, 3), keepdims=True)
    var = jnp.square(values - mean).mean((1, 2, 3), keepdims=True)
    scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
    y = (values - mean) * scale
    y = (y + self.bias[...]).astype(x.dtype).reshape(x.shape)
    return y, mean[:, 0, 0, 0], var[:, 0, 0, 0] * (n / (n - 1))

  def train(
    self,
    x: Array,
    valid: Array | None = None,
    axis: str | None = None,
    *,
    moves: bool = True,
  ) -> Array:
    """Normalises by the statistics of the whole batch, and moves the running.

    Gradients flow through the statistics. Over several devices they are those
    of the sum of all devices' losses by this device's x, and by this device's
    use of `scale` and `bias`: sum those over the devices.

    Args:
      x: [b, ..., c].
      valid: bool [b], the images that count; all by default. The others are
        normalised too.
      axis: of the device mesh, whose devices hold parts of one batch.
      moves: whether the running statistics move.

    Returns:
      x normalised by the mean and the biased variance. Should a single value
      per channel be valid, it is NaN and the running statistics stay: PyTorch
      refuses there. They also stay where nothing is valid.

    Raises:
      ValueError: there is one value per channel, so that none varies.
    """
    places = tuple(range(x.ndim - 1))
    values = x.astype(jnp.float32)
    count = jnp.asarray(values.size // values.shape[-1], jnp.float32)
    if axis is None:
      _check_count(values.size // values.shape[-1], x)
    weight = 1.0
    if valid is not None:
      weight = valid.reshape(-1, *(1,) * (x.ndim - 1)).astype(jnp.float32)
      count = count * valid.mean(dtype=jnp.float32)

    def over_all(total):
      return total if axis is None else jax.lax.psum(total, axis)

    count = over_all(count)
    n = jnp.maximum(count, 1)
    mean = over_all((values * weight).sum(places)) / n
    apart = values - mean
    var = over_all((jnp.square(apart) * weight).sum(places)) / n
    unbiased = var * (n / jnp.maximum(n - 1, 1))
    for running, new in ((self.mean, mean), (self.var, unbiased)):
      if not moves:
        break
      old = running[...]
      moved = old + self.momentum * (jax.lax.stop_gradient(new) - old)
      running[...] = jnp.where(count > 1, moved, old)
    scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
    y = (apart * scale + self.bias[...]).astype(x.dtype)
    return jnp.where(count == 1, jnp.nan, y)


# How a BatchNorm acts on its input.
Normalise = Callable[[BatchNorm, Array], Array]


def by_running(norm: BatchNorm, x: Array) -> Array:
  """By its running statistics: what every `normalise` is if none is given."""
  return norm(x)


def _check_count(count, x):
  if count < 2:
    raise ValueError(
      'the variance of one value per channel is undefined: the feature map is '
      f'{x.shape[1]}x{x.shape[2]}; give larger images'
    )


class PatchProjection(nnx.Module):
  """A convolution whose stride is its size: a product over patches.

  Images [b, H, W, 3] to [b, H / patch, W / patch, outputs].
  """

  def __init__(self, patch: int, outputs: int, *, rngs):
    shape = (patch, patch, 3, outputs)
    self.kernel = nnx.Param(uniform(rngs, shape, patch * patch * 3))
    self.bias = nnx.Param(jnp.zeros(outputs))

  def __call__(self, images: Array) -> Array:
    b, H, W, _ = images.shape
    p = self.kernel.shape[0]
    x = images.reshape(b, H // p, p, W // p, p, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, H // p, W // p, p * p * 3)
    kernel = self.kernel[...].astype(x.dtype)
    return x @ kernel.reshape(-1, kernel.shape[-1]) + self.bias[...].astype(
      x.dtype
    )


class MLP(nnx.Module):
  """Two layers, four times as wide in between, exact GELU."""

  def __init__(self, channels: int, *, rngs):
    started = {'kernel': normal, 'bias': zeros, 'rngs': rngs}
    self.fc1 = Linear(channels, 4 * channels, **started)
    self.fc2 = Linear(4 * channels, channels, **started)

  def __call__(self, x: Array) -> Array:
    return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


def torch_rules(kind: str, theirs: str, ours: str) -> Rules:
  """How PyTorch names a layer's numbers, as rules of `params.from_torch`.

  Args:
    kind: 'conv', 'linear' or 'norm'; a BatchNorm's statistics are a norm's.
    theirs: regular expression of the layer's name, up to '.weight'.
    ours: template of its path, up to '/kernel' or '/scale'.
  """
  weight = ('scale', 'copy') if kind == 'norm' else ('kernel', kind)
  rules = (
    (rf'{theirs}\.weight', f'{ours}/{weight[0]}', weight[1]),
    (rf'{theirs}\.bias', f'{ours}/bias', 'copy'),
  )
  if kind != 'norm':
    return rules
  return rules + tuple(
    (rf'{theirs}\.running_{name}', f'{ours}/{name}', 'copy')
    for name in ('mean', 'var')
  )


# BatchNorm counts its batches but, having a momentum, does not use the count.
TORCH_COUNTS = ((r'(.*\.)?num_batches_tracked', '', 'drop'),)


def torch_counts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The counts of batches that PyTorch has beside these tensors, all zero."""
  return {
    name.replace('running_mean', 'num_batches_tracked'): np.zeros((), np.int64)
    for name in tensors
    if name.endswith('running_mean')
  }
