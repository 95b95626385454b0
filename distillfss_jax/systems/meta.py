"""What BAM and HDMNet share: a meta learner beside a frozen base learner.

An episode asks for one class, which in training is one of the base classes.
The cross-entropies are means over all pixels of a batch.
"""

import jax
import jax.numpy as jnp

from distillfss_jax.models import core, pspnet
from distillfss_jax.ops import losses, resize, together
from distillfss_jax.pretrained import weights
from distillfss_jax.systems import base
from distillfss_jax.types import (
  VOID,
  Array,
  Episode,
  Items,
  Losses,
  Prediction,
  Support,
)

# What makes a base learner another one.
_SAME = (
  'data.name',
  'data.args.fold',
  'data.args.rule',
  'model.backbone.name',
)


class MetaSystem(base.System):
  """A meta learner by the cross-entropy of its answer and of the ensemble's.

  Args:
    model: with its base learner.
    ways: 1.
  """

  # Parity: the base learner's cross-entropy has nothing to move, for it is
  # frozen; the original adds it all the same, and so its loss is the larger.

  takes, roles, coupled = Episode, ('final', 'meta'), True
  beside = ('base', 'prior')

  def __init__(self, model: core.BaseAndMeta, ways: int):
    if ways != 1:
      raise ValueError(f'an episode of a source has one way, not {ways}')
    self.model, self.ways = model, ways

  def sets(self):
    return {
      name: tuple(f'model/{regex}' for regex in regexes)
      for name, regexes in self.model.sets().items()
    }

  def sources(self, config):
    """`model.init` fills all; `base.init`, of a base learner, its part."""
    whole = weights.Part('model/', self.model)
    learner = pspnet.Within(self.model)
    return (
      weights.Source(
        'model.init',
        config.model.init,
        (whole,),
        same=(*_SAME, 'model.name', 'model.fields.shots'),
      ),
      weights.Source(
        'base.init',
        config.base.init,
        (weights.Part('model/', learner),),
        same=_SAME,
      ),
    )

  def shared(self, values: Array) -> Array:
    """[256] labels of the records to the base learner's classes.

    `values` [n] are the records' labels of its classes; all others are
    background, and void stays.
    """
    table = jnp.zeros(256, jnp.int32).at[VOID].set(VOID)
    return table.at[values].set(jnp.arange(1, 1 + values.shape[0]))

  def memorize(self, support: Support):
    """The meta learner's memory of a support set."""
    return self.model.memorize_images(
      support.images, support.masks, support.present
    )

  def predict(self, images, memory, roles):
    pyramid = self.model.encode(images)
    coarse = self.model.correlate(pyramid, memory)
    answers, size = self.model.answer(pyramid, coarse), images.shape[1:3]

    def conclude(logits):
      return self.model.conclude(logits, coarse, memory.present, size)

    found = {
      role: conclude(getattr(answers, role))
      for role in roles
      if role not in self.beside
    }
    if 'prior' in roles:
      prior = self.model.prior(coarse)
      found['prior'] = conclude(jnp.stack([1 - prior, prior], -1))
    if 'base' in roles:
      logits = resize.bilinear(answers.base.astype(jnp.float32), size)
      found['base'] = Prediction(logits)
    return found

  def losses(self, shared: Array, batch: Episode, items: Items) -> Losses:
    support, how = batch.support, {'train': True, 'keys': items.keys}
    query, shots = jax.lax.stop_gradient(
      (
        self.model.encode(batch.images),
        self.model.encode_support(support.images, support.masks),
      )
    )
    memory = self.model.memorize(shots, support.masks, support.present, **how)
    coarse = self.model.correlate(query, memory, **how)
    answers = self.model.answer(query, coarse, own=batch.way, **how)
    labels = batch.labels.astype(jnp.int32)
    final, meta, known = (
      resize.bilinear(x.astype(jnp.float32), labels.shape[1:])
      for x in (answers.final[:, 0], answers.meta[:, 0], answers.base)
    )
    classes = shared[batch.all_labels]
    parts = {
      name: together.mean_of_all(*losses.cross_entropy(x, y), items)
      for name, x, y in (
        ('final', final, labels),
        ('meta', meta, labels),
        ('base', known, classes),
      )
    }
    parts |= self.more(coarse, labels)
    counts = {
      f'train_miou/{role}': base.confusion(labels, Prediction(x))
      for role, x in (('final', final), ('meta', meta))
    }
    return Losses(sum(parts.values()), parts, counts)

  def more(self, coarse, labels: Array) -> dict[str, Array]:
    """Further parts of the loss, {name: [b]}."""
    del coarse, labels
    return {}
