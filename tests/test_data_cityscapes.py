"""Preparing and loading Cityscapes from trees as its two zips unpack."""

import io
import logging
import pickle

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from distillfss_jax import datasets
from distillfss_jax.data import download
from distillfss_jax.datasets import cityscapes

# Raw ids by train id, and what the owners do not evaluate; -1 is 255 in 8 bits.
RAW = (
  7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33,
)  # fmt: skip
VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255)
IMAGE = 'leftImg8bit/{}/{}/{}_leftImg8bit.png'
LABEL = 'gtFine/{}/{}/{}_gtFine_{}.png'


def encode(array):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, 'PNG')
  return buffer.getvalue()


def names(train=24, val=5):
  """(part, city, id) in our order."""
  found = [
    ('train', city, f'{city}_{i:06d}_000019')
    for city, rows in (('aachen', range(0, train, 2)), ('ulm', range(1, 24, 2)))
    for i in rows
    if i < train
  ]
  found += [('val', 'munster', f'munster_{i:06d}_000019') for i in range(val)]
  return found


def drawn(i):
  """Raw ids [32, 64] of image i: stripes of all classes but one, and void."""
  stripes = np.delete(RAW, i % 19).repeat(3)
  row = np.concatenate([stripes, np.take(VOID, range(i, i + 10), mode='wrap')])
  return np.tile(row.astype(np.uint8), (32, 1))


def records(**kwargs):
  """{id: (image, raw ids)} in our order."""
  random = np.random.RandomState(0)
  return {
    id_: (random.randint(0, 256, (32, 64, 3)).astype(np.uint8), drawn(i))
    for i, (_, _, id_) in enumerate(names(**kwargs))
  }


def tree(**kwargs):
  """Files {name: bytes} of both zips, with what is passed over."""
  made = records(**kwargs)
  files = {'README': b'text', 'license.txt': b'text'}
  for part, city, id_ in names(**kwargs):
    image, raw = made[id_]
    files[IMAGE.format(part, city, id_)] = encode(image)
    files[LABEL.format(part, city, id_, 'labelIds')] = encode(raw)
    files[LABEL.format(part, city, id_, 'color')] = b'not read'
    files[LABEL.format(part, city, id_, 'instanceIds')] = b'not read'
    files[f'gtFine/{part}/{city}/{id_}_gtFine_polygons.json'] = b'not read'
  id_ = 'berlin_000000_000019'  # of the owners' test: all is void
  files[IMAGE.format('test', 'berlin', id_)] = b'not read'
  files[LABEL.format('test', 'berlin', id_, 'labelIds')] = b'not read'
  return files


def expected(raw):
  label = np.full(raw.shape, 255, np.uint8)
  for i, value in enumerate(RAW):
    label[raw == value] = i + 1
  return label


@pytest.mark.parametrize('form', ['folder', 'zip', 'images'])
def test_prepare_and_load(tmp_path, form, caplog):
  files = tree()
  if form == 'images':  # what the original calls the folder
    files = {x.replace('leftImg8bit/', 'images/'): y for x, y in files.items()}
  if form == 'zip':
    raw = pack(files, tmp_path / 'x.zip', 'cityscapes/')
  else:
    raw = put(files, tmp_path / 'raw')
  manifest, new = cityscapes.prepare(raw, tmp_path / 'data')
  assert new
  assert not manifest['skipped']
  made = datasets.load('cityscapes', data_dir=tmp_path / 'data')
  assert made.name == 'cityscapes'
  assert len(made.classes) == 19
  assert len(set(made.palette)) == 20
  assert made.classes[0] == 'road'
  assert made.classes[16:] == ('train', 'motorcycle', 'bicycle')
  assert made.palette[made.classes.index('sky') + 1] == (70, 130, 180)
  kept = records()
  for part, source in (('train', made.train), ('val', made.test)):
    assert list(source.ids) == [x for at, _, x in names() if at == part]
    source = pickle.loads(pickle.dumps(source))
    for i, record in enumerate(source):
      image, raw_ids = kept[record['id']]
      assert source.sizes[i].tolist() == [32, 64]
      np.testing.assert_array_equal(record['image'], image)
      np.testing.assert_array_equal(record['label'], expected(raw_ids))
      assert source.present[i].sum() == 18
      assert record['label'].all(), 'background never occurs'
  for said in (
    'train has 24 images, its owners publish 2975',
    'val has 5 images, its owners publish 500',
    '29 images are there, its owners publish 3475',
  ):
    assert said in caplog.text


