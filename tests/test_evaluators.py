"""What an evaluator counts, against each image on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillfss_jax.evaluators import fewshot
from distillfss_jax.ops import metrics, resize


@pytest.mark.parametrize('band', [8, 16, 256])
def test_native_counts_are_those_of_each_image(monkeypatch, band):
  """Whatever the size of a band, and of the canvas that the images share."""
  monkeypatch.setattr(fewshot, 'BAND', band)
  sizes, classes = [(40, 31), (17, 48), (9, 11), (1, 1)], 4
  rng = np.random.default_rng(0)
  x = rng.normal(size=(len(sizes), 9, 11, classes)).astype(np.float32)
  labels = np.full((len(sizes), 48, 48), 255, np.uint8)
  expected = np.zeros((classes, classes), int)
  for image, label, (h, w) in zip(x, labels, sizes, strict=True):
    label[:h, :w] = rng.integers(0, classes + 1, (h, w))
    label[:h, :w][label[:h, :w] == classes] = 255  # void inside, too
    alone = resize.bilinear(jnp.asarray(image), (h, w), align_corners=False)
    truth = jnp.asarray(label[:h, :w])
    expected += np.asarray(metrics.count(truth, alone.argmax(-1), classes))
  batch = {
    'labels': labels[:, :9, :11],
    'native_labels': labels,
    'sizes': np.array(sizes, np.int32),
  }
  counts, maps = jax.jit(fewshot._count, static_argnums=2)(
    {'student': x}, batch, classes
  )
  np.testing.assert_array_equal(counts['student']['test_native'], expected)
  np.testing.assert_array_equal(maps['student'], x.argmax(-1))
