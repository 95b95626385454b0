"""MobileNetV2 as a feature pyramid (Sandler et al. 2018, 1801.04381).

Inverted residuals: widen, filter each channel, narrow. A block's result is
linear, so the maps have negative values. An *output stride* of 8 or 16 keeps
the size of the last maps and dilates instead (DeepLabv3+, 1802.02611).

Parity: AttnFD's pads a block's *input* with zeros, and filters without padding:
what lies beyond the border is relu6(norm(0)) there, not 0.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.backbones import base
from distillfss_jax.layers import Normalise, by_running, torch_rules
from distillfss_jax.types import Array

STEM = 32  # channels
HEAD, CLASSES = 1280, 1000  # of ImageNet, in the checkpoints' classifier

# Of each group: factor of the inner channels, channels, blocks, stride.
_GROUPS = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
# First block of each stage of the pyramid; block 0 is the stem.
_BEGIN = (2, 4, 7, 14)


def _unit(conv, norm, path):
  return (
    *torch_rules('conv', conv, f'{path}/conv'),
    *torch_rules('norm', norm, f'{path}/bn'),
  )


_BLOCK = r'features\.([2-9]|1[0-7])\.conv\.'
_STEM = _unit(r'features\.0\.0', r'features\.0\.1', 'blocks/0')
_DROPPED = (
  (r'features\.18\..*', '', 'drop'),
  (r'classifier\..*', '', 'drop'),
  *layers.TORCH_COUNTS,
)
# AttnFD's, and those of the networks it comes from.
TORCH_NAMES = (
  *_STEM,
  *_unit(
    r'features\.1\.conv\.0', r'features\.1\.conv\.1', 'blocks/1/depthwise'
  ),
  *_unit(r'features\.1\.conv\.3', r'features\.1\.conv\.4', 'blocks/1/project'),
  *_unit(_BLOCK + '0', _BLOCK + '1', r'blocks/\1/expand'),
  *_unit(_BLOCK + '3', _BLOCK + '4', r'blocks/\1/depthwise'),
  *_unit(_BLOCK + '6', _BLOCK + '7', r'blocks/\1/project'),
  *_DROPPED,
)
TORCHVISION_NAMES = (
  *_STEM,
  *_unit(
    r'features\.1\.conv\.0\.0', r'features\.1\.conv\.0\.1', 'blocks/1/depthwise'
  ),
  *_unit(r'features\.1\.conv\.1', r'features\.1\.conv\.2', 'blocks/1/project'),
  *_unit(_BLOCK + r'0\.0', _BLOCK + r'0\.1', r'blocks/\1/expand'),
  *_unit(_BLOCK + r'1\.0', _BLOCK + r'1\.1', r'blocks/\1/depthwise'),
  *_unit(_BLOCK + '2', _BLOCK + '3', r'blocks/\1/project'),
  *_DROPPED,
)


class Unit(nnx.Module):
  """A convolution without bias, and its norm."""

  def __init__(self, inputs, outputs, size, *, rngs, **fields):
    self.conv = layers.Conv(
      inputs,
      outputs,
      size,
      kernel=layers.he_fan_in,
      bias=None,
      rngs=rngs,
      **fields,
    )
    self.bn = layers.BatchNorm(outputs)

  def __call__(self, x: Array, normalise: Normalise) -> Array:
    return normalise(self.bn, self.conv(x))


class Block(nnx.Module):
  """An inverted residual."""

  def __init__(self, inputs, outputs, *, stride, dilation, factor, rngs):
    inner = factor * inputs
    self.expand = Unit(inputs, inner, 1, rngs=rngs) if factor > 1 else None
    self.depthwise = Unit(
      inner, inner, 3, stride=stride, dilation=dilation, groups=inner,
      padding=0, rngs=rngs,
    )  # fmt: skip
    self.project = Unit(inner, outputs, 1, rngs=rngs)
    self.residual = stride == 1 and inputs == outputs
    self.pad = dilation

  def __call__(
    self, x: Array, normalise: Normalise
  ) -> tuple[Array, Array | None]:
    """The result, and the widened map before its ReLU6, without padding."""
    p = self.pad
    y, wide = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0))), None
    if self.expand is not None:
      y = self.expand(y, normalise)
      wide = y[:, p:-p, p:-p]
      y = nnx.relu6(y)
    y = nnx.relu6(self.depthwise(y, normalise))
    y = self.project(y, normalise)
    return (x + y if self.residual else y), wide


class MobileNetV2(base.Staged):
  """MobileNetV2 without its head.

  Blocks of one stage may differ in width; the narrower maps are filled up with
  zeros.

  Args:
    output_stride: 8, 16 or 32.
    rngs: of the initialisation.

  Attributes:
    depths: blocks of each stage of the pyramid.
    channels: channels of each stage's maps, those of its last block.
    strides: pixels per feature, of each stage.

  Raises:
    ValueError: an output stride that there is not.
  """

  def __init__(self, *, output_stride=32, rngs):
    if output_stride not in (8, 16, 32):
      raise ValueError(
        f'a MobileNetV2 has no output_stride {output_stride!r}; there are: '
        '8, 16, 32'
      )
    self.blocks = nnx.List([Unit(3, STEM, 3, stride=2, padding=1, rngs=rngs)])
    inputs, at, rate, strides, channels = STEM, 2, 1, [2], [STEM]
    for factor, outputs, count, stride in _GROUPS:
      # Parity: a group reads the dilation before it is doubled for the next.
      dilation, step = rate, 1
      if at == output_stride:
        rate *= stride
      else:
        dilation, step, at = 1, stride, at * stride
      for j in range(count):
        self.blocks.append(
          Block(
            inputs,
            outputs,
            stride=1 if j else step,
            dilation=dilation,
            factor=factor,
            rngs=rngs,
          )
        )
        inputs = outputs
        strides.append(at)
        channels.append(outputs)
    self.ends = (*_BEGIN[1:], len(self.blocks))
    self.depths = tuple(
      end - begin for begin, end in zip(_BEGIN, self.ends, strict=True)
    )
    self.channels = tuple(channels[end - 1] for end in self.ends)
    self.strides = tuple(strides[end - 1] for end in self.ends)

  def stem(self, images: Array, normalise: Normalise = by_running) -> Array:
    x = nnx.relu6(self.blocks[0](images, normalise))
    return self.blocks[1](x, normalise)[0]

  def stage(
    self, i: int, x: Array, normalise: Normalise = by_running
  ) -> tuple[Array, ...]:
    return self._stage(i, x, normalise)[0]

  def _stage(self, i, x, normalise):
    """The maps of a stage, and the first block's widened one."""
    maps, wide = [], []
    for block in self.blocks[_BEGIN[i] : self.ends[i]]:
      x, inner = block(x, normalise)
      maps.append(x)
      wide.append(inner)
    return tuple(maps), wide[0]

  def features(
    self, images: Array, normalise: Normalise = by_running
  ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """See `Staged`; compared are the maps that the next stage widens first.

    Parity: AttnFD's widens the unpadded map once more for that. Its norm's
    statistics, where they are a batch's, are those without the border; here
    they are the network's own.
    """
    x, read, compared = self.stem(images, normalise), [], []
    for i in range(len(self.depths)):
      maps, wide = self._stage(i, x, normalise)
      if i:
        compared.append(wide)
      x = maps[-1]
      read.append(x)
    return tuple(read), (*compared, x)

  def compared(self):
    norms = [self.blocks[i].expand.bn for i in self.ends[:-1]]
    norms.append(self.blocks[-1].project.bn)
    return tuple((norm.scale.shape[0], norm) for norm in norms)

  def torch_tables(self):
    return {'attnfd': TORCH_NAMES, 'torchvision': TORCHVISION_NAMES}

  def torch_unused(self, tensors):
    """The head and the classifier, empty, and the norms' counts of batches."""
    head = {
      'features.18.0.weight': (HEAD, self.channels[-1], 1, 1),
      **{
        f'features.18.1.{name}': (HEAD,)
        for name in ('weight', 'bias', 'running_mean', 'running_var')
      },
      'classifier.1.weight': (CLASSES, HEAD),
      'classifier.1.bias': (CLASSES,),
    }
    empty = {name: np.zeros(shape, np.float32) for name, shape in head.items()}
    return empty | layers.torch_counts({**tensors, **empty})


variants = {'mobilenet_v2': functools.partial(MobileNetV2)}
