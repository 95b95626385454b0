"""What an evaluator counts, against each image on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillfss_jax.evaluators import base
from distillfss_jax.evaluators import metrics as evaluation
from distillfss_jax.ops import metrics, resize
from distillfss_jax.workdir import pictures


@pytest.mark.parametrize('band', [8, 16, 256])
def test_native_counts_are_those_of_each_image(monkeypatch, band):
  """Whatever the size of a band, and of the canvas that the images share."""
  monkeypatch.setattr(evaluation, 'BAND', band)
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
  native = evaluation.NativeSize(
    ('a', 'b', 'c'), base.Protocol('test_native', 'native', '')
  )
  batch = {'native_labels': labels, 'sizes': np.array(sizes, np.int32)}
  counts = jax.jit(native.count)(x, batch)
  np.testing.assert_array_equal(counts, expected)
  assert native.scores(np.asarray(counts))['miou'] is not None


def found(numbers, images=1):
  return base.Scored(
    {'test': {'student': numbers}},
    (base.Protocol('test', 'model', 'how', {'miou': 'mIoU'}),),
    {},
    images,
    1.0,
  )


def test_several_seeds_are_mean_and_deviation():
  one = found({'miou': 0.2, 'iou': {'a': 0.1, 'b': None}})
  two = found({'miou': 0.6, 'iou': {'a': 0.5, 'b': 0.3}})
  both = base.over_seeds({0: one, 7: two})
  numbers = both.scores['test']['student']
  assert numbers['miou'] == pytest.approx(0.4)
  assert numbers['iou'] == {'a': pytest.approx(0.3), 'b': None}
  assert numbers['deviation'] == {
    'miou': pytest.approx(np.std([0.2, 0.6], ddof=1))
  }
  assert numbers['seeds'] == {'0': {'miou': 0.2}, '7': {'miou': 0.6}}
  assert both.images == 2
  alone = base.over_seeds({0: one}).scores['test']['student']
  assert alone['deviation'] == {}


def test_several_test_sets_are_weighted_by_their_images():
  both = base.over_sets(
    {'x': found({'miou': 0.2}, images=1), 'y': found({'miou': 0.6}, images=3)}
  )
  assert [x.name for x in both.protocols] == ['test', 'test/x', 'test/y']
  assert both.scores['test']['student']['miou'] == pytest.approx(0.5)
  assert both.scores['test/y']['student']['miou'] == 0.6


def test_what_was_never_found_or_never_there_is_said():
  metric = evaluation.ModelSize(
    ('a', 'b', 'c'), base.Protocol('test', 'model', '')
  )
  counts = np.zeros((4, 4), int)
  counts[0, 0], counts[1, 1], counts[2, 0], counts[0, 3] = 9, 5, 3, 1
  blind, absent = metric.notes('student', counts)
  assert "student predicts no pixel of 'b'" in blind
  assert "no test image shows 'c'" in absent


def test_calibration_by_hand():
  """Ten pixels of background at 0.9, one of them wrong; two of void."""
  labels = np.array([[[0] * 9 + [1] + [255] * 2]], np.uint8)
  logits = np.zeros((1, 1, 12, 2), np.float32)
  logits[..., 0] = np.log(9)
  metric = evaluation.Calibration('test_confidence')
  counts = jax.jit(metric.count)(logits, {'labels': labels})
  assert np.asarray(counts).sum((1, 2)).tolist() == [10 + 9, 1]
  found = metric.scores(np.asarray(counts, np.int64))
  assert found['all']['accuracy'] == [0.9]
  assert found['all']['confidence'] == pytest.approx([0.9], abs=1 / 256)
  assert found['ece'] == pytest.approx(0, abs=1 / 256)
  # Where label or prediction is foreground there is the wrong one alone.
  assert found['foreground']['accuracy'] == [0]
  assert found['ece_foreground'] == pytest.approx(0.9, abs=1 / 256)
  nothing = metric.scores(np.zeros((2, metrics.LEVELS, 2), np.int64))
  assert nothing['ece'] is None
  assert metrics.calibration_error(
    {'confidence': [0.2, 1.0], 'accuracy': [0.5, 0.9], 'share': [0.25, 0.75]}
  ) == pytest.approx(0.25 * 0.3 + 0.75 * 0.1)
  assert pictures.reliability({'student': found, 'x': nothing}).ndim == 3
