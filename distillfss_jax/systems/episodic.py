"""DCAMA's own training: a few-shot segmenter learns from episodes of a source.

Every episode asks for one class. Beside the cross-entropy of the answer, the
mean of all coarse maps is held to the mask ("modcross_soft"), which the
teachers of DistillFSS were trained with (2512.05613, section 4; 2207.08549).
"""

import jax.numpy as jnp

from distillfss_jax.ops import losses
from distillfss_jax.systems import base
from distillfss_jax.types import VOID


class Episodic(base.AdaptedSystem):
  """The segmenter alone, by cross-entropy and that of its coarse maps.

  Args:
    weights: of the cross-entropy of the logits, and of the coarse maps'.
    (others): see `AdaptedSystem`.
  """

  roles = ('teacher',)

  def __init__(self, teacher, ways, *, weights=(0.5, 2.0), **kwargs):
    super().__init__(teacher, ways, **kwargs)
    if ways != 1:
      raise ValueError(f'an episode of a source has one way, not {ways}')
    self.weights = tuple(weights)

  def losses(self, bank, table, keys):
    # They come as bytes: each step has others.
    bank = bank.replace(labels=bank.labels.astype(jnp.int32))
    query, labels, support = self._episode(bank, table, keys)
    memory = self.teacher.memorize(*support, train=True, keys=keys)
    coarse = self.teacher.correlate(query, memory, train=True, keys=keys)
    logits = self.teacher.decode(query, coarse, memory)
    prediction = self.teacher.conclude(
      logits, coarse, memory.present, labels.shape[1:]
    )
    # Parity: what is void trains as background; only scores leave it out.
    masks = jnp.where(labels == VOID, 0, labels)
    parts = {
      'logits': losses.focal(prediction.logits, masks, gamma=0),
      'coarse': losses.map_bce(coarse, masks.astype(jnp.float32)),
    }
    total = sum(
      weight * part
      for weight, part in zip(self.weights, parts.values(), strict=True)
    )
    return total, parts, {'teacher': base.confusion(labels, prediction)}


def build(config, teacher, ways, backbone_trains, rngs):
  """The system of a config."""
  del rngs
  return Episodic(
    teacher,
    ways,
    weights=(config.loss.logits, config.loss.maps),
    backbone_mode=config.backbone_mode,
    backbone_trains=backbone_trains,
  )
