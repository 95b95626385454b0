"""What PSPNet, BAM and HDMNet share.

A *base learner* segments the classes it was trained on. BAM (2203.07615) and
HDMNet (2303.14652) look for another class beside it, with its frozen backbone:
a *meta learner* compares query and support, and an ensemble takes from its
foreground what the base learner knows to be something else.
"""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax import backbones, layers
from distillfss_jax.backbones.base import Staged
from distillfss_jax.layers import Normalise, by_running, torch_rules
from distillfss_jax.models import base
from distillfss_jax.ops import conv, correlation, random, resize, ways
from distillfss_jax.params import Rules
from distillfss_jax.types import Array, Prediction, Pyramid

BINS = (1, 2, 3, 6)  # of the pyramid pooling
WIDTH = 512  # of the base learner's last features
NECK = 256  # channels of the merged maps of query and support
_FEW = 0.0005  # places, added to a mask's area


class Pooled(nnx.Module):
  """One branch of pyramid pooling: means of b x b parts, projected."""

  def __init__(self, inputs, outputs, bins, *, rngs):
    self.conv = layers.Conv(inputs, outputs, 1, bias=None, rngs=rngs)
    self.norm = layers.BatchNorm(outputs)
    self.bins = bins

  def __call__(self, x: Array, normalise: Normalise) -> Array:
    x = self.conv(resize.adaptive_mean(x, self.bins))
    return nnx.relu(normalise(self.norm, x))


class PyramidHead(nnx.Module):
  """PSPNet's head (1612.01105): pyramid pooling and a classifier.

  Args:
    inputs: channels of the backbone's last stage.
    classes: of the logits, background included.
    dropout: rate, of channels before the last layer.
    rngs: of the initialisation.
  """

  def __init__(self, inputs, classes, *, dropout=0.1, rngs):
    share = inputs // len(BINS)
    self.ppm = nnx.List([Pooled(inputs, share, b, rngs=rngs) for b in BINS])
    self.conv = layers.Conv(
      inputs + share * len(BINS), WIDTH, 3, bias=None, rngs=rngs
    )
    self.norm = layers.BatchNorm(WIDTH)
    self.score = layers.Conv(WIDTH, classes, 1, rngs=rngs)
    self.dropout = dropout

  def features(self, x: Array, normalise: Normalise = by_running) -> Array:
    """[b, h, w, inputs] to [b, h, w, WIDTH], before their ReLU.

    The 3x3 convolution reads x and, brought to its size, the pooled maps. It
    commutes with the latter, which saves half of the network's largest product.
    """
    c = x.shape[-1]
    kernel = self.conv.kernel[...].astype(x.dtype)
    y = conv.conv2d(x, kernel[:, :, :c])
    for branch in self.ppm:
      pooled = branch(x, normalise)
      part = kernel[:, :, c : c + pooled.shape[-1]]
      y += conv.conv_of_upsampled(pooled, part, [x.shape[1:3]])
      c += pooled.shape[-1]
    return normalise(self.norm, y)

  def classify(self, features: Array, seed: Array | None = None) -> Array:
    """Logits [b, h, w, classes] of `features`; a seed [b] drops channels."""
    x = nnx.relu(features)
    if seed is not None:
      x = random.drop_channels(x, seed, self.dropout)
    return self.score(x)


def head_rules(ppm: str, conv: str, norm: str, score: str) -> Rules:
  """PyTorch's names of a head, given how a model calls its four parts."""
  return (
    *torch_rules('conv', rf'{ppm}\.features\.(\d)\.1', r'head/ppm/\1/conv'),
    *torch_rules('norm', rf'{ppm}\.features\.(\d)\.2', r'head/ppm/\1/norm'),
    *torch_rules('conv', conv, 'head/conv'),
    *torch_rules('norm', norm, 'head/norm'),
    *torch_rules('conv', score, 'head/score'),
  )


def backbone_rules(backbone: Staged) -> Rules:
  """PyTorch's names of a backbone inside one of these models."""
  tables = backbone.torch_tables()
  rules = (
    tables['pspnet'] if 'pspnet' in tables else next(iter(tables.values()))
  )
  return tuple(
    (name, path and f'backbone/{path}', kind) for name, path, kind in rules
  )


