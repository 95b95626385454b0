"""DINOv3's vision transformer as a feature pyramid (Siméoni et al. 2025).

A plain ViT (Dosovitskiy et al. 2021) with LayerScale (Touvron et al. 2021),
four storage tokens (registers, Darcet et al. 2024) and rotary positions (Su et
al. 2021) along both axes. All of its maps have one stride; what makes them a
pyramid is how the blocks are grouped. What is collected is the patch tokens
after every block, each through the one final LayerNorm.

Written from public facts alone: section 1.3 of the specification and the names
of the checkpoint. `h w` is the grid of patches, `t` counts all tokens.
"""

import functools
import itertools
import math

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

BASE = 100.0  # of the periods of the rotary positions
LAYER_SCALE = 1e-5  # where gamma starts, in networks this deep

_BLOCK = r'blocks\.(\d+)\.'
_PATH = r'blocks/\1/'

TORCH_NAMES = (
  (r'cls_token', 'class_token', 'copy'),
  (r'storage_tokens', 'storage_tokens', 'copy'),
  (r'patch_embed\.proj\.weight', 'patch_embed/proj/kernel', 'conv'),
  (r'patch_embed\.proj\.bias', 'patch_embed/proj/bias', 'copy'),
  (_BLOCK + r'norm([12])\.weight', _PATH + r'norm\2/scale', 'copy'),
  (_BLOCK + r'norm([12])\.bias', _PATH + r'norm\2/bias', 'copy'),
  (_BLOCK + r'attn\.(qkv|proj)\.weight', _PATH + r'attn/\2/kernel', 'linear'),
  (_BLOCK + r'attn\.(qkv|proj)\.bias', _PATH + r'attn/\2/bias', 'copy'),
  (_BLOCK + r'ls([12])\.gamma', _PATH + r'ls\2/gamma', 'copy'),
  (_BLOCK + r'mlp\.(fc[12])\.weight', _PATH + r'mlp/\2/kernel', 'linear'),
  (_BLOCK + r'mlp\.(fc[12])\.bias', _PATH + r'mlp/\2/bias', 'copy'),
  (r'norm\.weight', 'norm/scale', 'copy'),
  (r'norm\.bias', 'norm/bias', 'copy'),
  # Only the pretraining hides patches; the buffers are computed here.
  (r'mask_token', '', 'drop'),
  (r'rope_embed\.periods', '', 'drop'),
  (_BLOCK + r'attn\.qkv\.bias_mask', '', 'drop'),
)