def test_every_raw_id_has_its_label(tmp_path):
  files = tree(train=2, val=2)
  raw_ids = np.array([sorted((*RAW, *VOID))], np.uint8)
  image = np.arange(raw_ids.size * 3, dtype=np.uint8).reshape(1, -1, 3)
  part, city, id_ = names()[0]
  files[IMAGE.format(part, city, id_)] = encode(image)
  files[LABEL.format(part, city, id_, 'labelIds')] = encode(raw_ids)
  cityscapes.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'data')
  label = cityscapes.load(tmp_path / 'data').train[0]['label'][0]
  assert raw_ids.size == 35
  assert dict(zip(raw_ids[0].tolist(), label.tolist(), strict=True)) == {
    **dict.fromkeys(VOID, 255),
    **{value: i + 1 for i, value in enumerate(RAW)},
  }


def test_the_published_count_warns_of_nothing(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(cityscapes, 'COUNTS', {'train': 4, 'val': 2})
  monkeypatch.setattr(cityscapes.Cityscapes, 'COUNT', 6)
  raw = pack(tree(train=4, val=2), tmp_path / 'x.zip')
  with caplog.at_level(logging.WARNING):
    cityscapes.prepare(raw, tmp_path / 'data')
  assert 'publish' not in caplog.text


def test_files_are_kept_as_they_are(tmp_path):
  files = tree(train=2, val=2)
  with download.Files(pack(files, tmp_path / 'x.zip'), '') as opened:
    layout = cityscapes.Layout(opened)
    part, city, id_ = names()[0]
    assert layout.encoded(id_) == files[IMAGE.format(part, city, id_)]


def test_twice_returns_at_once(tmp_path):
  raw = pack(tree(train=2, val=2), tmp_path / 'x.zip')
  first, new = cityscapes.prepare(raw, tmp_path / 'd')
  assert new
  assert cityscapes.prepare('gone.zip', tmp_path / 'd') == (first, False)


def test_bad_files_are_named_and_left_out(tmp_path):
  files = tree()
  chosen = names()[:5]
  images = [IMAGE.format(*x) for x in chosen]
  labels = [LABEL.format(*x, 'labelIds') for x in chosen]
  del files[images[0]], files[labels[1]]
  files[labels[2]] = encode(np.full((5, 7), 7, np.uint8))
  files[images[3]] = files[images[3]][:60]
  raw_ids = drawn(4).copy()
  raw_ids[3, 3] = 34
  files[labels[4]] = encode(raw_ids)
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match='5 of 29 images') as caught:
    cityscapes.prepare(raw, tmp_path / 'data')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    f'{images[0]}: cannot be read',
    f'{labels[1]}: cannot be read',
    f'{labels[2]}: mask is 7x5, its image 64x32',
    f'{images[3]}: cannot be decoded',
    f'{labels[4]}: value 34 is no raw id',
    '--skip_bad',
  ):
    assert part in message
  manifest, _ = cityscapes.prepare(raw, tmp_path / 'data', skip_bad=True)
  assert set(manifest['skipped']) == {x for _, _, x in chosen}
  assert len(manifest['records']) == 24


@pytest.mark.parametrize('lacking', ['gtFine/', 'leftImg8bit/'])
def test_one_zip_is_not_enough(tmp_path, lacking):
  files = tree(train=2, val=2)
  files = {x: y for x, y in files.items() if not x.startswith(lacking)}
  with pytest.raises(ValueError, match='unpack both into one') as caught:
    cityscapes.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  assert 'www.cityscapes-dataset.com' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_both_parts_are_needed(tmp_path):
  files = {x: y for x, y in tree(train=2, val=2).items() if '/val/' not in x}
  with pytest.raises(ValueError, match='divides into 2 train'):
    cityscapes.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')


def test_a_name_in_two_places(tmp_path):
  files = tree(train=2, val=2)
  for form in (IMAGE.format, lambda *x: LABEL.format(*x, 'labelIds')):
    files[form('val', 'ulm', names()[0][2])] = files[form(*names()[0])]
  with pytest.raises(ValueError, match='1 names are in several cities'):
    cityscapes.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')


def test_wrong_layout_and_split(tmp_path):
  (tmp_path / 'empty').mkdir()
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'empty', 'has no leftImg8bit'),
    (tmp_path / 'nowhere', 'does not exist'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      cityscapes.prepare(raw, tmp_path / 'data')
    assert 'gtFine_trainvaltest.zip' in str(caught.value)
  with pytest.raises(FileNotFoundError, match='--dataset cityscapes'):
    cityscapes.load(tmp_path)
  with pytest.raises(ValueError, match="'odd' is not one of"):
    cityscapes.prepare(tmp_path, tmp_path / 'data', split='odd')


def test_raw_is_never_written_into(tmp_path):
  raw = put(tree(train=2, val=2), tmp_path / 'raw')
  with pytest.raises(ValueError, match='inside the raw folder'):
    cityscapes.prepare(raw, raw / 'prepared')
