"""Metrics over the images of a test set: counted on the device, divided last.

A metric says what to count of a batch; the counts of all batches and processes
are summed, and become scores at the end.
"""

import abc
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillfss_jax.evaluators.base import Protocol, Scores
from distillfss_jax.ops import metrics, resize
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.types import Array

BAND = 256  # rows at once, of scoring at the images' own sizes


class Metric(abc.ABC):
  """What is counted of predictions, and the scores that come of it."""

  protocol: Protocol

  @abc.abstractmethod
  def count(self, logits: Array, batch: dict[str, Array]) -> Any:
    """Counts of a batch, a tree of integer arrays, summed over its images.

    Args:
      logits: [b, S, S, classes], background first.
      batch: as `pipeline.test_batches` gives it; what is padding is void.
    """

  @abc.abstractmethod
  def scores(self, total: Any) -> dict:
    """Numbers by name, from the summed counts (int64)."""

  def notes(self, role: str, total: Any) -> list[str]:
    """What a reader of the scores has to know, in sentences."""
    del role, total
    return []


class ModelSize(Metric):
  """Every pixel at the model's size, with labels shrunk to it.

  Args:
    classes: names of labels 1..n.
    protocol: what it is called.
    dense: also the numbers that dense methods publish, in which background is
      a class like others.
  """

  # Parity: the reference scores so, with labels shrunk to the nearest pixel.

  def __init__(self, classes, protocol: Protocol, *, dense: bool = False):
    self.classes, self.protocol, self._dense = tuple(classes), protocol, dense

  def count(self, logits, batch):
    return self.count_each(logits, batch).sum(0)

  def count_each(self, logits: Array, batch: dict[str, Array]) -> Array:
    """Counts [b, classes, classes] of each image, at the model's size."""
    return jax.vmap(lambda x, y: metrics.count(x, y, 1 + len(self.classes)))(
      batch['labels'].astype(jnp.int32), logits.argmax(-1)
    )

  def scores(self, total) -> Scores:
    confusion = Confusion(total)
    found = confusion.scores(self.classes)
    return {**found, **confusion.dense_scores()} if self._dense else found

  def notes(self, role, total):
    said = []
    for way, name in enumerate(self.classes, 1):
      if not total[way].sum():
        said.append(
          f'{self.protocol.name}: no test image shows {name!r}, so that there '
          'is nothing to find of it'
        )
      elif not total[:, way].sum():
        said.append(
          f'{self.protocol.name}: {role} predicts no pixel of {name!r} in any '
          'test image'
        )
    return said


class Calibration(Metric):
  """Whether a model is right as often as it is sure, at the model's size."""

  def __init__(self, name: str):
    self.protocol = Protocol(
      name,
      'model',
      "whether the largest probability of a pixel, at the model's size, is how "
      'often it is right: expected calibration error over 15 bins of it; of '
      'foreground: where label or prediction is no background',
      {'ece_foreground': 'ECE of foreground', 'ece': 'ECE'},
    )

  def count(self, logits, batch):
    return metrics.count_confidence(batch['labels'], logits.astype(jnp.float32))

  def scores(self, total):
    every, foreground = (metrics.reliability(x) for x in total)
    return {
      'ece_foreground': metrics.calibration_error(foreground),
      'ece': metrics.calibration_error(every),
      'foreground': foreground,
      'all': every,
    }


class NativeSize(ModelSize):
  """Every pixel at the images' own sizes: the logits are stretched."""

  def count(self, logits, batch):
    return count_native(
      logits, batch['sizes'], batch['native_labels'], 1 + len(self.classes)
    )


def stretched(
  shape: tuple[int, int], sizes: Array, canvas: tuple[int, int]
) -> tuple[resize.Taps, resize.Taps]:
  """Where the pixels of images that were stretched to a shape lie in it.

  Args:
    shape: rows and columns of what the model says.
    sizes: [b, 2] int32, rows and columns of each image.
    canvas: rows and columns that are asked for.

  Returns:
    Of the rows and of the columns, `resize.taps` with a leading axis b.
  """
  return tuple(
    jax.vmap(lambda size, i=i, n=n: resize.taps(shape[i], size, n))(sizes[:, i])
    for i, n in enumerate(canvas)
  )


@jax.jit
def pictured(logits: Array) -> Array:
  """What pictures show of an answer.

  Args:
    logits: [H, W, classes], background first.

  Returns:
    uint8 [2, H, W]: labels, and their probabilities in 0..255.
  """
  most = jax.nn.softmax(logits.astype(jnp.float32)).max(-1)
  return jnp.stack([logits.argmax(-1), jnp.rint(255 * most)]).astype(jnp.uint8)


def argmax(logits: Array) -> Array:
  """The class of the largest logit."""
  return logits.argmax(-1)


def count_native(
  logits: Any,
  sizes: Array,
  labels: Array,
  classes: int,
  *,
  places: Callable = stretched,
  answer: Callable = argmax,
) -> Array:
  """Pixel counts [classes, classes] at the images' own sizes.

  Stretched logits of a large image take gigabytes, so they are made and
  forgotten a band of rows at a time.

  Args:
    logits: [b, h, w, .], or a tree of such.
    sizes: [b, 2] int32, rows and columns of each image.
    labels: [b, H, W] of one canvas for all, void where an image has ended.
    classes: background counts.
    places: where an image's pixels lie in the logits; see `stretched`.
    answer: logits at the images' size -> labels.
  """
  height, width = labels.shape[1:]
  band = math.gcd(BAND, height)
  shape = jax.tree.leaves(logits)[0].shape[1:3]
  rows, columns = places(shape, sizes, (height, width))
  lerp = jax.vmap(resize.lerp, (0, 0, None))
  # [b, h, W, .]
  wide = jax.tree.map(lambda x: lerp(x, columns, 1), logits)

  def add(i, counts):
    mine, truth = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, i * band, band, 1),
      (rows, labels),
    )
    found = answer(jax.tree.map(lambda x: lerp(x, mine, 0), wide))
    return counts + metrics.count(truth, found, classes)

  # Where all images have ended there is nothing to count.
  bands = -(-sizes[:, 0].max() // band)
  nothing = jnp.zeros((classes, classes), jnp.int32)
  return jax.lax.fori_loop(0, bands, add, nothing)


def total(counts: list[Any]) -> Any:
  """Sums counts of batches on the host, in int64."""
  return jax.tree.map(
    lambda *x: np.sum([np.asarray(y, np.int64) for y in x], 0), *counts
  )
