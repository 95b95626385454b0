"""SSP: a query that supports itself (2207.11549); IFA goes back (2401.08407).

    encode     images -> stage 3, before its last ReLU
    memorize   support, masks -> a prototype of foreground and of background
    correlate  how much more alike to the first than to the second is a place?
    decode     the query's own prototypes, of places that are sure; twice

Nothing is learnt but the backbone: all answers are cosines to prototypes. Those
of the support are a first guess. Where that is sure, the query's own features
are averaged: objects of one image are more alike than those of two.

IFA goes back and forth: the query's prototypes find the support's foreground,
whose places make new prototypes for the query, and so on (`rounds`). All of it
is in the losses; the test asks once.
"""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp

from distillfss_jax import layers, models, params
from distillfss_jax.models import base
from distillfss_jax.ops import correlation, resize, ways
from distillfss_jax.types import Array, Pyramid

SCALE = 10.0  # of all cosines
SURE = (0.6, 0.7)  # probability of a sure background, foreground
FEW = 12  # places to take where none is sure
STAGE = 2  # of the backbone, the last that is read

_EPSILON = 1e-5


class Prototypes(NamedTuple):
  """What foreground and background look like.

  foreground: [b, j, 1, 1, c].
  background: [b, j, 1, 1, c]; or [b, j, h, w, c], one for each place.
  """

  foreground: Array
  background: Array


@flax.struct.dataclass
class Memory:
  """A support set as SSP sees it.

  prototypes: means over the shots of each selection j.
  present: [b, s, n, v] bool, the shots of each way's votes.
  """

  prototypes: Prototypes
  present: Array


class Coarse(NamedTuple):
  """All that the query is told of the support.

  likeness: [b, j, h, w, 1], of foreground less that of background.
  foreground: [b, j, 1, 1, c], the prototype.
  background: the same.
  """

  likeness: Array
  foreground: Array
  background: Array


class Rounds(NamedTuple):
  """IFA's answers in training, background first, at the features' size.

  Of the query [b, h, w, 2]: `final`; `query_1` to `query_3`, of each round;
  `query_own`, by the prototypes of its own labels. Of the support
  [b, s, h, w, 2]: `support_1` to `support_3`, `support_own`.
  """

  final: Array
  query_1: Array
  query_own: Array
  support_own: Array
  support_1: Array
  query_2: Array | None = None
  support_2: Array | None = None
  query_3: Array | None = None
  support_3: Array | None = None


