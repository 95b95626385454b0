"""What a threshold on brightness scores: the baseline a model has to beat."""

import numpy as np

from distillfss_jax.data import core, pipeline
from distillfss_jax.ops import threshold as thresholds
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.types import VOID


def score(
  dataset: core.Dataset, support: pipeline.SupportSet, *, image_size: int
) -> Confusion:
  """Scores the threshold that fits the support best, on the test images.

  Candidates are every fixed brightness and Otsu's threshold of each image, with
  nuclei brighter or darker than it. All foreground gets the label that the
  support shows most of. One process scores all images.
  """
  classes = 1 + len(dataset.classes)
  brightness = [thresholds.brightness(image) for image in support.images]
  known = support.labels[support.labels != VOID]
  name = int(np.bincount(known[known > 0], minlength=2)[1:].argmax()) + 1
  candidates = [
    (threshold, darker)
    for threshold in (None, *range(8, 256, 8))
    for darker in (False, True)
  ]

  def fit(candidate):
    confusion = Confusion.empty(2)
    for image, label in zip(brightness, support.labels, strict=True):
      _add(confusion, label, _segment(image, *candidate), name=1)
    return confusion.miou or 0.0

  best = max(candidates, key=fit)
  confusion = Confusion.empty(classes)
  batches = pipeline.test_batches(
    dataset.test, image_size=image_size, batch_size=8, native=False
  )
  for batch in batches:
    for row in np.flatnonzero(batch['valid']):
      found = _segment(thresholds.brightness(batch['images'][row]), *best)
      _add(confusion, batch['labels'][row], found, name=name, merge=False)
  return confusion


def _segment(image, threshold, darker):
  threshold = thresholds.otsu(image) if threshold is None else threshold
  return (image <= threshold) if darker else (image > threshold)


def _add(confusion, label, found, *, name, merge=True):
  label = np.where(label == VOID, VOID, label > 0) if merge else label
  classes = len(confusion.counts)
  confusion.add(Confusion.of(label, found * name, classes).counts)
