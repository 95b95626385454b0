"""What every system adapted on a support set shares.

The support images are encoded once: a `Bank` holds their pyramids, and an
episode is a row of indices into it, the query first. Only where the backbone
itself changes, or is noisy, are images encoded in the step.
"""

import abc

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax.backbones import resnet
from distillfss_jax.models.base import FewShotSegmenter
from distillfss_jax.ops import metrics
from distillfss_jax.types import (
  VOID,
  Array,
  Prediction,
  Pyramid,
  Support,
)


@flax.struct.dataclass
class Bank:
  """The support set of an adaptation, on the device.

  images [M, H, W, 3] uint8, labels [M, H, W] int32, present [M, n] bool.
  pyramid: [M, l, h, w, c] per stage, or None where the step encodes.
  statistics: {path of a running statistic: [M, c]} of each image's own forward,
    or {} where the backbone keeps its own.
  """

  images: Array
  labels: Array
  present: Array
  pyramid: Pyramid | None
  statistics: dict[str, Array]


class AdaptedSystem(nnx.Module):
  """A few-shot segmenter, perhaps with students, adapted on a support set.

  Args:
    teacher: the segmenter.
    ways: number of foreground classes.
    backbone_mode: 'frozen' leaves the backbone in evaluation mode; 'reference'
      does what the original's `model.train()` does to it.
    backbone_trains: whether the optimiser changes the backbone.

  Attributes:
    roles: what `predict` answers as, the first being the system's product.
  """

  # Parity: the original's training mode reaches its frozen backbone. A ResNet
  # then normalises each image by its own statistics, which also move the
  # running statistics that the test uses; a Swin drops paths at random.
  # 'reference' does the same, 'frozen' is the evident intent.

  roles: tuple[str, ...]

  def __init__(
    self,
    teacher: FewShotSegmenter,
    ways: int,
    *,
    backbone_mode: str = 'frozen',
    backbone_trains: bool = False,
  ):
    if backbone_mode not in ('frozen', 'reference'):
      raise ValueError(
        f"backbone_mode is 'frozen' or 'reference', not {backbone_mode!r}"
      )
    self.teacher, self.ways = teacher, ways
    self.backbone_mode = backbone_mode
    self.backbone_trains = backbone_trains

  @abc.abstractmethod
  def losses(
    self, bank: Bank, table: Array, keys: Array
  ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Losses of a batch of episodes.

    Args:
      bank: the support set.
      table: [b, 1+s] int32, indices into it, the query first.
      keys: [b] JAX keys.

    Returns:
      What is minimised [b]; parts of it by name, each [b]; and per role the
      confusion counts [b, 1+n, 1+n] on the queries.
    """

  def predict(
    self, images: Array, memory, roles: tuple[str, ...]
  ) -> dict[str, Prediction]:
    """Predictions by role for images [b, H, W, 3], at their own size.

    Here of systems that have the teacher alone.
    """
    pyramid = self.teacher.encode(images)
    size = images.shape[1:3]
    return {role: self.teacher.segment(pyramid, memory, size) for role in roles}

  def memorize(self, support: Support):
    """The teacher's memory of a support set."""
    pyramid = self.teacher.encode(support.images)
    return self.teacher.memorize(pyramid, support.masks, support.present)

  def bank(self, images: Array, labels: Array) -> Bank:
    """Encodes the support set once, as the training step will see it."""
    labels = labels.astype(jnp.int32)
    present = masks_of(labels, self.ways).any((1, 2))
    pyramid, statistics = None, {}
    if not self._encodes_in_step:
      # One image at a time: the batch must not decide how much memory it takes.
      if self._own_statistics:

        def encode(image):
          x, own = self.teacher.backbone.encode_with_statistics(
            self.teacher.normalised(image[None])
          )
          return self.teacher.select(x), own

        pyramid, statistics = jax.lax.map(encode, images)
        pyramid = tuple(x[:, 0] for x in pyramid)
        statistics = {
          f'teacher/backbone/{path}': x[:, 0] for path, x in statistics.items()
        }
      else:
        pyramid = jax.lax.map(self.teacher.encode, images)
    return Bank(images, labels, present, pyramid, statistics)

  def after_step(
    self,
    rest: dict[str, Array],
    bank: Bank,
    table: Array,
    valid: Array,
  ) -> dict[str, Array]:
    """Module state (BatchNorm) after the episodes of a step were seen."""
    if not bank.statistics:
      return rest
    # The original encodes a query and its supports anew for every way.
    visits = jnp.repeat(table[:, None], self.ways, axis=1)
    has_way = bank.present[table[:, 1:]].any(1)
    seen = jnp.broadcast_to((valid[:, None] & has_way)[..., None], visits.shape)
    # A shot that is no example of the way is not encoded for it.
    shots = bank.present[table[:, 1:]].swapaxes(1, 2)
    seen = seen & jnp.concatenate([jnp.ones_like(shots[..., :1]), shots], -1)
    return rest | resnet.update_statistics(
      rest, bank.statistics, visits.reshape(-1), seen.reshape(-1)
    )

  def _episode(self, bank: Bank, table: Array, keys: Array):
    """Query pyramid, its labels, and the support as `memorize` takes it."""
    pyramid = self._features(bank, table, keys)
    query = tuple(x[:, 0] for x in pyramid)
    shots = tuple(x[:, 1:] for x in pyramid)
    masks = masks_of(bank.labels[table[:, 1:]], self.ways)
    present = bank.present[table[:, 1:]]
    labels = bank.labels[table[:, 0]]
    # A way that no shot of the episode shows is background in its query.
    known = jnp.concatenate(
      [jnp.ones_like(present[:, 0, :1]), present.any(1)], 1
    )
    index = jnp.where(labels == VOID, 0, labels)
    shown = jax.vmap(lambda known, i: known[i])(known, index)
    return query, jnp.where(shown, labels, 0), (shots, masks, present)

  def _features(self, bank: Bank, table: Array, keys: Array) -> Pyramid:
    """[b, 1+s, l, h, w, c] per stage."""
    if bank.pyramid is not None:
      return tuple(x[table] for x in bank.pyramid)
    images = bank.images[table]
    if self.backbone_mode == 'frozen':
      return self.teacher.encode(images)
    flat = self.teacher.normalised(images.reshape(-1, *images.shape[2:]))
    if self._own_statistics:
      pyramid, _ = self.teacher.backbone.encode_with_statistics(flat)
    else:
      # A key for each image, so that its noise is its own.
      each = jax.vmap(lambda key: jax.random.split(key, table.shape[1]))(keys)

      def encode(image, key):
        x = self.teacher.backbone(image[None], train=True, key=key)
        return tuple(y[0] for y in x)

      pyramid = jax.vmap(encode)(flat, each.reshape(-1))
    pyramid = self.teacher.select(pyramid)
    return tuple(x.reshape(*table.shape, *x.shape[1:]) for x in pyramid)

  @property
  def _own_statistics(self) -> bool:
    return self.backbone_mode == 'reference' and hasattr(
      self.teacher.backbone, 'encode_with_statistics'
    )

  @property
  def _encodes_in_step(self) -> bool:
    noisy = self.backbone_mode == 'reference' and not self._own_statistics
    return self.backbone_trains or noisy


def masks_of(labels: Array, ways: int) -> Array:
  """Binary masks [..., H, W, n] of label maps [..., H, W]; void is in none."""
  return (labels[..., None] == jnp.arange(1, ways + 1)).astype(jnp.float32)


def confusion(labels: Array, prediction: Prediction) -> Array:
  """[b, 1+n, 1+n] counts of each query."""
  logits = jax.lax.stop_gradient(prediction.logits)
  classes = logits.shape[-1]
  return jax.vmap(lambda x, y: metrics.count(x, y, classes))(
    labels, logits.argmax(-1)
  )