class SSP(base.FewShotSegmenter):
  """See the module.

  Args:
    backbone: of three stages or more, such as 'resnet50_ssp'.
    shot_major: whether the support of several shots meets the prototypes of
      other episodes in training, see `rounds`.
    dtype: see `FewShotSegmenter`.
  """

  def __init__(self, backbone, *, shot_major: bool = False, dtype='float32'):
    if len(backbone.depths) <= STAGE:
      raise ValueError(
        f'SSP reads stage {STAGE + 1} of its backbone, which has '
        f'{len(backbone.depths)}'
      )
    self.backbone, self.voting, self.dtype = backbone, None, dtype
    self.shot_major = shot_major

  @classmethod
  def sets(cls):
    """What IFA trains: convolutions of stages 2 and 3, and no norm."""
    return {'convolutions': (r'backbone/layer[23]/.*kernel',)}

  @property
  def slots(self):
    """The likeness, and the prototypes as constants of a way."""
    channels = self.backbone.channels[STAGE]
    return (
      base.Slot('maps', 1, 0, channels),
      base.Slot('vector', channels),
      base.Slot('vector', channels),
    )

  def keep(self, pyramid: Pyramid) -> Pyramid:
    return (pyramid[STAGE][:, -1:],)

  def memorize(
    self,
    pyramid: Pyramid,
    masks: Array,
    present: Array,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> Memory:
    x = pyramid[0][:, :, -1]  # [b, s, h, w, c]
    each = pooled(x[:, :, None], jnp.moveaxis(masks, -1, 2))
    chosen = ways.selections(present, self.voting)

    def mean(x):  # [b, s, n, 1, 1, c] to [b, n * v, 1, 1, c]
      weights = chosen.astype(x.dtype)
      weights /= jnp.maximum(weights.sum(1, keepdims=True), 1)
      x = jnp.einsum('bsnc,bsnv->bnvc', x[..., 0, 0, :], weights)
      return x.reshape(len(x), -1, 1, 1, x.shape[-1])

    return Memory(Prototypes(*map(mean, each)), chosen)

  def correlate(
    self,
    pyramid: Pyramid,
    memory: Memory,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> Coarse:
    x = pyramid[0][:, -1]
    b, prototypes = len(x), memory.prototypes
    logits = compare(x[:, None], prototypes)
    return Coarse(
      (logits[..., 1:] - logits[..., :1]).astype(x.dtype),
      *(jnp.broadcast_to(y, (b, *y.shape[1:])) for y in prototypes),
    )

  def decode(
    self, pyramid: Pyramid, coarse: Coarse, memory: Memory | None = None
  ) -> Array:
    x, coarse = pyramid[0][:, -1], Coarse(*coarse)
    given = Prototypes(coarse.foreground, coarse.background)
    return _answer(x, coarse.likeness, given)[0]

  def rounds(
    self,
    query: Pyramid,
    support: Pyramid,
    masks: Array,
    present: Array,
    mask: Array,
    *,
    iterate: bool = True,
  ) -> Rounds:
    """All answers of training, each episode of one way.

    Args:
      query: of [b] queries.
      support: of [b, s] shots.
      masks: [b, s, H, W], of the shots.
      present: [b, s] bool.
      mask: [b, H, W], of the queries.
      iterate: whether to take the second and the third round.
    """
    x, shots = query[0][:, -1], support[0][:, :, -1]
    b, s = shots.shape[:2]
    memory = self.memorize(support, masks[..., None], present[..., None])

    # Parity: the original stacks the shots of all episodes shot by shot, and
    # repeats prototypes episode by episode. With more than one of each, shots
    # meet the prototypes of other episodes, and means over shots mix episodes.
    # `shot_major` does so among the episodes that are here at once.
    def there(x):
      return jnp.swapaxes(x, 0, 1).reshape(x.shape) if self.shot_major else x

    def back(x):
      if not self.shot_major:
        return x
      return jnp.swapaxes(x.reshape(s, b, *x.shape[2:]), 0, 1)

    weights = there(present).astype(jnp.float32)
    weights /= jnp.maximum(weights.sum(1, keepdims=True), 1)
    flat = there(shots).reshape(b * s, *shots.shape[2:])

    def over_shots(given):  # a copy for each shot
      return Prototypes(*(jnp.repeat(x, s, 0) for x in given))

    def turn(given):
      """One round: to the query, and back to the support."""
      likeness = _likeness(compare(x[:, None], given))
      final, first, found = _answer(x, likeness, given)
      likeness = _likeness(compare(flat[:, None], over_shots(found)))
      foreground, background = _own(flat, likeness)
      found = Prototypes(
        0.5 * jnp.repeat(given.foreground, s, 0) + 0.5 * foreground, background
      )
      answer = compare(flat[:, None], found)[:, 0]
      answer = back(answer.reshape(b, s, *answer.shape[1:]))
      found = Prototypes(
        *(
          jnp.einsum('bs...,bs->b...', y.reshape(b, s, *y.shape[1:]), weights)
          for y in found
        )
      )
      return final[:, 0], first[:, 0], answer, found

    final, query_1, support_1, found = turn(memory.prototypes)
    own = pooled(x[:, None], mask[:, None])
    each = pooled(shots, masks)
    answers = Rounds(
      final,
      query_1,
      compare(x[:, None], own)[:, 0],
      compare(shots, each),
      support_1,
    )
    if not iterate:
      return answers
    _, query_2, support_2, found = turn(found)
    _, query_3, support_3, _ = turn(found)
    return answers._replace(
      query_2=query_2,
      support_2=support_2,
      query_3=query_3,
      support_3=support_3,
    )

  def torch_tables(self):
    rules = self.backbone.torch_tables()
    rules = rules.get('ssp') or next(iter(rules.values()))
    return {'original': params.prefixed(rules, '', 'backbone/')}

  def torch_unused(self, tensors):
    return layers.torch_counts(tensors)


def pooled(x: Array, masks: Array) -> Prototypes:
  """Means of maps [..., h, w, c] inside and outside masks [..., H, W].

  Axes before these broadcast; the result is [..., 1, 1, c] float32.
  """
  # Parity: what is void in the labels is outside, too.
  inside = resize.bilinear(masks.astype(jnp.float32)[..., None], x.shape[-3:-1])
  x = x.astype(jnp.float32)

  def mean(weights):
    area = weights.sum((-3, -2), keepdims=True) + _EPSILON
    return (x * weights).sum((-3, -2), keepdims=True) / area

  return Prototypes(mean(inside), mean(1 - inside))


def compare(x: Array, prototypes: Prototypes) -> Array:
  """Logits [..., h, w, 2] of maps [..., h, w, c], background first."""
  found = (correlation.cosine(x, y) for y in reversed(prototypes))
  return SCALE * jnp.stack(list(found), -1)


def sure(likeness: Array) -> tuple[Array, Array]:
  """Which places are sure to be background, and which foreground.

  Of each the surest few where none is sure. No gradient passes.

  Args:
    likeness: [b, j, p], logits of foreground less those of background.

  Returns:
    Two of bool [b, j, p].
  """
  likeness = jax.lax.stop_gradient(likeness.astype(jnp.float32))

  def chosen(logits, least):
    enough = jax.nn.sigmoid(logits) > least
    _, best = jax.lax.top_k(logits, min(FEW, logits.shape[-1]))
    few = (best[..., None] == jnp.arange(logits.shape[-1])).any(-2)
    return jnp.where(enough.any(-1, keepdims=True), enough, few)

  background, foreground = SURE
  return chosen(-likeness, background), chosen(likeness, foreground)


def _likeness(logits):
  return logits[..., 1:] - logits[..., :1]


def _own(x, likeness):
  """Prototypes of an image's own sure places, background for each place.

  Args:
    x: [b, h, w, c].
    likeness: [b, j, h, w, 1].

  Returns:
    `Prototypes` of j answers.
  """
  b, h, w, c = x.shape
  j = likeness.shape[1]
  values = x.reshape(b, -1, c).astype(jnp.float32)
  background, foreground = sure(likeness.reshape(b, j, -1))

  def mean(chosen):
    weights = chosen / chosen.sum(-1, keepdims=True)
    return jnp.einsum('bpc,bjp->bjc', values, weights)[:, :, None, None]

  adaptive = correlation.alike_mean(values, background)
  adaptive = adaptive.reshape(b, j, h, w, c)
  return Prototypes(mean(foreground), 0.3 * mean(background) + 0.7 * adaptive)


def _answer(x, likeness, given):
  """The query side of a round.

  Args:
    x: [b, h, w, c].
    likeness: [b, j, h, w, 1], by the given prototypes, or a student's.
    given: the prototypes.

  Returns:
    The last answer [b, j, h, w, 2], the one before, and the prototypes that
    this one was made by.
  """
  foreground, background = _own(x, likeness)
  first = Prototypes(0.5 * given.foreground + 0.5 * foreground, background)
  answer = compare(x[:, None], first)
  foreground, background = _own(x, _likeness(answer))
  second = Prototypes(0.5 * given.foreground + 0.5 * foreground, background)
  again = Prototypes(
    *(
      0.5 * a + 0.2 * b + 0.3 * c
      for a, b, c in zip(given, first, second, strict=True)
    )
  )
  final = 0.7 * compare(x[:, None], again) + 0.3 * answer
  return final, answer, first


def build(config, image_size, rngs):
  """The model of a config; see `models.build`."""
  return SSP(
    models.build_backbone(config, image_size, rngs),
    **config.fields,
    dtype=config.dtype,
  )
