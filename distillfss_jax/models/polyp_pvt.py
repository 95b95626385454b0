"""Polyp-PVT: a pyramid transformer and three small modules (2108.06932).

KDAS's (2312.08555) teacher, on PVTv2-B2, and its student, on B0. For one class.
Of the backbone's maps of strides 4 to 32:

    CIM  the finest, weighted by attention to its channels and places
    CFM  the three coarser ones, multiplied and joined, at stride 8
    SAM  CFM's places exchange through 16 nodes, which CIM's edges place
    two heads, on CFM and on SAM; the answer is the sum of their logits

Parity: the published figure has a ReLU after every norm; the code never calls
it, and neither does this.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers, models
from distillfss_jax.backbones.base import Backbone
from distillfss_jax.layers import Normalise, by_running, torch_rules
from distillfss_jax.models import base
from distillfss_jax.ops import conv, resize
from distillfss_jax.types import Answer, Array

WIDTH = 32  # of the maps behind the backbone
STATES = 16  # channels of a node
SIDE = 4  # nodes are SIDE x SIDE places
HEADS = ('cfm', 'sam')
_REDUCTION = 16  # of the attention to channels


class Unit(nnx.Module):
  """A convolution without bias, and its norm."""

  def __init__(self, inputs, outputs, size, *, rngs):
    self.conv = layers.Conv(inputs, outputs, size, bias=None, rngs=rngs)
    self.norm = layers.BatchNorm(outputs)

  def __call__(self, x: Array, normalise: Normalise) -> Array:
    return normalise(self.norm, self.conv(x))

  def upsampled(self, x: Array, times: int, normalise: Normalise) -> Array:
    """Of x after so many times twice its size, made where it is small."""
    h, w = x.shape[1:3]
    sizes = [(2**i * h, 2**i * w) for i in range(1, 1 + times)]
    kernel = self.conv.kernel[...].astype(x.dtype)
    return normalise(self.norm, conv.conv_of_upsampled(x, kernel, sizes))


class Camouflage(nnx.Module):
  """CIM: attention to channels, then to places; mean before maximum."""

  def __init__(self, channels, *, rngs):
    inner = channels // _REDUCTION
    self.channel1 = layers.Conv(channels, inner, 1, bias=None, rngs=rngs)
    self.channel2 = layers.Conv(inner, channels, 1, bias=None, rngs=rngs)
    self.place = layers.Conv(2, 1, 7, bias=None, rngs=rngs)

  def __call__(self, x: Array) -> Array:
    both = (x.mean((1, 2), keepdims=True), x.max((1, 2), keepdims=True))
    each = (self.channel2(nnx.relu(self.channel1(y))) for y in both)
    x = x * nnx.sigmoid(sum(each))
    both = jnp.stack([x.mean(-1), x.max(-1)], -1)
    return x * nnx.sigmoid(self.place(both))


class Fusion(nnx.Module):
  """CFM: maps of strides 8, 16 and 32 to one of stride 8."""

  def __init__(self, *, rngs):
    c = WIDTH
    self.up1 = Unit(c, c, 3, rngs=rngs)
    self.up2 = Unit(c, c, 3, rngs=rngs)
    self.up3 = Unit(c, c, 3, rngs=rngs)
    self.up4 = Unit(c, c, 3, rngs=rngs)
    self.up5 = Unit(2 * c, 2 * c, 3, rngs=rngs)
    self.join2 = Unit(2 * c, 2 * c, 3, rngs=rngs)
    self.join3 = Unit(3 * c, 3 * c, 3, rngs=rngs)
    self.last = Unit(3 * c, c, 3, rngs=rngs)

  def __call__(
    self, fine: Array, middle: Array, coarse: Array, normalise: Normalise
  ) -> Array:
    at16 = self.up1.upsampled(coarse, 1, normalise) * middle
    at8 = self.up2.upsampled(coarse, 2, normalise)
    at8 = at8 * self.up3.upsampled(middle, 1, normalise) * fine
    more = self.up4.upsampled(coarse, 1, normalise)
    at16 = self.join2(jnp.concatenate([at16, more], -1), normalise)
    more = self.up5.upsampled(at16, 1, normalise)
    at8 = self.join3(jnp.concatenate([at8, more], -1), normalise)
    return self.last(at8, normalise)


class Aggregation(nnx.Module):
  """SAM: places exchange through few nodes (section 3.4).

  A place belongs to nodes as it is like what lies at their anchors, which the
  edges of another map weight.
  """

  def __init__(self, *, rngs):
    self.state = layers.Conv(WIDTH, STATES, 1, rngs=rngs)
    self.project = layers.Conv(WIDTH, STATES, 1, rngs=rngs)
    self.of_nodes = layers.Linear(SIDE**2, SIDE**2, rngs=rngs)
    self.of_states = layers.Linear(STATES, STATES, bias=None, rngs=rngs)
    self.extend = layers.Conv(STATES, WIDTH, 1, bias=None, rngs=rngs)

  def __call__(self, x: Array, edges: Array) -> Array:
    """Of maps [b, h, w, WIDTH] both."""
    # Parity: of the softmax over channels the original takes channel 1.
    edge = jax.nn.softmax(edges.astype(jnp.float32))[..., 1:2].astype(x.dtype)
    projected = self.project(x)
    anchors = resize.adaptive_mean(projected * edge, SIDE + 2)[:, 1:-1, 1:-1]
    anchors = anchors.reshape(x.shape[0], SIDE**2, STATES)
    share = jax.nn.softmax(
      jnp.einsum('bns,bhws->bhwn', anchors, projected).astype(jnp.float32)
    ).astype(x.dtype)
    # Parity: a sum over places, not a mean: its size grows with the image's.
    nodes = jnp.einsum('bhws,bhwn->bsn', self.state(x), share)
    # Parity: minus the nodes, where a graph convolution would keep its input.
    nodes = self.of_nodes(nodes) - nodes
    nodes = nnx.relu(self.of_states(nodes.swapaxes(1, 2)))  # [b, n, s]
    return x + self.extend(jnp.einsum('bns,bhwn->bhws', nodes, share))


class PolypPVT(base.DenseSegmenter):
  """A segmenter of one class, with two heads.

  Its features are 'stage1' to 'stage4', 'cim', 'edges', 'cfm' and 'sam'.

  Args:
    backbone: of strides 4, 8, 16, 32; see `backbones/pvt_v2.py`.
    classes: 2, background included.
    dtype: of the arithmetic; parameters and logits stay float32.
    rngs: of the initialisation.

  Raises:
    ValueError: other classes, or a backbone of other strides.
  """

  multiple, heads = 32, len(HEADS)

  def __init__(
    self, backbone: Backbone, classes: int, *, dtype: str = 'float32', rngs
  ):
    if classes != 2:
      raise ValueError(
        f'Polyp-PVT tells one class from background, and the data have '
        f'{classes - 1}: take config.model.name=deeplab for several'
      )
    if tuple(backbone.strides) != (4, 8, 16, 32):
      raise ValueError(
        f'Polyp-PVT reads maps of strides 4, 8, 16 and 32; this backbone has '
        f'{tuple(backbone.strides)}'
      )
    self.backbone, self.classes, self.dtype = backbone, classes, dtype
    finest, *others = backbone.channels
    self.cim = Camouflage(finest, rngs=rngs)
    self.edges = Unit(finest, WIDTH, 1, rngs=rngs)
    self.reduce = nnx.List(Unit(c, WIDTH, 1, rngs=rngs) for c in others)
    self.cfm = Fusion(rngs=rngs)
    self.sam = Aggregation(rngs=rngs)
    self.score = nnx.Dict(
      {name: layers.Conv(WIDTH, 1, 1, rngs=rngs) for name in HEADS}
    )

  @property
  def features(self):
    channels = {
      f'stage{i + 1}': (c, None) for i, c in enumerate(self.backbone.channels)
    }
    return {
      **channels,
      'cim': (self.backbone.channels[0], None),
      'edges': (WIDTH, self.edges.norm),
      'cfm': (WIDTH, self.cfm.last.norm),
      'sam': (WIDTH, None),
    }

  def answer(
    self,
    images: Array,
    *,
    keys: Array | None = None,
    normalise: Normalise = by_running,
  ) -> Answer:
    size = images.shape[1:3]
    if any(side % self.multiple for side in size):
      raise ValueError(
        f'images are {size[0]}x{size[1]}; Polyp-PVT takes sides that are '
        f'multiples of {self.multiple}'
      )
    x = base.normalise(images, self.backbone).astype(self.dtype)
    pyramid = self.backbone(x, train=keys is not None, key=keys)
    maps = [maps[:, -1] for maps in pyramid]
    cim = self.cim(maps[0])
    edges = self.edges(cim, normalise)
    fine, middle, coarse = (
      unit(x, normalise) for unit, x in zip(self.reduce, maps[1:], strict=True)
    )
    fused = self.cfm(fine, middle, coarse, normalise)
    edges = resize.bilinear(edges, fused.shape[1:3])
    joined = self.sam(fused, edges)
    scores = [
      self.score[name](y).astype(jnp.float32)
      for name, y in zip(HEADS, (fused, joined), strict=True)
    ]
    sides = resize.bilinear(
      jnp.concatenate(scores, -1), size, align_corners=False
    )
    total = sides.sum(-1, keepdims=True)
    features = {f'stage{i + 1}': y for i, y in enumerate(maps)}
    return Answer(
      jnp.concatenate([jnp.zeros_like(total), total], -1),
      {**features, 'cim': cim, 'edges': edges, 'cfm': fused, 'sam': joined},
      sides=sides,
    )

  def torch_tables(self):
    rules = next(iter(self.backbone.torch_tables().values()))
    mine = tuple(
      (rf'backbone\.{name}', f'backbone/{path}', kind)
      for name, path, kind in rules
      if kind != 'drop'
    )
    return {'original': (*mine, *TORCH_NAMES)}


def _unit_rules(theirs, ours):
  return (
    *torch_rules('conv', rf'{theirs}\.conv', f'{ours}/conv'),
    *torch_rules('norm', rf'{theirs}\.bn', f'{ours}/norm'),
  )


def _of_axis(name, path):
  """A convolution over one axis is a linear layer there."""
  return (
    (rf'SAM\.gcn\.{name}\.weight', f'sam/{path}/kernel', 'conv1d'),
    (rf'SAM\.gcn\.{name}\.bias', f'sam/{path}/bias', 'copy'),
  )


TORCH_NAMES = (
  *_unit_rules('Translayer2_0', 'edges'),
  *_unit_rules('Translayer2_1', 'reduce/0'),
  *_unit_rules('Translayer3_1', 'reduce/1'),
  *_unit_rules('Translayer4_1', 'reduce/2'),
  *_unit_rules(r'CFM\.conv_upsample(\d)', r'cfm/up\1'),
  *_unit_rules(r'CFM\.conv_concat(\d)', r'cfm/join\1'),
  *_unit_rules(r'CFM\.conv4', 'cfm/last'),
  *torch_rules('conv', r'ca\.fc(\d)', r'cim/channel\1'),
  *torch_rules('conv', r'sa\.conv1', 'cim/place'),
  *torch_rules('conv', r'SAM\.conv_state', 'sam/state'),
  *torch_rules('conv', r'SAM\.conv_proj', 'sam/project'),
  *torch_rules('conv', r'SAM\.conv_extend', 'sam/extend'),
  *_of_axis('conv1', 'of_nodes'),
  *_of_axis('conv2', 'of_states'),
  *torch_rules('conv', 'out_CFM', 'score/cfm'),
  *torch_rules('conv', 'out_SAM', 'score/sam'),
  *layers.TORCH_COUNTS,
)


def build(config, image_size, rngs, classes):
  """The model of a config; see `models.build`.

  Raises:
    ValueError: the size of its images does not fit.
  """
  if image_size % PolypPVT.multiple:
    raise ValueError(
      f'config.data.image_size={image_size}: Polyp-PVT takes multiples of '
      f'{PolypPVT.multiple}, such as 352'
    )
  return PolypPVT(
    models.build_backbone(config, image_size, rngs),
    classes,
    **config.fields,
    dtype=config.dtype,
    rngs=rngs,
  )
