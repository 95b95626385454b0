"""DCAMA's own training: a few-shot segmenter learns from episodes of a source.

Every episode asks for one class. Beside the cross-entropy of the answer, the
mean of all coarse maps is held to the mask ("modcross_soft"), which the
teachers of DistillFSS were trained with (2512.05613, section 4; 2207.08549).
"""

import jax.numpy as jnp

from distillfss_jax import models
from distillfss_jax.ops import losses
from distillfss_jax.systems import adapted, base
from distillfss_jax.types import VOID, Episode, Items, Losses


class Episodic(adapted.AdaptedSystem):
  """The segmenter alone, by cross-entropy and that of its coarse maps.

  Args:
    weights: of the cross-entropy of the logits, and of the coarse maps'.
    **kwargs: see `AdaptedSystem`.
  """

  takes, roles = Episode, ('teacher',)

  def __init__(self, teacher, ways, *, weights=(0.5, 2.0), **kwargs):
    super().__init__(teacher, ways, **kwargs)
    if ways != 1:
      raise ValueError(f'an episode of a source has one way, not {ways}')
    self.weights = tuple(weights)

  def shared(self, values):
    """Nothing: every step has images of its own, of one class."""
    del values
    return ()

  def seen(self, shared, batch, items):
    return None

  def after_step(self, buffers, shared, batch, items):
    return buffers

  def losses(self, shared, batch: Episode, items: Items):
    keys, support = items.keys, batch.support
    images = jnp.concatenate([batch.images[:, None], support.images], 1)
    query, shots = self.encode_episodes(images, support.masks, keys)
    # Where no shot shows the class, the query is background.
    known = support.present.any((1, 2))[:, None, None]
    labels = jnp.where(known, batch.labels.astype(jnp.int32), 0)
    # Parity: what is void trains as background; only scores leave it out.
    masks = jnp.where(labels == VOID, 0, labels)
    memory = self.teacher.memorize(
      shots, support.masks, support.present, train=True, keys=keys
    )
    coarse = self.teacher.correlate(query, memory, train=True, keys=keys)
    logits = self.teacher.decode(query, coarse, memory)
    prediction = self.teacher.conclude(
      logits, coarse, memory.present, labels.shape[1:]
    )
    parts = {
      'logits': losses.focal(prediction.logits, masks, gamma=0),
      'coarse': losses.map_bce(coarse, masks.astype(jnp.float32)),
    }
    total = sum(
      weight * part
      for weight, part in zip(self.weights, parts.values(), strict=True)
    )
    counts = {'train_miou/teacher': base.confusion(labels, prediction)}
    return Losses(total, parts, counts)


def build(config, ways, rngs):
  """The system of a config, with a model of its own."""
  return Episodic(
    models.build(config.model, config.data.image_size, rngs),
    ways,
    weights=(config.loss.logits, config.loss.maps),
    backbone_mode=config.backbone_mode,
    loss_scale=config.loss.scale,
  )
