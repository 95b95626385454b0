"""Students: what a teacher sees in its support, as a function of the query.

DistillFSS (2512.05613, section 3) replaces a segmenter's `correlate` by one
small network per class that reads the query's pyramid alone; encoder and
decoder stay the teacher's. Here the students of all ways are one module whose
parameters have a leading axis n.
"""

import abc

import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers, params
from distillfss_jax.models import base
from distillfss_jax.ops import conv, resize, ways
from distillfss_jax.types import Array, Prediction, Pyramid

# Names of the original's full student, without the 'student.' prefix.
TORCH_NAMES = (
  (
    r'(\d+)\.coarse_extractor\.(\d)\.0\.weight',
    r'levels/\2/conv/kernel@\1',
    'conv',
  ),
  (
    r'(\d+)\.coarse_extractor\.(\d)\.0\.bias',
    r'levels/\2/conv/bias@\1',
    'copy',
  ),
  (
    r'(\d+)\.coarse_extractor\.(\d)\.2\.weight',
    r'levels/\2/score/kernel@\1',
    'conv',
  ),
  (
    r'(\d+)\.coarse_extractor\.(\d)\.2\.bias',
    r'levels/\2/score/bias@\1',
    'copy',
  ),
)


class WayConv(nnx.Module):
  """A convolution of its own for each way; torch's default initialisation."""

  def __init__(self, ways, size, inputs, outputs, *, rngs):
    fan_in, shape = size * size * inputs, (ways, size, size, inputs, outputs)
    self.kernel = nnx.Param(layers.uniform(rngs, shape, fan_in))
    self.bias = nnx.Param(layers.uniform(rngs, (ways, outputs), fan_in))

  def from_shared(self, x: Array) -> Array:
    """The same maps [..., h, w, c] for all ways to [..., h, w, n, c']."""
    kernel = self.kernel[...].astype(x.dtype)
    n, kh, kw, c, outputs = kernel.shape
    kernel = jnp.moveaxis(kernel, 0, 3).reshape(kh, kw, c, n * outputs)
    y = conv.conv2d(x, kernel)
    return y.reshape(*y.shape[:-1], n, outputs) + self.bias[...].astype(x.dtype)

  def from_own(self, x: Array) -> Array:
    """Each way's own maps [..., h, w, n, c] to [..., h, w, n, c']."""
    kernel, bias = self.kernel[...].astype(x.dtype), self.bias[...]
    if kernel.shape[1:3] == (1, 1):
      y = jnp.einsum('...nc,ncd->...nd', x, kernel[:, 0, 0])
    else:
      y = jax.vmap(conv.conv2d, in_axes=(-2, 0), out_axes=-2)(x, kernel)
    return y + bias.astype(x.dtype)


class ClassDistiller(nnx.Module):
  """Imitates `correlate`, one network per way and slot of the teacher.

  Args:
    ways: number of foreground classes.
    slots: what the teacher declares (`FewShotSegmenter.slots`).
    rngs: of the initialisation.

  Attributes:
    levels: one module per slot; see `Level`.
  """

  level: type[nnx.Module]

  def __init__(self, ways: int, slots: tuple[base.Slot, ...], *, rngs):
    self.slots = tuple(slots)
    self.levels = nnx.List(
      [
        Vector(ways, slot.channels)
        if slot.kind == 'vector'
        else self.level(ways, slot.inputs, slot.channels, rngs=rngs)
        for slot in slots
      ]
    )

  def torch_tables(self) -> dict[str, params.Rules]:
    """How the original's files name its tensors; see `weights.py`."""
    raise ValueError(
      f'{type(self).__name__} has no counterpart in the original: only '
      "student='full' has"
    )

  def torch_buffers(self):
    """PyTorch keeps nothing beside the parameters."""
    return {}

  def torch_unused(self, tensors):
    """The original reads all that it loads."""
    del tensors
    return {}

  def __call__(self, pyramid: Pyramid) -> tuple[Array, ...]:
    """Coarse maps [b, n, h, w, m] per slot, in the slots' order."""
    coarse = []
    for slot, level in zip(self.slots, self.levels, strict=True):
      x = pyramid[slot.stage][:, :, :: slot.every, :: slot.every]
      y = level(x if slot.per_block else x[:, -1:])  # [b, l, h, w, n, m]
      if slot.per_block:  # of each block one map
        coarse.append(y[..., 0].transpose(0, 4, 2, 3, 1))
      else:
        coarse.append(y[:, 0].transpose(0, 3, 1, 2, 4))
    return tuple(coarse)


