"""Preparing and loading Nucleus from trees laid out as its owners publish."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from distillfss_jax import datasets
from distillfss_jax.data import prepared, support
from distillfss_jax.datasets import nucleus

SIZES = [(24, 30), (30, 24), (33, 20), (24, 30)]


def png(array):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, 'PNG')
  return buffer.getvalue()


def real_ids(train=6, test=3):
  frozen = nucleus.frozen_split()
  return frozen['train'][:train] + frozen['test'][:test]


def tree(ids, seed=0):
  """Files {name: bytes} below stage1_train/ and the records they stand for."""
  random = np.random.RandomState(seed)
  files, records = {}, {}
  for i, id_ in enumerate(ids):
    rows, columns = SIZES[i % len(SIZES)]
    image = random.randint(0, 256, (rows, columns, 4)).astype(np.uint8)
    files[f'{id_}/images/{id_}.png'] = png(image)
    label = np.zeros((rows, columns), np.uint8)
    for k in range(3):  # the second overlaps the first by some pixels
      mask = np.zeros((rows, columns), np.uint8)
      mask[4 * k : 4 * k + 6, 3 : 9 + i] = 255
      mask[-1, -1] = 127  # not yet nucleus
      mask[-2, -1] = 128
      label[mask >= 128] = 1
      files[f'{id_}/masks/{k:02d}abc.png'] = png(mask)
    records[id_] = image[..., :3], label
  return files, records


def put(files, folder, top='stage1_train'):
  for name, contents in files.items():
    path = folder / top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents)
  return folder


def pack(files, path, top='stage1_train'):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(f'__MACOSX/{top}/._x', b'')
    for name, contents in files.items():
      archive.writestr(f'{top}/{name}' if top else name, contents)
  return path


def listing(folder):
  return {
    p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob('*')
  }


def test_frozen_split_is_the_reference_rule(shared):
  golden = json.loads(shared('goldens/dcama/split.json').read_text())
  frozen = nucleus.frozen_split()
  assert frozen['test'] == golden['test']
  assert frozen['train'] == golden['train'] == sorted(golden['train'])
  ids = golden['train'] + golden['test']
  train, test = nucleus.split_ids(ids, 'reference')
  assert (train, test) == (golden['train'], golden['test'])
  assert nucleus.split_ids(ids, 'frozen') == (train, test)


def test_images_of_neither_list_go_to_train(caplog):
  caplog.set_level('INFO')
  train, test = nucleus.split_ids([*real_ids(2, 2), '-new', 'znew'], 'frozen')
  assert [train[0], train[-1]] == ['-new', 'znew']
  assert test == nucleus.frozen_split()['test'][:2]
  assert len(caplog.messages) == 1
  assert '2 images' in caplog.text


@pytest.mark.parametrize('top', ['stage1_train', 'Nucleus', ''])
@pytest.mark.parametrize('packed', [True, False])
def test_prepare_and_load(tmp_path, top, packed):
  files, records = tree(real_ids())
  (tmp_path / 'raw').mkdir()
  if packed:
    raw = pack(files, tmp_path / 'raw' / 'x.zip', top)
  else:
    raw = put(files, tmp_path / 'raw', top)
    (raw / 'classes.csv').write_text('filename,foreground\n')
  before = listing(tmp_path / 'raw')
  manifest, new = nucleus.prepare(raw, tmp_path / 'data')
  assert new
  assert manifest == prepared.manifest(nucleus.Nucleus, tmp_path / 'data')
  assert listing(tmp_path / 'raw') == before
  made = datasets.load('nucleus', data_dir=tmp_path / 'data')
  assert made.classes == ('nucleus',)
  assert list(made.train.ids) == sorted(real_ids()[:6])
  assert list(made.test.ids) == nucleus.frozen_split()['test'][:3]
  for source in (made.train, pickle.loads(pickle.dumps(made.test))):
    assert source.present.all()
    for i, record in enumerate(source):
      image, label = records[source.ids[i]]
      assert record['id'] == source.ids[i]
      assert source.sizes[i].tolist() == list(label.shape)
      assert record['label'].dtype == record['image'].dtype == np.uint8
      np.testing.assert_array_equal(record['image'], image)
      np.testing.assert_array_equal(record['label'], label)
  assert support.choose(made, 3)[0].tolist() == [0, 2, 5]


def test_the_prepared_is_a_tfds_dataset(tmp_path):
  import tensorflow_datasets as tfds

  files, _ = tree(real_ids(2, 1))
  nucleus.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'data')
  source = tfds.data_source(
    'nucleus', split='train', data_dir=tmp_path / 'data'
  )
  assert len(source) == 2
  assert (source[0]['height'], source[0]['width']) == SIZES[0]


def test_other_split_without_preparing_again(tmp_path):
  ids = [f'own{i:02d}' for i in range(10)]
  files, _ = tree(ids)
  raw, data_dir = pack(files, tmp_path / 'x.zip'), tmp_path / 'data'
  with pytest.raises(ValueError, match='10 train and 0 test images of 10'):
    nucleus.prepare(raw, data_dir)
  assert not data_dir.exists()
  nucleus.prepare(raw, data_dir, split='reference')
  expected = [ids[i] for i in np.random.RandomState(42).permutation(10)[:2]]
  assert list(nucleus.load(data_dir).test.ids) == expected
  made = nucleus.load(data_dir, split='frozen')
  assert list(made.train.ids) == ids
  assert [record['id'] for record in made.train] == ids
  with pytest.raises(ValueError, match="'odd' is not one of"):
    nucleus.load(data_dir, split='odd')


def test_twice_returns_at_once(tmp_path):
  files, _ = tree(real_ids(2, 1))
  raw = pack(files, tmp_path / 'x.zip')
  first, new = nucleus.prepare(raw, tmp_path / 'data')
  assert new
  before = listing(tmp_path / 'data')
  assert nucleus.prepare('gone.zip', tmp_path / 'data') == (first, False)
  assert listing(tmp_path / 'data') == before


def test_interrupted_and_started_again(tmp_path, monkeypatch):
  """Killed while it writes: not prepared; started again: whole, no rests."""
  files, _ = tree(real_ids(3, 2))
  raw, data_dir = pack(files, tmp_path / 'x.zip'), tmp_path / 'data'
  real, calls = nucleus.Layout.encoded, []

  def interrupted(self, id_):
    calls.append(id_)
    if len(calls) == 3:  # while the records are written
      raise KeyboardInterrupt
    return real(self, id_)

  monkeypatch.setattr(nucleus.Layout, 'encoded', interrupted)
  with pytest.raises(KeyboardInterrupt):
    nucleus.prepare(raw, data_dir)
  monkeypatch.undo()
  with pytest.raises(FileNotFoundError, match='is not prepared'):
    nucleus.load(data_dir)
  # What a kill without any clean-up leaves behind:
  killed = data_dir / 'nucleus' / 'incomplete.ABCDEF_1.0.0'
  killed.mkdir()
  (killed / prepared.MANIFEST).write_text('{')
  assert nucleus.prepare(raw, data_dir)[1]
  assert [p.name for p in (data_dir / 'nucleus').iterdir()] == ['1.0.0']
  assert len(nucleus.load(data_dir).train) == 3


def damaged():
  """A tree with one image for each thing that can be wrong with one."""
  ids = real_ids(6, 2)
  files, _ = tree(ids)
  image = f'{ids[0]}/images/{ids[0]}.png'
  files[image] = files[image][:40]
  files[f'{ids[1]}/masks/00abc.png'] = b'no picture'
  files[f'{ids[1]}/masks/01abc.png'] = b''
  files[f'{ids[2]}/masks/02abc.png'] = png(np.zeros((5, 7), np.uint8))
  for name in [n for n in files if n.startswith(f'{ids[3]}/masks')]:
    del files[name]
  files[f'{ids[4]}/images/second.png'] = png(np.zeros((5, 7, 3), np.uint8))
  return ids, files


@pytest.mark.parametrize('packed', [True, False])
def test_all_bad_files_are_named(tmp_path, packed):
  ids, files = damaged()
  raw = (
    pack(files, tmp_path / 'x.zip') if packed else put(files, tmp_path / 'raw')
  )
  with pytest.raises(ValueError, match='5 of 8 images') as caught:
    nucleus.prepare(raw, tmp_path / 'data')
  message = str(caught.value)
  for part in (
    f'stage1_train/{ids[0]}/images/{ids[0]}.png: cannot be decoded',
    f'{ids[1]}/masks/00abc.png: cannot be decoded',
    f'{ids[1]}/masks/01abc.png: cannot be decoded',
    f'{ids[2]}/masks/02abc.png: mask is 7x5, its image 20x33',
    f'{ids[3]}: no files in masks/',
    f'{ids[4]}: 2 files in images/',
    '--skip_bad',
  ):
    assert part in message
  assert '\n' not in message
  assert not (tmp_path / 'data').exists()


def test_skip_bad_records_what_it_left_out(tmp_path):
  ids, files = damaged()
  raw = pack(files, tmp_path / 'x.zip')
  manifest, _ = nucleus.prepare(raw, tmp_path / 'data', skip_bad=True)
  assert sorted(manifest['skipped']) == sorted(ids[:5])
  assert prepared.manifest(nucleus.Nucleus, tmp_path / 'data') == manifest
  made = nucleus.load(tmp_path / 'data')
  assert (list(made.train.ids), list(made.test.ids)) == (ids[5:6], ids[6:])


def test_nothing_good(tmp_path):
  raw = pack({'a/images/a.png': b''}, tmp_path / 'x.zip')
  with pytest.raises(ValueError, match='none of the 1 images can be used'):
    nucleus.prepare(raw, tmp_path / 'data', skip_bad=True)


def test_missing_or_empty_raw(tmp_path):
  empty = tmp_path / 'empty'
  (empty / 'stage1_train').mkdir(parents=True)
  torn = tmp_path / 'torn.zip'
  torn.write_bytes(b'PK\x03\x04 and no more')
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'gone', 'does not exist'),
    (empty, 'has no <id>/images and <id>/masks'),
    (pack({}, tmp_path / 'none.zip'), 'has no <id>/images'),
    (torn, 'neither a folder nor a whole zip'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      nucleus.prepare(raw, tmp_path / 'data')
    assert 'BBBC038' in str(caught.value)


def test_damaged_member_of_a_zip_is_named(tmp_path):
  files, _ = tree(real_ids(2, 1))
  raw = pack(files, tmp_path / 'x.zip')
  contents = raw.read_bytes()
  victim = files[f'{real_ids(2, 1)[1]}/masks/01abc.png']
  assert contents.count(victim) >= 1
  at = contents.rindex(victim) + 20
  raw.write_bytes(contents[:at] + b'\xff\x00\xff' + contents[at + 3 :])
  with pytest.raises(ValueError, match=r'01abc\.png: cannot be read'):
    nucleus.prepare(raw, tmp_path / 'data')


def test_raw_is_never_written_into(tmp_path):
  files, _ = tree(real_ids(2, 1))
  raw = put(files, tmp_path / 'data', top='Nucleus')
  before = listing(raw)
  for place in (raw, raw / 'Nucleus', raw / 'Nucleus' / 'prepared'):
    with pytest.raises(ValueError, match='inside the raw folder'):
      nucleus.prepare(raw, place)
  assert listing(raw) == before
  nucleus.prepare(raw / 'Nucleus', raw)  # beside what is read


def test_unprepared(tmp_path):
  with pytest.raises(FileNotFoundError) as caught:
    nucleus.load(tmp_path)
  assert 'python -m distillfss_jax.prepare --dataset nucleus' in str(
    caught.value
  )
  with pytest.raises(ValueError, match='is not prepared in'):
    nucleus.Nucleus(data_dir=str(tmp_path)).download_and_prepare()


def test_unknown_dataset():
  with pytest.raises(ValueError, match=r"'nuclei'; there are: .*nucleus"):
    datasets.load('nuclei')
  with pytest.raises(ValueError, match="no dataset 'core'"):
    datasets.load('core')
