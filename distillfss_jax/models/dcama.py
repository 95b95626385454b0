"""DCAMA: where does a query's attention fall on the support's masks?

Dense Cross-query-and-support Attention weighted Mask Aggregation (2207.08549),
the teacher of DistillFSS (2512.05613). For every block of the backbone's last
three stages, each query token attends to all tokens of all support images; the
share of its attention that falls on the mask is a coarse map. A decoder merges
the maps of the three strides and refines them with the query's own shallow
maps.

The numbering follows the original's: attention 0, 1, 2 belongs to stages 2, 3,
4, but conv1 reads the deepest maps.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import layers, models, params
from distillfss_jax.models import base
from distillfss_jax.ops import attention, conv, random, resize, ways
from distillfss_jax.types import Array, Pyramid

GROUPS = 4  # of the decoder's group norms
EPSILON = 1e-5
WIDTH = 128  # of the decoder

# Names of the original's checkpoints, without the 'model.' prefix.
TORCH_NAMES = (
  (
    r'DCAMA_blocks\.(\d)\.linears\.0\.weight',
    r'attention/\1/query/kernel',
    'linear',
  ),
  (r'DCAMA_blocks\.(\d)\.linears\.0\.bias', r'attention/\1/query/bias', 'copy'),
  (
    r'DCAMA_blocks\.(\d)\.linears\.1\.weight',
    r'attention/\1/key/kernel',
    'linear',
  ),
  (r'DCAMA_blocks\.(\d)\.linears\.1\.bias', r'attention/\1/key/bias', 'copy'),
  (r'pe\.\d\.pe', '', 'drop'),
  *(
    rule
    for torch, ours in ((0, 0), (3, 1), (6, 2))
    for rule in (
      (rf'conv(\d)\.{torch}\.weight', rf'conv\1/convs/{ours}/kernel', 'conv'),
      (rf'conv(\d)\.{torch}\.bias', rf'conv\1/convs/{ours}/bias', 'copy'),
      (
        rf'conv(\d)\.{torch + 1}\.weight',
        rf'conv\1/norms/{ours}/scale',
        'copy',
      ),
      (rf'conv(\d)\.{torch + 1}\.bias', rf'conv\1/norms/{ours}/bias', 'copy'),
    )
  ),
  *(
    rule
    for torch, ours in ((0, 0), (2, 1))
    for rule in (
      (rf'mixer(\d)\.{torch}\.weight', rf'mixer\1/{ours}/kernel', 'conv'),
      (rf'mixer(\d)\.{torch}\.bias', rf'mixer\1/{ours}/bias', 'copy'),
    )
  ),
)

_TABLE = 10000  # rows of the original's table of positions
_SHOTS = 3  # the axis of keys that counts them


@flax.struct.dataclass
class Memory:
  """A support set as DCAMA sees it.

  keys: per level [b, l, a, s, t, d].   values: per level [b, s, t, j].
  present: [b, s, n, v] bool, the shots of each way's votes (n * v = j).
  skips: shallow support maps [b, j, h, w, c] of strides 8 and 4, or ().
  """

  keys: tuple[Array, ...]
  values: tuple[Array, ...]
  present: Array
  skips: tuple[Array, ...]


class ConvBlock(nnx.Module):
  """Three times convolution, group norm, ReLU."""

  def __init__(self, inputs, widths, kernels, *, rngs):
    self.convs, self.norms = nnx.List(), nnx.List()
    for width, size in zip(widths, kernels, strict=True):
      self.convs.append(layers.Conv(inputs, width, size, rngs=rngs))
      self.norms.append(
        nnx.GroupNorm(
          width, GROUPS, epsilon=EPSILON, use_fast_variance=False, rngs=rngs
        )
      )
      inputs = width

  def __call__(self, x: Array) -> Array:
    for layer, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(layer(x)).astype(x.dtype))
    return x


class Attention(nnx.Module):
  """The query and key projections of one stage, shared by its blocks."""

  def __init__(self, channels, *, rngs):
    self.query = layers.Linear(channels, channels, rngs=rngs)
    self.key = layers.Linear(channels, channels, rngs=rngs)


class DCAMA(base.FewShotSegmenter):
  """The teacher of DistillFSS.

  Args:
    backbone: of four stages; see `backbones/`.
    heads: attention heads.
    dropout: rate, of tokens after the position and of attention weights.
    positional: whether token positions are added (and the tokens dropped out).
    concat_support: whether the decoder also reads the support's shallow maps.
    voting: shots that answer together; None for all.
    mix_size: side of the maps that enter the mixers; None for stride 4's own.
    dtype: see `FewShotSegmenter`.
    rngs: of the initialisation.
  """

  # Parity: at any image size the original brings the mixed maps to 96 pixels
  # (stride 4 of its 384 pixel images) before the mixers. `mix_size=96` does.

  def __init__(
    self,
    backbone,
    *,
    heads=8,
    dropout=0.5,
    positional=True,
    concat_support=False,
    voting=None,
    mix_size=None,
    dtype='float32',
    rngs,
  ):
    self.backbone = backbone
    self.heads, self.dropout, self.positional = heads, dropout, positional
    self.concat_support, self.voting = concat_support, voting
    self.mix_size, self.dtype = mix_size, dtype
    channels, maps = backbone.channels, backbone.depths
    for c in channels[1:]:
      if c % heads:
        raise ValueError(f'{heads} heads do not divide {c} channels')
    self.attention = nnx.List([Attention(c, rngs=rngs) for c in channels[1:]])
    grow, keep = (16, 64, WIDTH), (WIDTH,) * 3
    self.conv1 = ConvBlock(maps[3], grow, (3, 3, 3), rngs=rngs)
    self.conv2 = ConvBlock(maps[2], grow, (5, 3, 3), rngs=rngs)
    self.conv3 = ConvBlock(maps[1], grow, (5, 5, 3), rngs=rngs)
    self.conv4 = ConvBlock(WIDTH, keep, (3, 3, 3), rngs=rngs)
    self.conv5 = ConvBlock(WIDTH, keep, (3, 3, 3), rngs=rngs)
    inputs = WIDTH + (channels[0] + channels[1]) * (2 if concat_support else 1)
    self.mixer1 = nnx.List(
      [
        layers.Conv(inputs, WIDTH, 3, rngs=rngs),
        layers.Conv(WIDTH, 64, 3, rngs=rngs),
      ]
    )
    self.mixer2 = nnx.List(
      [layers.Conv(64, 64, 3, rngs=rngs), layers.Conv(64, 16, 3, rngs=rngs)]
    )
    self.mixer3 = nnx.List(
      [layers.Conv(16, 16, 3, rngs=rngs), layers.Conv(16, 2, 3, rngs=rngs)]
    )

  @classmethod
  def sets(cls):
    mixing = (r'conv[123]/.*', r'mixer[123]/.*')
    return {
      'A': mixing,
      'B': (*mixing, r'conv[45]/.*'),
      'C': (*mixing, r'attention/.*'),
      'D': (*mixing, r'conv[45]/.*', r'attention/.*'),
    }

  @property
  def slots(self):
    return tuple(
      base.Slot('maps', 1, stage, channels, per_block=True)
      for stage, channels in enumerate(self.backbone.channels)
      if stage
    )

  def unteachable(self):
    if self.voting:
      return (
        f'model.fields.voting={self.voting}: a student imitates one coarse map '
        'per way, not one per vote; set it to 0'
      )
    if self.concat_support:
      return (
        'model.fields.concat_support=True: the decoder would need support '
        'maps, which a student does not have; set it to False'
      )
    return ''

  def torch_tables(self):
    return {
      naming: (
        *params.prefixed(table, 'feature_extractor.', 'backbone/'),
        *params.prefixed(TORCH_NAMES, 'model.', ''),
      )
      for naming, table in self.backbone.torch_tables().items()
    }

  def torch_buffers(self):
    found = {
      f'feature_extractor.{name}': x
      for name, x in self.backbone.torch_buffers().items()
    }
    if self.positional:
      for i, c in enumerate(self.backbone.channels[1:]):
        found[f'model.pe.{i}.pe'] = positions(_TABLE, c)[None]
    return found

  def torch_unused(self, tensors):
    prefix = 'feature_extractor.'
    own = {
      name.removeprefix(prefix): x
      for name, x in tensors.items()
      if name.startswith(prefix)
    }
    unused = self.backbone.torch_unused(own)
    return {f'{prefix}{name}': x for name, x in unused.items()}

  def keep(self, pyramid: Pyramid) -> Pyramid:
    """Of stage 1 only the last map is read, as a skip."""
    return (pyramid[0][:, -1:], *pyramid[1:])

  def memorize(
    self,
    pyramid: Pyramid,
    masks: Array,
    present: Array,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> Memory:
    present = ways.selections(present, self.voting)
    seeds = [_seeds(keys, i) if train else None for i in range(3)]
    skips = ()
    if self.concat_support:
      skips = tuple(
        _brightest(x[:, :, -1], present) for x in (pyramid[1], pyramid[0])
      )
    sizes = [x.shape[3:5] for x in pyramid[1:]]
    return Memory(
      self._keys(pyramid, seeds), _values(masks, sizes, present), present, skips
    )

  def memorize_images(self, images, masks, present):
    """Shot by shot, straight into place: keys are as large as the pyramids."""
    if self.concat_support:
      return super().memorize_images(images, masks, present)
    present, shots = ways.selections(present, self.voting), images.shape[1]

    def keys_of(shot):
      return self._keys(self.encode(shot))

    def put(i, held):
      shot = jax.lax.dynamic_slice_in_dim(images, i, 1, axis=1)
      return tuple(
        jax.lax.dynamic_update_slice_in_dim(x, k, i, _SHOTS)
        for x, k in zip(held, keys_of(shot), strict=True)
      )

    one = images[:, :1]
    held = tuple(
      jnp.zeros((*x.shape[:_SHOTS], shots, *x.shape[_SHOTS + 1 :]), x.dtype)
      for x in jax.eval_shape(keys_of, one)
    )
    held = jax.lax.fori_loop(0, shots, put, held)
    sizes = [x.shape[3:5] for x in jax.eval_shape(self.encode, one)[1:]]
    return Memory(held, _values(masks, sizes, present), present, ())

  def _keys(self, pyramid, seeds=(None,) * 3):
    """Keys of the support's tokens, per level [b, l, a, s, t, d]."""
    held = []
    for x, level, seed in zip(pyramid[1:], self.attention, seeds, strict=True):
      k = level.key(self._tokens(x.swapaxes(1, 2), seed))
      held.append(self._split(k).transpose(0, 1, 4, 2, 3, 5))
    return tuple(held)

  def correlate(
    self,
    pyramid: Pyramid,
    memory: Memory,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> tuple[Array, ...]:
    b, s = pyramid[0].shape[0], memory.present.shape[1]
    present = memory.present.reshape(memory.present.shape[0], s, -1)
    coarse = []
    for i, x in enumerate(pyramid[1:]):
      seed = _seeds(keys, i + 3) if train else None
      q = self.attention[i].query(self._tokens(x, seed))
      q = self._split(q).swapaxes(2, 3)  # [b, l, a, q, d]
      q = q * q.shape[-1] ** -0.5
      if train:
        share = attention.attend(
          q,
          memory.keys[i],
          memory.values[i],
          present,
          _seeds(keys, i + 6),
          self.dropout,
        )
      else:
        share = attention.attend_memory(
          q, memory.keys[i], memory.values[i], present
        )
      share = share.reshape(b, -1, *x.shape[2:4], share.shape[-1])
      coarse.append(share.transpose(0, 4, 2, 3, 1).astype(self.dtype))
    return tuple(coarse)

  def decode(
    self,
    pyramid: Pyramid,
    coarse: tuple[Array, ...],
    memory: Memory | None = None,
  ) -> Array:
    """Any j: teacher and students of all ways go through in one pass."""
    b, j = coarse[0].shape[:2]
    fine, middle, deep = (x.reshape(b * j, *x.shape[2:]) for x in coarse)
    f1, f2, f3 = self.conv1(deep), self.conv2(middle), self.conv3(fine)
    x = self.conv4(resize.bilinear(f1, f2.shape[1:3]) + f2)
    x = self.conv5(resize.bilinear(x, f3.shape[1:3]) + f3)
    x = self._mix(pyramid, x, memory)
    x = nnx.relu(self.mixer1[1](x))
    x = nnx.relu(self.mixer2[0](_double(x)))
    x = nnx.relu(self.mixer2[1](x))
    x = nnx.relu(self.mixer3[0](_double(x)))
    return self.mixer3[1](x).reshape(b, j, *x.shape[1:3], 2)

  def _mix(self, pyramid, x, memory):
    """The first convolution of the first mixer, with its ReLU.

    It reads the upsampled x, then the query's (and support's) maps of strides
    8 and 4. Being linear, it is done part by part: the query's half, the most
    of it, once for all ways, and what is upsampled at its own resolution.
    """
    kernel, bias = self.mixer1[0].kernel[...], self.mixer1[0].bias[...]
    b, j = pyramid[0].shape[0], x.shape[0] // pyramid[0].shape[0]
    q8, q4 = pyramid[1][:, -1], pyramid[0][:, -1]
    doubled = (2 * x.shape[1], 2 * x.shape[2])
    final = (self.mix_size,) * 2 if self.mix_size else doubled
    sizes = [doubled] if final == doubled else [doubled, final]

    def brought(x):
      for size in sizes:
        x = resize.bilinear(x, size)
      return x

    q4 = brought(q4)
    c8, c4 = q8.shape[-1], q4.shape[-1]
    supports = 2 if self.concat_support else 1
    parts = jnp.split(
      kernel.astype(x.dtype),
      np.cumsum([WIDTH, *[c8] * supports, *[c4] * supports])[:-1],
      axis=2,
    )
    y = (
      conv.conv_of_upsampled(q8, parts[1], sizes)
      + conv.conv2d(q4, parts[1 + supports])
      + bias.astype(x.dtype)
    )
    y = y[:, None] + conv.conv_of_upsampled(x, parts[0], sizes).reshape(
      b, j, *y.shape[1:]
    )
    if self.concat_support:
      s8, s4 = memory.skips
      lead = s8.shape[:2]
      s8 = s8.reshape(-1, *s8.shape[2:])
      s4 = brought(s4.reshape(-1, *s4.shape[2:]))
      support = conv.conv_of_upsampled(s8, parts[2], sizes) + conv.conv2d(
        s4, parts[4]
      )
      y = y + support.reshape(*lead, *support.shape[1:])
    return nnx.relu(y.reshape(b * j, *y.shape[2:]))

  def _tokens(self, x: Array, seed: Array | None) -> Array:
    """[b, ..., h, w, c] to tokens [b, ..., t, c] that know their position."""
    x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    if not self.positional:
      # Parity: without positions the original also loses their dropout.
      return x
    x = x + positions(*x.shape[-2:]).astype(x.dtype)
    return x if seed is None else random.dropout(x, seed, self.dropout)

  def _split(self, x: Array) -> Array:
    return x.reshape(*x.shape[:-1], self.heads, -1)


def build(config, image_size, rngs):
  """The model of a config; see `models.build`."""
  backbone = models.build_backbone(config, image_size, rngs)
  if image_size % backbone.strides[-1]:
    raise ValueError(
      f'config.data.image_size={image_size}: the maps of DCAMA double in size '
      f'from stride {backbone.strides[-1]} on; take a multiple of it'
    )
  fields = dict(config.fields)
  for name in ('voting', 'mix_size'):  # 0 in a config: None
    fields[name] = fields.get(name) or None
  return DCAMA(backbone, **fields, dtype=config.dtype, rngs=rngs)


def positions(tokens: int, channels: int) -> np.ndarray:
  """[tokens, channels] sinusoids over the flattened index, float32."""
  rate = np.exp(
    np.arange(0, channels, 2, dtype=np.float32)
    * np.float32(-np.log(10000.0) / channels)
  )
  angle = np.arange(tokens, dtype=np.float32)[:, None] * rate
  return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(tokens, channels)


def _values(masks: Array, sizes, present: Array) -> tuple[Array, ...]:
  """Masks [b, s, H, W, n] at the tokens of each level, [b, s, t, j]."""
  found = []
  for size in sizes:
    x = resize.bilinear(masks, size)
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])
    found.append(jnp.repeat(x, present.shape[-1], axis=-1))
  return tuple(found)


def _seeds(keys: Array, use: int) -> Array:
  return random.fold(random.seed_of(keys), use)


def _double(x: Array) -> Array:
  return resize.bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))


def _brightest(x: Array, present: Array) -> Array:
  """Largest value over a selection's shots: [b, s, ...] to [b, j, ...]."""
  present = present.reshape(*present.shape[:2], -1)
  some = present.any(1)[..., None, None, None]
  shots = present.transpose(0, 2, 1)[..., None, None, None]
  best = jnp.where(shots, x[:, None], -jnp.inf).max(2)
  return jnp.where(some, best, 0)
