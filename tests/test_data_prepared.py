"""What was prepared and then damaged, or prepared by an older version."""

import contextlib
import json
import logging
import os
import shutil

import numpy as np
import pytest
from test_data_folder import IDS, drawn, encoded, grey, photo, tree
from test_data_nucleus import real_ids
from test_data_nucleus import tree as nuclei
from trees import pack, put

from distillfss_jax.data import builder, download, prepared
from distillfss_jax.datasets import folder, nucleus


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A folder of one prepared dataset; it is copied, not changed."""
  place = tmp_path_factory.mktemp('whole')
  files = tree([grey([1, 255]), grey([2])], test='a\nb')
  raw = put(files, place / 'raw')
  folder.prepare(raw, place / 'd', name='mine')
  return place / 'd'


@pytest.fixture
def copied(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'd')
  return tmp_path / 'd'


def read(data_dir):
  """All records: {id: record}."""
  dataset = folder.load(data_dir, 'mine')
  return {x['id']: x for part in (dataset.train, dataset.test) for x in part}


def damaged(data_dir):
  """The one line in which a damaged folder is told."""
  with pytest.raises(ValueError, match='is damaged') as caught:
    read(data_dir)
  said = str(caught.value)
  assert '\n' not in said
  assert 'prepare it again with python -m distillfss_jax.prepare' in said
  assert str(data_dir) in said
  return said


def manifest_of(data_dir):
  return data_dir / 'mine' / '1.0.0' / prepared.MANIFEST


def test_whole(copied):
  records = read(copied)
  assert sorted(records) == IDS
  np.testing.assert_array_equal(records['a']['label'], drawn([1, 255]))
  np.testing.assert_array_equal(records['e']['image'], photo(4))


def test_a_byte_of_the_records_is_flipped(copied):
  """Wherever it is: the records are right, or it is said."""
  files = sorted(copied.rglob('*.array_record*'))
  before, told = read(copied), 0
  random = np.random.RandomState(0)
  for path in files:
    contents = path.read_bytes()
    for at in random.randint(0, len(contents), 12):
      changed = bytearray(contents)
      changed[at] ^= 1 << random.randint(8)
      path.write_bytes(changed)
      try:
        found = read(copied)
      except ValueError as error:
        told += 'is damaged' in str(error) and '\n' not in str(error)
        continue
      for id_, record in found.items():
        for what in ('image', 'label'):
          np.testing.assert_array_equal(record[what], before[id_][what])
      told += 1
    path.write_bytes(contents)
  assert told == 12 * len(files)


def test_records_that_are_cut_or_gone(copied):
  path = next(copied.rglob('*train.array_record*'))
  contents = path.read_bytes()
  path.write_bytes(contents[: len(contents) // 2])
  damaged(copied)
  path.write_bytes(b'')
  damaged(copied)
  path.unlink()
  damaged(copied)


def test_a_record_that_is_another(copied):
  """Even whole files of another dataset are not taken for its own."""
  raw = put(
    tree([grey([1, 2])], test='a\nb'), copied.parent / 'other'
  )  # masks differ
  folder.prepare(raw, copied.parent / 'x', name='mine')
  for path in (copied.parent / 'x').rglob('*.array_record*'):
    shutil.copy(path, copied / 'mine' / '1.0.0' / path.name)
  assert 'is not as it was written' in damaged(copied)


@pytest.mark.parametrize('text', ['', '{', 'null', '{"name": 7}', '[1]'])
def test_what_tfds_says_is_damaged(copied, text):
  for name in ('dataset_info.json', 'features.json'):
    path = copied / 'mine' / '1.0.0' / name
    before = path.read_text()
    path.write_text(text)
    damaged(copied)
    path.write_text(before)


def _delete(key):
  def change(made):
    del made[key]

  return change


def _row(**changes):
  def change(made):
    made['records'][1].update(changes)

  return change


def _without(key):
  def change(made):
    del made['records'][2][key]

  return change


CHANGES = [
  *map(_delete, ('records', 'classes', 'palette', 'skipped')),
  *map(_without, ('id', 'split', 'index', 'size', 'present', 'areas')),
  _without('digest'),
  _row(index=99),
  _row(index=-1),
  _row(index='0'),
  _row(index=None),
  _row(split='validation'),
  _row(split='test'),
  _row(size=[12]),
  _row(size=[12, -16]),
  _row(size='large'),
  _row(present=[3]),
  _row(present=[0]),
  _row(areas=[1, 2, 3]),
  _row(id=7),
  lambda made: made['records'].append(made['records'][0]),
  lambda made: made['records'].pop(0),
  lambda made: made.update(records={}),
  lambda made: made.update(records=[[]]),
  lambda made: made.update(classes=['one more', *made['classes']]),
  lambda made: made.update(skipped=None),
]


@pytest.mark.parametrize('sealed', [True, False])
@pytest.mark.parametrize('change', CHANGES)
def test_a_manifest_that_is_not_as_it_was(copied, change, sealed):
  """With its seal, and as older versions wrote it, without."""
  path = manifest_of(copied)
  made = json.loads(path.read_text())
  change(made)
  if not sealed:
    del made['seal']
  path.write_text(json.dumps(made))
  assert 'manifest.json' in damaged(copied)


def test_every_change_of_a_sealed_manifest_is_seen(copied):
  path = manifest_of(copied)
  text = path.read_text()
  random = np.random.RandomState(0)
  same = json.loads(text)
  for _ in range(150):
    changed = bytearray(text.encode())
    changed[random.randint(len(changed))] = random.randint(32, 127)
    path.write_bytes(changed)
    with contextlib.suppress(ValueError):
      assert prepared.read(path) == same
  for odd in (b'', b'\xff\xfe', b'[' * 100_000, b'7', b'{}'):
    path.write_bytes(odd)
    with pytest.raises(ValueError, match='prepare'):
      prepared.read(path)


def test_what_an_older_version_prepared_is_read(copied, caplog):
  """Without digests: it is read as it is, and that is said once."""
  caplog.set_level(logging.INFO)
  path = manifest_of(copied)
  made = json.loads(path.read_text())
  for key in ('seal', 'near', 'meaning', 'forms', 'stamp'):
    del made[key]
  for row in made['records']:
    for key in ('stored', 'void', 'edges'):
      del row[key]
  del made['options']['checksum']
  path.write_text(json.dumps(made))
  assert sorted(read(copied)) == sorted(read(copied)) == IDS
  said = [x for x in caplog.messages if 'have no digests' in x]
  assert len(said) == 1
  assert '% of images' in folder.summary(made)


def test_a_seal_tells_data_apart(copied):
  made = prepared.read(manifest_of(copied))
  assert made['seal'] == prepared.seal(made)
  made['records'][0]['areas'][0] += 1
  assert made['seal'] != prepared.seal(made)


def test_an_index_that_is_another(tmp_path):
  """Of a benchmark's dataset, too."""
  files, _ = nuclei(real_ids(3, 1))
  nucleus.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'd')
  path = prepared.folder(nucleus.Nucleus, tmp_path / 'd') / prepared.MANIFEST
  made = json.loads(path.read_text())
  rows = [x for x in made['records'] if x['split'] == 'train'][:2]
  rows[0]['index'], rows[1]['index'] = rows[1]['index'], rows[0]['index']
  path.write_text(json.dumps(made))
  with pytest.raises(ValueError, match='it is not as it was written'):
    nucleus.load(tmp_path / 'd')
  del made['seal']
  path.write_text(json.dumps(made))
  with pytest.raises(ValueError, match=r'is damaged .record . of train is '):
    list(nucleus.load(tmp_path / 'd').train)