def angles(h: int, w: int, d: int, factor: float | Array = 1.0) -> Array:
  """How far each patch turns each channel of a head, [h*w, d] float32.

  The first quarter of the channels turns with the row and the second with the
  column; the other half repeats them, since `rotate` turns channel i together
  with channel i + d/2.

  Args:
    h: rows of patches.
    w: columns of patches.
    d: size of a head, a multiple of 4.
    factor: what the coordinates, in (-1, 1) along either axis, are scaled by.
  """
  # The middle of each patch, as a share of its own axis.
  y, x = ((np.arange(n) + 0.5) / n * 2 - 1 for n in (h, w))
  places = np.stack(np.meshgrid(y, x, indexing='ij'), -1).reshape(h * w, 2)
  turns = 2 * np.pi * places[:, :, None] / periods(d)
  turns = np.tile(turns.reshape(h * w, d // 2), 2)
  return jnp.asarray(turns, jnp.float32) * factor


def periods(d: int) -> np.ndarray:
  """How far apart coordinates of a full turn are, [d / 4]."""
  return BASE ** (2 * np.arange(d // 4) / (d // 2))


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Turns the tokens x [b, t, a, d] by the angles of cos and sin [t, d].

  In float32; the result has the dtype of x.
  """
  values = x.astype(jnp.float32)
  first, second = jnp.split(values, 2, -1)
  across = jnp.concatenate([-second, first], -1)
  return (values * cos[:, None] + across * sin[:, None]).astype(x.dtype)


class QueryKeyValue(nnx.Module):
  """x [b, t, c] -> queries, keys and values [b, t, 3, c]; keys have no bias."""

  def __init__(self, channels, *, rngs):
    self.kernel = nnx.Param(layers.normal(rngs, (channels, 3 * channels)))
    self.bias = nnx.Param(jnp.zeros(3 * channels))

  def __call__(self, x: Array) -> Array:
    b, t, c = x.shape
    # Parity: the original keeps a bias for the keys and masks it. It is
    # overwritten, not multiplied by zero, lest what lies there be NaN.
    bias = self.bias[...].reshape(3, c).at[1].set(0)
    y = (x @ self.kernel[...].astype(x.dtype)).reshape(b, t, 3, c)
    return y + bias.astype(x.dtype)


class LayerScale(nnx.Module):
  """A learned factor per channel, which starts near zero."""

  def __init__(self, channels):
    self.gamma = nnx.Param(jnp.full(channels, LAYER_SCALE))

  def __call__(self, x: Array) -> Array:
    return x * self.gamma[...].astype(x.dtype)


class PatchEmbed(nnx.Module):
  """images [b, H, W, 3] -> tokens [b, h*w, c], row by row."""

  def __init__(self, patch, channels, *, rngs):
    self.proj = layers.PatchProjection(patch, channels, rngs=rngs)

  def __call__(self, images: Array) -> Array:
    x = self.proj(images)
    return x.reshape(x.shape[0], -1, x.shape[-1])


class Attention(nnx.Module):
  """Attention among all tokens x [b, t, c], which are turned by position."""

  def __init__(self, channels, heads, *, rngs):
    self.heads = heads
    self.qkv = QueryKeyValue(channels, rngs=rngs)
    self.proj = _linear(channels, channels, rngs=rngs)

  def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
    b, t, c = x.shape
    d = c // self.heads
    q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, t, 3, self.heads, d), 2, 0)
    logits = jnp.einsum(
      'bqad,bkad->baqk',
      rotate(q, cos, sin) * d**-0.5,
      rotate(k, cos, sin),
      preferred_element_type=jnp.float32,
    )
    weights = jax.nn.softmax(logits, -1).astype(x.dtype)
    y = jnp.einsum('baqk,bkad->bqad', weights, v)
    return self.proj(y.reshape(b, t, c))


class Block(nnx.Module):
  """Attention and an MLP, both residual, each with its LayerScale."""

  def __init__(self, channels, heads, *, rngs):
    self.norm1 = layers.LayerNorm(channels)
    self.attn = Attention(channels, heads, rngs=rngs)
    self.ls1 = LayerScale(channels)
    self.norm2 = layers.LayerNorm(channels)
    self.mlp = layers.MLP(channels, rngs=rngs)
    self.ls2 = LayerScale(channels)

  def __call__(self, x: Array, cos: Array, sin: Array) -> Array:
    x = x + self.ls1(self.attn(self.norm1(x), cos, sin))
    return x + self.ls2(self.mlp(self.norm2(x)))


class Dino(base.Backbone):
  """DINOv3's transformer for one image size.

  Args:
    patch: height and width of a patch, in pixels.
    embed: channels of a token.
    heads: attention heads of every block.
    storage: tokens beside the class token that stand for no patch.
    (others): see the attributes.

  Attributes:
    image_size: height and width of the images, in pixels.
    depths: blocks of each of the four stages.
    channels: channels of each stage's maps, all alike.
    strides: pixels per feature of each stage, all alike.
    rescale: in training, the coordinates of the rotary positions are scaled by
      a random factor in [1 / rescale, rescale]; 0 or None for never.

  Raises:
    ValueError: the image size is no multiple of the patch, the channels do not
      divide among the heads by fours, or `rescale` is below 1.
  """

  def __init__(
    self,
    *,
    image_size=384,
    patch=16,
    embed=1024,
    depths=(3, 7, 7, 7),
    heads=16,
    storage=4,
    rescale=2.0,
    rngs,
  ):
    _check(image_size, patch, embed, heads, rescale)
    self.image_size = image_size
    self.depths = tuple(depths)
    self.channels = (embed,) * 4
    self.strides = (patch,) * 4
    self.rescale = rescale
    self.class_token = nnx.Param(layers.normal(rngs, (1, 1, embed)))
    self.storage_tokens = nnx.Param(layers.normal(rngs, (1, storage, embed)))
    self.patch_embed = PatchEmbed(patch, embed, rngs=rngs)
    self.blocks = nnx.List(
      Block(embed, heads, rngs=rngs) for _ in range(sum(self.depths))
    )
    self.norm = layers.LayerNorm(embed)

  def __call__(
    self, images: Array, *, train: bool = False, key: Array | None = None
  ) -> Pyramid:
    """The pyramid of images [b, H, W, 3] (normalised).

    Computes in the dtype of `images`; softmax, LayerNorm and rotations in
    float32. With `train`, the positions are rescaled by `key`, alike for all
    images; without, `key` is not looked at.

    Raises:
      ValueError: images of another size, or `train` without a key.
    """
    size = self.image_size
    if images.shape[1:] != (size, size, 3):
      raise ValueError(
        f'images are {images.shape}; this Dino takes [b, {size}, {size}, 3]: '
        'resize them, or build it with another image_size'
      )
    side = size // self.strides[0]
    x = self._tokens(images)
    others = x.shape[1] - side**2
    cos, sin = self._rotation(side, others, self._factor(train, key))
    maps = []
    for block in self.blocks:
      x = block(x, cos, sin)
      patches = self.norm(x[:, others:])
      maps.append(patches.reshape(-1, side, side, self.channels[0]))
    ends = np.cumsum((0, *self.depths)).tolist()
    return tuple(jnp.stack(maps[i:j], 1) for i, j in itertools.pairwise(ends))

  def _tokens(self, images: Array) -> Array:
    """Class token, storage tokens and patches, [b, t, c]."""
    patches = self.patch_embed(images)
    others = (self.class_token[...], self.storage_tokens[...])
    b, _, c = patches.shape
    others = [
      jnp.broadcast_to(x, (b, x.shape[1], c)).astype(patches.dtype)
      for x in others
    ]
    return jnp.concatenate([*others, patches], 1)

  def _rotation(self, side, others, factor) -> tuple[Array, Array]:
    """Cosines and sines [t, d]; what is no patch is turned by nothing."""
    d = self.channels[0] // self.blocks[0].attn.heads
    turns = angles(side, side, d, factor)
    turns = jnp.pad(turns, ((others, 0), (0, 0)))
    return jnp.cos(turns), jnp.sin(turns)

  def _factor(self, train, key) -> float | Array:
    """What the coordinates of both axes are scaled by."""
    # Parity: the original's training mode reaches its frozen backbone, whose
    # positions it then rescales: log-uniform, one factor for the forward.
    if not (train and self.rescale):
      return 1.0
    if key is None:
      raise ValueError(
        'train=True rescales positions and needs a key; give key='
      )
    limit = math.log(self.rescale)
    return jnp.exp(jax.random.uniform(key, minval=-limit, maxval=limit))

  def torch_tables(self):
    return {'original': TORCH_NAMES}

  def torch_buffers(self):
    d = self.channels[0] // self.blocks[0].attn.heads
    return {'rope_embed.periods': periods(d).astype(np.float32)}

  def torch_unused(self, tensors):
    del tensors
    c = self.channels[0]
    mask = np.repeat(np.array([1, 0, 1], np.float32), c)
    return {
      'mask_token': np.zeros((1, c), np.float32),
      **{
        f'blocks.{i}.attn.qkv.bias_mask': mask for i in range(len(self.blocks))
      },
    }


def _check(image_size, patch, embed, heads, rescale):
  if image_size < patch or image_size % patch:
    raise ValueError(
      f'image_size {image_size} is no multiple of the patch, {patch} pixels'
    )
  if embed % (4 * heads):
    raise ValueError(
      f'{embed} channels do not divide among {heads} heads by fours, which the '
      f'rotary positions need; multiples of {4 * heads} fit'
    )
  if rescale and rescale < 1:
    raise ValueError(
      f'rescale is the largest factor, at least 1, or 0 for none; not {rescale}'
    )


variants = {
  'dinov3_vitl16': functools.partial(
    Dino,
    image_size=384,
    patch=16,
    embed=1024,
    depths=(3, 7, 7, 7),
    heads=16,
  ),
  'dino_tiny_test': functools.partial(
    Dino,
    image_size=128,
    patch=16,
    embed=32,
    depths=(1, 2, 2, 2),
    heads=2,
  ),
}
