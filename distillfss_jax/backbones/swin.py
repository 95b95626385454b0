"""Swin Transformer as a feature pyramid (Liu et al. 2021).

What is collected is the residual stream after every block, un-normalised and
before the patch merging of its stage. The classifier and the last LayerNorm of
the checkpoints are left out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.backbones import base
from distillfss_jax.types import Array, Pyramid

_linear = functools.partial(
  layers.Linear, kernel=layers.normal, bias=layers.zeros
)

MASKED = -100.0  # added to the logits of tokens that are no neighbours
CLASSES = 1000  # of ImageNet, in the checkpoints' classifier

_BLOCK = r'layers\.(\d+)\.blocks\.(\d+)\.'
_PATH = r'layers/\1/blocks/\2/'

TORCH_NAMES = (
  (r'patch_embed\.proj\.weight', 'patch_embed/proj/kernel', 'conv'),
  (r'patch_embed\.proj\.bias', 'patch_embed/proj/bias', 'copy'),
  (r'patch_embed\.norm\.weight', 'patch_embed/norm/scale', 'copy'),
  (r'patch_embed\.norm\.bias', 'patch_embed/norm/bias', 'copy'),
  (_BLOCK + r'norm([12])\.weight', _PATH + r'norm\3/scale', 'copy'),
  (_BLOCK + r'norm([12])\.bias', _PATH + r'norm\3/bias', 'copy'),
  (
    _BLOCK + r'attn\.relative_position_bias_table',
    _PATH + 'attn/relative_bias',
    'copy',
  ),
  (_BLOCK + r'attn\.(qkv|proj)\.weight', _PATH + r'attn/\3/kernel', 'linear'),
  (_BLOCK + r'attn\.(qkv|proj)\.bias', _PATH + r'attn/\3/bias', 'copy'),
  (_BLOCK + r'mlp\.(fc[12])\.weight', _PATH + r'mlp/\3/kernel', 'linear'),
  (_BLOCK + r'mlp\.(fc[12])\.bias', _PATH + r'mlp/\3/bias', 'copy'),
  (
    r'layers\.(\d+)\.downsample\.norm\.weight',
    r'layers/\1/downsample/norm/scale',
    'copy',
  ),
  (
    r'layers\.(\d+)\.downsample\.norm\.bias',
    r'layers/\1/downsample/norm/bias',
    'copy',
  ),
  (
    r'layers\.(\d+)\.downsample\.reduction\.weight',
    r'layers/\1/downsample/reduction/kernel',
    'linear',
  ),
  (_BLOCK + r'attn\.relative_position_index', '', 'drop'),
  (_BLOCK + r'attn_mask', '', 'drop'),
  (r'(norm|head)\.(weight|bias)', '', 'drop'),
)

# timm puts the step to the next stage at that stage's head.
TIMM_NAMES = (
  *(row for row in TORCH_NAMES if 'downsample' not in row[0]),
  *(
    (
      rf'layers\.{i + 1}\.downsample\.{name}',
      f'layers/{i}/downsample/{path}',
      layout,
    )
    for i in range(3)
    for name, path, layout in (
      (r'norm\.weight', 'norm/scale', 'copy'),
      (r'norm\.bias', 'norm/bias', 'copy'),
      (r'reduction\.weight', 'reduction/kernel', 'linear'),
    )
  ),
  (r'head\.fc\.(weight|bias)', '', 'drop'),
)


def relative_position_index(window: int) -> np.ndarray:
  """Row of the bias table for each (query, key) of a window, [t, t] int."""
  y, x = np.divmod(np.arange(window**2), window)
  rows = y[:, None] - y[None, :] + window - 1
  columns = x[:, None] - x[None, :] + window - 1
  return rows * (2 * window - 1) + columns


def shift_regions(size: int, window: int) -> np.ndarray:
  """Which tokens of each window are neighbours after the shift, [w, t] int.

  The rolled plane has three bands either way: what was not cut, the rest of
  the last window, and what came round from the other side. Tokens of one
  window attend to each other only within the same of the 9 regions.
  """
  band = np.zeros(size, int)
  band[size - window :] = 1
  band[size - window // 2 :] = 2
  plane = 3 * band[:, None] + band[None, :]
  n = size // window
  windows = plane.reshape(n, window, n, window).transpose(0, 2, 1, 3)
  return windows.reshape(n * n, window * window)


class PatchEmbed(nnx.Module):
  """images [b, H, W, 3] -> tokens [b, h, w, c]."""

  def __init__(self, patch, channels, *, rngs):
    self.proj = layers.PatchProjection(patch, channels, rngs=rngs)
    self.norm = layers.LayerNorm(channels)

  def __call__(self, images: Array) -> Array:
    return self.norm(self.proj(images))


class PatchMerging(nnx.Module):
  """[b, h, w, c] -> [b, h/2, w/2, 2c]."""

  def __init__(self, channels, *, rngs):
    self.norm = layers.LayerNorm(4 * channels)
    self.reduction = _linear(4 * channels, 2 * channels, bias=None, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    # The four neighbours lie column by column: (0,0), (1,0), (0,1), (1,1).
    x = x.transpose(0, 1, 3, 4, 2, 5).reshape(b, h // 2, w // 2, 4 * c)
    return self.reduction(self.norm(x))


class WindowAttention(nnx.Module):
  """Attention within windows, with a learned bias by relative position.

  x is [b, w, t, c]: w windows of t tokens.
  """

  def __init__(self, channels, heads, window, *, rngs):
    if channels % heads:
      raise ValueError(
        f'{channels} channels do not divide among {heads} heads; each stage '
        'needs heads that divide embed * 2**stage'
      )
    self.heads = heads
    self.window = window
    self.relative_bias = nnx.Param(
      layers.normal(rngs, ((2 * window - 1) ** 2, heads))
    )
    self.qkv = _linear(channels, 3 * channels, rngs=rngs)
    self.proj = _linear(channels, channels, rngs=rngs)

  def __call__(self, x: Array, regions: np.ndarray | None) -> Array:
    b, w, t, c = x.shape
    d = c // self.heads
    qkv = self.qkv(x).reshape(b, w, t, 3, self.heads, d)
    q, k, v = jnp.moveaxis(qkv, 3, 0)
    logits = jnp.einsum(
      'bwqad,bwkad->bwaqk',
      q * d**-0.5,
      k,
      preferred_element_type=jnp.float32,
    )
    bias = self.relative_bias[...][relative_position_index(self.window)]
    logits += bias.transpose(2, 0, 1)
    if regions is not None:
      strangers = regions[:, :, None] != regions[:, None, :]
      logits += jnp.where(strangers, MASKED, 0.0)[None, :, None]
    weights = jax.nn.softmax(logits, -1).astype(x.dtype)
    y = jnp.einsum('bwaqk,bwkad->bwqad', weights, v)
    return self.proj(y.reshape(b, w, t, c))


class Block(nnx.Module):
  """Attention within (shifted) windows and an MLP, both residual."""

  def __init__(self, channels, heads, size, window, *, shifted, rngs):
    self.size = size
    self.window = window
    self.shift = window // 2 if shifted else 0
    self.norm1 = layers.LayerNorm(channels)
    self.attn = WindowAttention(channels, heads, window, rngs=rngs)
    self.norm2 = layers.LayerNorm(channels)
    self.mlp = layers.MLP(channels, rngs=rngs)

  def __call__(self, x: Array, drop) -> Array:
    x = x + drop(0, self._attend(self.norm1(x)))
    return x + drop(1, self.mlp(self.norm2(x)))

  def _attend(self, x: Array) -> Array:
    b, h, w, c = x.shape
    t, s = self.window, self.shift
    n = self.size // t
    regions = shift_regions(self.size, t) if s else None
    x = jnp.roll(x, (-s, -s), (1, 2)) if s else x
    x = x.reshape(b, n, t, n, t, c).swapaxes(2, 3).reshape(b, n * n, t * t, c)
    x = self.attn(x, regions)
    x = x.reshape(b, n, n, t, t, c).swapaxes(2, 3).reshape(b, h, w, c)
    return jnp.roll(x, (s, s), (1, 2)) if s else x


class Stage(nnx.Module):
  """Blocks of one size and, but for the last stage, the step to the next."""

  def __init__(self, channels, heads, size, window, depth, *, merge, rngs):
    if size <= window:  # one window has no neighbours to shift towards
      window, shifted = size, False
    else:
      shifted = True
    self.blocks = nnx.List(
      Block(
        channels, heads, size, window, shifted=shifted and j % 2 == 1, rngs=rngs
      )
      for j in range(depth)
    )
    self.downsample = PatchMerging(channels, rngs=rngs) if merge else None


class Swin(base.Backbone):
  """A Swin Transformer for one image size.

  Attributes:
    image_size: height and width of the images, in pixels.
    depths: blocks of each of the four stages.
    channels: channels of each stage's maps, embed * 2**i.
    strides: pixels per feature, of each stage.
    drop_path: rate at which the last block's branches are dropped in training;
      it grows linearly from 0 at the first block.

  Raises:
    ValueError: the image size does not divide into whole windows, or the
      channels do not divide among the heads.
  """

  def __init__(
    self,
    *,
    image_size=384,
    patch=4,
    window=12,
    embed=128,
    depths=(2, 2, 18, 2),
    heads=(4, 8, 16, 32),
    drop_path=0.1,
    rngs,
  ):
    self.image_size = image_size
    self.depths = tuple(depths)
    self.channels = tuple(embed * 2**i for i in range(4))
    self.strides = tuple(patch * 2**i for i in range(4))
    self.drop_path = drop_path
    _check_size(image_size, self.strides, window)
    self.patch_embed = PatchEmbed(patch, embed, rngs=rngs)
    self.layers = nnx.List(
      Stage(
        self.channels[i],
        heads[i],
        image_size // self.strides[i],
        window,
        depths[i],
        merge=i < 3,
        rngs=rngs,
      )
      for i in range(4)
    )

  def __call__(
    self, images: Array, *, train: bool = False, key: Array | None = None
  ) -> Pyramid:
    """The pyramid of images [b, H, W, 3] (normalised).

    Computes in the dtype of `images`, softmax and LayerNorm in float32. With
    `train`, branches are dropped by `key`, each image on its own (stochastic
    depth, Huang et al. 2016); without, `key` is not looked at.

    Raises:
      ValueError: images of another size, or `train` without a key.
    """
    size = self.image_size
    if images.shape[1:] != (size, size, 3):
      raise ValueError(
        f'images are {images.shape}; this Swin takes [b, {size}, {size}, 3]: '
        'resize them, or build it with another image_size'
      )
    rates = np.linspace(0, self.drop_path if train else 0, sum(self.depths))
    if rates.any() and key is None:
      raise ValueError('train=True drops branches and needs a key; give key=')
    x = self.patch_embed(images)
    pyramid, index = [], 0
    for stage in self.layers:
      maps = []
      for block in stage.blocks:
        x = block(x, functools.partial(_drop, key, index, rates[index]))
        maps.append(x)
        index += 1
      pyramid.append(jnp.stack(maps, 1))
      if stage.downsample is not None:
        x = stage.downsample(x)
    return tuple(pyramid)

  def torch_tables(self):
    return {'original': TORCH_NAMES, 'timm': TIMM_NAMES}

  def torch_buffers(self):
    found = {}
    for i, stage in enumerate(self.layers):
      for j, block in enumerate(stage.blocks):
        name = f'layers.{i}.blocks.{j}.'
        index = relative_position_index(block.window)
        found[name + 'attn.relative_position_index'] = index.astype(np.int64)
        if block.shift:
          regions = shift_regions(block.size, block.window)
          strangers = regions[:, :, None] != regions[:, None, :]
          mask = np.where(strangers, np.float32(MASKED), np.float32(0))
          found[name + 'attn_mask'] = mask
    return found

  def torch_unused(self, tensors):
    del tensors
    # A classifier and the norm before it, empty here.
    channels = self.channels[-1]
    return {
      'norm.weight': np.ones(channels, np.float32),
      'norm.bias': np.zeros(channels, np.float32),
      'head.weight': np.zeros((CLASSES, channels), np.float32),
      'head.bias': np.zeros(CLASSES, np.float32),
    }


def _drop(key, block, rate, branch, x):
  """Drops a residual branch of whole images, and scales up the others."""
  if not rate:
    return x
  key = jax.random.fold_in(key, 2 * block + branch)
  stays = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, 1))
  return jnp.where(stays, x / (1 - rate), 0)


def _check_size(image_size, strides, window):
  sizes = [image_size // stride for stride in strides]
  if (
    min(sizes) < 1
    or image_size % strides[-1]
    or any(s % min(s, window) for s in sizes)
  ):
    raise ValueError(
      f'image_size {image_size} gives stages of {image_size} / {strides} '
      f'features, which must be whole numbers and, where larger than the '
      f'window of {window}, multiples of it; {window * strides[-1]} and its '
      'multiples fit'
    )


variants = {
  'swin_b': functools.partial(
    Swin,
    image_size=384,
    window=12,
    embed=128,
    depths=(2, 2, 18, 2),
    heads=(4, 8, 16, 32),
  ),
  'swin_tiny_test': functools.partial(
    Swin,
    image_size=128,
    window=4,
    embed=32,
    depths=(2, 2, 2, 2),
    heads=(1, 2, 4, 8),
  ),
}
