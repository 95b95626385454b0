"""What every system adapted on a support set shares.

The support images are encoded once: a `Bank` holds their pyramids, and an
episode is a row of indices into it, the query first. Only where the backbone
itself changes, or is noisy, are images encoded in the step.
"""

import flax
import jax
import jax.numpy as jnp

from distillfss_jax.backbones import resnet
from distillfss_jax.models.base import FewShotSegmenter
from distillfss_jax.ops import together
from distillfss_jax.pretrained import weights
from distillfss_jax.systems import base
from distillfss_jax.types import (
  VOID,
  Array,
  Items,
  Prediction,
  Pyramid,
  Support,
  Table,
)


@flax.struct.dataclass
class Bank:
  """The support set of an adaptation, on the device.

  images [M, H, W, 3] uint8, labels [M, H, W] int32, present [M, n] bool.
  queries: their pyramids, [M, l, h, w, c] per stage, or None where the step
    encodes.
  shots: their pyramids as `memorize` takes them; None where they are those of
    the queries.
  statistics: {path of a running statistic: [M, c]} of each image's own forward,
    or {} where the backbone keeps its own.
  """

  images: Array
  labels: Array
  present: Array
  queries: Pyramid | None
  shots: Pyramid | None
  statistics: dict[str, Array]


class AdaptedSystem(base.System):
  """A few-shot segmenter, perhaps with students, adapted on a support set.

  Args:
    teacher: the segmenter.
    ways: number of foreground classes.
    backbone_mode: 'frozen' leaves the backbone in evaluation mode; 'reference'
      does what the original's `model.train()` does to it.
    loss_scale: 'mean' over the episodes, or 'reference'.
  """

  takes = Table

  # Parity: the original's training mode reaches its frozen backbone. A ResNet
  # then normalises each image by its own statistics, which also move the
  # running statistics that the test uses; a Swin drops paths at random.
  # 'reference' does the same, 'frozen' is the evident intent.

  # Parity: the original divides by the length of an axis it takes for the
  # support images; it is that of the colour channels, 3. 'reference' does so.

  def __init__(
    self,
    teacher: FewShotSegmenter,
    ways: int,
    *,
    backbone_mode: str = 'frozen',
    loss_scale: str = 'mean',
  ):
    for name, value, known in (
      ('backbone_mode', backbone_mode, ('frozen', 'reference')),
      ('loss.scale', loss_scale, ('reference', 'mean')),
    ):
      if value not in known:
        raise ValueError(
          f'config.{name} is {value!r}; there are: {", ".join(known)}'
        )
    if backbone_mode == 'reference' and teacher.masks_support:
      raise ValueError(
        f"backbone_mode='reference' is DCAMA's; a {type(teacher).__name__} "
        "masks its support and keeps its backbone as it is: take 'frozen'"
      )
    self.teacher, self.ways = teacher, ways
    self.backbone_mode, self.loss_scale = backbone_mode, loss_scale

  def sets(self):
    of_teacher = {
      name: tuple(f'teacher/{regex}' for regex in regexes)
      for name, regexes in self.teacher.sets().items()
    }
    return {**of_teacher, 'backbone': (r'teacher/backbone/.*',)}

  def parts(self) -> tuple[weights.Part, ...]:
    """How the original's files name what is in the system."""
    return (weights.Part('teacher/', self.teacher, 'teacher.'),)

  def sources(self, config):
    """`model.init` fills the teacher and, if it has them, the students.

    `model.backbone.init` fills the backbone, in place of that of `model.init`
    if both are given.
    """
    model, backbone = config.model, 'teacher/backbone/'
    return (
      weights.Source('model.init', model.init, self.parts()),
      weights.Source(
        'model.backbone.init',
        model.backbone.init,
        (weights.Part(backbone, self.teacher.backbone),),
      ),
    )

  def scale(self, count):
    return 1 / 3 if self.loss_scale == 'reference' else 1 / count

  def predict(
    self, images: Array, memory, roles: tuple[str, ...]
  ) -> dict[str, Prediction]:
    """Here of systems that have the teacher alone."""
    pyramid = self.teacher.encode(images)
    size = images.shape[1:3]
    return {role: self.teacher.segment(pyramid, memory, size) for role in roles}

  def memorize(self, support: Support):
    """The teacher's memory of a support set."""
    return self.teacher.memorize_images(
      support.images, support.masks, support.present
    )

  def shared(self, images: Array, labels: Array) -> Bank:
    """Encodes the support set once, as the training step will see it."""
    labels = labels.astype(jnp.int32)
    masks = base.masks_of(labels, self.ways)
    present = masks.any((1, 2))
    queries, shots, statistics = None, None, {}
    # One image at a time: the batch must not decide how much memory it takes.
    if self._encodes_in_step:
      pass
    elif self._own_statistics:

      def encode(image):
        x, own = self.teacher.backbone.encode_with_statistics(
          self.teacher.normalised(image[None])
        )
        return self.teacher.keep(x), own

      pyramid, own = jax.lax.map(encode, images)
      queries = tuple(x[:, 0] for x in pyramid)
      statistics = {
        f'teacher/backbone/{path}': x[:, 0] for path, x in own.items()
      }
    else:
      queries = jax.lax.map(self.teacher.encode, images)
      if self.teacher.masks_support:
        shots = jax.lax.map(
          lambda x: self.teacher.encode_support(*x), (images, masks)
        )
    return Bank(images, labels, present, queries, shots, statistics)

  def seen(self, shared: Bank, batch: Table, items: Items) -> Array:
    shown = shared.present[batch.rows[:, 1:]].any(1)
    return (shown & items.valid[:, None]).any(0)

  def after_step(self, buffers, shared: Bank, batch: Table, items: Items):
    """Running statistics after every episode has passed the backbone."""
    if not shared.statistics:
      return buffers
    rows, valid = together.everywhere((batch.rows, items.valid), items)
    # The original encodes a query and its supports anew for every way.
    visits = jnp.repeat(rows[:, None], self.ways, axis=1)
    has_way = shared.present[rows[:, 1:]].any(1)
    seen = jnp.broadcast_to((valid[:, None] & has_way)[..., None], visits.shape)
    # A shot that is no example of the way is not encoded for it.
    shots = shared.present[rows[:, 1:]].swapaxes(1, 2)
    seen = seen & jnp.concatenate([jnp.ones_like(shots[..., :1]), shots], -1)
    return buffers | resnet.update_statistics(
      buffers, shared.statistics, visits.reshape(-1), seen.reshape(-1)
    )

  def episode(self, bank: Bank, rows: Array, keys: Array):
    """Query pyramid, its labels, and the support as `memorize` takes it.

    Args:
      bank: the support set.
      rows: [b, 1+s] int32 indices into it, the query first.
      keys: [b] JAX keys.
    """
    masks = base.masks_of(bank.labels[rows[:, 1:]], self.ways)
    query, shots = self._pyramids(bank, rows, masks, keys)
    present = bank.present[rows[:, 1:]]
    labels = bank.labels[rows[:, 0]]
    # A way that no shot of the episode shows is background in its query.
    known = jnp.concatenate(
      [jnp.ones_like(present[:, 0, :1]), present.any(1)], 1
    )
    index = jnp.where(labels == VOID, 0, labels)
    shown = jax.vmap(lambda known, i: known[i])(known, index)
    return query, jnp.where(shown, labels, 0), (shots, masks, present)

  def _pyramids(self, bank: Bank, rows: Array, masks: Array, keys: Array):
    """Of the queries [b, l, h, w, c] and of the shots [b, s, l, h, w, c]."""
    if bank.queries is None:
      return self.encode_episodes(bank.images[rows], masks, keys)
    query = tuple(x[rows[:, 0]] for x in bank.queries)
    shots = bank.queries if bank.shots is None else bank.shots
    return query, tuple(x[rows[:, 1:]] for x in shots)

  def encode_episodes(
    self, images: Array, masks: Array, keys: Array
  ) -> tuple[Pyramid, Pyramid]:
    """The pyramids of queries and of shots, as training sees them.

    Args:
      images: [b, 1+s, H, W, 3], the query first.
      masks: [b, s, H, W, n] of the shots.
      keys: [b] JAX keys.

    Returns:
      [b, l, h, w, c] and [b, s, l, h, w, c] per stage.
    """
    if self.backbone_mode == 'reference':
      pyramid = self._noisy(images, keys)
    elif self.teacher.masks_support:
      query = self.teacher.encode(images[:, 0])
      return query, self.teacher.encode_support(images[:, 1:], masks)
    else:
      pyramid = self.teacher.encode(images)
    return tuple(x[:, 0] for x in pyramid), tuple(x[:, 1:] for x in pyramid)

  def _noisy(self, images: Array, keys: Array) -> Pyramid:
    """[b, 1+s, l, h, w, c] per stage, as the training mode encodes images."""
    lead = images.shape[:2]
    flat = self.teacher.normalised(images.reshape(-1, *images.shape[2:]))
    if self._own_statistics:
      pyramid, _ = self.teacher.backbone.encode_with_statistics(flat)
    else:
      # A key for each image, so that its noise is its own.
      each = jax.vmap(lambda key: jax.random.split(key, lead[1]))(keys)

      def encode(image, key):
        x = self.teacher.backbone(image[None], train=True, key=key)
        return tuple(y[0] for y in x)

      pyramid = jax.vmap(encode)(flat, each.reshape(-1))
    pyramid = self.teacher.keep(pyramid)
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in pyramid)

  @property
  def _own_statistics(self) -> bool:
    return self.backbone_mode == 'reference' and hasattr(
      self.teacher.backbone, 'encode_with_statistics'
    )

  @property
  def _encodes_in_step(self) -> bool:
    trained = any(path.startswith('teacher/backbone/') for path in self.trains)
    noisy = self.backbone_mode == 'reference' and not self._own_statistics
    return trained or noisy
