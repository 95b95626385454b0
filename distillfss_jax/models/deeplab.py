"""DeepLabv3+: dilated maps at several rates beside a fine one (1802.02611).

As AttnFD (2403.05451) has it. A dilated backbone gives maps of stride 16 or 8.
*ASPP*, atrous spatial pyramid pooling, reads them at four rates and as their
mean; the decoder puts what comes of it beside the backbone's maps of stride 4.

    encode   images       -> maps of the stages
    pool     last map     -> [b, h, w, width] by ASPP
    decode   pooled, fine -> logits

For AttnFD three of its maps also go through attention to channels and places
(CBAM, 1807.06521). Nothing reads what comes of it but the distiller.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers, models
from distillfss_jax.backbones.base import Staged
from distillfss_jax.layers import Normalise, by_running, torch_rules
from distillfss_jax.models import base
from distillfss_jax.ops import conv, random, resize
from distillfss_jax.types import Answer, Array

WIDTH = 256  # of the pooled and of the decoded maps, by default
FINE = 48  # channels of the fine map beside the pooled one
RATES = (6, 12, 18)  # of ASPP's 3x3 convolutions, at output stride 16
REDUCTION = 16  # of the attention to channels
_DROPOUT = (0.5, 0.5, 0.1)  # after ASPP, and in the decoder
_MOMENTUM = 0.01  # of the newest statistics, in the attention's norm


class Unit(nnx.Module):
  """A convolution without bias, and its norm."""

  def __init__(self, inputs, outputs, size=1, *, dilation=1, rngs):
    self.conv = layers.Conv(
      inputs, outputs, size, dilation=dilation, kernel=layers.he_fan_in,
      bias=None, rngs=rngs,
    )  # fmt: skip
    self.norm = layers.BatchNorm(outputs)

  def __call__(self, x: Array, normalise: Normalise) -> Array:
    return normalise(self.norm, self.conv(x))


class ASPP(nnx.Module):
  """[b, h, w, c] to [b, h, w, width], before the last ReLU."""

  def __init__(self, inputs, width, stride, *, rngs):
    rates = [rate * 16 // stride for rate in RATES]
    self.branches = nnx.List([Unit(inputs, width, rngs=rngs)])
    for rate in rates:
      self.branches.append(Unit(inputs, width, 3, dilation=rate, rngs=rngs))
    self.pooled = Unit(inputs, width, rngs=rngs)
    self.merge = Unit((2 + len(rates)) * width, width, rngs=rngs)

  def __call__(self, x: Array, normalise: Normalise) -> Array:
    parts = [nnx.relu(branch(x, normalise)) for branch in self.branches]
    mean = x.mean((1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
    mean = nnx.relu(self.pooled(mean, normalise))
    # A map that is the same everywhere goes through the 1x1 convolution once.
    kernel = self.merge.conv.kernel[...].astype(x.dtype)
    split = kernel.shape[2] - mean.shape[-1]
    y = conv.conv2d(jnp.concatenate(parts, -1), kernel[:, :, :split])
    y += conv.conv2d(mean, kernel[:, :, split:])
    return normalise(self.merge.norm, y)


class Decoder(nnx.Module):
  """The pooled map and a fine one to logits at the fine one's size."""

  def __init__(self, inputs, width, classes, dropout, *, rngs):
    self.fine = Unit(inputs, FINE, rngs=rngs)
    self.unit1 = Unit(width + FINE, width, 3, rngs=rngs)
    self.unit2 = Unit(width, width, 3, rngs=rngs)
    self.score = layers.Conv(
      width, classes, 1, kernel=layers.he_fan_in, rngs=rngs
    )
    self.dropout = tuple(dropout)

  def decode(
    self, pooled: Array, fine: Array, seeds: Sequence, normalise: Normalise
  ) -> Array:
    """The last features [b, h, w, width], before their ReLU."""
    fine = nnx.relu(self.fine(fine, normalise))
    # The 3x3 convolution of the upsampled map, made where it is small.
    kernel = self.unit1.conv.kernel[...].astype(pooled.dtype)
    split = pooled.shape[-1]
    y = conv.conv_of_upsampled(pooled, kernel[:, :, :split], [fine.shape[1:3]])
    y += conv.conv2d(fine, kernel[:, :, split:])
    y = nnx.relu(normalise(self.unit1.norm, y))
    return self.unit2(_drop(y, seeds[0], self.dropout[0]), normalise)

  def classify(self, features: Array, seeds: Sequence) -> Array:
    """Logits [b, h, w, classes] of `decode`."""
    return self.score(_drop(nnx.relu(features), seeds[1], self.dropout[1]))


