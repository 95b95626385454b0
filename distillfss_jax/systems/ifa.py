"""IFA's training (2401.08407): query and support find each other, in turns.

On a source the first round is minimised, as SSP does (2207.11549), with the way
back to the support. On the domain that it is adapted to the second and the
third round are, too; there a query is one of the shots, augmented. See
`models/ssp.py` for the method.
"""

import jax.numpy as jnp

from distillfss_jax import models
from distillfss_jax.ops import losses, resize
from distillfss_jax.systems import adapted, base
from distillfss_jax.types import VOID, Episode, Items, Losses, Prediction

# What the terms of the first round weigh.
WEIGHTS = {
  'final': 1.0,
  'query_1': 1.0,
  'query_own': 1.0,
  'support_own': 0.2,
  'support_1': 0.4,
}


class IFA(adapted.AdaptedSystem):
  """SSP by cross-entropies of its answers to the query and to the support.

  Args:
    teacher: the model.
    ways: 1.
    rounds: weight of each term of the second and the third round; with 0 they
      are not taken.
    void: whether pixels that are void count in no loss; otherwise they are
      background.
    shots: of an episode.
  """

  takes, roles = Episode, ('teacher',)

  # Parity: the original reads void as background. In the prototypes it is
  # background in any case.

  def __init__(self, teacher, ways, *, rounds=0.1, void=False, shots=1):
    super().__init__(teacher, ways)
    if ways != 1:
      raise ValueError(f'an episode of a source has one way, not {ways}')
    self.rounds, self.void = float(rounds), bool(void)
    # Parity: in the released order, shots of several episodes are mixed up.
    self.coupled = bool(teacher.shot_major and shots > 1)

  def shared(self, values):
    """Nothing: every step has images of its own, of one class."""
    del values
    return ()

  def seen(self, shared, batch, items):
    return None

  def after_step(self, buffers, shared, batch, items):
    return buffers

  def losses(self, shared, batch: Episode, items: Items):
    support = batch.support
    images = jnp.concatenate([batch.images[:, None], support.images], 1)
    query, shots = self.encode_episodes(images, support.masks, items.keys)
    present = support.present[..., 0]
    labels = batch.labels.astype(jnp.int32)
    answers = self.teacher.rounds(
      query,
      shots,
      support.masks[..., 0],
      present,
      (labels == 1).astype(jnp.float32),
      iterate=self.rounds > 0,
    )
    weights = present / jnp.maximum(present.sum(1, keepdims=True), 1)
    parts = {
      name: self._of_support(logits, batch.support_labels, weights)
      if name.startswith('support')
      else self._cross_entropy(logits, labels)
      for name, logits in answers._asdict().items()
      if logits is not None
    }
    total = sum(WEIGHTS.get(k, self.rounds) * part for k, part in parts.items())
    size = labels.shape[1:]
    found = Prediction(resize.bilinear(answers.final, size))
    counts = {'train_miou/teacher': base.confusion(labels, found)}
    return Losses(total, parts, counts)

  def _cross_entropy(self, logits, labels):
    """[b], of logits [b, h, w, 2] and labels [b, H, W], mean over pixels."""
    logits = resize.bilinear(logits.astype(jnp.float32), labels.shape[1:])
    if not self.void:
      labels = jnp.where(labels == VOID, 0, labels)
    total, count = losses.cross_entropy(logits, labels)
    return total / jnp.maximum(count, 1)

  def _of_support(self, logits, labels, weights):
    """[b], of logits [b, s, h, w, 2], each shot by its weight [b, s]."""
    flat = logits.reshape(-1, *logits.shape[2:])
    labels = labels.astype(jnp.int32).reshape(-1, *labels.shape[2:])
    each = self._cross_entropy(flat, labels).reshape(weights.shape)
    return (each * weights).sum(1)


def build(config, ways, rngs):
  """The system of a config, with a model of its own."""
  return IFA(
    models.build(config.model, config.data.image_size, rngs),
    ways,
    rounds=config.ifa.rounds,
    void=config.ifa.void,
    shots=config.support.shots,
  )
