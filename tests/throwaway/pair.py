"""A system that no line of the package knows: what the house must take in.

A dense teacher, frozen but in training mode, and a student; batch norms and a
norm over the whole batch; two updates a batch, at two sizes; a queue of what
the teacher saw, which is state and not a parameter.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.ops import losses, resize
from distillfss_jax.systems import base
from distillfss_jax.types import Dense, Losses, Prediction

LENGTH = 6  # of the queue


class Queue(nnx.Variable):
  """What came before."""


class Net(nnx.Module):
  """Two convolutions with a batch norm between."""

  def __init__(self, width, outputs, *, rngs):
    self.inner = layers.Conv(3, width, 3, stride=2, rngs=rngs)
    self.norm = layers.BatchNorm(width)
    self.outer = layers.Conv(width, outputs, 1, rngs=rngs)

  def __call__(self, images, items=None):
    """Features [b, h, w, width] and logits [b, H, W, outputs]."""
    x = self.inner(images.astype(jnp.float32) / 255)
    if items is None:
      x = self.norm(x)
    else:
      x = self.norm.train(x, items.valid, items.axis)
    x = nnx.relu(x)
    return x, resize.bilinear(self.outer(x), images.shape[1:3])


class Pair(base.System):
  """See the module's docstring."""

  takes, roles, coupled = Dense, ('student', 'teacher'), True
  updates = (1, 2)  # every pixel, every second

  def __init__(self, ways, *, rngs):
    self.ways = ways
    self.teacher = Net(6, 1 + ways, rngs=rngs)
    self.student = Net(6, 1 + ways, rngs=rngs)
    self.queue = Queue(jnp.zeros((LENGTH, 6)))

  def losses(self, shared, batch, items):
    images = batch.images[:, :: items.update, :: items.update]
    labels = batch.labels[:, :: items.update, :: items.update]
    taught, _ = self.teacher(images, items)
    learnt, logits = self.student(images, items)
    taught = jax.lax.stop_gradient(taught)

    def over_all(x):
      x = (x * items.valid).sum()
      return jax.lax.psum(x, items.axis)

    count = over_all(jnp.ones(len(images)))
    sizes = [over_all((x**2).sum((1, 2, 3))) ** 0.5 for x in (taught, learnt)]
    alike = (taught * learnt).sum((1, 2, 3)) / (sizes[0] * sizes[1])
    away = taught.mean((1, 2)) - self.queue[...].mean(0)
    parts = {
      'labels': losses.focal(logits, labels.astype(jnp.int32), 0),
      'features': 1 - count * alike,
      'away': (away**2).sum(-1),  # moves nothing: the teacher is frozen
    }
    newest = over_all_images(taught.mean((1, 2)), items) / count
    self.queue[...] = jnp.concatenate([self.queue[1:], newest[None]])
    counts = {
      'train_miou/student': base.confusion(
        labels.astype(jnp.int32), Prediction(logits)
      )
    }
    return Losses(sum(parts.values()), parts, counts)

  def predict(self, images, memory, roles):
    nets = {'student': self.student, 'teacher': self.teacher}
    return {role: Prediction(nets[role](images)[1]) for role in roles}


def over_all_images(x, items):
  """The sum [c] of x [b, c] over the images of all devices."""
  return jax.lax.psum((x * items.valid[:, None]).sum(0), items.axis)


def build(config, ways, rngs):
  """The system of a config."""
  del config
  return Pair(ways, rngs=rngs)
