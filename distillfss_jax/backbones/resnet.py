"""ResNets as feature pyramids (He et al. 2016, in the V1.5 form).

V1.5 is torchvision's form: the stride of a bottleneck sits on its 3x3
convolution. What is collected from a block is the sum of its branches *before*
the final ReLU, so the maps have negative values; the next block sees them
after the ReLU (`activate`).

Segmentation networks change two things. A *deep* stem (PSPNet, 1612.01105)
has three 3x3 convolutions for the one of 7x7. An *output stride* of 8 or 16
replaces the strides of the last stages by dilation, so that maps keep their
size.

Parity: DistillFSS leaves its frozen backbone in training mode while it adapts,
so that BatchNorm normalises every image by its own statistics and moves the
running statistics with it. `encode_with_statistics` computes that form for many
images at once, and `update_statistics` replays the running statistics in any
order of forwards. Nothing here changes a module's state by itself.
"""

import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.backbones import base
from distillfss_jax.layers import Normalise, by_running, torch_rules
from distillfss_jax.types import Array

MOMENTUM = 0.1  # of the newest statistics, as torch counts it
CLASSES = 1000  # of ImageNet, in the checkpoints' classifier

_STAGES = (
  *torch_rules('conv', r'layer(\d)\.(\d+)\.conv(\d)', r'layer\1/\2/conv\3'),
  *torch_rules('norm', r'layer(\d)\.(\d+)\.bn(\d)', r'layer\1/\2/bn\3'),
  *torch_rules(
    'conv', r'layer(\d)\.0\.downsample\.0', r'layer\1/0/downsample/conv'
  ),
  *torch_rules(
    'norm', r'layer(\d)\.0\.downsample\.1', r'layer\1/0/downsample/bn'
  ),
  *layers.TORCH_COUNTS,
  (r'fc\.(weight|bias)', '', 'drop'),
)


def _stem_rules(**names):
  """Rules of a stem, given their name of each of our layers."""
  return tuple(
    rule
    for ours, theirs in names.items()
    for rule in torch_rules(
      'conv' if ours.startswith('conv') else 'norm', theirs, ours
    )
  )


# torchvision's, of the plain stem; and of the deep stem in a file of ImageNet
# weights for PSPNet, whose names are the same and go on.
TORCH_NAMES = (
  *torch_rules('conv', r'conv(\d)', r'conv\1'),
  *torch_rules('norm', r'bn(\d)', r'bn\1'),
  *_STAGES,
)
# The deep stem inside PSPNet's, BAM's and HDMNet's files, a list of layers.
PSPNET_NAMES = (
  *_stem_rules(
    conv1=r'layer0\.0',
    bn1=r'layer0\.1',
    conv2=r'layer0\.3',
    bn2=r'layer0\.4',
    conv3=r'layer0\.6',
    bn3=r'layer0\.7',
  ),
  *_STAGES,
)
# In files of ImageNet weights for SSP and IFA, a list of layers but the last.
NESTED_NAMES = (
  *_stem_rules(
    conv1=r'conv1\.0',
    bn1=r'conv1\.1',
    conv2=r'conv1\.3',
    bn2=r'conv1\.4',
    conv3=r'conv1\.6',
    bn3=r'bn1',
  ),
  *_STAGES,
)
# Inside SSP's and IFA's own files.
SSP_NAMES = (
  *_stem_rules(
    conv1=r'layer0\.0\.0',
    bn1=r'layer0\.0\.1',
    conv2=r'layer0\.0\.3',
    bn2=r'layer0\.0\.4',
    conv3=r'layer0\.0\.6',
    bn3=r'layer0\.1',
  ),
  *_STAGES,
)

_conv = functools.partial(layers.Conv, kernel=layers.he_fan_out, bias=None)


class Shortcut(nnx.Module):
  """The projection of a stage's first shortcut."""

  def __init__(self, inputs, outputs, *, stride, rngs):
    self.conv = _conv(inputs, outputs, 1, stride=stride, rngs=rngs)
    self.bn = layers.BatchNorm(outputs)

  def __call__(self, x: Array, normalise: Normalise) -> Array:
    return normalise(self.bn, self.conv(x))


class Bottleneck(nnx.Module):
  """1x1, 3x3 (with stride and dilation), 1x1 convolutions beside a shortcut.

  Attributes:
    expansion: channels of the output over `width`, those of the 3x3.
  """

  expansion = 4

  def __init__(self, inputs, width, *, stride, project, dilation=1, rngs):
    outputs = self.expansion * width
    self.conv1 = _conv(inputs, width, 1, rngs=rngs)
    self.bn1 = layers.BatchNorm(width)
    self.conv2 = _conv(
      width, width, 3, stride=stride, dilation=dilation, rngs=rngs
    )
    self.bn2 = layers.BatchNorm(width)
    self.conv3 = _conv(width, outputs, 1, rngs=rngs)
    self.bn3 = layers.BatchNorm(outputs)
    self.downsample = (
      Shortcut(inputs, outputs, stride=stride, rngs=rngs) if project else None
    )

  def __call__(self, x: Array, normalise: Normalise = by_running) -> Array:
    """The sum of both branches, before the ReLU."""
    y = nnx.relu(normalise(self.bn1, self.conv1(x)))
    y = nnx.relu(normalise(self.bn2, self.conv2(y)))
    y = normalise(self.bn3, self.conv3(y))
    return y + (self.downsample(x, normalise) if self.downsample else x)