def gram(maps: Array) -> Array:
  """Cosines of all pairs of channels of [..., h, w, c], [..., c, c]."""
  x = maps.astype(jnp.float32)
  products = jnp.einsum('...hwc,...hwd->...cd', x, x)
  squares = jnp.square(x).sum((-3, -2))
  some = squares > 0  # the root of 0 has no gradient
  length = jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), 0)
  return products / (length[..., None] * length[..., None, :] + 1e-7)


def scene_difference(query: Array, support: Array) -> Array:
  """How much two Gram matrices [..., c, c] differ, from 0 to 1."""
  square = jnp.square(query - support).sum((-2, -1))
  some = square > 0
  root = jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
  return root / query.shape[-1]


def prototypes(maps: Array, masks: Array) -> Array:
  """Means of maps [..., h, w, c] under masks [..., h, w], [..., c]."""
  total = jnp.einsum('...hwc,...hw->...c', maps, masks.astype(maps.dtype))
  area = masks.sum((-2, -1))[..., None] + _FEW
  return total / area.astype(maps.dtype)


class ShotWeights(nnx.Module):
  """How much each of several shots counts, by its scene difference (BAM).

  Args:
    shots: how many.
    hidden: width of the network in between; 0 for one matrix alone.
    rngs: of the initialisation.
  """

  def __init__(self, shots, *, hidden=2, rngs):
    self.layers = nnx.List()
    if hidden:
      self.layers.append(layers.Conv(shots, hidden, 1, rngs=rngs))
      self.layers.append(layers.Conv(hidden, shots, 1, rngs=rngs))
    else:
      self.layers.append(layers.Conv(shots, shots, 1, bias=None, rngs=rngs))
      kernel = self.layers[0].kernel
      kernel[...] = jnp.full(kernel.shape, 1 / shots)

  def __call__(self, scene: Array, *, restored: bool = True) -> Array:
    """Weights of the shots, which sum to 1.

    Args:
      scene: [b, j, shots].
      restored: whether each shot gets its own weight. The network sees the
        differences in ascending order, and so gives its weights.

    Returns:
      [b, j, shots].
    """
    order = scene.argsort(-1)
    x = jnp.take_along_axis(scene, order, -1)
    for i, layer in enumerate(self.layers):
      x = layer(nnx.relu(x) if i else x)
    if restored:
      x = jnp.take_along_axis(x, order.argsort(-1), -1)
    return jax.nn.softmax(x, -1)


def shot_rules(weights: ShotWeights | None) -> Rules:
  """PyTorch's names of `ShotWeights`, if there are any."""
  if weights is None:
    return ()
  if len(weights.layers) == 1:
    return torch_rules('conv', 'kshot_rw', 'kshot/layers/0')
  return (
    *torch_rules('conv', r'kshot_rw\.0', 'kshot/layers/0'),
    *torch_rules('conv', r'kshot_rw\.2', 'kshot/layers/1'),
  )


class Ensemble(nnx.Module):
  """Adjusts the meta learner by the scene and by the base learner (BAM).

  All of it is on probabilities, and so is the result, which is trained as if it
  were logits: the four numbers are also its scale.
  """

  def __init__(self, *, rngs):
    def first(rngs, shape, *fans):
      return jnp.array([1.0, 0]).reshape(shape)

    self.scene = layers.Conv(2, 1, 1, kernel=first, bias=None, rngs=rngs)
    self.base = layers.Conv(2, 1, 1, kernel=first, bias=None, rngs=rngs)

  def __call__(
    self, meta: Array, base: Array, scene: Array, own: Array | None = None
  ) -> Array:
    """The final answer.

    Args:
      meta: [b, j, h, w, 2], logits of the meta learner.
      base: [b, h, w, classes], logits of the base learner.
      scene: [b, j, 1, 1, 1], scene differences.
      own: int [b], the base class, from 0 on, that an episode is about, and
        which then is no other class; -1 for none.

    Returns:
      [b, j, h, w, 2] float32.
    """
    meta = jax.nn.softmax(meta.astype(jnp.float32))
    base = resize.bilinear(base.astype(jnp.float32), meta.shape[2:4])
    known = jax.nn.softmax(base)
    if own is not None:
      index = jnp.arange(known.shape[-1])
      known = jnp.where(index == own[:, None, None, None] + 1, 0, known)
    known = known[..., 1:].sum(-1)[:, None]
    a, b = self.scene.kernel[...].ravel()
    adjusted = a * meta + b * scene.astype(jnp.float32)
    a, b = self.base.kernel[...].ravel()
    background = a * adjusted[..., 0] + b * known
    return jnp.stack([background, adjusted[..., 1]], -1)


