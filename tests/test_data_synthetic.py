"""The synthetic dataset: pure, quick to say what it holds, and not trivial."""

import pickle

import numpy as np
import pytest

from distillfss_jax import datasets
from distillfss_jax.data import support
from distillfss_jax.datasets import synthetic


def test_records_depend_on_seed_split_and_index_alone():
  few = synthetic.load(num_train=3, num_test=3, image_size=64, seed=5)
  many = synthetic.load(num_train=9, num_test=5, image_size=64, seed=5)
  other = synthetic.load(num_train=3, num_test=3, image_size=64, seed=6)
  for i in (2, 0):
    one, same = few.train[i], pickle.loads(pickle.dumps(many.train))[i]
    np.testing.assert_array_equal(one['image'], same['image'])
    np.testing.assert_array_equal(one['label'], same['label'])
    assert one['id'] == same['id'] == few.train.ids[i]
    assert (one['image'] != few.test[i]['image']).any()
    assert (one['image'] != other.train[i]['image']).any()


@pytest.mark.parametrize('classes', [1, 2, 3, 4])
@pytest.mark.parametrize('size', [32, 96])
def test_labels_hold_the_classes_announced(classes, size):
  made = datasets.load(
    'synthetic', num_train=12, num_test=2, image_size=size, classes=classes
  )
  assert len(made.classes) == classes == len(made.palette) - 1
  for i, record in enumerate(made.train):
    assert record['image'].shape == (size, size, 3)
    assert record['label'].shape == (size, size)
    assert record['image'].dtype == record['label'].dtype == np.uint8
    found = np.isin(np.arange(1, classes + 1), record['label'])
    assert found.tolist() == made.train.present[i].tolist()
    assert found[i % classes]
    assert record['label'].max() <= classes
  assert made.train.present.any(axis=0).all()
  assert len(support.choose(made, 8, seed=1, rule='random')[0]) == 8


def test_brightness_alone_does_not_segment():
  made = synthetic.load(num_train=24, num_test=1)
  grey = np.stack([record['image'].mean(axis=-1) for record in made.train])
  nuclei = np.stack([record['label'] > 0 for record in made.train])
  assert 0.05 < nuclei.mean() < 0.35
  scores = []
  for level in range(0, 256, 8):
    for guess in (grey > level, grey <= level):
      scores.append((guess & nuclei).sum() / (guess | nuclei).sum())
  assert max(scores) < 0.4
  # Yet the nuclei stand out from what is around them in every image.
  for image, mask in zip(grey, nuclei, strict=True):
    gap = abs(image[mask].mean() - image[~mask].mean())
    assert gap > 0.5 * image[~mask].std()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'classes': 0}, '1 to 4, got 0'),
    ({'classes': 5}, '1 to 4, got 5'),
    ({'image_size': 8}, 'at least 32, got 8'),
    ({'num_test': 0}, 'got 64, 0'),
  ],
)
def test_errors(options, message):
  with pytest.raises(ValueError, match=message):
    synthetic.load(**options)