class Basic(nnx.Module):
  """Two 3x3 convolutions, both dilated, beside a shortcut.

  Attributes:
    expansion: see `Bottleneck`.
  """

  expansion = 1

  def __init__(self, inputs, width, *, stride, project, dilation=1, rngs):
    self.conv1 = _conv(
      inputs, width, 3, stride=stride, dilation=dilation, rngs=rngs
    )
    self.bn1 = layers.BatchNorm(width)
    self.conv2 = _conv(width, width, 3, dilation=dilation, rngs=rngs)
    self.bn2 = layers.BatchNorm(width)
    self.downsample = (
      Shortcut(inputs, width, stride=stride, rngs=rngs) if project else None
    )

  def __call__(self, x: Array, normalise: Normalise = by_running) -> Array:
    """The sum of both branches, before the ReLU."""
    y = nnx.relu(normalise(self.bn1, self.conv1(x)))
    y = normalise(self.bn2, self.conv2(y))
    return y + (self.downsample(x, normalise) if self.downsample else x)


BLOCKS = {'bottleneck': Bottleneck, 'basic': Basic}
STEMS = ('plain', 'deep')


class ResNet(base.Staged):
  """A ResNet without its classifier, of as many stages as `depths` has.

  Args:
    depths: see the attributes.
    width: channels of the first stage's 3x3; they double with every stage.
    block: 'bottleneck' or 'basic'.
    stem: 'plain', a 7x7 convolution, or 'deep', three of 3x3, of twice the
      width. Both end in a max-pool, at stride 4.
    output_stride: 8, 16 or 32: a stage that would go beyond it keeps the size
      and doubles the dilation instead, of all its blocks.
    lagging: whether such a stage's first block has the dilation of the stage
      before, as in torchvision and SSP; in PSPNet and DeepLab it has not.
    multi_grid: factors of the dilations of the last stage's blocks, in turn
      (DeepLabv3, 1706.05587, section 3.2.1).
    rngs: of the initialisation.

  Attributes:
    depths: blocks of each stage.
    channels: channels of each stage's maps.
    strides: pixels per feature, of each stage.

  Raises:
    ValueError: a block, stem or output stride that there is not.
  """

  def __init__(
    self,
    *,
    depths=(3, 4, 6, 3),
    width=64,
    block='bottleneck',
    stem='plain',
    output_stride=32,
    lagging=False,
    multi_grid=(1,),
    rngs,
  ):
    for name, value, known in (
      ('block', block, tuple(BLOCKS)),
      ('stem', stem, STEMS),
      ('output_stride', output_stride, (8, 16, 32)),
    ):
      if value not in known:
        raise ValueError(
          f'a ResNet has no {name} {value!r}; there are: '
          f'{", ".join(map(str, known))}'
        )
    kind = BLOCKS[block]
    self.deep = stem == 'deep'
    self.depths = tuple(depths)
    self.channels = tuple(
      kind.expansion * width * 2**i for i in range(len(self.depths))
    )
    if self.deep:
      self.conv1 = _conv(3, width, 3, stride=2, rngs=rngs)
      self.bn1 = layers.BatchNorm(width)
      self.conv2 = _conv(width, width, 3, rngs=rngs)
      self.bn2 = layers.BatchNorm(width)
      self.conv3 = _conv(width, 2 * width, 3, rngs=rngs)
      self.bn3 = layers.BatchNorm(2 * width)
    else:
      self.conv1 = _conv(3, width, 7, stride=2, rngs=rngs)
      self.bn1 = layers.BatchNorm(width)
    inputs = 2 * width if self.deep else width
    at, rate, strides = 4, 1, []
    for i, depth in enumerate(self.depths):
      stride, before = 1, rate
      if i and 2 * at <= output_stride:
        stride, at = 2, 2 * at
      elif i:
        rate *= 2
      strides.append(at)
      rates = [rate] * depth
      if lagging:
        rates[0] = before
      if i == len(self.depths) - 1:
        rates = [
          r * multi_grid[j % len(multi_grid)] for j, r in enumerate(rates)
        ]
      blocks = nnx.List()
      for j, dilation in enumerate(rates):
        step = 1 if j else stride
        blocks.append(
          kind(
            inputs,
            width * 2**i,
            stride=step,
            dilation=dilation,
            project=step > 1 or inputs != self.channels[i],
            rngs=rngs,
          )
        )
        inputs = self.channels[i]
      setattr(self, f'layer{i + 1}', blocks)
    self.strides = tuple(strides)

  def stem(self, images: Array, normalise: Normalise = by_running) -> Array:
    x = nnx.relu(normalise(self.bn1, self.conv1(images)))
    if self.deep:
      x = nnx.relu(normalise(self.bn2, self.conv2(x)))
      x = nnx.relu(normalise(self.bn3, self.conv3(x)))
    return base.max_pool(x, 3, 2, ((1, 1), (1, 1)))

  def stage(
    self, i: int, x: Array, normalise: Normalise = by_running
  ) -> tuple[Array, ...]:
    maps = []
    for block in getattr(self, f'layer{i + 1}'):
      maps.append(block(x, normalise))
      x = nnx.relu(maps[-1])
    return tuple(maps)

  def activate(self, x: Array) -> Array:
    return nnx.relu(x)

  def compared(self):
    last = [getattr(self, f'layer{i + 1}')[-1] for i in range(len(self.depths))]
    norms = [x.bn3 if hasattr(x, 'bn3') else x.bn2 for x in last]
    return tuple(zip(self.channels, norms, strict=True))

  def torch_tables(self):
    if not self.deep:
      tables = {'torchvision': TORCH_NAMES}
    else:
      tables = {
        'imagenet': TORCH_NAMES,
        'pspnet': PSPNET_NAMES,
        'nested': NESTED_NAMES,
        'ssp': SSP_NAMES,
      }
    return {name: self._own_stages(rules) for name, rules in tables.items()}

  def _own_stages(self, rules):
    """The rules of a table, without stages that a file has beside ours."""
    count = len(self.depths)
    if count == 4:
      return rules
    kept = [
      (name.replace(r'layer(\d)', rf'layer([1-{count}])'), path, kind)
      for name, path, kind in rules
    ]
    more = rf'layer[{count + 1}-9]\.(?!.*num_batches_tracked).*'
    return (*kept, (more, '', 'drop'))

  def torch_unused(self, tensors):
    channels = self.channels[-1]
    return {
      **layers.torch_counts(tensors),
      'fc.weight': np.zeros((CLASSES, channels), np.float32),
      'fc.bias': np.zeros(CLASSES, np.float32),
    }


