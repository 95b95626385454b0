"""The prepare command, as a user types it."""

import concurrent.futures
import pathlib
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import test_data_copies
from PIL import Image
from tensorflow_datasets.core import shuffle
from test_data_nucleus import pack, put, real_ids, tree

from distillfss_jax import prepare as prepare_lib
from distillfss_jax.data import builder, download
from distillfss_jax.datasets import nucleus

ROOT = pathlib.Path(__file__).resolve().parents[1]


def prepare(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'distillfss_jax.prepare', *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def error(result):
  """The one line an error is told in."""
  assert result.returncode == 1, result
  assert 'Traceback' not in result.stderr
  lines = [line for line in result.stderr.splitlines() if 'error: ' in line]
  assert len(lines) == 1, result.stderr
  return lines[0]


def test_prepare_and_again(tmp_path):
  files, _ = tree([*real_ids(2, 2), 'unlisted'])
  raw = pack(files, tmp_path / 'x.zip')
  command = ('--dataset', 'nucleus', '--raw', raw, '--data_dir', tmp_path / 'd')
  done = prepare(*command)
  assert done.returncode == 0, done.stderr
  assert (
    f'nucleus: 3 train, 2 test images in {tmp_path}/d/nucleus' in done.stdout
  )
  assert '5/5' in done.stderr  # the bar
  assert done.stderr.count('1 images that splits/nucleus.json') == 1
  assert 'dataset_builder' not in done.stderr
  again = prepare(*command)
  assert again.returncode == 0
  assert 'prepared already: 3 train, 2 test' in again.stdout


def test_errors_are_one_line(tmp_path):
  files, _ = tree(real_ids(2, 1))
  bad = f'{real_ids(2, 1)[0]}/masks/00abc.png'
  raw = pack({**files, bad: b'x'}, tmp_path / 'x.zip')
  place = ('--data_dir', tmp_path / 'd')
  said = error(prepare('--dataset', 'nucleus', '--raw', raw, *place))
  assert bad in said
  assert 'BBBC038' in error(prepare('--dataset', 'nucleus', *place))
  assert 'there are: camvid, chestxray, ' in error(
    prepare('--dataset', 'nukleus', *place)
  )
  skipped = prepare('--dataset', 'nucleus', '--raw', raw, *place, '--skip_bad')
  assert skipped.returncode == 0
  assert f'left out {real_ids(2, 1)[0]}: ' in skipped.stdout


def test_a_contact_sheet(tmp_path):
  """With --raw it is made after preparing; without, of what is there."""
  files, _ = tree(real_ids(3, 2))
  raw = pack(files, tmp_path / 'x.zip')
  place = ('--dataset', 'nucleus', '--data_dir', tmp_path / 'd')
  assert 'is not prepared' in error(prepare(*place, '--show'))
  done = prepare(*place, '--raw', raw, '--show')
  assert done.returncode == 0, done.stderr
  path = tmp_path / 'd' / 'nucleus' / 'show.png'
  assert f'look: {path}' in done.stdout
  with Image.open(path) as sheet:
    assert sheet.width > 600
    assert sheet.height > 2 * 192
    colours = {colour for _, colour in sheet.getcolors(1 << 24)}
  assert (80, 200, 255) in colours  # outlines of nuclei
  path.unlink()
  again = prepare(*place, '--show')
  assert again.returncode == 0
  assert path.exists()
  for given in (('--raw', raw), ('--show',)):
    assert 'does not take --name' in error(
      prepare(*place, *given, '--name', 'x')
    )
  assert 'does not take --unknown' in error(
    prepare(*place, '--raw', raw, '--unknown', 'void')
  )


def test_a_test_image_is_no_training_image(tmp_path):
  """Copies of test images, under other names, are left out of train."""
  train, test = real_ids(3, 2)[:3], real_ids(3, 2)[3:]
  files, _ = tree([*train, *test])
  for name in list(files):  # the first training image becomes the last test's
    if name.startswith(train[0]):
      del files[name]
  files |= {
    name.replace(test[-1], train[0]): contents
    for name, contents in files.items()
    if name.startswith(test[-1])
  }
  raw = pack(files, tmp_path / 'x.zip')
  done = prepare(
    '--dataset', 'nucleus', '--raw', raw, '--data_dir', tmp_path / 'd'
  )
  assert done.returncode == 0, done.stderr
  assert '2 train, 2 test' in done.stdout
  assert f'left out {train[0]}: its pixels are those of the test image' in (
    done.stdout
  )
  assert '1 training images are left out' in done.stderr


def test_nor_is_it_when_images_are_divided_anew(tmp_path):
  """A support of 'reference' would have a copy that 'frozen' keeps in train."""
  ids = sorted(real_ids(8, 4))
  train = set(nucleus.split_ids(ids, 'frozen')[0])
  tested = [i for i in nucleus.split_ids(ids, 'reference')[1] if i in train]
  other = next(i for i in ids if i in train and i not in tested)
  files, _ = tree(ids)
  files = {k: v for k, v in files.items() if not k.startswith(other)}
  files |= {
    name.replace(tested[0], other): contents
    for name, contents in files.items()
    if name.startswith(tested[0])
  }
  nucleus.prepare(put(files, tmp_path / 'raw'), tmp_path / 'd')
  assert other in nucleus.load(tmp_path / 'd').train.ids
  made = nucleus.load(tmp_path / 'd', split='reference')
  assert tested[0] in made.test.ids
  assert other not in made.train.ids
  assert len(made.train) + len(made.test) == len(ids) - 1


def test_other_options_are_not_passed_over(tmp_path):
  files, _ = tree(real_ids(3, 2))
  raw = pack(files, tmp_path / 'x.zip')
  command = ('--dataset', 'nucleus', '--raw', raw, '--data_dir', tmp_path / 'd')
  assert prepare(*command).returncode == 0
  said = error(prepare(*command, '--split', 'reference'))
  assert 'was prepared with split frozen, not reference: remove' in said


def test_a_place_that_cannot_be_written_is_told_first(tmp_path, monkeypatch):
  files, _ = tree(real_ids(2, 1))
  raw = put(files, tmp_path / 'raw')

  def check(*args, **kwargs):
    raise AssertionError('this would have taken long')

  monkeypatch.setattr(builder, 'check', check)
  (tmp_path / 'file').write_text('')
  for place in (tmp_path / 'file', pathlib.Path('/proc/nowhere')):
    with pytest.raises(OSError, match='choose another --data_dir'):
      nucleus.prepare(raw, place)
  (tmp_path / 'd' / 'nucleus' / '1.0.0').mkdir(parents=True)
  with pytest.raises(ValueError, match='exists but holds no whole dataset'):
    nucleus.prepare(raw, tmp_path / 'd')


def test_threads_read_a_zip_each_for_itself(tmp_path, monkeypatch):
  """Two that read from one at once got each other's bytes on Python 3.12."""
  path, both, used = tmp_path / 'x.zip', threading.Barrier(2), []
  pack({'a': b'A', 'b': b'B'}, path, top='')
  whole = zipfile.ZipFile.open

  def together(self, name):
    both.wait(60)
    used.append(self)
    return whole(self, name)

  monkeypatch.setattr(zipfile.ZipFile, 'open', together)
  with (
    download.Files(path, '') as files,
    concurrent.futures.ThreadPoolExecutor(2) as threads,
  ):
    for _ in range(3):
      assert list(threads.map(files.read, 'ab')) == [b'A', b'B']
  assert len(set(used)) == 2  # which were used again
  assert all(archive.fp is None for archive in used)  # and are closed


def test_links_are_followed_and_lead_nowhere_twice(tmp_path):
  files, records = tree(real_ids(2, 1))
  real = put(files, tmp_path / 'elsewhere')
  raw = tmp_path / 'raw'
  raw.mkdir()
  for folder in real.iterdir():
    (raw / folder.name).symlink_to(folder)
  (raw / 'round').symlink_to(raw)
  manifest, _ = nucleus.prepare(raw, tmp_path / 'd')
  assert {row['id'] for row in manifest['records']} == set(records)


def test_a_folder_may_be_linked_twice(tmp_path):
  real, raw = tmp_path / 'real', tmp_path / 'raw'
  put({'a.txt': b''}, real, top='')
  raw.mkdir()
  for name in ('one', 'two'):
    (raw / name).symlink_to(real)
  (raw / 'broken').symlink_to(tmp_path / 'nowhere')
  (real / 'back').symlink_to(raw)  # round by way of elsewhere
  with download.Files(raw, '') as files:
    assert files.names == ('one/a.txt', 'two/a.txt')


def test_ctrl_c_is_one_line(tmp_path):
  code = (
    'import sys; from unittest import mock; from absl import app\n'
    'from distillfss_jax import prepare\n'
    'prepare.define_flags()\n'
    'with mock.patch.object(prepare, "run", side_effect=KeyboardInterrupt):\n'
    '  app.run(prepare.main)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, '--dataset', 'nucleus', '--raw', 'x'],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 130
  assert done.stderr == 'stopped; the same command starts again\n'


def test_synthetic_needs_nothing():
  done = prepare('--dataset', 'synthetic')
  assert done.returncode == 0
  assert 'nothing needs preparing' in done.stdout


def test_many_shards_and_no_tensorflow(tmp_path, monkeypatch):
  """What is larger than TFDS keeps in memory is written all the same."""
  monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 1000)
  monkeypatch.setattr(builder, 'SHARD', 2000)
  files, _ = tree(real_ids(7, 4))
  raw = put(files, tmp_path / 'raw')
  manifest, _ = nucleus.prepare(raw, tmp_path / 'data')
  records = list((tmp_path / 'data').rglob('*.array_record*'))
  assert len(records) > 4
  made = nucleus.load(tmp_path / 'data')
  assert len(made.train) + len(made.test) == len(manifest['records']) == 11
  for source in (made.train, made.test):
    for i in range(len(source)):
      record = source[i]
      assert record['id'] == source.ids[i]
      assert record['image'].shape[:2] == tuple(source.sizes[i])


def test_flags_of_a_folder(tmp_path):
  """What masks mean, groups, and how large a picture may be, as one types."""
  raw = put(test_data_copies.scenes(3, 2), tmp_path / 'raw', top='')
  said = tmp_path / 'said.txt'
  said.write_text('255 crack\n')
  command = (
    '--dataset', 'folder', '--raw', raw, '--data_dir', tmp_path / 'd',
    '--name', 'tiles',
  )  # fmt: skip
  done = prepare(*command, '--group-by', r's\d', '--meaning', said)
  assert done.returncode == 0, done.stderr
  for part in (
    'masks are taken to mean: 0 background, 255 crack',
    '3 groups, none of them divided',
    '4 train, 2 test',
    f'look: {tmp_path}/d/tiles/classes.png, a picture of each class',
    f'--config.data.args.data_dir={tmp_path}/d',
  ):
    assert part in done.stdout
  assert 'near-copies' not in done.stdout
  with Image.open(tmp_path / 'd' / 'tiles' / 'classes.png') as sheet:
    assert min(sheet.size) > 192
  assert 'does not take --group_by' in error(
    prepare('--dataset', 'nucleus', '--raw', raw, '--group-by', 'x')
  )
  (raw / 'images' / 's0_e0.png').unlink()
  Image.new('RGB', (1500, 1000)).save(raw / 'images' / 's0_e0.png')
  command = (*command[:-1], 'other', '--max_megapixels', 1)
  assert '--max_megapixels 2' in error(prepare(*command))


def test_where_a_class_lies():
  """The cut around it is a square inside the image, and not too small."""
  mask = np.zeros((300, 200), bool)
  mask[290:, :4] = True
  assert prepare_lib._around(mask) == (slice(236, 300), slice(0, 64))
  mask[:] = True
  rows, columns = prepare_lib._around(mask)
  assert mask[rows, columns].shape == mask.shape
  mask[:] = False
  mask[100:150, 60:80] = True
  assert prepare_lib._around(mask) == (slice(75, 175), slice(20, 120))
