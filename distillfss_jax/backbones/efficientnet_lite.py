"""EfficientNet-Lite as a feature pyramid (Liu 2020, after Tan and Le 2019).

Inverted residuals (Sandler et al. 2018) scaled in width and depth, without
squeeze-and-excite and with ReLU6, for small devices: lite0 has 3 million
parameters without its classifier. A block's result is linear, so the maps have
negative values. Padding is TensorFlow's: at stride 2 it is not the same on both
sides, and PyTorch's would shift every map.

The weights of lite0, lite1 and lite2 come as Python packages; see
`pretrained/hub.py`.
"""

import functools
import itertools
import math

import numpy as np
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.backbones import base
from distillfss_jax.layers import Normalise, by_running
from distillfss_jax.types import Array

EPSILON = 1e-3
MOMENTUM = 0.01  # of the newest statistics, as torch counts it
CLASSES = 1000  # of ImageNet, in the checkpoints' classifier
STEM, HEAD = 32, 1280  # channels, alike in all variants

# Of each stage: kernel, stride, factor of the inner channels, channels, blocks.
_STAGES = (
  (3, 1, 1, 16, 1),
  (3, 2, 6, 24, 2),
  (5, 2, 6, 40, 2),
  (3, 2, 6, 80, 3),
  (5, 1, 6, 112, 3),
  (5, 2, 6, 192, 4),
  (3, 1, 6, 320, 1),
)
# The stages whose blocks have stride 2, 4, 8, 16 and 32.
_STRIDES = ((0,), (1,), (2,), (3, 4), (5, 6))
_SCALES = {  # variant: width, depth
  'lite0': (1.0, 1.0),
  'lite1': (1.0, 1.1),
  'lite2': (1.1, 1.2),
  'lite3': (1.2, 1.4),
  'lite4': (1.4, 1.8),
}


def scaled(width: float, depth: float) -> tuple[tuple, tuple]:
  """Channels and blocks of the seven stages (Tan and Le 2019, section 3.3).

  Channels become multiples of 8 and lose at most a tenth; the first and the
  last stage keep one block.
  """
  channels, blocks = [], []
  for i, (_, _, _, c, n) in enumerate(_STAGES):
    wanted = c * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    channels.append(rounded + 8 if rounded < 0.9 * wanted else rounded)
    blocks.append(n if i in (0, len(_STAGES) - 1) else math.ceil(n * depth))
  return tuple(channels), tuple(blocks)


def _norm_rules(torch, path):
  return (
    (rf'{torch}\.weight', f'{path}/scale', 'copy'),
    (rf'{torch}\.bias', f'{path}/bias', 'copy'),
    (rf'{torch}\.running_mean', f'{path}/mean', 'copy'),
    (rf'{torch}\.running_var', f'{path}/var', 'copy'),
  )


def _unit_rules(convolution, norm, path):
  return (
    (rf'{convolution}\.weight', f'{path}/conv/kernel', 'conv'),
    *_norm_rules(norm, f'{path}/bn'),
  )


# The names in the packages' files.
_BLOCK, _PATH = r'_blocks\.(\d+)\.', r'blocks/\1/'
TORCH_NAMES = (
  *_unit_rules('_conv_stem', '_bn0', 'stem'),
  *_unit_rules(_BLOCK + '_expand_conv', _BLOCK + '_bn0', _PATH + 'expand'),
  *_unit_rules(
    _BLOCK + '_depthwise_conv', _BLOCK + '_bn1', _PATH + 'depthwise'
  ),
  *_unit_rules(_BLOCK + '_project_conv', _BLOCK + '_bn2', _PATH + 'project'),
  (r'(.*\.)?num_batches_tracked', '', 'drop'),
  (r'(_conv_head|_fc)\.(weight|bias)', '', 'drop'),
  (r'_bn1\.(weight|bias|running_mean|running_var)', '', 'drop'),
)


def _timm_names(blocks):
  """Timm's names, which count blocks within their stage."""
  rows = list(_unit_rules('conv_stem', 'bn1', 'stem'))
  # The first stage does not expand, so its norms count from the depthwise one.
  first = (('conv_dw', 'bn1', 'depthwise'), ('conv_pw', 'bn2', 'project'))
  others = (
    ('conv_pw', 'bn1', 'expand'),
    ('conv_dw', 'bn2', 'depthwise'),
    ('conv_pwl', 'bn3', 'project'),
  )
  places = [(i, j) for i, count in enumerate(blocks) for j in range(count)]
  for index, (i, j) in enumerate(places):
    for convolution, norm, unit in others if i else first:
      start = rf'blocks\.{i}\.{j}\.'
      rows += _unit_rules(
        start + convolution, start + norm, f'blocks/{index}/{unit}'
      )
  return (
    *rows,
    (r'(.*\.)?num_batches_tracked', '', 'drop'),
    (r'(conv_head|classifier)\.(weight|bias)', '', 'drop'),
    (r'bn2\.(weight|bias|running_mean|running_var)', '', 'drop'),
  )


class Unit(nnx.Module):
  """A convolution without bias and its norm; ReLU6 where it is `active`."""

  def __init__(self, inputs, outputs, size, *, active=True, rngs, **fields):
    self.conv = layers.Conv(
      inputs,
      outputs,
      size,
      padding='SAME',
      kernel=layers.he_fan_out,
      bias=None,
      rngs=rngs,
      **fields,
    )
    self.bn = layers.BatchNorm(outputs, epsilon=EPSILON, momentum=MOMENTUM)
    self.active = active

  def __call__(self, x: Array, normalise: Normalise = by_running) -> Array:
    x = normalise(self.bn, self.conv(x))
    return nnx.relu6(x) if self.active else x