# ------------------------------------------------------ a folder that changed


def repaint(raw, name, form):
  """Another mask of the same size in bytes."""
  path = raw / 'masks' / name
  before = path.stat()
  path.write_bytes(encoded(drawn([0, 255]).astype(np.uint8), form))
  assert path.stat().st_size == before.st_size
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.mark.parametrize(('suffix', 'form'), [('bmp', 'BMP'), ('tif', 'TIFF')])
def test_a_mask_is_repainted(tmp_path, suffix, form):
  files = tree([grey([255])])
  for id_ in IDS:
    del files[f'masks/{id_}.png']
    mask = encoded(drawn([255]).astype(np.uint8), form)
    files[f'masks/{id_}.{suffix}'] = mask
  raw = put(files, tmp_path / 'raw')
  folder.prepare(raw, tmp_path / 'd', name='mine')
  repaint(raw, f'c.{suffix}', form)
  with pytest.raises(ValueError, match=r'was prepared with checksum .*, not'):
    folder.prepare(raw, tmp_path / 'd', name='mine')


def test_an_image_is_changed(tmp_path):
  files = tree([grey([255])])
  files |= {
    f'images/{x}.png': encoded(photo(i), 'BMP') for i, x in enumerate(IDS)
  }
  raw = put(files, tmp_path / 'raw')
  folder.prepare(raw, tmp_path / 'd', name='mine')
  (raw / 'images' / 'b.png').write_bytes(encoded(photo(77), 'BMP'))
  with pytest.raises(ValueError, match='was prepared with checksum'):
    folder.prepare(raw, tmp_path / 'd', name='mine')


