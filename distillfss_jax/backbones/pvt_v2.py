"""Pyramid Vision Transformer v2 (Wang et al. 2022, 2106.13797).

Four stages: an overlapping patch embedding, blocks of attention to a shrunken
grid of keys and of an MLP with a depthwise convolution in it, a LayerNorm. The
normalised map is a stage's result, and what the next one reads. Places are
known by the zero padding of the convolutions alone, so that any size does;
where a size is no multiple of 32, maps cover a part of a stride more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.backbones import base
from distillfss_jax.layers import torch_rules
from distillfss_jax.ops import random
from distillfss_jax.types import Array, Pyramid

CLASSES = 1000  # of ImageNet, in the checkpoints' classifier
_HEADS, _SHRINK = (1, 2, 5, 8), (8, 4, 2, 1)  # of the stages

_linear = functools.partial(
  layers.Linear, kernel=layers.normal, bias=layers.zeros
)
_conv = functools.partial(
  layers.Conv, kernel=layers.he_fan_out, bias=layers.zeros
)


def _names():
  """Their stages count from 1, ours from 0: a row for each of the four."""
  rows = []
  for i in range(4):
    stage, block = f'stages/{i}/', rf'block{i + 1}\.(\d+)\.'
    path = stage + r'blocks/\1/'
    embed = rf'patch_embed{i + 1}\.'
    rows += [
      *torch_rules('conv', embed + 'proj', stage + 'embed/proj'),
      *torch_rules('norm', embed + 'norm', stage + 'embed/norm')[:2],
      *torch_rules('norm', f'norm{i + 1}', stage + 'norm')[:2],
      *torch_rules('norm', block + r'norm1', path + 'norm1')[:2],
      *torch_rules('norm', block + r'norm2', path + 'norm2')[:2],
      *torch_rules('linear', block + r'attn\.q', path + 'attn/query'),
      *torch_rules('linear', block + r'attn\.kv', path + 'attn/key_value'),
      *torch_rules('linear', block + r'attn\.proj', path + 'attn/proj'),
      *torch_rules('conv', block + r'attn\.sr', path + 'attn/shrink'),
      *torch_rules('norm', block + r'attn\.norm', path + 'attn/norm')[:2],
      *torch_rules('linear', block + r'mlp\.fc1', path + 'mlp/fc1'),
      *torch_rules('linear', block + r'mlp\.fc2', path + 'mlp/fc2'),
      *torch_rules(
        'conv', block + r'mlp\.dwconv\.dwconv', path + 'mlp/depthwise'
      ),
    ]
  return (*rows, (r'head\.(weight|bias)', '', 'drop'))


TORCH_NAMES = _names()


class Embed(nnx.Module):
  """Overlapping patches: [b, h, w, c] to [b, h / s, w / s, c']."""

  def __init__(self, inputs, outputs, size, stride, *, rngs):
    self.proj = _conv(
      inputs, outputs, size, stride=stride, padding=size // 2, rngs=rngs
    )
    self.norm = layers.LayerNorm(outputs, epsilon=1e-5)

  def __call__(self, x: Array) -> Array:
    return self.norm(self.proj(x))


class Attention(nnx.Module):
  """Every place attends to a grid `shrink` times coarser (section 3.2)."""

  def __init__(self, channels, heads, shrink, *, rngs):
    self.heads = heads
    self.query = _linear(channels, channels, rngs=rngs)
    self.key_value = _linear(channels, 2 * channels, rngs=rngs)
    self.proj = _linear(channels, channels, rngs=rngs)
    shrinks = shrink > 1
    self.shrink = (
      _conv(channels, channels, shrink, stride=shrink, padding=0, rngs=rngs)
      if shrinks
      else None
    )
    self.norm = layers.LayerNorm(channels, epsilon=1e-5) if shrinks else None

  def __call__(self, x: Array) -> Array:
    """Of maps [b, h, w, c]."""
    b, h, w, c = x.shape
    d = c // self.heads
    query = self.query(x).reshape(b, h * w, self.heads, d)
    grid = x if self.shrink is None else self.norm(self.shrink(x))
    pairs = self.key_value(grid).reshape(b, -1, 2, self.heads, d)
    key, value = pairs[:, :, 0], pairs[:, :, 1]
    logits = jnp.einsum(
      'bqad,bkad->baqk',
      query * d**-0.5,
      key,
      preferred_element_type=jnp.float32,
    )
    weights = jax.nn.softmax(logits).astype(x.dtype)
    y = jnp.einsum('baqk,bkad->bqad', weights, value)
    return self.proj(y.reshape(b, h, w, c))


class MLP(nnx.Module):
  """Two layers, a depthwise convolution and GELU between them."""

  def __init__(self, channels, ratio, *, rngs):
    inner = ratio * channels
    self.fc1 = _linear(channels, inner, rngs=rngs)
    self.depthwise = _conv(inner, inner, 3, groups=inner, rngs=rngs)
    self.fc2 = _linear(inner, channels, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    x = nnx.gelu(self.depthwise(self.fc1(x)), approximate=False)
    return self.fc2(x)


class Block(nnx.Module):
  """Attention and an MLP, both residual."""

  def __init__(self, channels, heads, shrink, ratio, *, rngs):
    self.norm1 = layers.LayerNorm(channels, epsilon=1e-6)
    self.attn = Attention(channels, heads, shrink, rngs=rngs)
    self.norm2 = layers.LayerNorm(channels, epsilon=1e-6)
    self.mlp = MLP(channels, ratio, rngs=rngs)

  def __call__(self, x: Array, drop) -> Array:
    x = x + drop(0, self.attn(self.norm1(x)))
    return x + drop(1, self.mlp(self.norm2(x)))


class Stage(nnx.Module):
  """An embedding, blocks, and the norm of their result."""

  def __init__(self, i, inputs, channels, depth, ratio, *, rngs):
    size, stride = (3, 2) if i else (7, 4)
    self.embed = Embed(inputs, channels, size, stride, rngs=rngs)
    self.blocks = nnx.List(
      Block(channels, _HEADS[i], _SHRINK[i], ratio, rngs=rngs)
      for _ in range(depth)
    )
    self.norm = layers.LayerNorm(channels, epsilon=1e-6)


class PVTv2(base.Backbone):
  """A PVTv2 without its classifier; a map of each stage.

  Args:
    channels: of the stages.
    blocks: of each stage.
    ratios: inner channels of the MLPs over `channels`.
    drop_path: rate at which the last block's branches are dropped in training;
      it grows linearly from 0 at the first block.
    rngs: of the initialisation.

  Attributes:
    depths: maps of each stage, one.
    channels: channels of each stage's map.
    strides: pixels per feature, of each stage.
  """

  strides = (4, 8, 16, 32)
  depths = (1, 1, 1, 1)

  def __init__(
    self,
    *,
    channels=(64, 128, 320, 512),
    blocks=(3, 4, 6, 3),
    ratios=(8, 8, 4, 4),
    drop_path=0.1,
    rngs,
  ):
    self.channels, self.drop_path = tuple(channels), drop_path
    self.blocks = tuple(blocks)
    inputs = (3, *self.channels)
    self.stages = nnx.List(
      Stage(i, inputs[i], inputs[i + 1], blocks[i], ratios[i], rngs=rngs)
      for i in range(4)
    )

  def __call__(
    self, images: Array, *, train: bool = False, key: Array | None = None
  ) -> Pyramid:
    """The pyramid of images [b, H, W, 3] (normalised).

    Computes in the dtype of `images`, softmax and LayerNorm in float32. With
    `train`, branches are dropped by `key`, one or one for each image
    (stochastic depth, Huang et al. 2016); without, it is not looked at.

    Raises:
      ValueError: `train` without a key.
    """
    rates = np.linspace(0, self.drop_path if train else 0, sum(self.blocks))
    seed = None
    if rates.any():
      if key is None:
        raise ValueError('train=True drops branches and needs a key; give key=')
      seed = random.seed_of(key)
      if not seed.ndim:
        seed = random.fold(seed, jnp.arange(images.shape[0]))
    x, pyramid, index = images, [], 0
    for stage in self.stages:
      x = stage.embed(x)
      for block in stage.blocks:
        x = block(x, functools.partial(_drop, seed, index, rates[index]))
        index += 1
      x = stage.norm(x)
      pyramid.append(x[:, None])
    return tuple(pyramid)

  def torch_tables(self):
    return {'original': TORCH_NAMES}

  def torch_unused(self, tensors):
    """A classifier, empty."""
    del tensors
    channels = self.channels[-1]
    return {
      'head.weight': np.zeros((CLASSES, channels), np.float32),
      'head.bias': np.zeros(CLASSES, np.float32),
    }


def _drop(seed, block, rate, branch, x):
  """Drops a residual branch of whole images, and scales up the others."""
  if not rate:
    return x
  seed = random.fold(seed, 2 * block + branch)
  kept = random.keep(seed, jnp.zeros((), jnp.uint32), float(rate))
  return x * kept.reshape(-1, 1, 1, 1).astype(x.dtype)


_SMALL = (32, 64, 160, 256)

variants = {
  'pvt_v2_b0': functools.partial(PVTv2, channels=_SMALL, blocks=(2, 2, 2, 2)),
  'pvt_v2_b1': functools.partial(PVTv2, blocks=(2, 2, 2, 2)),
  'pvt_v2_b2': functools.partial(PVTv2),
  'pvt_v2_b3': functools.partial(PVTv2, blocks=(3, 4, 18, 3)),
  'pvt_v2_b4': functools.partial(PVTv2, blocks=(3, 8, 27, 3)),
  'pvt_v2_b5': functools.partial(
    PVTv2, blocks=(3, 6, 40, 3), ratios=(4, 4, 4, 4)
  ),
  'pvt_v2_tiny': functools.partial(
    PVTv2, channels=(16, 16, 40, 64), blocks=(1, 1, 1, 1), ratios=(2, 2, 2, 2)
  ),
}