class Block(nnx.Module):
  """An inverted residual: widen, filter each channel, narrow."""

  def __init__(
    self, inputs, outputs, size, *, stride, factor, dilation=1, rngs
  ):
    inner = factor * inputs
    self.expand = Unit(inputs, inner, 1, rngs=rngs) if factor > 1 else None
    self.depthwise = Unit(
      inner, inner, size, stride=stride, dilation=dilation, groups=inner,
      rngs=rngs,
    )  # fmt: skip
    self.project = Unit(inner, outputs, 1, active=False, rngs=rngs)
    self.residual = stride == 1 and inputs == outputs

  def __call__(self, x: Array, normalise: Normalise = by_running) -> Array:
    y = x if self.expand is None else self.expand(x, normalise)
    y = self.project(self.depthwise(y, normalise), normalise)
    return x + y if self.residual else y


class EfficientNetLite(base.Backbone):
  """EfficientNet-Lite without its head.

  Blocks of one stride differ in width (of lite0's six at stride 16, three have
  80 channels and three 112). The narrower maps are filled up with zeros, which
  change neither dot products nor what a linear layer makes of a map.

  Args:
    width: factor of the channels.
    depth: factor of the numbers of blocks.
    finest: stride of the pyramid's first stage: 4, as that of the papers'
      backbones, or 2, which adds a stage for decoders that go down to it.
    output_stride: 32, 16 or 8: blocks that would go beyond it keep the size and
      dilate instead (DeepLabv3+, 1802.02611).
    rngs: of the initialisation.

  Attributes:
    mean, std: [3], of RGB in [0, 1], as its weights expect it.
    depths: blocks of each stage of the pyramid.
    channels: channels of each stage's maps, those of its last block.
    strides: pixels per feature, of each stage.

  Raises:
    ValueError: `finest` or `output_stride` is none of these.
  """

  # (v - 127) / 128 of v in 0..255: its own, not ImageNet's.
  mean = np.full(3, 127 / 255, np.float32)
  std = np.full(3, 128 / 255, np.float32)

  def __init__(self, *, width=1.0, depth=1.0, finest=4, output_stride=32, rngs):
    if finest not in (2, 4):
      raise ValueError(f'finest is {finest}; the pyramid begins at 2 or 4')
    if output_stride not in (8, 16, 32):
      raise ValueError(
        f'an EfficientNet-Lite has no output_stride {output_stride!r}; there '
        'are: 8, 16, 32'
      )
    channels, blocks = scaled(width, depth)
    self.repeats = blocks
    first = 0 if finest == 2 else 1
    groups = _STRIDES[first:]
    self.depths = tuple(sum(blocks[i] for i in group) for group in groups)
    self.channels = tuple(channels[group[-1]] for group in groups)
    self.strides = tuple(
      min(2 ** (first + 1 + i), output_stride) for i in range(len(groups))
    )
    self.stem = Unit(3, STEM, 3, stride=2, rngs=rngs)
    self.blocks = nnx.List()
    inputs, at, dilation = STEM, 2, 1
    for (size, stride, factor, _, _), outputs, count in zip(
      _STAGES, channels, blocks, strict=True
    ):
      if at * stride > output_stride:
        stride, dilation = 1, dilation * stride
      at *= stride
      for j in range(count):
        self.blocks.append(
          Block(
            inputs,
            outputs,
            size,
            stride=1 if j else stride,
            factor=factor,
            dilation=dilation,
            rngs=rngs,
          )
        )
        inputs = outputs

  def torch_tables(self):
    # timm numbers blocks by stage, which is another table for each depth.
    own = _timm_names(self.repeats)
    return {'efficientnet_lite_pytorch': TORCH_NAMES, 'timm': own}

  def torch_unused(self, tensors):
    """The head and the classifier, empty, and the norms' counts of batches."""
    head = {
      '_conv_head.weight': (HEAD, self.channels[-1], 1, 1),
      '_fc.weight': (CLASSES, HEAD),
      '_fc.bias': (CLASSES,),
      **{
        f'_bn1.{name}': (HEAD,)
        for name in ('weight', 'bias', 'running_mean', 'running_var')
      },
    }
    empty = {name: np.zeros(shape, np.float32) for name, shape in head.items()}
    return empty | layers.torch_counts({**tensors, **empty})

  def __call__(
    self, images: Array, *, train: bool = False, key: Array | None = None
  ) -> tuple[Array, ...]:
    """The pyramid of images [b, H, W, 3] (normalised), by running statistics.

    Computes in the dtype of `images`; any size does. `train` and `key` change
    nothing: blocks are dropped in pre-training only.
    """
    del train, key
    return tuple(base.stack(maps) for maps in self._maps(images, by_running))

  def _maps(self, images, normalise):
    """The maps of each stage of the pyramid."""
    x = self.stem(images, normalise)
    maps = []
    for block in self.blocks:
      x = block(x, normalise)
      maps.append(x)
    maps = maps[len(maps) - sum(self.depths) :]
    ends = np.cumsum((0, *self.depths)).tolist()
    return [maps[i:j] for i, j in itertools.pairwise(ends)]

  def features(
    self, images: Array, normalise: Normalise = by_running
  ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """See `base.Staged`; a block's result has no activation to be before."""
    maps = tuple(x[-1] for x in self._maps(images, normalise))
    return maps, maps

  def compared(self) -> tuple[tuple[int, layers.BatchNorm], ...]:
    """See `base.Staged`."""
    before = len(self.blocks) - sum(self.depths)
    ends = (before + np.cumsum(self.depths) - 1).tolist()
    norms = [self.blocks[i].project.bn for i in ends]
    return tuple(zip(self.channels, norms, strict=True))


variants = {
  name: functools.partial(EfficientNetLite, width=width, depth=depth)
  for name, (width, depth) in _SCALES.items()
}