class Attention(nnx.Module):
  """Attention to channels, then to places (CBAM, 1807.06521).

  Both see the mean and the maximum: of all places, and of all channels.
  """

  def __init__(self, channels, *, kernel, rngs):
    inner = channels // REDUCTION
    self.channel1 = layers.Linear(channels, inner, rngs=rngs)
    self.channel2 = layers.Linear(inner, channels, rngs=rngs)
    self.place = layers.Conv(2, 1, 7, kernel=kernel, bias=None, rngs=rngs)
    self.norm = layers.BatchNorm(1, momentum=_MOMENTUM)

  def __call__(self, x: Array, normalise: Normalise) -> Array:
    x = x * self.of_channels(x.mean((1, 2)), x.max((1, 2)))[:, None, None]
    both = jnp.stack([x.max(-1), x.mean(-1)], -1)
    return x * nnx.sigmoid(normalise(self.norm, self.place(both)))

  def of_channels(self, mean: Array, largest: Array) -> Array:
    """Weights [b, c] of the channels, of both over all places."""
    each = (self.channel2(nnx.relu(self.channel1(x))) for x in (mean, largest))
    return nnx.sigmoid(sum(each))


class Attentions(nnx.Module):
  """An attention for each of some maps; files may be without them."""

  def __init__(self, **of_maps):
    for name, attention in of_maps.items():
      setattr(self, name, attention)

  def torch_tables(self):
    """None of its own: the whole network's has its names."""
    raise ValueError('attention is named as a part of its network')

  def torch_buffers(self):
    """See `backbones.base.Backbone`."""
    return {}


def attend_freely(x: Array) -> Array:
  """The same without parameters, for a teacher that has none to give."""
  x = x * nnx.sigmoid(x.mean((1, 2)) + x.max((1, 2)))[:, None, None]
  return x * nnx.sigmoid(x.max(-1) + x.mean(-1))[..., None]


class DeepLab(base.DenseSegmenter):
  """A segmenter of fixed classes.

  Its features are 'stage1' to 'stage4', 'aspp' and 'decoder'; attended are
  'stage4' as it is before its activation, and the other two after theirs.

  Args:
    backbone: of four stages, the last dilated; see `backbones/`.
    classes: background included.
    width: of the pooled and of the decoded maps.
    dropout: rates after ASPP, and after the decoder's two 3x3 convolutions.
    attention: 'none', 'learned' or 'free', which has no parameters.
    dtype: of the arithmetic; parameters and logits stay float32.
    rngs: of the initialisation.

  Raises:
    ValueError: the backbone's last stage is coarser than stride 16, or there is
      no such attention.
  """

  def __init__(
    self,
    backbone: Staged,
    classes: int,
    *,
    width: int = WIDTH,
    dropout: Sequence[float] = _DROPOUT,
    attention: str = 'none',
    dtype: str = 'float32',
    rngs,
  ):
    stride = backbone.strides[-1]
    if stride not in (8, 16):
      raise ValueError(
        f'the last stage of this backbone has stride {stride}; DeepLab needs '
        '16 or 8: give config.model.backbone.fields.output_stride=16'
      )
    if attention not in ('none', 'learned', 'free'):
      raise ValueError(
        f'config.model.fields.attention is {attention!r}; there are: none, '
        'learned, free'
      )
    if len(dropout) != len(_DROPOUT):
      raise ValueError(
        f'config.model.fields.dropout has {len(dropout)} rates; it needs '
        f'{len(_DROPOUT)}, such as {_DROPOUT}'
      )
    self.backbone, self.classes, self.dtype = backbone, classes, dtype
    self.width = width
    self.aspp = ASPP(backbone.channels[-1], width, stride, rngs=rngs)
    self.decoder = Decoder(
      backbone.channels[0], width, classes, dropout[1:], rngs=rngs
    )
    self.dropout, self.attention_kind = dropout[0], attention
    learned = {}
    if attention == 'learned':
      # As the originals' loops over their layers start it: a ResNet's by its
      # outputs, all else by its inputs.
      by_outputs = hasattr(backbone, 'conv1')
      for name, channels in self.attended.items():
        of_backbone = name == 'stage4' and by_outputs
        kernel = layers.he_fan_out if of_backbone else layers.he_fan_in
        learned[name] = Attention(channels, kernel=kernel, rngs=rngs)
      self.optional = ('attention',)
    self.attention = Attentions(**learned)

  @property
  def features(self):
    of_stages = {
      f'stage{i + 1}': x for i, x in enumerate(self.backbone.compared())
    }
    return {
      **of_stages,
      'aspp': (self.width, self.aspp.merge.norm),
      'decoder': (self.width, self.decoder.unit2.norm),
    }

  @property
  def attended(self):
    if self.attention_kind == 'none':
      return {}
    stage4 = self.backbone.compared()[-1][0]
    return {'stage4': stage4, 'aspp': self.width, 'decoder': self.width}

  @classmethod
  def sets(cls):
    # Parity: AttnFD collects convolutions and norms, and so leaves out the
    # linear layers of its attention to channels.
    return {
      **super().sets(),
      'attention': ('attention/.*',),
      'convolutions': ('(?!attention/.*/channel).*',),
    }

  def answer(
    self,
    images: Array,
    *,
    keys: Array | None = None,
    normalise: Normalise = by_running,
  ) -> Answer:
    x = base.normalise(images, self.backbone).astype(self.dtype)
    maps, compared = self.backbone.features(x, normalise)
    pooled = self.aspp(maps[-1], normalise)
    seeds = [None] * 3
    if keys is not None:
      seed = random.seed_of(keys)
      seeds = [random.fold(seed, i) for i in range(3)]
    decoded = self.decoder.decode(
      _drop(nnx.relu(pooled), seeds[0], self.dropout),
      maps[0],
      seeds[1:],
      normalise,
    )
    logits = self.decoder.classify(decoded, seeds[1:]).astype(jnp.float32)
    features = {f'stage{i + 1}': x for i, x in enumerate(compared)}
    return Answer(
      resize.bilinear(logits, images.shape[1:3]),
      {**features, 'aspp': pooled, 'decoder': decoded},
      self._attend(compared[-1], pooled, decoded, normalise),
    )

  def _attend(self, last, pooled, decoded, normalise):
    seen = {
      'stage4': last, 'aspp': nnx.relu(pooled), 'decoder': nnx.relu(decoded),
    }  # fmt: skip
    if self.attention_kind == 'free':
      return {name: attend_freely(x) for name, x in seen.items()}
    return {
      name: getattr(self.attention, name)(x, normalise)
      for name, x in seen.items()
      if hasattr(self.attention, name)
    }

  def torch_tables(self):
    rules = [
      (name, path and f'backbone/{path}', kind)
      for name, path, kind in next(iter(self.backbone.torch_tables().values()))
    ]
    rules = [
      (rf'backbone\.{name}', path, kind)
      for name, path, kind in rules
      if kind != 'drop'
    ]
    return {'attnfd': (*rules, *TORCH_NAMES)}

  def torch_unused(self, tensors):
    found = layers.torch_counts(tensors)
    again = {}
    for name, x in (tensors | found).items():
      number = name.removeprefix('backbone.features.').partition('.')[0]
      if name.startswith('backbone.features.'):
        # The original lists its blocks a second time.
        part = 'low' if int(number) < _LOW else 'high'
        again[name.replace('features', f'{part}_level_features', 1)] = x
    return found | again


