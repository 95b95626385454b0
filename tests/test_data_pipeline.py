"""Grain pipelines over the synthetic dataset and one of several sizes."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from distillfss_jax.data import pipeline, support, transforms
from distillfss_jax.datasets import synthetic


@pytest.fixture(scope='module')
def made():
  return synthetic.load(num_train=6, num_test=7, image_size=32)


class Sizes:
  """Source of images of many sizes; counts what is decoded."""

  def __init__(self, sizes):
    self.sizes = np.array(sizes, np.int32)
    self.ids = tuple(f't{i}' for i in range(len(sizes)))

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, i):
    rows, columns = self.sizes[i]
    random = np.random.RandomState(i)
    return {
      'image': random.randint(0, 256, (rows, columns, 3)).astype(np.uint8),
      'label': random.randint(0, 3, (rows, columns)).astype(np.uint8),
      'id': self.ids[i],
    }


def test_load_images(made):
  loaded = pipeline.load_images(made.train, np.array([4, 0, 4], np.int32), 48)
  assert loaded.images.shape == (3, 48, 48, 3)
  assert loaded.labels.shape == (3, 48, 48)
  assert loaded.ids == tuple(made.train.ids[i] for i in (4, 0, 4))
  for k, i in enumerate((4, 0, 4)):
    record = made.train[i]
    np.testing.assert_array_equal(
      loaded.images[k], transforms.resize_image(record['image'], 48)
    )
    np.testing.assert_array_equal(
      loaded.labels[k], transforms.resize_label(record['label'], 48)
    )


@pytest.mark.parametrize('batch_size', [1, 3, 7, 9])
def test_every_test_image_once(made, batch_size):
  batches = list(
    pipeline.test_batches(
      made.test, image_size=32, batch_size=batch_size, native=False
    )
  )
  assert len(batches) == -(-7 // batch_size)
  seen = []
  for batch in batches:
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
      'images': ((batch_size, 32, 32, 3), np.uint8),
      'labels': ((batch_size, 32, 32), np.uint8),
      'valid': ((batch_size,), bool),
      'index': ((batch_size,), np.int32),
    }
    for k in range(batch_size):
      if not batch['valid'][k]:
        assert batch['index'][k] == -1
        assert (batch['labels'][k] == 255).all()
        continue
      seen.append(batch['index'][k])
      record = made.test[batch['index'][k]]
      np.testing.assert_array_equal(batch['images'][k], record['image'])
      np.testing.assert_array_equal(batch['labels'][k], record['label'])
  assert sorted(seen) == list(range(7))


@pytest.mark.parametrize('parts', [1, 3])
def test_native_batches(made, parts):
  sizes = [(30, 40), (600, 10), (256, 256), (20, 300), (31, 40), (257, 5)]
  mixed = dataclasses.replace(made, test=Sizes(sizes))
  shards = [
    list(
      pipeline.test_batches(
        mixed.test,
        image_size=16,
        batch_size=2,
        native=True,
        shard=(part, parts),
      )
    )
    for part in range(parts)
  ]
  seen, canvases = [], []
  for together in zip(*shards, strict=True):  # equally many in each process
    shapes = {batch['native_labels'].shape for batch in together}
    assert len(shapes) == 1  # and of the same shape
    canvases.append(shapes.pop()[1:])
    for batch in together:
      for k in np.flatnonzero(batch['valid']):
        index = batch['index'][k]
        seen.append(index)
        rows, columns = batch['sizes'][k]
        assert (rows, columns) == sizes[index]
        native = batch['native_labels'][k]
        label = mixed.test[index]['label']
        np.testing.assert_array_equal(native[:rows, :columns], label)
        assert (native[rows:] == 255).all()
        assert (native[:, columns:] == 255).all()
      empty = batch['native_labels'][~batch['valid']]
      assert (empty == 255).all()
  assert sorted(seen) == list(range(6))
  if parts == 1:  # like sizes share a batch
    assert canvases == [(256, 256), (512, 512), (768, 768)]


@hypothesis.given(st.integers(1, 9000), st.integers(1, 9000))
def test_canvas(rows, columns):
  made = pipeline.canvas((rows, columns))
  assert made[0] == made[1] >= max(rows, columns)
  assert made[0] in {256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192,
                     12288}  # fmt: skip
  assert made[0] == 256 or made[0] / 2 < max(rows, columns)


@pytest.mark.parametrize(
  'options', [{'batch_size': 0}, {'shard': (2, 2)}, {'shard': (-1, 2)}]
)
def test_batch_errors(made, options):
  options = {'batch_size': 2, 'image_size': 32, 'native': False, **options}
  with pytest.raises(ValueError, match='need batch_size >= 1'):
    pipeline.test_batches(made.test, **options)
  with pytest.raises(ValueError, match='no images to test on'):
    pipeline.test_batches(Sizes([]), image_size=32, batch_size=2, native=False)


def test_workers_change_nothing(made, monkeypatch):
  monkeypatch.setattr(pipeline, '_WORTH', 1)  # else so few images need none

  def batches(workers):
    return list(
      pipeline.test_batches(
        made.test, image_size=32, batch_size=2, native=True, workers=workers
      )
    )

  alone, helped = batches(0), batches(2)
  assert len(alone) == len(helped) == 4
  for one, other in zip(alone, helped, strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def test_few_images_start_no_process():
  batches = object()
  for workers, images in ((4, 255), (0, None), (0, 9999)):
    assert pipeline._in_processes(batches, workers, images) is batches
  with pytest.raises(AttributeError, match='mp_prefetch'):
    pipeline._in_processes(batches, 4, 256)
  with pytest.raises(AttributeError, match='mp_prefetch'):
    pipeline._in_processes(batches, 1, None)


@pytest.mark.parametrize('kind', support.KINDS)
def test_step_tables(kind):
  tables = support.episode_tables(np.ones((4, 1)), kind=kind, subsample=2)
  steps = list(pipeline.step_tables(tables, steps=7))
  assert len(steps) == 7
  for i, step in enumerate(steps):
    table, valid = tables(i)
    assert step['table'].dtype == np.int32
    np.testing.assert_array_equal(step['table'], table)
    np.testing.assert_array_equal(step['valid'], valid)


def test_step_tables_resume():
  tables = support.episode_tables(
    np.ones((5, 1)), kind='leave_one_out', subsample=3, seed=3
  )
  make = lambda: iter(pipeline.step_tables(tables, steps=5))  # noqa: E731
  first = make()
  next(first), next(first)
  state = first.get_state()
  rest = [d['table'] for d in first]
  again = make()
  again.set_state(state)
  np.testing.assert_array_equal([d['table'] for d in again], rest)
  assert len(rest) == 3
  with pytest.raises(ValueError, match='got 0'):
    pipeline.step_tables(tables, steps=0)
