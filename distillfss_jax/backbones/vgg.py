"""VGG-16 with BatchNorm as a feature pyramid (Simonyan and Zisserman 2015).

The 13 convolutions fall into five groups, each but the last with a max-pool
behind it: the first is the stem, the others are the stages, of which the
pyramid has the last map. The pool behind the last group and the classifier are
left out, so that the last two stages have stride 16 (as PSPNet, BAM and HDMNet
cut it). Maps are after their ReLU and pool.
"""

import functools

from flax import nnx

from distillfss_jax import layers
from distillfss_jax.backbones import base
from distillfss_jax.layers import Normalise, by_running, torch_rules
from distillfss_jax.types import Array

COUNTS = (2, 2, 3, 3, 3)  # convolutions of each group, configuration D
_PLACES = (0, 7, 14, 24, 34)  # where each starts in torchvision's list


def _rules(name):
  """Rules of all layers; `name(group, place)` is that of a group's layer."""
  return tuple(
    rule
    for i, count in enumerate(COUNTS)
    for j in range(count)
    for kind, ours, place in (
      ('conv', f'layer{i}/convs/{j}', 3 * j),
      ('norm', f'layer{i}/norms/{j}', 3 * j + 1),
    )
    for rule in torch_rules(kind, name(i, place), ours)
  )


TORCH_NAMES = (
  *_rules(lambda i, place: rf'features\.{_PLACES[i] + place}'),
  *layers.TORCH_COUNTS,
  (r'classifier\.(0|3|6)\.(weight|bias)', '', 'drop'),
)
# Inside PSPNet's, BAM's and HDMNet's files.
PSPNET_NAMES = (
  *_rules(lambda i, place: rf'layer{i}\.{place}'),
  *layers.TORCH_COUNTS,
)


class Group(nnx.Module):
  """3x3 convolutions with BatchNorm and ReLU, then perhaps a max-pool."""

  def __init__(self, inputs, outputs, count, *, pools, rngs):
    self.convs, self.norms = nnx.List(), nnx.List()
    for i in range(count):
      self.convs.append(
        layers.Conv(
          outputs if i else inputs,
          outputs,
          3,
          kernel=layers.he_fan_out,
          bias=layers.zeros,
          rngs=rngs,
        )
      )
      self.norms.append(layers.BatchNorm(outputs))
    self.pools = pools

  def __call__(self, x: Array, normalise: Normalise = by_running) -> Array:
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(normalise(norm, conv(x)))
    if not self.pools:
      return x
    # A last row or column of its own is pooled alone (torch's ceil_mode).
    h, w = x.shape[1:3]
    return base.max_pool(x, 2, 2, ((0, h % 2), (0, w % 2)))


class VGG(base.Staged):
  """VGG-16 without its classifier.

  Args:
    width: channels of the first group.
    rngs: of the initialisation.

  Attributes:
    depths, channels, strides: see `base.Backbone`.
  """

  def __init__(self, *, width=64, rngs):
    widths = tuple(min(width * 2**i, 8 * width) for i in range(len(COUNTS)))
    self.depths = (1,) * (len(COUNTS) - 1)
    self.channels = widths[1:]
    self.strides = (4, 8, 16, 16)
    inputs = 3
    for i, (outputs, count) in enumerate(zip(widths, COUNTS, strict=True)):
      pools = i < len(COUNTS) - 1
      group = Group(inputs, outputs, count, pools=pools, rngs=rngs)
      setattr(self, f'layer{i}', group)
      inputs = outputs

  def stem(self, images: Array, normalise: Normalise = by_running) -> Array:
    return self.layer0(images, normalise)

  def stage(
    self, i: int, x: Array, normalise: Normalise = by_running
  ) -> tuple[Array, ...]:
    return (getattr(self, f'layer{i + 1}')(x, normalise),)

  def torch_tables(self):
    return {'torchvision': TORCH_NAMES, 'pspnet': PSPNET_NAMES}

  def torch_unused(self, tensors):
    return layers.torch_counts(tensors)


variants = {
  'vgg16': functools.partial(VGG),
  'vgg_tiny': functools.partial(VGG, width=16),
}
