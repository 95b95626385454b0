"""A light decoder over a backbone's pyramid: what many would reach for first.

Coarse to fine, each step doubles the map, puts the backbone's map of that
stride beside it and convolves once (after Ronneberger et al. 2015); the last
convolution gives every pixel of the finest map its block of sub-pixels (Shi et
al. 2016). With EfficientNet-Lite0 down to stride 2: 3.28 million parameters,
1.9 billion multiply-adds at 384 pixels.
"""

import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.models import base
from distillfss_jax.ops import resize
from distillfss_jax.types import Array, Prediction

WIDTHS = (64, 48, 32, 24)  # of the decoder's steps, coarse to fine


class Step(nnx.Module):
  """To the next finer map: resize, put the skip beside, convolve, norm."""

  def __init__(self, inputs, skip, width, *, rngs):
    self.conv = layers.Conv(
      inputs + skip, width, 3, kernel=layers.he_fan_in, bias=None, rngs=rngs
    )
    self.bn = layers.BatchNorm(width)

  def __call__(self, x: Array, skip: Array, *, train: bool) -> Array:
    x = resize.bilinear(x, skip.shape[1:3], align_corners=False)
    x = self.conv(jnp.concatenate([x, skip], -1))
    return nnx.relu(self.bn.train(x) if train else self.bn(x))


class UNet(nnx.Module):
  """A dense segmenter of n classes and background, on any backbone.

  Args:
    backbone: see `backbones/`; the finest of its strides is the decoder's.
    classes: n.
    dtype: of the arithmetic; parameters, norms and logits stay float32.
    rngs: of the initialisation.
  """

  def __init__(self, backbone, *, classes=1, dtype='float32', rngs):
    self.backbone, self.classes, self.dtype = backbone, classes, dtype
    self.steps = nnx.List()
    *skips, width = backbone.channels
    for skip, wanted in zip(reversed(skips), WIDTHS, strict=False):
      self.steps.append(Step(width, skip, wanted, rngs=rngs))
      width = wanted
    self.factor = backbone.strides[0]
    self.last = layers.Conv(width, self.factor**2 * (1 + classes), 3, rngs=rngs)

  def encode(self, images: Array) -> tuple[Array, ...]:
    """Images [b, H, W, 3], uint8 or normalised, to each stage's last map."""
    images = base.normalise(images, self.backbone).astype(self.dtype)
    return tuple(stage[:, -1] for stage in self.backbone(images))

  def decode(
    self,
    pyramid: tuple[Array, ...],
    size: tuple[int, int],
    *,
    train: bool = False,
  ) -> Array:
    """Logits [b, H, W, 1+n] of maps [b, h, w, c], fine to coarse.

    Args:
      pyramid: as `encode` gives it.
      size: (H, W), of the images.
      train: whether the norms take the batch's statistics and move their own.
    """
    *skips, x = pyramid
    for step, skip in zip(self.steps, reversed(skips), strict=True):
      x = step(x, skip, train=train)
    x = self.last(x).astype(jnp.float32)
    b, h, w, _ = x.shape
    f = self.factor
    x = x.reshape(b, h, w, f, f, -1).swapaxes(2, 3).reshape(b, h * f, w * f, -1)
    return x[:, : size[0], : size[1]]

  def __call__(self, images: Array, *, train: bool = False) -> Prediction:
    """What is seen in images [b, H, W, 3]; the backbone's norms stay."""
    logits = self.decode(self.encode(images), images.shape[1:3], train=train)
    return Prediction(logits, ())
