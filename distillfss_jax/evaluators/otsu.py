"""What Otsu's rule scores: no training, and of the support only a class.

Each image is cut in two by its own threshold, and the smaller side is taken for
the object. What a model has learnt is what it scores above that.
"""

import numpy as np

from distillfss_jax.data import core, pipeline
from distillfss_jax.ops import metrics, threshold
from distillfss_jax.types import VOID


def score(
  dataset: core.Dataset, support: pipeline.SupportSet, *, image_size: int
) -> metrics.Confusion:
  """Scores the rule on the test images; one process scores all of them.

  All objects get the label of which the support shows most.
  """
  classes = 1 + len(dataset.classes)
  shown = support.labels[(support.labels > 0) & (support.labels != VOID)]
  name = int(np.bincount(shown, minlength=2).argmax())
  confusion = metrics.Confusion.empty(classes)
  batches = pipeline.test_batches(
    dataset.test, image_size=image_size, batch_size=8, native=False
  )
  for batch in batches:
    for row in np.flatnonzero(batch['valid']):
      grey = threshold.brightness(batch['images'][row])
      found = threshold.minority(grey) * name
      confusion.add(metrics.count(batch['labels'][row], found, classes))
  return confusion