_LOW = 4  # blocks of a MobileNetV2 up to stride 4


def _attention_rules(theirs, ours):
  gate = rf'{theirs}\.cbam\.'
  return (
    *torch_rules('linear', gate + r'ChannelGate\.mlp\.1', f'{ours}/channel1'),
    *torch_rules('linear', gate + r'ChannelGate\.mlp\.3', f'{ours}/channel2'),
    *torch_rules('conv', gate + r'SpatialGate\.spatial\.conv', f'{ours}/place'),
    *torch_rules('norm', gate + r'SpatialGate\.spatial\.bn', f'{ours}/norm'),
  )


def _branch_rules(number):
  """They count ASPP's branches from 1."""
  theirs, ours = rf'aspp\.aspp{number}\.', f'aspp/branches/{number - 1}/'
  return (
    *torch_rules('conv', theirs + 'atrous_conv', ours + 'conv'),
    *torch_rules('norm', theirs + 'bn', ours + 'norm'),
  )


TORCH_NAMES = (
  *(rule for i in range(1, 5) for rule in _branch_rules(i)),
  *torch_rules('conv', r'aspp\.global_avg_pool\.1', 'aspp/pooled/conv'),
  *torch_rules('norm', r'aspp\.global_avg_pool\.2', 'aspp/pooled/norm'),
  *torch_rules('conv', r'aspp\.conv1', 'aspp/merge/conv'),
  *torch_rules('norm', r'aspp\.bn1', 'aspp/merge/norm'),
  *torch_rules('conv', r'decoder\.conv1', 'decoder/fine/conv'),
  *torch_rules('norm', r'decoder\.bn1', 'decoder/fine/norm'),
  *torch_rules('conv', r'decoder\.last_conv\.0', 'decoder/unit1/conv'),
  *torch_rules('norm', r'decoder\.last_conv\.1', 'decoder/unit1/norm'),
  *torch_rules('conv', r'decoder\.last_conv\.4', 'decoder/unit2/conv'),
  *torch_rules('norm', r'decoder\.last_conv\.5', 'decoder/unit2/norm'),
  *torch_rules('conv', r'decoder\.last_conv\.8', 'decoder/score'),
  *_attention_rules('backbone', 'attention/stage4'),
  *_attention_rules('aspp', 'attention/aspp'),
  *_attention_rules('decoder', 'attention/decoder'),
  *layers.TORCH_COUNTS,
  (
    r'backbone\.(low|high)_level_features\.(?!.*num_batches_tracked).*',
    '',
    'drop',
  ),
)


def _drop(x, seed, rate):
  if seed is None or not rate:
    return x
  return random.dropout(x, seed, rate).astype(x.dtype)


def build(config, image_size, rngs, classes):
  """The model of a config; see `models.build`."""
  return DeepLab(
    models.build_backbone(config, image_size, rngs),
    classes,
    **config.fields,
    dtype=config.dtype,
    rngs=rngs,
  )
