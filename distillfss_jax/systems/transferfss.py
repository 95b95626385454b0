"""TransferFSS: fine-tune a few-shot segmenter on the support set itself.

Every support image in turn is the query of an episode whose support are the
others (2512.05613, section 3). At test time the support is still needed.
"""

from distillfss_jax import models
from distillfss_jax.ops import losses
from distillfss_jax.systems import adapted, base
from distillfss_jax.types import Losses


class TransferFSS(adapted.AdaptedSystem):
  """The teacher alone, by focal loss.

  Args:
    gamma: of the focal loss.
    **kwargs: see `AdaptedSystem`.
  """

  roles = ('teacher',)

  def __init__(self, teacher, ways, *, gamma=2.0, **kwargs):
    super().__init__(teacher, ways, **kwargs)
    self.gamma = gamma

  def losses(self, shared, batch, items):
    keys = items.keys
    query, labels, support = self.episode(shared, batch.rows, keys)
    memory = self.teacher.memorize(*support, train=True, keys=keys)
    prediction = self.teacher.segment(
      query, memory, labels.shape[1:], train=True, keys=keys
    )
    loss = losses.focal(prediction.logits, labels, self.gamma)
    counts = {'support_miou/teacher': base.confusion(labels, prediction)}
    return Losses(loss, {}, counts)


def build(config, ways, rngs):
  """The system of a config, with a model of its own."""
  return TransferFSS(
    models.build(config.model, config.data.image_size, rngs),
    ways,
    gamma=config.loss.gamma,
    backbone_mode=config.backbone_mode,
    loss_scale=config.loss.scale,
  )
