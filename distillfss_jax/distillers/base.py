"""What every distiller is: two answers, and labels, to terms of a loss.

A term is a number for each item; what is minimised is the mean of the items'
sums. A term of a whole batch is the same number for all. Distillers may have
parameters (connectors, which bring the student's features to the teacher's
channels) and state (queues of what they saw).
"""

import abc
import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.ops import resize
from distillfss_jax.types import Answer, Array, Items


class Terms(NamedTuple):
  """What a distiller says of a batch, {name: [b]}.

  added: to the loss. seen: for the log alone.
  """

  added: dict[str, Array]
  seen: Mapping[str, Array] = types.MappingProxyType({})


class Distiller(nnx.Module):
  """See the module's docstring.

  Attributes:
    reads: fields of a teacher's `Answer` that are read.
  """

  reads: tuple[str, ...]

  def read(self, taught: Answer) -> Answer:
    """The part of a teacher's answer that is read; the rest is None."""
    fields = dataclasses.fields(Answer)
    left = {x.name: None for x in fields if x.name not in self.reads}
    return taught.replace(**left)

  @abc.abstractmethod
  def __call__(
    self,
    taught: Answer,
    learnt: Answer,
    labels: Array,
    items: Items,
    teacher: nnx.Module,
  ) -> Terms:
    """The terms of a batch.

    Args:
      taught: the teacher's answer; no gradient reaches it.
      learnt: the student's.
      labels: [b, H, W] int32; void is 255.
      items: of the batch.
      teacher: the network itself, for what its parameters say.
    """


class Connector(nnx.Module):
  """A 1x1 convolution and a norm, to the teacher's channels."""

  def __init__(self, inputs, outputs, *, rngs):
    self.conv = layers.Conv(
      inputs, outputs, 1, kernel=layers.he_fan_out, bias=None, rngs=rngs
    )
    self.norm = layers.BatchNorm(outputs)

  def __call__(self, x: Array, items: Items) -> Array:
    return self.norm.train(self.conv(x), items.valid, items.axis)


def connectors(
  learnt: Mapping[str, int], taught: Mapping[str, int], rngs: nnx.Rngs
) -> nnx.Dict:
  """A connector for each name, given the channels of both sides."""
  return nnx.Dict(
    {name: Connector(learnt[name], taught[name], rngs=rngs) for name in taught}
  )


def channels(model: nnx.Module, names: Sequence[str]) -> dict[str, int]:
  """The channels of a model's features."""
  return {name: model.features[name][0] for name in names}


def check(
  distiller: str,
  teacher: nnx.Module,
  student: nnx.Module,
  *,
  features: Sequence[str] = (),
  normed: bool = False,
  attended: bool = False,
  heads: int = 0,
) -> None:
  """Raises ValueError where a model lacks what a distiller compares.

  Args:
    distiller: its name.
    teacher: a `models.base.DenseSegmenter`.
    student: another.
    features: names of features that both must have.
    normed: whether the teacher's must come from norms, whose numbers are read.
    attended: whether both must have maps weighted by attention.
    heads: how many binary heads both must have.
  """
  lacks = []
  for role, model in (('teacher', teacher), ('student', student)):
    missing = [name for name in features if name not in model.features]
    if missing:
      has = ', '.join(model.features) or 'none'
      lacks.append(
        f'the {role} ({type(model).__name__}) lacks the features '
        f'{", ".join(missing)}; it has {has}'
      )
    if attended and not model.attended:
      lacks.append(
        f'the {role} ({type(model).__name__}) has no maps weighted by '
        "attention (a DeepLab has them with fields.attention='learned')"
      )
    if model.heads < heads:
      lacks.append(
        f'the {role} ({type(model).__name__}) has {model.heads or "no"} binary '
        f'heads, {heads} are compared'
      )
  if normed and not lacks:
    bare = [name for name in features if teacher.features[name][1] is None]
    if bare:
      lacks.append(
        f"the teacher's {', '.join(bare)} come from no batch norm, whose "
        'numbers are read'
      )
  if lacks:
    raise ValueError(f'distiller {distiller}: {"; ".join(lacks)}')


def of_batch(value: Array, items: Items) -> Array:
  """A number of the whole batch as a term: the same for each item."""
  return jnp.broadcast_to(value, items.valid.shape)


def alike(x: Array, like: Array) -> Array:
  """Maps [b, h, w, c] at the size of another map, where they differ."""
  return resize.bilinear(x, like.shape[1:3])


def unit(x: Array, axis=-1) -> Array:
  """Divides by the length along axes; 0 stays 0."""
  square = jnp.square(x).sum(axis, keepdims=True)
  some = square > 0  # the root of 0 has no gradient
  return x * jnp.where(some, jax.lax.rsqrt(jnp.where(some, square, 1)), 0)


def kl(taught: Array, learnt: Array, temperature: float = 1.0) -> Array:
  """T^2 KL of class probabilities at a temperature T, mean over pixels, [b].

  Args:
    taught: logits [b, h, w, c].
    learnt: the same shape.
    temperature: T.
  """
  t, s = (jax.nn.log_softmax(x / temperature) for x in (taught, learnt))
  return temperature**2 * (jnp.exp(t) * (t - s)).sum(-1).mean((1, 2))