def test_a_copy_is_the_same_folder(tmp_path, monkeypatch):
  """As a zip, and with other times; its files are read only if need be."""
  files = tree([grey([255])])
  raw = put(files, tmp_path / 'raw')
  folder.prepare(raw, tmp_path / 'd', name='mine')
  other = put(files, tmp_path / 'other')
  os.utime(other / 'masks' / 'a.png', (7, 7))
  for same in (other, pack(files, tmp_path / 'x.zip')):
    assert not folder.prepare(same, tmp_path / 'd', name='mine')[1]

  def read_again(files):
    raise AssertionError('nothing has changed')

  monkeypatch.setattr(folder, '_checksum', read_again)
  assert not folder.prepare(raw, tmp_path / 'd', name='mine')[1]


def test_a_zip_that_has_changed(tmp_path):
  files = tree([grey([255])])
  files['masks/a.png'] = encoded(drawn([255]).astype(np.uint8), 'BMP')
  raw = pack(files, tmp_path / 'x.zip')
  folder.prepare(raw, tmp_path / 'd', name='mine')
  files['masks/a.png'] = encoded(drawn([0, 255]).astype(np.uint8), 'BMP')
  raw = pack(files, tmp_path / 'x.zip')
  with pytest.raises(ValueError, match='was prepared with checksum'):
    folder.prepare(raw, tmp_path / 'd', name='mine')


def test_records_may_be_larger_than_raw_images_may(copied, monkeypatch):
  monkeypatch.setattr(download._Limit, 'pixels', 10)
  assert len(read(copied)) == 5


def test_where_it_was_looked_for(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'args\.data_dir'):
    folder.load(tmp_path, 'mine')
  with pytest.raises(FileNotFoundError, match=r'args\.data_dir'):
    nucleus.load(tmp_path)
  with pytest.raises(ValueError, match=r'folder\.py:name=my_cells') as caught:
    folder.load(tmp_path)
  assert 'not given' in str(caught.value)


def test_large_images_are_written_one_by_one(tmp_path, monkeypatch):
  monkeypatch.setattr(builder, '_LARGE', 10)
  raw = put(tree([grey([255])]), tmp_path / 'raw')
  folder.prepare(raw, tmp_path / 'd', name='mine')
  found = read(tmp_path / 'd')
  for i, id_ in enumerate(IDS):
    np.testing.assert_array_equal(found[id_]['image'], photo(i))
