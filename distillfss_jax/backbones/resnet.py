"""ResNet-50 and -101 as feature pyramids (He et al. 2016, in the V1.5 form).

V1.5 is torchvision's form: the stride of a bottleneck sits on its 3x3
convolution. What is collected from a block is the sum of its branches *before*
the final ReLU, so the maps have negative values; the next block sees them
after the ReLU.

Parity: DistillFSS leaves its frozen backbone in training mode while it adapts,
so that BatchNorm normalises every image by its own statistics and moves the
running statistics with it. `encode_with_statistics` computes that form for many
images at once, and `update_statistics` replays the running statistics in any
order of forwards. Nothing here changes a module's state by itself.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import layers, params
from distillfss_jax.types import Array, Pyramid

MOMENTUM = 0.1  # of the newest statistics, as torch counts it
CLASSES = 1000  # of ImageNet, in the checkpoints' classifier
EXPANSION = 4  # channels of a bottleneck's output over those of its 3x3

# How a BatchNorm layer, given with its path, acts on its input.
Normalise = Callable[[str, layers.BatchNorm, Array], Array]

TORCH_NAMES = (
  (r'conv1\.weight', 'conv1/kernel', 'conv'),
  (r'bn1\.weight', 'bn1/scale', 'copy'),
  (r'bn1\.bias', 'bn1/bias', 'copy'),
  (r'bn1\.running_(mean|var)', r'bn1/\1', 'copy'),
  (
    r'layer(\d)\.(\d+)\.conv(\d)\.weight',
    r'layer\1/\2/conv\3/kernel',
    'conv',
  ),
  (r'layer(\d)\.(\d+)\.bn(\d)\.weight', r'layer\1/\2/bn\3/scale', 'copy'),
  (r'layer(\d)\.(\d+)\.bn(\d)\.bias', r'layer\1/\2/bn\3/bias', 'copy'),
  (
    r'layer(\d)\.(\d+)\.bn(\d)\.running_(mean|var)',
    r'layer\1/\2/bn\3/\4',
    'copy',
  ),
  (
    r'layer(\d)\.0\.downsample\.0\.weight',
    r'layer\1/0/downsample/conv/kernel',
    'conv',
  ),
  (
    r'layer(\d)\.0\.downsample\.1\.weight',
    r'layer\1/0/downsample/bn/scale',
    'copy',
  ),
  (
    r'layer(\d)\.0\.downsample\.1\.bias',
    r'layer\1/0/downsample/bn/bias',
    'copy',
  ),
  (
    r'layer(\d)\.0\.downsample\.1\.running_(mean|var)',
    r'layer\1/0/downsample/bn/\2',
    'copy',
  ),
  (r'(.*\.)?num_batches_tracked', '', 'drop'),
  (r'fc\.(weight|bias)', '', 'drop'),
)
TABLES = (TORCH_NAMES,)


def _conv(inputs, outputs, size, *, stride=1, rngs):
  return layers.Conv(
    inputs,
    outputs,
    size,
    stride=stride,
    kernel=layers.he_fan_out,
    bias=None,
    rngs=rngs,
  )


class Shortcut(nnx.Module):
  """The projection of a stage's first shortcut."""

  def __init__(self, inputs, outputs, *, stride, rngs):
    self.conv = _conv(inputs, outputs, 1, stride=stride, rngs=rngs)
    self.bn = layers.BatchNorm(outputs)


class Bottleneck(nnx.Module):
  """1x1, 3x3 (with the stride), 1x1 convolutions beside a shortcut."""

  def __init__(self, inputs, width, *, stride, project, rngs):
    outputs = EXPANSION * width
    self.conv1 = _conv(inputs, width, 1, rngs=rngs)
    self.bn1 = layers.BatchNorm(width)
    self.conv2 = _conv(width, width, 3, stride=stride, rngs=rngs)
    self.bn2 = layers.BatchNorm(width)
    self.conv3 = _conv(width, outputs, 1, rngs=rngs)
    self.bn3 = layers.BatchNorm(outputs)
    self.downsample = (
      Shortcut(inputs, outputs, stride=stride, rngs=rngs) if project else None
    )

  def __call__(self, x: Array, path: str, normalise: Normalise) -> Array:
    """The sum of both branches, before the ReLU."""
    y = nnx.relu(normalise(f'{path}/bn1', self.bn1, self.conv1(x)))
    y = nnx.relu(normalise(f'{path}/bn2', self.bn2, self.conv2(y)))
    y = normalise(f'{path}/bn3', self.bn3, self.conv3(y))
    if self.downsample is not None:
      shortcut = self.downsample
      x = normalise(f'{path}/downsample/bn', shortcut.bn, shortcut.conv(x))
    return y + x