class Answers(NamedTuple):
  """What the two learners and their ensemble say, at the features' size.

  final: [b, j, h, w, 2], the ensemble's.
  meta: [b, j, h, w, 2], the meta learner's alone.
  base: [b, h, w, classes], the base learner's.
  """

  final: Array
  meta: Array
  base: Array


@flax.struct.dataclass
class Selections:
  """Which shots each selection has, always as many as the model takes.

  present: [b, s, n, v] bool, the shots of each way's votes (n * v = j).
  table: [b, j, shots] int32; where a vote has fewer, its last comes again.
  """

  present: Array
  table: Array

  def pick(self, x: Array, b: int) -> Array:
    """What belongs to the selections' shots.

    Args:
      x: [b or 1, s, n, ...], something of each shot for each way; or with an
        n of 1, the same for all ways.
      b: how many episodes there are.

    Returns:
      [b, j, shots, ...].
    """
    votes = self.present.shape[-1]
    j = jnp.arange(self.table.shape[1])
    way = (j // votes if x.shape[2] > 1 else 0 * j)[:, None]
    found = jax.vmap(lambda x, table: x[table, way])
    rows = max(x.shape[0], self.table.shape[0])
    x, table = (
      jnp.broadcast_to(y, (rows, *y.shape[1:])) for y in (x, self.table)
    )
    x = found(x, table)
    return jnp.broadcast_to(x, (b, *x.shape[1:]))


def select_shots(present: Array, shots: int) -> Selections:
  """Cuts each way's shots, in order, into selections of `shots` each.

  `present` is [b, s, n] bool.
  """
  b, _, n = present.shape
  chosen = ways.selections(present, shots)
  votes = chosen.shape[-1]
  rank = jnp.cumsum(present, 1) - 1
  last = present.sum(1) - 1  # rank of a way's last shot
  wanted = jnp.arange(votes * shots)
  wanted = jnp.minimum(wanted, last[..., None])  # [b, n, votes * shots]
  is_it = present[..., None] & (rank[..., None] == wanted[:, None])
  table = is_it.argmax(1).reshape(b, n * votes, shots)
  return Selections(chosen, table.astype(jnp.int32))


class BaseAndMeta(base.FewShotSegmenter):
  """A meta learner beside a base learner, on one backbone.

  Its pyramid is what of the backbone the two read: the last maps of stages 2,
  3 and 4, and the base learner's last features. Stage 2 has the size of 3.

  Args:
    backbone: the base learner's.
    classes: how many it knows, background included.
    shots: that the model takes at once; more are answered in rounds.
    shot_hidden: see `ShotWeights`.
    dropout: rate, of the merged maps' channels.
    head_dropout: rate, of the last features' channels of both learners.
    dtype: see `FewShotSegmenter`.
    rngs: of the initialisation.

  Raises:
    ValueError: the backbone's stages cannot be called one by one.
  """

  # Parity: the original's training mode reaches the frozen base learner, whose
  # dropout stays active. So it is here, with `train`.

  def __init__(
    self,
    backbone: Staged,
    classes: int,
    *,
    shots: int = 1,
    shot_hidden: int = 2,
    dropout: float = 0.5,
    head_dropout: float = 0.1,
    dtype: str = 'float32',
    rngs,
  ):
    if not isinstance(backbone, Staged):
      fit = ', '.join(
        sorted(
          name
          for name, variant in backbones.variants().items()
          if issubclass(variant.func, Staged)
        )
      )
      raise ValueError(
        f'{type(self).__name__} looks at single stages of its backbone, which '
        f'{type(backbone).__name__} has not; these have: {fit}'
      )
    self.backbone, self.dtype = backbone, dtype
    self.shots = self.voting = shots
    self.dropout, self.head_dropout = dropout, head_dropout
    channels = backbone.channels
    self.head = PyramidHead(
      channels[3], classes, dropout=head_dropout, rngs=rngs
    )
    merged = channels[1] + channels[2]
    self.query_neck = layers.Conv(merged, NECK, 1, bias=None, rngs=rngs)
    self.support_neck = layers.Conv(merged, NECK, 1, bias=None, rngs=rngs)
    self.ensemble = Ensemble(rngs=rngs)
    self.kshot = (
      ShotWeights(shots, hidden=shot_hidden, rngs=rngs) if shots > 1 else None
    )

  @classmethod
  def sets(cls):
    """What the base learner has not: with and without weights of shots."""
    return {
      'meta': (r'(?!backbone|head).*',),
      # Parity: HDMNet's optimiser has forgotten the weights of shots.
      'meta_without_shots': (r'(?!backbone|head|kshot).*',),
    }

  def torch_misfit(self, tensors, paths):
    """Says so where a file is of a model for another number of shots."""
    weights = [x for name, x in tensors.items() if name.startswith('kshot_rw.')]
    takes = max((max(x.shape) for x in weights), default=1)
    needs = self.shots if any(x.startswith('kshot/') for x in paths) else 1
    if takes == needs or (self.shots > 1 and needs == 1):
      return ''
    return (
      f'the file is of a model that takes {takes} shot{"s"[: takes > 1]}, and '
      f'config.model.fields.shots is {self.shots}: take a file of such a '
      f'model, or shots={takes}'
    )

  def keep(self, pyramid: Pyramid) -> Pyramid:
    f2, f3, f4 = (self.backbone.activate(x[:, -1]) for x in pyramid[1:])
    f2 = resize.bilinear(f2, f3.shape[1:3])
    f5 = self.head.features(f4)
    return tuple(x[:, None] for x in (f2, f3, f4, f5))

  def merged(
    self, neck: layers.Conv, deep: Array, shallow: Array, seed: Array | None
  ) -> Array:
    """Stages 3 and 2, [b, h, w, c] each, in NECK channels.

    `neck` is the query's or the support's; a seed [b] drops channels.
    """
    x = nnx.relu(neck(jnp.concatenate([deep, shallow], -1)))
    return x if seed is None else random.drop_channels(x, seed, self.dropout)

  def best_cosines(self, query: Array, support: Array) -> Array:
    """Each query place's largest cosine with each shot, for each way.

    Args:
      query: [b, h, w, c].
      support: [b or 1, s, n, k, c], zero outside the masks.

    Returns:
      [b, s, n, h, w] float32.
    """
    b, h, w, c = query.shape
    shape = (b, *support.shape[1:3], h, w)

    def one(query, support):
      sets = support.reshape(-1, *support.shape[2:])
      return jax.lax.map(lambda x: correlation.best_cosine(query, x), sets)

    axis = 0 if support.shape[0] > 1 else None
    support = support if support.shape[0] > 1 else support[0]
    x = jax.vmap(one, (0, axis))(query.reshape(b, -1, c), support)
    return x.reshape(shape)

  def answers(
    self,
    pyramid: Pyramid,
    meta: Array,
    scene: Array,
    own: Array | None,
    seed: Array | None,
  ) -> Answers:
    """All answers, given the meta learner's logits [b, j, h, w, 2].

    `pyramid` is the query's; for `scene` and `own` see `Ensemble`; a seed [b]
    drops channels of the base learner.
    """
    known = self.head.classify(pyramid[3][:, -1], seed)
    return Answers(self.ensemble(meta, known, scene, own), meta, known)

  def conclude(
    self,
    logits: Array,
    coarse: tuple[Array, ...],
    present: Array,
    size: tuple[int, int],
  ) -> Prediction:
    """Resizes, takes the largest of the rounds, and merges the ways.

    See `FewShotSegmenter`.
    """
    b = logits.shape[0]
    some = jnp.broadcast_to(present.any(1), (b, *present.shape[2:]))
    logits = resize.bilinear(logits.astype(jnp.float32), size)
    logits = logits.reshape(*some.shape, *logits.shape[2:])
    # Parity: DistillFSS takes the maximum of each channel for itself.
    logits = jnp.where(some[..., None, None, None], logits, -jnp.inf).max(2)
    return Prediction(ways.merge(logits, some.any(-1)), coarse)


def seed_at(keys: Array | None, use: int) -> Array | None:
  """A dropout seed [b] of JAX keys [b], another for every use; or None."""
  return None if keys is None else random.fold(random.seed_of(keys), use)


def seeds_of(seed: Array | None, *counts: int) -> Array | None:
  """A seed for each of b * counts items, of one seed [b] per episode."""
  if seed is None:
    return None
  for count in counts:
    seed = random.fold(seed[..., None], jnp.arange(count))
  return seed.reshape(-1)
