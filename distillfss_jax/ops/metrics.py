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


LEVELS = 256  # of confidence, evenly from 0 to 1


def count_confidence(labels: jax.Array, logits: jax.Array) -> jax.Array:
  """How sure a model is, and how often it is right.

  Args:
    labels: [b, H, W], integers; void is left out.
    logits: [b, H, W, classes], background first.

  Returns:
    int32 [2, LEVELS, 2]: of all pixels, and of those where label or prediction
    is foreground, by the level of the largest probability, how many there are
    and how many are right.
  """
  labels, found = labels.astype(jnp.int32), logits.argmax(-1)
  sure = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, -1))
  level = jnp.clip((sure * LEVELS).astype(jnp.int32), 0, LEVELS - 1)
  some = labels != VOID

  def counted(which):
    index = jnp.where(which, 2 * level + (labels == found), 2 * LEVELS)
    flat = jnp.bincount(index.reshape(-1), length=2 * LEVELS + 1)[:-1]
    wrong, right = flat.reshape(LEVELS, 2).T
    return jnp.stack([wrong + right, right], 1)

  either = (labels > 0) | (found > 0)
  return jnp.stack([counted(some), counted(some & either)]).astype(jnp.int32)


def reliability(counts: np.ndarray, bins: int = 15) -> dict[str, list]:
  """What `count_confidence` has found, in bins of equal width (1706.04599).

  Args:
    counts: [LEVELS, 2], of one kind of pixels.
    bins: how many.

  Returns:
    Lists over the bins that have pixels: 'confidence', the mean of the largest
    probability, to half a level; 'accuracy'; 'share' of the pixels.
  """
  middle = (np.arange(LEVELS) + 0.5) / LEVELS
  of = np.arange(LEVELS) * bins // LEVELS
  counts = np.asarray(counts, float)
  n, right = (np.bincount(of, x, bins) for x in counts.T)
  sure = np.bincount(of, counts[:, 0] * middle, bins)
  some = n > 0
  return {
    'confidence': (sure[some] / n[some]).tolist(),
    'accuracy': (right[some] / n[some]).tolist(),
    'share': (n[some] / n.sum()).tolist(),
  }


def calibration_error(found: dict[str, list]) -> float | None:
  """Expected calibration error of a `reliability`; None of no pixels."""
  if not found['share']:
    return None
  apart = np.abs(np.subtract(found['confidence'], found['accuracy']))
  return float(np.sum(apart * found['share']))


@dataclasses.dataclass
class Confusion:
  """A confusion matrix over a test set, mergeable: sums first, division last.

  counts: int64 [1+n, 1+n], pixels by (label, prediction).

  A ratio whose denominator is 0 is 0; of `scores` it is None, and what is no
  number is no part of a mean: a class that neither labels nor predictions show
  says nothing of a model.
  """

  # Parity: the reference's metric (torchmetrics) counts such a class as a zero
  # in the mean. In the published tables every class is there.

  counts: np.ndarray

  @classmethod
  def empty(cls, classes: int) -> 'Confusion':
    """Nothing counted yet; `classes` counts background."""
    return cls(np.zeros((classes, classes), np.int64))

  @classmethod
  def of(cls, label, predicted, classes: int) -> 'Confusion':
    """Of two label maps on the host, void left out."""
    scored = label != VOID
    index = label[scored].astype(int) * classes + predicted[scored]
    counts = np.bincount(index, minlength=classes**2)
    return cls(counts.reshape(classes, classes))

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

  def iou_or_none(self) -> list[float | None]:
    """`iou`, None of classes that neither labels nor predictions show."""
    union = self.counts.sum(0) + self.counts.sum(1) - np.diag(self.counts)
    return _where(self.iou, union)

  @property
  def miou(self) -> float | None:
    """Mean over foreground classes: the number the papers publish."""
    return _mean(self.iou_or_none()[1:])

  @property
  def accuracy(self) -> float | None:
    """The share of pixels that are right, background too."""
    [share] = _where(
      [_ratio(self._hits.sum(), self.counts.sum())], [self.counts.sum()]
    )
    return share

  @property
  def fb_iou(self) -> float | None:
    """Mean IoU of background and of all foreground taken as one class."""
    binary = np.array(
      [
        [self.counts[0, 0], self.counts[0, 1:].sum()],
        [self.counts[1:, 0].sum(), self.counts[1:, 1:].sum()],
      ]
    )
    return _mean(Confusion(binary).iou_or_none())

  def scores(self, classes: tuple[str, ...]) -> dict:
    """The scores as a nested dict, per foreground class and over them."""
    labelled, predicted = self.counts.sum(1), self.counts.sum(0)
    each = {
      'iou': self.iou_or_none(),
      'f1': _where(self.f1, labelled + predicted),
      # Of a class that is there but never predicted the precision is 0, as
      # what is never labelled but predicted has a recall of 0.
      'precision': _where(self.precision, labelled + predicted),
      'recall': _where(self.recall, labelled + predicted),
    }

    def named(values):
      return dict(zip(classes, values[1:], strict=True))

    return {
      'miou': self.miou,
      'fb_iou': self.fb_iou,
      'accuracy': self.accuracy,
      **{k: _mean(each[k][1:]) for k in ('f1', 'precision', 'recall')},
      'iou': named(each['iou']),
      **{
        f'{k}_per_class': named(each[k]) for k in ('f1', 'precision', 'recall')
      },
    }

  def dense_scores(self) -> dict:
    """What dense methods publish: background is a class like the others."""
    labelled = self.counts.sum(1)
    share = _ratio(labelled, labelled.sum())
    return {
      'miou_with_background': _mean(self.iou_or_none()),
      'class_accuracy': _mean(_where(self.recall, labelled)),
      'pixel_accuracy': self.accuracy,
      'frequency_weighted_iou': float((share * self.iou).sum())
      if labelled.sum()
      else None,
    }


def _ratio(x, y):
  return np.divide(x, y, out=np.zeros_like(np.asarray(x, float)), where=y > 0)


def _where(values, counts):
  """Numbers as floats, None where nothing was counted."""
  pairs = zip(values, counts, strict=True)
  return [float(x) if n else None for x, n in pairs]


def _mean(values):
  """The mean of those that are numbers; None where none is."""
  known = [x for x in values if x is not None]
  return float(np.mean(known)) if known else None