def update_statistics(
  running: Mapping[str, Array],
  statistics: Mapping[str, Array],
  visits: Array,
  counted: Array | None = None,
) -> dict[str, Array]:
  """The running statistics after a sequence of forwards.

  Every forward moves them by new = 0.9 old + 0.1 own. The sequence is one
  weighted sum, so its length costs nothing.

  Args:
    running: {path: [c]}, the running statistics before.
    statistics: {path: [f, c]} of f forwards, by `encode_with_statistics`.
    visits: int [v], which of the f forwards came first, second, ...; a forward
      may come any number of times.
    counted: bool [v], which of them took place; all by default.

  Returns:
    {path: [c]} for the paths of `statistics`.
  """
  visits = jnp.asarray(visits)
  if counted is None:
    counted = jnp.ones(visits.shape, bool)
  later = counted[::-1].cumsum()[::-1] - counted
  weight = counted * MOMENTUM * (1 - MOMENTUM) ** later.astype(jnp.float32)
  rest = (1 - MOMENTUM) ** counted.sum().astype(jnp.float32)

  def moved(old, own):
    share = jnp.zeros(own.shape[0]).at[visits].add(weight)
    return rest * old + jnp.dot(share, own, precision='highest')

  return {path: moved(running[path], own) for path, own in statistics.items()}


_deep = functools.partial(ResNet, stem='deep', output_stride=8)
_ssp = functools.partial(_deep, lagging=True)

variants = {
  'resnet18': functools.partial(ResNet, depths=(2, 2, 2, 2), block='basic'),
  'resnet50': functools.partial(ResNet, depths=(3, 4, 6, 3)),
  'resnet101': functools.partial(ResNet, depths=(3, 4, 23, 3)),
  'resnet_small': functools.partial(ResNet, depths=(2, 2, 2, 2), width=32),
  'resnet_tiny': functools.partial(ResNet, depths=(1, 1, 1, 1), width=16),
  # PSPNet's, of BAM and HDMNet.
  'resnet50_deep': functools.partial(_deep, depths=(3, 4, 6, 3)),
  'resnet101_deep': functools.partial(_deep, depths=(3, 4, 23, 3)),
  'resnet_tiny_deep': functools.partial(_deep, depths=(1, 1, 1, 1), width=16),
  # SSP's and IFA's, whose third stage is the last.
  'resnet50_ssp': functools.partial(_ssp, depths=(3, 4, 6)),
  'resnet101_ssp': functools.partial(_ssp, depths=(3, 4, 23)),
  'resnet_tiny_ssp': functools.partial(_ssp, depths=(1, 1, 2), width=16),
}
