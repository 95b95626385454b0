"""Resizing, against the bytes and masks of the reference's loader."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from distillfss_jax.data import download, transforms
from distillfss_jax.datasets import nucleus

MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])


@pytest.fixture(scope='module')
def raw(shared):
  zipped = shared('data/stage1_train.zip')
  with download.Files(zipped, nucleus.Nucleus.DOWNLOAD) as files:
    yield nucleus.Layout(files)


def read(raw, id_, size):
  image = raw.image(id_)
  label = raw.label(id_, image.shape[:2])
  return (
    transforms.resize_image(image, size),
    transforms.resize_label(label, size),
  )


def test_nearest_equals_torch(shared):
  with np.load(shared('goldens/dcama/data.npz')) as golden:
    made = transforms.resize_label(golden['nearest.in_260x347'], 384)
    np.testing.assert_array_equal(made, golden['nearest.out_384'])


@pytest.mark.parametrize('size', [128, 384])
def test_bytes_equal_reference_loader(shared, raw, size):
  with np.load(shared(f'goldens/dcama/inputs_{size}.npz')) as golden:
    for kind in ('support', 'query'):
      for id_, image, mask in zip(
        golden[f'{kind}_ids'],
        golden[f'{kind}_u8'],
        golden[f'{kind}_mask'],
        strict=True,
      ):
        made = read(raw, str(id_), size)
        np.testing.assert_array_equal(made[0], image)
        np.testing.assert_array_equal(made[1], mask)


def test_loader_equals_reference(shared, raw):
  """Three test images at 384; the third has masks that overlap (Q33)."""
  with np.load(shared('goldens/dcama/data.npz')) as golden:
    for name in ('test0', 'test21', 'test37'):
      image, label = read(raw, str(golden[f'{name}.id']), 384)
      tensor = (image.astype(np.float32) / np.float32(255) - MEAN) / STD
      flat = tensor.transpose(2, 0, 1).ravel()
      np.testing.assert_array_equal(
        flat[:: int(golden[f'{name}.image@stride'])], golden[f'{name}.image']
      )
      np.testing.assert_array_equal(
        label, np.minimum(golden[f'{name}.mask'], 1)
      )
    assert golden['test37.mask'].max() == 2


def test_support_equals_reference(shared, raw):
  split = nucleus.frozen_split()['train']
  with np.load(shared('goldens/dcama/data.npz')) as golden:
    masks = golden['support5.prompt_masks_fg']
    made = [read(raw, split[i], 384) for i in (0, 132, 265, 397, 530)]
    labels = np.stack([label for _, label in made])
    np.testing.assert_array_equal(labels, masks)
    np.testing.assert_array_equal(labels[None], golden['support_batch.gt'])
    images = np.stack([image for image, _ in made]).astype(np.float32)
    tensor = ((images / np.float32(255)) - MEAN) / STD
    flat = tensor.transpose(0, 3, 1, 2).ravel()
    np.testing.assert_array_equal(
      flat[:: int(golden['support5.images@stride'])], golden['support5.images']
    )


@hypothesis.given(
  st.integers(1, 60), st.integers(1, 60), st.integers(1, 70), st.integers(0, 99)
)
def test_resized_labels_hold_no_new_values(rows, columns, size, seed):
  label = np.random.RandomState(seed).randint(0, 256, (rows, columns))
  label = label.astype(np.uint8)
  made = transforms.resize_label(label, size)
  assert made.shape == (size, size)
  assert made.dtype == np.uint8
  assert np.isin(made, label).all()
  assert made[0, 0] == label[0, 0]


def test_same_size_changes_nothing():
  image = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
  np.testing.assert_array_equal(transforms.resize_image(image, 32), image)
  label = image[..., 0]
  np.testing.assert_array_equal(transforms.resize_label(label, 32), label)