class ResNet(nnx.Module):
  """A bottleneck ResNet without its classifier.

  Attributes:
    depths: blocks of each of the four stages.
    channels: channels of each stage's maps, 4 * width * 2**i.
    strides: pixels per feature, of each stage.
  """

  def __init__(self, *, depths=(3, 4, 6, 3), width=64, rngs):
    self.depths = tuple(depths)
    self.channels = tuple(EXPANSION * width * 2**i for i in range(4))
    self.strides = (4, 8, 16, 32)
    self.conv1 = _conv(3, width, 7, stride=2, rngs=rngs)
    self.bn1 = layers.BatchNorm(width)
    inputs = width
    for i, (depth, outputs) in enumerate(
      zip(self.depths, self.channels, strict=True)
    ):
      blocks = nnx.List()
      for j in range(depth):
        blocks.append(
          Bottleneck(
            inputs,
            outputs // EXPANSION,
            stride=2 if i and not j else 1,
            project=not j,
            rngs=rngs,
          )
        )
        inputs = outputs
      setattr(self, f'layer{i + 1}', blocks)

  def __call__(
    self, images: Array, *, train: bool = False, key: Array | None = None
  ) -> Pyramid:
    """The pyramid of images [b, H, W, 3] (normalised), by running statistics.

    Computes in the dtype of `images`. `train` and `key` change nothing: there
    is no randomness here, and the form with own statistics is a method of its
    own.
    """
    del train, key
    return self._encode(images, lambda path, bn, x: bn(x))

  def encode_with_statistics(
    self, images: Array, *, together: int = 1
  ) -> tuple[Pyramid, dict[str, Array]]:
    """The pyramid by own statistics, and those statistics.

    Args:
      images: [b, H, W, 3] float, normalised.
      together: how many consecutive images are one forward and share their
        statistics. The original passes one image at a time.

    Returns:
      The pyramid, and {path of a running statistic: [b / together, c]}, such
      as 'layer1/0/bn1/mean' and 'layer1/0/bn1/var' (unbiased), as
      `update_statistics` takes it.

    Raises:
      ValueError: b is no multiple of `together`, or a map is a single pixel.
    """
    if images.shape[0] % together:
      raise ValueError(
        f'{images.shape[0]} images are no multiple of together={together}'
      )
    statistics = {}

    def normalise(path, bn, x):
      y, mean, var = bn.by_own(x, together)
      statistics[f'{path}/mean'], statistics[f'{path}/var'] = mean, var
      return y

    pyramid = self._encode(images, normalise)
    return pyramid, statistics

  def _encode(self, images: Array, normalise: Normalise) -> Pyramid:
    x = nnx.relu(normalise('bn1', self.bn1, self.conv1(images)))
    x = jax.lax.reduce_window(
      x,
      -jnp.inf,
      jax.lax.max,
      window_dimensions=(1, 3, 3, 1),
      window_strides=(1, 2, 2, 1),
      padding=((0, 0), (1, 1), (1, 1), (0, 0)),
    )
    pyramid = []
    for i in range(1, 5):
      maps = []
      for j, block in enumerate(getattr(self, f'layer{i}')):
        maps.append(block(x, f'layer{i}/{j}', normalise))
        x = nnx.relu(maps[-1])
      pyramid.append(jnp.stack(maps, 1))
    return tuple(pyramid)


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


def torch_buffers(backbone: ResNet) -> dict[str, np.ndarray]:
  """What PyTorch keeps beside the parameters: here, nothing that counts."""
  return {}


def torch_unused(backbone: ResNet) -> dict[str, np.ndarray]:
  """What the original loads and never reads, {torch name: array}.

  BatchNorm counts its batches but, having a momentum, does not use the count.
  """
  norms = [p for p in params.shapes(backbone) if p.endswith('/mean')]
  means = params.to_torch(
    {path: np.zeros(0, np.float32) for path in norms}, TORCH_NAMES
  )
  counts = {
    name.replace('running_mean', 'num_batches_tracked'): np.zeros((), np.int64)
    for name in means
  }
  channels = backbone.channels[-1]
  return {
    **counts,
    'fc.weight': np.zeros((CLASSES, channels), np.float32),
    'fc.bias': np.zeros(CLASSES, np.float32),
  }


variants = {
  'resnet50': functools.partial(ResNet, depths=(3, 4, 6, 3)),
  'resnet101': functools.partial(ResNet, depths=(3, 4, 23, 3)),
  'resnet_tiny': functools.partial(ResNet, depths=(1, 1, 1, 1), width=16),
}
