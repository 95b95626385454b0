"""Preparing and loading Polyp from trees of PraNet's form."""

import io
import logging
import pickle

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from configs import polyp as config
from distillfss_jax import datasets
from distillfss_jax.datasets import polyp

SIZE = (12, 16)


def encode(array, form='PNG'):
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(array, np.uint8)).save(buffer, form)
  return buffer.getvalue()


def pixels(contents):
  return np.asarray(Image.open(io.BytesIO(contents)).convert('RGB'))


def built(train=6, test=2):
  """Files {name: bytes} and {id: (image, label)}: six sets and a union."""
  random = np.random.RandomState(0)
  files, records = {}, {}
  for set_ in polyp.COUNTS:
    top = 'TrainDataset' if set_ == 'train' else f'TestDataset/{set_}'
    for i in range(train if set_ == 'train' else test):
      image = random.randint(0, 256, (*SIZE, 3))
      mask = np.zeros(SIZE, np.uint8)
      mask[2:7, 3 + i : 8 + i] = 255
      mask[7, 3:8], mask[8, 3:8] = 127, 128  # a soft border
      jpeg, tiff = i == 1, set_ == 'CVC-300'
      contents = encode(image, 'JPEG' if jpeg else 'PNG')
      files[f'{top}/images/{i + 1}.{"jpg" if jpeg else "png"}'] = contents
      files[f'{top}/masks/{i + 1}.{"tif" if tiff else "png"}'] = encode(
        # Some masks of the download have three channels.
        np.repeat(mask[..., None], 3, -1) if i == 0 else mask,
        'TIFF' if tiff else 'PNG',
      )
      label = (mask > 127).astype(np.uint8)
      records[f'{set_}/{i + 1}'] = pixels(contents), label
      if set_ != 'train':  # the union that users of the original make
        for kind in ('images', 'masks'):
          files[f'TestDataset/test/{kind}/{set_}{i}.png'] = b'not read'
  return files, records


def tree():
  return built()[0]


@pytest.mark.parametrize('top', ['', 'dataset/', 'data/'])
def test_prepare_and_load(tmp_path, top):
  files, records = built()
  raw = pack(files, tmp_path / 'x.zip', top)
  manifest, new = polyp.prepare(raw, tmp_path / 'd')
  assert new
  assert not manifest['skipped']
  assert {row['split'] for row in manifest['records']} == {
    'train', 'test_cvc_300', 'test_cvc_clinicdb', 'test_kvasir',
    'test_cvc_colondb', 'test_etis_laribpolypdb',
  }  # fmt: skip
  made = datasets.load('polyp', data_dir=tmp_path / 'd')
  assert (made.name, made.classes) == ('polyp', ('polyp',))
  assert list(made.train.ids) == [f'train/{i + 1}' for i in range(6)]
  assert list(made.test.ids) == [
    f'{set_}/{i + 1}' for set_ in polyp.TESTS for i in range(2)
  ]
  for source in (made.train, made.test):
    source = pickle.loads(pickle.dumps(source))
    assert source.present.all()
    for record in source:
      image, label = records[record['id']]
      np.testing.assert_array_equal(record['image'], image)
      np.testing.assert_array_equal(record['label'], label)
  assert {k: list(v) for k, v in made.sets.items()} == {
    set_: [2 * i, 2 * i + 1] for i, set_ in enumerate(polyp.TESTS)
  }
  for set_ in polyp.TESTS:
    one = polyp.load(tmp_path / 'd', test=set_)
    assert one.sets == {set_: (0, 1)}
    assert one.test.ids == (f'{set_}/1', f'{set_}/2')
    assert one.train.ids == made.train.ids


