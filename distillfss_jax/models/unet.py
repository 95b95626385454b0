"""U-Net: a pyramid decoded through its own maps (1505.04597).

What anyone would take for a segmenter on a pretrained backbone: from the
coarsest map on, twice the size, beside the backbone's map of that size, one
convolution. Strides 32, 16, 8, 4, 2; the last layer gives four pixels each.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers, models
from distillfss_jax.backbones.base import Backbone
from distillfss_jax.layers import Normalise, by_running
from distillfss_jax.models import base
from distillfss_jax.ops import resize
from distillfss_jax.types import Array

WIDTHS = (64, 48, 32, 24)


class Join(nnx.Module):
  """A coarse map and a finer one to one of the finer's size."""

  def __init__(self, coarse: int, fine: int, outputs: int, *, rngs):
    self.conv = layers.Conv(
      coarse + fine, outputs, 3, padding=1, kernel=layers.he_fan_in, bias=None,
      rngs=rngs,
    )  # fmt: skip
    self.norm = layers.BatchNorm(outputs)

  def __call__(self, coarse: Array, fine: Array, normalise: Normalise) -> Array:
    x = resize.bilinear(coarse, fine.shape[1:3], align_corners=False)
    x = self.conv(jnp.concatenate([x, fine], -1))
    return nnx.relu(normalise(self.norm, x))


class UNet(nnx.Module):
  """A segmenter of fixed classes.

  Args:
    backbone: whose pyramid begins at stride 2 or 4; see `backbones/`.
    classes: background included.
    widths: channels of the decoder, from coarse to fine, one less than the
      pyramid has stages; by default `WIDTHS`, as many as are needed.
    dtype: of the arithmetic; parameters and logits stay float32.
    rngs: of the initialisation.
  """

  def __init__(
    self,
    backbone: Backbone,
    classes: int,
    *,
    widths: Sequence[int] | None = None,
    dtype: str = 'float32',
    rngs,
  ):
    *fine, coarse = backbone.channels
    widths = WIDTHS[: len(fine)] if widths is None else widths
    if len(widths) != len(fine):
      raise ValueError(
        f'config.model.fields.widths is {tuple(widths)}; this backbone has '
        f'{len(fine)} finer stages, and each needs a width'
      )
    self.backbone, self.dtype = backbone, dtype
    self.joins = nnx.List()
    for channels, width in zip(reversed(fine), widths, strict=True):
      self.joins.append(Join(coarse, channels, width, rngs=rngs))
      coarse = width
    self.scale = backbone.strides[0]
    self.last = layers.Conv(
      coarse, self.scale**2 * classes, 3, padding=1, rngs=rngs
    )

  def encode(self, images: Array) -> tuple[Array, ...]:
    """The last map of each stage, [b, h, w, c], of images [b, H, W, 3]."""
    x = base.normalise(images, self.backbone).astype(self.dtype)
    return tuple(maps[:, -1] for maps in self.backbone(x))

  def decode(
    self,
    maps: tuple[Array, ...],
    size: tuple[int, int],
    normalise: Normalise = by_running,
  ) -> Array:
    """Logits [b, H, W, classes] of what `encode` gives."""
    *fine, x = maps
    for join, finer in zip(self.joins, reversed(fine), strict=True):
      x = join(x, finer, normalise)
    x = self.last(x).astype(jnp.float32)
    b, h, w, c = x.shape
    s = self.scale
    x = x.reshape(b, h, w, s, s, c // s**2).swapaxes(2, 3)
    x = x.reshape(b, h * s, w * s, c // s**2)
    # Odd sizes: the finest map covers up to a stride more than the image.
    return x if x.shape[1:3] == tuple(size) else x[:, : size[0], : size[1]]


def build(config, image_size, rngs, classes):
  """The model of a config; see `models.build`."""
  return UNet(
    models.build_backbone(config, image_size, rngs),
    classes,
    **config.fields,
    dtype=config.dtype,
    rngs=rngs,
  )