class Vector(nnx.Module):
  """A slot that no query changes: a constant of each way, 0 at the start."""

  def __init__(self, ways, channels):
    self.value = nnx.Param(jnp.zeros((ways, channels)))

  def __call__(self, x: Array) -> Array:
    """[b, l, h, w, c] to [b, 1, 1, 1, n, m]."""
    value = self.value[...].astype(x.dtype)
    return jnp.broadcast_to(value, (len(x), 1, 1, 1, *value.shape))


class Level(nnx.Module, abc.ABC):
  """The students of one slot of maps."""

  @abc.abstractmethod
  def __call__(self, x: Array) -> Array:
    """[b, l, h, w, c] to [b, l, h, w, n, m]."""


class FullLevel(Level):
  """3x3 convolution at full width, ReLU, 1x1 to the maps (the paper's)."""

  def __init__(self, ways, channels, maps, *, rngs):
    self.conv = WayConv(ways, 3, channels, channels, rngs=rngs)
    self.score = WayConv(ways, 1, channels, maps, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    return self.score.from_own(nnx.relu(self.conv.from_shared(x)))


class LightLevel(Level):
  """1x1 to 128 channels, 3x3, 1x1: the full one's field, a 20th of its work.

  Ours, not the paper's. On a ResNet-50 the full heads have 50 M parameters per
  class and do six times the work of the backbone; these have 0.9 M.
  """

  width = 128

  def __init__(self, ways, channels, maps, *, rngs):
    self.reduce = WayConv(ways, 1, channels, self.width, rngs=rngs)
    self.conv = WayConv(ways, 3, self.width, self.width, rngs=rngs)
    self.score = WayConv(ways, 1, self.width, maps, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    x = nnx.relu(self.reduce.from_shared(x))
    return self.score.from_own(nnx.relu(self.conv.from_own(x)))


class AttentionLevel(Level):
  """Attention to 32 learned keys in place of the support, then 1x1 to one map.

  Keys serve as values too. All that follows the softmax is linear, so a key's
  value is one number per head; and the query projection only meets the keys,
  so both fold into one [c, heads * 32] product.
  """

  keys_per_way, heads = 32, 8

  def __init__(self, ways, channels, maps, *, rngs):
    if maps != 1:
      raise ValueError(
        f"student 'attention' gives one map a block, not {maps}: use 'full' or "
        "'light'"
      )
    if channels % self.heads:
      raise ValueError(
        f'{self.heads} heads do not divide {channels} channels: use another '
        'student or a wider backbone'
      )
    shape = (ways, channels, channels)
    # The original's three projections are one matrix.
    fans = (channels, 3 * channels)
    self.keys = nnx.Param(
      jax.random.normal(rngs.params(), (ways, self.keys_per_way, channels))
    )
    self.query = nnx.Param(layers.xavier(rngs, shape, *fans))
    self.key = nnx.Param(layers.xavier(rngs, shape, *fans))
    self.value = nnx.Param(layers.xavier(rngs, shape, *fans))
    self.query_bias = nnx.Param(jnp.zeros((ways, channels)))
    self.key_bias = nnx.Param(jnp.zeros((ways, channels)))
    self.value_bias = nnx.Param(jnp.zeros((ways, channels)))
    self.out = nnx.Param(layers.uniform(rngs, shape, channels))
    self.out_bias = nnx.Param(jnp.zeros((ways, channels)))
    self.score = WayConv(ways, 1, channels, 1, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    n, c = self.keys.shape[0], self.keys.shape[-1]
    d = c // self.heads

    def split(y):
      return y.reshape(*y.shape[:-1], self.heads, d)

    keys, score = self.keys[...], self.score.kernel[...][:, 0, 0, :, 0]
    k = split(
      jnp.einsum('nkc,nce->nke', keys, self.key[...])
      + self.key_bias[...][:, None]
    )
    v = split(
      jnp.einsum('nkc,nce->nke', keys, self.value[...])
      + self.value_bias[...][:, None]
    )
    out = split(jnp.einsum('nce,ne->nc', self.out[...], score))
    v = jnp.einsum('nkad,nad->nak', v, out)
    query = self.query[...].reshape(n, c, self.heads, d)
    fold = jnp.einsum('ncad,nkad->cnak', query, k) * d**-0.5
    shift = jnp.einsum('nad,nkad->nak', split(self.query_bias[...]), k)
    logits = jnp.einsum('...c,cnak->...nak', x, fold.astype(x.dtype))
    share = jax.nn.softmax(
      logits.astype(jnp.float32) + shift * d**-0.5, axis=-1
    )
    constant = (self.out_bias[...] * score).sum(-1) + self.score.bias[...][:, 0]
    y = jnp.einsum('...nak,nak->...n', share, v) + constant
    return y[..., None].astype(x.dtype)


class FullDistiller(ClassDistiller):
  """The paper's student."""

  level = FullLevel

  def torch_tables(self):
    return {'DistillFSS': TORCH_NAMES}


class LightDistiller(ClassDistiller):
  """A student for small machines."""

  level = LightLevel


class AttentionDistiller(ClassDistiller):
  """The paper's other student, of learned keys."""

  level = AttentionLevel


variants = {
  'full': FullDistiller,
  'light': LightDistiller,
  'attention': AttentionDistiller,
}


def build(name, ways, teacher, rngs):
  """The students of a teacher, by the name of their kind.

  Raises:
    ValueError: there is no such kind, or the teacher has nothing to imitate.
  """
  if name not in variants:
    raise ValueError(
      f'no student {name!r}; there are: {", ".join(sorted(variants))}'
    )
  return variants[name](ways, teacher.slots, rngs=rngs)


class DistilledSegmenter(nnx.Module):
  """A teacher whose memory has moved from data into parameters.

  Shares the teacher's encoder and decoder; looks at no support.
  """

  def __init__(self, teacher: base.FewShotSegmenter, student: ClassDistiller):
    self.teacher, self.student = teacher, student

  def correlate(self, pyramid: Pyramid) -> tuple[Array, ...]:
    """Coarse maps [b, n, h, w, m] per level from the query alone."""
    return self.student(pyramid)

  def segment(self, pyramid: Pyramid, size: tuple[int, int]) -> Prediction:
    """Answers queries, merged over the students' ways."""
    coarse = self.correlate(pyramid)
    logits = self.teacher.decode(pyramid, coarse)
    everywhere = jnp.ones(coarse[0].shape[:2], bool)
    return conclude(logits, coarse, everywhere, size)


def conclude(
  logits: Array, coarse: tuple[Array, ...], some: Array, size: tuple[int, int]
) -> Prediction:
  """Merges the students' binary answers [b, n, H, W, 2] and resizes them.

  `some` [b, n] bool: the ways that count.
  """
  # Parity: a teacher's answers are resized, corners aligned, and then merged; a
  # student's are merged at the decoder's size and then resized by half pixels.
  # They differ only where the decoder's size is not the image's (`mix_size`).
  merged = ways.merge(logits.astype(jnp.float32), some)
  return Prediction(resize.bilinear(merged, size, align_corners=False), coarse)
