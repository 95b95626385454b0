"""Every score of a segmentation, from one confusion matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from distillfss_jax.types import VOID


def count(labels: jax.Array, predicted: jax.Array, classes: int) -> jax.Array:
  """[classes, classes] int32 pixel counts, rows by label; void left out.

  `classes` counts background. Both maps are integer, of one shape.
  """
  labels = labels.astype(jnp.int32)  # as stored, they would overflow
  scored = labels != VOID
  index = jnp.where(scored, labels * classes + predicted, classes**2)
  flat = jnp.bincount(index.reshape(-1), length=classes**2 + 1)
  return flat[:-1].reshape(classes, classes).astype(jnp.int32)


@dataclasses.dataclass
class Confusion:
  """A confusion matrix over a test set, mergeable: sums first, division last.

  counts: int64 [1+n, 1+n], pixels by (label, prediction).
  A score whose denominator is 0 is 0.
  """

  counts: np.ndarray

  @classmethod
  def empty(cls, classes: int) -> 'Confusion':
    """Nothing counted yet; `classes` counts background."""
    return cls(np.zeros((classes, classes), np.int64))

  def add(self, counts) -> None:
    """Adds counts of a batch, whose label and prediction ranges must fit."""
    self.counts += np.asarray(counts, np.int64)

  @property
  def _hits(self):
    return np.diag(self.counts).astype(float)

  @property
  def precision(self) -> np.ndarray:
    """[1+n], of what was predicted a class, the share that is."""
    return _ratio(self._hits, self.counts.sum(0))

  @property
  def recall(self) -> np.ndarray:
    """[1+n], of what is a class, the share that was found."""
    return _ratio(self._hits, self.counts.sum(1))

  @property
  def f1(self) -> np.ndarray:
    """[1+n], the harmonic mean of precision and recall (Dice)."""
    total = self.counts.sum(0) + self.counts.sum(1)
    return _ratio(2 * self._hits, total)

  @property
  def iou(self) -> np.ndarray:
    """[1+n] intersection over union of each class, background first."""
    union = self.counts.sum(0) + self.counts.sum(1) - np.diag(self.counts)
    return _ratio(self._hits, union)

  @property
  def miou(self) -> float:
    """Mean over foreground classes: the number the papers publish."""
    return float(self.iou[1:].mean())

  @property
  def accuracy(self) -> float:
    """The share of pixels that are right, background too."""
    return float(_ratio(self._hits.sum(), self.counts.sum()))

  @property
  def fb_iou(self) -> float:
    """Mean IoU of background and of all foreground taken as one class."""
    binary = Confusion(
      np.array(
        [
          [self.counts[0, 0], self.counts[0, 1:].sum()],
          [self.counts[1:, 0].sum(), self.counts[1:, 1:].sum()],
        ]
      )
    )
    return float(binary.iou.mean())

  def scores(self, classes: tuple[str, ...]) -> dict:
    """The scores as a nested dict, per foreground class and over them."""

    def named(values):
      return dict(zip(classes, values[1:].tolist(), strict=True))

    return {
      'miou': self.miou,
      'fb_iou': self.fb_iou,
      'accuracy': self.accuracy,
      'f1': float(self.f1[1:].mean()),
      'precision': float(self.precision[1:].mean()),
      'recall': float(self.recall[1:].mean()),
      'iou': named(self.iou),
      'f1_per_class': named(self.f1),
      'precision_per_class': named(self.precision),
      'recall_per_class': named(self.recall),
    }


def _ratio(x, y):
  # Parity: 0/0 is 0, so a class absent from labels and predictions counts as
  # a zero in the mean, as torchmetrics has it in the published tables.
  return np.divide(x, y, out=np.zeros_like(np.asarray(x, float)), where=y > 0)
