"""What every few-shot segmenter is: encode, memorize, correlate, decode.

    encode    images                 -> pyramid     once per image
    memorize  support pyramid, masks -> memory      once per support set
    correlate pyramid, memory        -> coarse maps the only look at the support
    decode    pyramid, coarse maps   -> logits

A student replaces `correlate` by a small function of the query's pyramid, and
keeps the rest (`distilled.py`).
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import layers, params
from distillfss_jax.ops import resize, ways
from distillfss_jax.types import Answer, Array, Prediction, Pyramid

# ImageNet's statistics of RGB in [0, 1], which most backbones expect.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalise(images: Array, backbone: nnx.Module | None = None) -> Array:
  """uint8 RGB to what a backbone expects; floats are taken as such.

  A backbone says it with `mean` and `std`, of RGB in [0, 1]; one that does not
  expects ImageNet's.
  """
  if images.dtype != jnp.uint8:
    return images
  return centred(images.astype(jnp.float32) / 255, backbone)


def centred(images: Array, backbone: nnx.Module | None = None) -> Array:
  """RGB in [0, 1] to what a backbone expects; see `normalise`."""
  mean = getattr(backbone, 'mean', MEAN)
  return (images - mean) / getattr(backbone, 'std', STD)


@dataclasses.dataclass(frozen=True)
class Slot:
  """One thing that a query's answer takes from the support.

  A student learns its slots: what they hold is a function of the query then.

  kind: 'maps' over the query's grid, or 'vector', the same for every query.
  channels: of the maps of a level, or of the vector.
  stage: 0..3, of the query's pyramid, that maps are read from.
  inputs: channels of that stage.
  per_block: whether every block of the stage gives a map of its own, by the
    same function (`channels` is then 1); else the last block gives all.
  every: of so many of the stage's rows and columns a map has one.
  """

  kind: str
  channels: int
  stage: int = 0
  inputs: int = 0
  per_block: bool = False
  every: int = 1


class DenseSegmenter(nnx.Module):
  """A segmenter of fixed classes; see `types.Answer` for what it says.

  Attributes:
    backbone: images [b, H, W, 3] to maps.
    classes: background included.
    multiple: what sides of images have to be multiples of.
    heads: how many binary answers it gives beside each other, for losses and
      distillers that look at them; 0 where there is but one.
    optional: names of modules that a file may lack; they then stay as drawn.
  """

  backbone: nnx.Module
  classes: int
  multiple: int = 1
  heads: int = 0
  optional: tuple[str, ...] = ()

  @abc.abstractmethod
  def answer(
    self,
    images: Array,
    *,
    keys: Array | None = None,
    normalise: layers.Normalise = layers.by_running,
  ) -> Answer:
    """What it says of images [b, H, W, 3], uint8 or normalised.

    Args:
      images: uint8 or normalised.
      keys: [b], a JAX key for each image, where noise acts as in training.
      normalise: how every BatchNorm acts; see `backbones.base.Staged`.
    """

  @property
  def features(self) -> Mapping[str, tuple[int, layers.BatchNorm | None]]:
    """Of each of an answer's features: channels, and the norm it comes from."""
    return {}

  @property
  def attended(self) -> Mapping[str, int]:
    """The channels of each of an answer's attended maps."""
    return {}

  @classmethod
  def sets(cls) -> Mapping[str, tuple[str, ...]]:
    """Named sets of its parameters, {name: regex of paths below itself}."""
    return {
      'backbone': ('backbone/.*',),
      'decoder': ('(?!backbone/).*',),
    }

  def torch_tables(self) -> dict[str, params.Rules]:
    """How files name its tensors, by who names them so; see `weights.py`."""
    raise ValueError(f'no other program has a {type(self).__name__}')

  def torch_buffers(self) -> dict[str, np.ndarray]:
    """What PyTorch keeps beside the parameters, {torch name: array}."""
    return {}

  def torch_unused(
    self, tensors: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """What else the original keeps; by default the norms' counts of batches."""
    return layers.torch_counts(tensors)


class FewShotSegmenter(nnx.Module):
  """A binary few-shot segmenter; `segment` maps it over ways.

  j counts *selections*: the ways, times the votes of each way when voting cuts
  its shots into groups (`ops/ways.py`).

  Attributes:
    backbone: images [b, H, W, 3] to a pyramid.
    voting: shots of a vote, or None.
    dtype: of the arithmetic; parameters, softmax and logits stay float32.
  """

  backbone: nnx.Module
  voting: int | None
  dtype: str

  @property
  def masks_support(self) -> bool:
    """Whether `encode_support` depends on the masks: it is its own then."""
    common = FewShotSegmenter.encode_support
    return type(self).encode_support is not common

  @classmethod
  def sets(cls) -> Mapping[str, tuple[str, ...]]:
    """Named sets of its parameters, {name: regex of paths below itself}."""
    return {}

  @property
  def slots(self) -> tuple[Slot, ...]:
    """What a student of it learns: one slot for each level of `correlate`."""
    raise ValueError(f'a {type(self).__name__} has nothing a student imitates')

  def lessons(self, coarse: tuple[Array, ...]) -> tuple[Array, ...]:
    """What of `correlate` a student imitates, in the order of `slots`."""
    return tuple(coarse)

  def unteachable(self) -> str:
    """Why its settings leave a student nothing to learn; '' if they do not."""
    return ''

  def torch_tables(self) -> dict[str, params.Rules]:
    """How files name its tensors, by who names them so; see `weights.py`."""
    raise ValueError(f'no other program has a {type(self).__name__}')

  def torch_buffers(self) -> dict[str, np.ndarray]:
    """What PyTorch keeps beside the parameters, {torch name: array}."""
    return {}

  def torch_unused(
    self, tensors: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """What else the original loads and never reads, {torch name: array}.

    Args:
      tensors: the parameters under the first names of `torch_tables`.
    """
    del tensors
    return {}

  def encode(self, images: Array) -> Pyramid:
    """Images [..., H, W, 3], uint8 or normalised, to maps [..., l, h, w, c]."""
    lead = images.shape[:-3]
    flat = self.normalised(images.reshape(-1, *images.shape[-3:]))
    pyramid = self.keep(self.backbone(flat))
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in pyramid)

  def encode_support(self, images: Array, masks: Array) -> Pyramid:
    """The pyramid of support images, as `memorize` takes it.

    Here what `encode` gives, so that an image is encoded once for all its
    uses. Methods that mask the support, its images or between two stages, do it
    here.

    Args:
      images: [..., H, W, 3], uint8 or normalised.
      masks: [..., H, W, n] in {0, 1}.
    """
    del masks
    return self.encode(images)

  def normalised(self, images: Array) -> Array:
    """Images as the backbone takes them, in `dtype`."""
    return normalise(images, self.backbone).astype(self.dtype)

  def keep(self, pyramid: Pyramid) -> Pyramid:
    """What of a backbone's pyramid the method reads; the rest is not kept."""
    return pyramid

  @abc.abstractmethod
  def memorize(
    self,
    pyramid: Pyramid,
    masks: Array,
    present: Array,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> Any:
    """What a query needs of the support.

    Args:
      pyramid: of the support images, [b, s, l, h, w, c].
      masks: [b, s, H, W, n] in {0, 1}, of any size.
      present: [b, s, n] bool.
      train: whether dropout acts; then `keys` [b] is one JAX key per episode.
    """

  def memorize_images(self, images: Array, masks: Array, present: Array) -> Any:
    """`memorize` of images [b, s, H, W, 3], uint8 or normalised, for tests.

    A method whose memory is large finds it here without ever holding the
    pyramids of all shots.
    """
    pyramid = self.encode_support(images, masks)
    return self.memorize(pyramid, masks, present)

  @abc.abstractmethod
  def correlate(
    self,
    pyramid: Pyramid,
    memory: Any,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> tuple[Array, ...]:
    """Coarse maps [b, j, h, w, m] per level, in the pyramid's order.

    The memory's b may be 1: every query then looks at the same support.
    """

  @abc.abstractmethod
  def decode(
    self, pyramid: Pyramid, coarse: tuple[Array, ...], memory: Any = None
  ) -> Array:
    """Logits [b, j, H, W, 2] at the decoder's own size.

    Of `coarse` it reads the `lessons` alone, which a student gives, too.
    """

  def segment(
    self,
    pyramid: Pyramid,
    memory: Any,
    size: tuple[int, int],
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> Prediction:
    """Answers queries by looking at a memory, merged over ways.

    `size` is that of the logits wanted, usually the images'.
    """
    coarse = self.correlate(pyramid, memory, train=train, keys=keys)
    logits = self.decode(pyramid, coarse, memory)
    return self.conclude(logits, coarse, memory.present, size)

  def conclude(
    self,
    logits: Array,
    coarse: tuple[Array, ...],
    present: Array,
    size: tuple[int, int],
  ) -> Prediction:
    """Resizes, votes and merges the binary answers [b, j, H, W, 2].

    `present` [b, s, n, v] bool: the shots of each way's votes.
    """
    b = logits.shape[0]
    some = jnp.broadcast_to(present.any(1), (b, *present.shape[2:]))
    logits = resize.bilinear(logits.astype(jnp.float32), size)
    logits = ways.vote(logits.reshape(*some.shape, *logits.shape[2:]), some)
    return Prediction(ways.merge(logits, some.any(-1)), coarse)
