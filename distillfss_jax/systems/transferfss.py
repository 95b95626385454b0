"""TransferFSS: fine-tune a few-shot segmenter on the support set itself.

Every support image in turn is the query of an episode whose support are the
others (2512.05613, section 3). At test time the support is still needed.
"""

from distillfss_jax.ops import losses
from distillfss_jax.systems import base


class TransferFSS(base.AdaptedSystem):
  """The teacher alone, by focal loss.

  Args:
    gamma: of the focal loss.
    (others): see `AdaptedSystem`.
  """

  roles = ('teacher',)

  def __init__(self, teacher, ways, *, gamma=2.0, **kwargs):
    super().__init__(teacher, ways, **kwargs)
    self.gamma = gamma

  def losses(self, bank, table, keys):
    query, labels, support = self._episode(bank, table, keys)
    memory = self.teacher.memorize(*support, train=True, keys=keys)
    prediction = self.teacher.segment(
      query, memory, labels.shape[1:], train=True, keys=keys
    )
    loss = losses.focal(prediction.logits, labels, self.gamma)
    return loss, {}, {'teacher': base.confusion(labels, prediction)}


def build(config, teacher, ways, backbone_trains, rngs):
  """The system of a config."""
  del rngs
  return TransferFSS(
    teacher,
    ways,
    gamma=config.loss.gamma,
    backbone_mode=config.backbone_mode,
    backbone_trains=backbone_trains,
  )
