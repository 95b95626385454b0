"""PSPNet: images to classes, by what surrounds them (1612.01105).

The base learner of BAM and HDMNet. A dilated backbone gives maps of stride 8;
means of them over 1, 4, 9 and 36 parts of the image stand beside every place,
and a small classifier reads both.
"""

import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers, models
from distillfss_jax.backbones.base import Staged
from distillfss_jax.layers import Normalise, by_running
from distillfss_jax.models import base, core
from distillfss_jax.ops import random, resize
from distillfss_jax.types import Array

TORCH_NAMES = core.head_rules('ppm', r'cls\.0', r'cls\.1', r'cls\.4')


class PSPNet(nnx.Module):
  """A segmenter of fixed classes.

  Args:
    backbone: of four stages; see `backbones/`.
    classes: background included.
    dropout: rate, of channels before the last layer.
    dtype: of the arithmetic; parameters and logits stay float32.
    rngs: of the initialisation.
  """

  def __init__(
    self,
    backbone: Staged,
    classes: int,
    *,
    dropout: float = 0.1,
    dtype: str = 'float32',
    rngs,
  ):
    self.backbone, self.dtype = backbone, dtype
    self.head = core.PyramidHead(
      backbone.channels[-1], classes, dropout=dropout, rngs=rngs
    )

  def __call__(
    self,
    images: Array,
    *,
    train: bool = False,
    keys: Array | None = None,
    normalise: Normalise = by_running,
  ) -> Array:
    """Logits [b, H, W, classes] of images [b, H, W, 3], uint8 or normalised.

    Args:
      images: uint8 or normalised.
      train: whether dropout acts; then `keys` [b] is one JAX key per image.
      keys: see `train`.
      normalise: how every BatchNorm acts; see `backbones.base.Staged`.
    """
    x = self.backbone.stem(base.normalise(images).astype(self.dtype), normalise)
    for i in range(len(self.backbone.depths)):
      x = self.backbone.activate(self.backbone.stage(i, x, normalise)[-1])
    seed = random.seed_of(keys) if train else None
    logits = self.head.classify(self.head.features(x, normalise), seed)
    return resize.bilinear(logits.astype(jnp.float32), images.shape[1:3])

  def torch_tables(self):
    """See `backbones.base.Backbone`."""
    rules = (
      *core.backbone_rules(self.backbone),
      *TORCH_NAMES,
      # The original names its stages a second time.
      (r'encoder\.\d\.(?!.*num_batches_tracked).*', '', 'drop'),
    )
    return {'original': rules}

  def torch_buffers(self):
    """See `backbones.base.Backbone`."""
    return {}

  def torch_unused(self, tensors):
    """See `backbones.base.Backbone`."""
    found = layers.torch_counts(tensors)
    again = {
      name.replace('layer', 'encoder.', 1): x
      for name, x in (tensors | found).items()
      if name.startswith('layer')
    }
    return found | again


def build(config, image_size, rngs, classes):
  """The model of a config; see `models.build`."""
  return PSPNet(
    models.build_backbone(config, image_size, rngs),
    classes,
    **config.fields,
    dtype=config.dtype,
    rngs=rngs,
  )


class Within(PSPNet):
  """The base learner inside BAM or HDMNet, by PSPNet's names."""

  def __init__(self, model: core.BaseAndMeta):
    self.backbone, self.head = model.backbone, model.head
    self.dtype = model.dtype
