"""What every backbone is: images to a pyramid, and its names elsewhere."""

import abc
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.params import Rules
from distillfss_jax.types import Array, Pyramid

Arrays = dict[str, np.ndarray]


class Backbone(nnx.Module):
  """An image encoder.

  Attributes:
    depths: maps of each stage.
    channels: channels of each stage's maps.
    strides: pixels per feature, of each stage.
  """

  depths: tuple[int, ...]
  channels: tuple[int, ...]
  strides: tuple[int, ...]

  @abc.abstractmethod
  def __call__(
    self, images: Array, *, train: bool = False, key: Array | None = None
  ) -> Pyramid:
    """The pyramid of images [b, H, W, 3] (normalised), in their dtype.

    `train` switches on what noise there is, which `key` decides.
    """

  @abc.abstractmethod
  def torch_tables(self) -> dict[str, Rules]:
    """The rules of all names its parameters have in PyTorch's files.

    By who names them so; the first are those that are written.
    """

  def torch_buffers(self) -> Arrays:
    """What PyTorch keeps beside the parameters, and is computed here."""
    return {}

  def torch_unused(self, tensors: Mapping[str, np.ndarray]) -> Arrays:
    """What else the original loads and never reads, {torch name: array}.

    Args:
      tensors: the parameters under the first names of `torch_tables`.
    """
    del tensors
    return {}


class Staged(Backbone):
  """A convolutional backbone whose stages can be called one by one.

  `normalise` is how every BatchNorm acts on its input: by its running
  statistics, if nothing else is said; or, to train them as part of a batch,
  `lambda norm, x: norm.train(x, valid, axis)`.
  """

  @abc.abstractmethod
  def stem(
    self, images: Array, normalise: layers.Normalise = layers.by_running
  ) -> Array:
    """What the first stage reads, of images [b, H, W, 3]."""

  @abc.abstractmethod
  def stage(
    self, i: int, x: Array, normalise: layers.Normalise = layers.by_running
  ) -> tuple[Array, ...]:
    """The maps [b, h, w, c] of stage i, from 0 on; its pyramid's, in turn.

    Args:
      i: which stage.
      x: what it reads: `stem`'s, or the last map before after `activate`.
      normalise: see the class.
    """

  def activate(self, x: Array) -> Array:
    """A stage's last map as what follows reads it."""
    return x

  def features(
    self, images: Array, normalise: layers.Normalise = layers.by_running
  ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """What a dense segmenter reads, and what distillers compare.

    Returns:
      The last map [b, h, w, c] of each stage as what follows reads it; and, of
      each stage, a map before its activation, by default the same one.
    """
    x, read, compared = self.stem(images, normalise), [], []
    for i in range(len(self.depths)):
      compared.append(self.stage(i, x, normalise)[-1])
      x = self.activate(compared[-1])
      read.append(x)
    return tuple(read), tuple(compared)

  def compared(self) -> tuple[tuple[int, layers.BatchNorm], ...]:
    """Of the second of `features`: channels, and the norm each comes from."""
    raise ValueError(f'a {type(self).__name__} has no features for distillers')

  def __call__(
    self, images: Array, *, train: bool = False, key: Array | None = None
  ) -> Pyramid:
    """The pyramid of images [b, H, W, 3] (normalised), by running statistics.

    Computes in the dtype of `images`. `train` and `key` change nothing: there
    is no randomness here, and statistics of a batch are asked for by name.
    """
    del train, key
    return self.encode(images)

  def encode(
    self, images: Array, normalise: layers.Normalise = layers.by_running
  ) -> Pyramid:
    """The pyramid of images [b, H, W, 3]; for `normalise` see the class."""
    x = self.stem(images, normalise)
    pyramid = []
    for i in range(len(self.depths)):
      maps = self.stage(i, x, normalise)
      pyramid.append(stack(maps))
      x = self.activate(maps[-1])
    return tuple(pyramid)

  def encode_with_statistics(
    self, images: Array, *, together: int = 1
  ) -> tuple[Pyramid, dict[str, Array]]:
    """The pyramid by own statistics, and those statistics.

    Args:
      images: [b, H, W, 3] float, normalised.
      together: how many consecutive images are one forward and share their
        statistics. The original of DistillFSS passes one image at a time.

    Returns:
      The pyramid, and {path of a running statistic: [b / together, c]}, such
      as 'layer1/0/bn1/mean' and 'layer1/0/bn1/var' (unbiased), as
      `resnet.update_statistics` takes it.

    Raises:
      ValueError: b is no multiple of `together`, or a map is a single pixel.
    """
    if images.shape[0] % together:
      raise ValueError(
        f'{images.shape[0]} images are no multiple of together={together}'
      )
    paths = {
      id(module): '/'.join(map(str, path))
      for path, module in nnx.iter_modules(self)
    }
    statistics = {}

    def normalise(norm, x):
      y, mean, var = norm.by_own(x, together)
      path = paths[id(norm)]
      statistics[f'{path}/mean'], statistics[f'{path}/var'] = mean, var
      return y

    return self.encode(images, normalise), statistics


def stack(maps: Sequence[Array]) -> Array:
  """Maps [b, h, w, c] of one size as [b, l, h, w, c], filled up with zeros."""
  widest = max(x.shape[-1] for x in maps)
  fill = ((0, 0),) * 3
  return jnp.stack(
    [jnp.pad(x, (*fill, (0, widest - x.shape[-1]))) for x in maps], 1
  )


def max_pool(x: Array, size: int, stride: int, pads: tuple) -> Array:
  """Largest values of windows over [b, h, w, c]; what pads is below all.

  `pads` ((top, bottom), (left, right)) are how many pixels.
  """
  return jax.lax.reduce_window(
    x,
    -jnp.inf,
    jax.lax.max,
    window_dimensions=(1, size, size, 1),
    window_strides=(1, stride, stride, 1),
    padding=((0, 0), *pads, (0, 0)),
  )
