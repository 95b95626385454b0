"""One form of images that differ in light, contrast and polarity only.

A stain, a lamp or a camera decides how light objects are, and whether they are
darker or lighter than what surrounds them. In *polar form* an image is grey,
its contrast is stretched, and the smaller side of Otsu's threshold (Otsu 1979)
is the light one: few annotated images then stand for all of these.
"""

import jax
import jax.numpy as jnp

from distillfss_jax.ops.views import LUMA, QUANTILES

Array = jax.Array

_LEVELS = 256
_SAMPLE = 96  # rows and columns, at least, that tell the levels


def polar(images: Array) -> Array:
  """Images [b, H, W, 3] in [0, 1] in polar form: the same shape, grey."""
  grey = images @ jnp.asarray(LUMA, images.dtype)
  below = _share_below(grey)  # [b, levels]
  low, high = ((below < q).sum(1) / _LEVELS for q in QUANTILES)
  low, high = low[:, None, None], jnp.maximum(high, low + 1e-3)[:, None, None]
  grey = jnp.clip((grey - low) / (high - low), 0, 1)
  levels = (jnp.arange(_LEVELS) + 0.5) / _LEVELS
  levels = jnp.clip((levels - low[:, 0]) / (high - low)[:, 0], 0, 1)
  turn = _smaller_is_dark(below, levels)[:, None, None]
  grey = jnp.where(turn, 1 - grey, grey)
  return jnp.broadcast_to(grey[..., None], images.shape)


def _share_below(grey):
  """[b, levels]: which share of an image is at most so light."""
  step = max(1, min(grey.shape[1:]) // _SAMPLE)
  values = grey[:, ::step, ::step].reshape(grey.shape[0], -1, 1)
  ends = (jnp.arange(_LEVELS) + 1) / _LEVELS
  return (values <= ends).mean(1)


def _smaller_is_dark(below, levels):
  """[b] bool, by the levels' shares and what each level is after stretching."""
  share = below - jnp.pad(below[:, :-1], ((0, 0), (1, 0)))
  mean = jnp.cumsum(share * levels, 1)
  spread = below * (1 - below)
  between = jnp.square(mean[:, -1:] * below - mean) / jnp.maximum(spread, 1e-9)
  best = jnp.where(spread > 1e-9, between, 0).argmax(1)
  return jnp.take_along_axis(below, best[:, None], 1)[:, 0] < 0.5
