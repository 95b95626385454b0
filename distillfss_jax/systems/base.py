"""What every system is: models, what is minimised, what follows a step.

A step (`train_step.py`) knows a system by this alone. It takes a batch, any
pytree whose arrays have a leading axis of items, asks for `losses`, and moves
the parameters. Whether the images of a batch see each other, how losses are
summed, what state comes out of a step: the system says it, and no line below
asks for its name.
"""

import abc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax.ops import metrics
from distillfss_jax.pretrained import weights
from distillfss_jax.types import Array, Items, Losses, Prediction, Support


class System(nnx.Module):
  """Models under training.

  Attributes:
    ways: number of foreground classes.
    takes: the type of batch: `Table`, `Episode` or `Dense`.
    roles: what `predict` answers as, the first being the system's product.
    beside: what else it answers when asked, of other classes than those of an
      episode: 'base', logits of the base classes, background first.
    trains: paths of the parameters that the optimiser moves; `systems.build`
      sets it.
    stacked: regular expressions of paths whose arrays have a leading axis of
      ways, each of which is optimised on its own; such a system has `seen`.
    coupled: whether the images of a batch see each other (batch statistics,
      norms over a batch, queues). `losses` then gets all items of a device at
      once, reaches those of the others over `items.axis`, and may change the
      buffers of its modules in place: that is the state after the update.
      Otherwise items are independent, and the step chooses how many go
      together.
    updates: the optimiser's updates of a batch, one after the other; `losses`
      is told which.
    teaches: whether a teacher says the same of an image at each step: a task
      whose images stay as they are may ask `teach` once, and put the answers
      into its batches.
  """

  ways: int
  takes: type
  roles: tuple[str, ...]
  beside: tuple[str, ...] = ()
  trains: frozenset[str] = frozenset()
  stacked: tuple[str, ...] = ()
  coupled: bool = False
  updates: tuple[Any, ...] = (None,)
  teaches: bool = False

  @abc.abstractmethod
  def losses(self, shared: Any, batch: Any, items: Items) -> Losses:
    """What a batch says; `shared` is what all steps read."""

  @abc.abstractmethod
  def predict(
    self, images: Array, memory: Any, roles: tuple[str, ...]
  ) -> dict[str, Prediction]:
    """Predictions by role for images [b, H, W, 3], at their own size."""

  def memorize(self, support: Support) -> Any:
    """What `predict` needs of a support set; None where there is none."""
    del support

  def teach(self, images: Array) -> Any:
    """What `losses` reads of a teacher's answers; a pytree of [b, ...]."""
    del images
    return ()

  def shared(self, *arrays: Array) -> Any:
    """What all steps read, made once; () for nothing."""
    del arrays
    return ()

  def scale(self, count: Array) -> Array:
    """What the sum of the losses of `count` items is multiplied by."""
    return 1 / count

  def seen(self, shared: Any, batch: Any, items: Items) -> Array | None:
    """[n] bool: which ways the items held here show, of `stacked` systems."""
    del shared, batch, items

  def after_step(
    self, buffers: dict[str, Array], shared: Any, batch: Any, items: Items
  ) -> dict[str, Array]:
    """The buffers after the items of a step were seen; not where coupled."""
    del shared, batch, items
    return buffers

  def sources(self, config) -> tuple[weights.Source, ...]:
    """What is loaded before a run, and whereto; see `weights.load`."""
    del config
    return ()

  def sets(self) -> Mapping[str, tuple[str, ...]]:
    """Named sets of parameters for `config.optim.trainable`: {name: regex}."""
    return {}


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
