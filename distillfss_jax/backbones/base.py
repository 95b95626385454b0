"""Layers that the transformers here share."""

import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax.types import Array

EPSILON = 1e-5

# Both cut their normal distribution at +-2, a hundred times this deviation.
normal = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
  """A matrix product, with a bias or not, in the dtype of its input."""

  def __init__(self, inputs, outputs, *, use_bias=True, rngs):
    self.kernel = nnx.Param(normal(rngs.params(), (inputs, outputs)))
    self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None

  def __call__(self, x: Array) -> Array:
    y = x @ self.kernel[...].astype(x.dtype)
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer normalisation over channels, in float32."""

  def __init__(self, channels):
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))

  def __call__(self, x: Array) -> Array:
    values = x.astype(jnp.float32)
    values -= values.mean(-1, keepdims=True)
    var = jnp.square(values).mean(-1, keepdims=True)
    y = values * jax.lax.rsqrt(var + EPSILON) * self.scale[...]
    return (y + self.bias[...]).astype(x.dtype)


class PatchProjection(nnx.Module):
  """A convolution whose stride is its size: a product over patches."""

  def __init__(self, patch, outputs, *, rngs):
    # torch's default for a convolution: uniform within 1 / sqrt(inputs).
    init = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
    self.kernel = nnx.Param(init(rngs.params(), (patch, patch, 3, outputs)))
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

  def __init__(self, channels, *, rngs):
    self.fc1 = Linear(channels, 4 * channels, rngs=rngs)
    self.fc2 = Linear(4 * channels, channels, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return self.fc2(nnx.gelu(self.fc1(x), approximate=False))