def test_counts_are_compared_and_the_union_is_passed_over(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  polyp.prepare(pack(tree(), tmp_path / 'x.zip'), tmp_path / 'd')
  assert 'train has 6 images, its owners publish 1450' in caplog.text
  assert 'CVC-ColonDB has 2 images, its owners publish 380' in caplog.text
  assert 'test (10 images) is passed over' in caplog.text


def test_a_test_set_that_is_not_there(tmp_path, caplog):
  gone = 'ETIS-LaribPolypDB'
  files = {k: v for k, v in tree().items() if gone not in k}
  polyp.prepare(put(files, tmp_path / 'raw'), tmp_path / 'd')
  assert f'{gone} has 0 images, its owners publish 196: it is' in caplog.text
  assert len(polyp.load(tmp_path / 'd').test) == 8
  assert gone not in polyp.load(tmp_path / 'd').sets
  with pytest.raises(ValueError, match=f'{gone} was not in the') as caught:
    polyp.load(tmp_path / 'd', test=gone)
  assert 'CVC-300, CVC-ClinicDB, Kvasir, CVC-ColonDB' in str(caught.value)
  with pytest.raises(ValueError, match="'kvasir' is not one of"):
    polyp.load(tmp_path / 'd', test='kvasir')


def test_bad_files_are_named_and_left_out(tmp_path):
  files, _ = built()
  del files['TrainDataset/masks/1.png']
  files['TrainDataset/images/3.png'] = b'no picture'
  files['TrainDataset/masks/4.png'] = encode(np.ones((5, 7)))
  files['TestDataset/Kvasir/masks/1.tif'] = encode(np.ones(SIZE), 'TIFF')
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match='4 of 16 images') as caught:
    polyp.prepare(raw, tmp_path / 'd')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    'train/1: has none in masks/',
    'TrainDataset/images/3.png: cannot be decoded',
    'TrainDataset/masks/4.png: mask is 7x5, its image 16x12',
    'Kvasir/1: has several: TestDataset/Kvasir/masks/1.png, ',
    '--skip_bad',
  ):
    assert part in message
  assert not (tmp_path / 'd').exists()
  manifest, _ = polyp.prepare(raw, tmp_path / 'd', skip_bad=True)
  bad = {'train/1', 'train/3', 'train/4', 'Kvasir/1'}
  assert set(manifest['skipped']) == bad
  assert polyp.load(tmp_path / 'd', test='Kvasir').test.ids == ('Kvasir/2',)


def test_an_image_in_train_and_test_is_left_out(tmp_path):
  files, _ = built()
  files['TrainDataset/images/1.png'] = files['TestDataset/Kvasir/images/1.png']
  manifest, _ = polyp.prepare(put(files, tmp_path / 'raw'), tmp_path / 'd')
  assert 'Kvasir/1' in manifest['skipped']['train/1']


def test_wrong_layout_and_split(tmp_path):
  half = {k: v for k, v in tree().items() if 'TestDataset' not in k}
  union = {k: v for k, v in tree().items() if 'Test' not in k or '/test/' in k}
  for i, (files, message) in enumerate(
    (
      (half, 'has no TrainDataset/images'),
      (union, 'has no TrainDataset/images'),
      ({'x/y/z/a.png': b''}, r'\(1 files in all\)'),
    )
  ):
    with pytest.raises(ValueError, match=message) as caught:
      polyp.prepare(put(files, tmp_path / f'raw{i}'), tmp_path / 'd')
    assert 'PraNet' in str(caught.value)
  with pytest.raises(ValueError, match='--raw is not given'):
    polyp.prepare(None, tmp_path / 'd')
  with pytest.raises(FileNotFoundError, match='--dataset polyp'):
    polyp.load(tmp_path, test='Kvasir')
  with pytest.raises(ValueError, match="'odd' is not one of"):
    polyp.prepare(tmp_path, tmp_path / 'd', split='odd')


def test_raw_is_never_written_into_and_twice_returns_at_once(tmp_path):
  raw = put(tree(), tmp_path / 'raw', 'data/')
  with pytest.raises(ValueError, match='inside the raw folder'):
    polyp.prepare(raw, raw / 'data')
  first, _ = polyp.prepare(raw, tmp_path / 'd')
  assert polyp.prepare('gone', tmp_path / 'd') == (first, False)


def test_the_config_knows_the_test_sets():
  assert config.TESTS == polyp.TESTS
  assert config.get_config('test=Kvasir').data.args.test == 'Kvasir'
  assert config.get_config().data.args.test == 'all'
