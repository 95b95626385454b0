"""The base learner of BAM and HDMNet: PSPNet on base classes (2203.07615, 3.2).

Every pixel is a base class or background; classes that a fold tests are
background, too. BatchNorm sees the whole batch, over all devices.
"""

from distillfss_jax import models
from distillfss_jax.ops import losses, together
from distillfss_jax.pretrained import weights
from distillfss_jax.systems import base
from distillfss_jax.types import Dense, Losses, Prediction


class BaseLearner(base.System):
  """PSPNet by cross-entropy over all pixels of a batch.

  Args:
    model: the network.
    ways: foreground classes.
  """

  takes, roles, coupled = Dense, ('student',), True

  def __init__(self, model, ways):
    self.model, self.ways = model, ways

  def sources(self, config):
    """`model.init` fills the network, `model.backbone.init` its backbone."""
    model, backbone = config.model, 'model/backbone/'
    return (
      weights.Source(
        'model.init', model.init, (weights.Part('model/', self.model),)
      ),
      weights.Source(
        'model.backbone.init',
        model.backbone.init,
        (weights.Part(backbone, self.model.backbone),),
      ),
    )

  def losses(self, shared, batch, items):
    logits = self.model(
      batch.images,
      train=True,
      keys=items.keys,
      normalise=lambda norm, x: norm.train(x, items.valid, items.axis),
    )
    labels = batch.labels.astype('int32')
    each = together.mean_of_all(*losses.cross_entropy(logits, labels), items)
    counts = base.confusion(labels, Prediction(logits))
    return Losses(each, {}, {'train_miou/student': counts})

  def predict(self, images, memory, roles):
    logits = self.model(images)
    return {role: Prediction(logits) for role in roles}


def build(config, ways, rngs):
  """The system of a config, with a model of its own."""
  size = config.data.image_size
  return BaseLearner(
    models.build(config.model, size, rngs, classes=1 + ways), ways
  )
