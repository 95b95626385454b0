"""Preparing and loading Chest X-ray from trees of the download's form."""

import io
import logging
import pickle

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from distillfss_jax import datasets
from distillfss_jax.datasets import chestxray

COUNT, SIZE = 10, (14, 10)


def encode(array):
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(array, np.uint8)).save(buffer, 'PNG')
  return buffer.getvalue()


def built(count=COUNT):
  """Files {name: bytes} and {id: (grey image, label)}."""
  random = np.random.RandomState(0)
  files, records = {}, {}
  for i in range(count):
    id_ = f'CHNCXR_{i + 1:04d}_{i % 2}'
    image = random.randint(0, 256, SIZE)
    mask = np.zeros(SIZE, np.uint8)
    mask[2:9, 1:4], mask[2:9, 6:9] = 255, 128
    mask[9, 1:9] = 127
    files[f'CXR_png/{id_}.png'] = encode(image)
    files[f'masks/{id_}_mask.png'] = encode(mask)
    records[id_] = image, (mask >= 128).astype(np.uint8)
  for i in range(3):  # Montgomery: no suffix; the last one has no mask
    files[f'CXR_png/MCUCXR_000{i}_0.png'] = b'not read'
    if i < 2:
      files[f'masks/MCUCXR_000{i}_0.png'] = b'not read'
  files['CXR_png/CHNCXR_0900_1.png'] = b'no mask, so not read'
  files['CXR_png/CHNCXR_0901_1.png'] = b'no mask, so not read'
  files['test/CHNCXR_0902_1.png'] = b'not read'
  files['ClinicalReadings/CHNCXR_0001_0.txt'] = b'male 45yrs'
  return files, records


def tree():
  return built()[0]


def reference(records):
  """The rule of the benchmark's other datasets on the sorted ids."""
  ids = sorted(records)
  shuffled = np.random.RandomState(42).permutation(len(ids))
  test = [ids[i] for i in shuffled[: -(-len(ids) // 5)]]
  return [i for i in ids if i not in test], test


@pytest.mark.parametrize(
  'top', ['', 'LungSegmentation/', 'data/Lung Segmentation/']
)
def test_prepare_and_load(tmp_path, top, caplog):
  caplog.set_level(logging.INFO)
  files, records = built()
  raw = pack(files, tmp_path / 'x.zip', top)
  manifest, new = chestxray.prepare(raw, tmp_path / 'd')
  assert new
  assert not manifest['skipped']
  assert '10 images are there, its owners publish 566' in caplog.text
  assert '2 images have no mask and are passed over' in caplog.text
  made = datasets.load('chestxray', data_dir=tmp_path / 'd')
  assert (made.name, made.classes) == ('chestxray', ('lung',))
  assert (list(made.train.ids), list(made.test.ids)) == reference(records)
  for source in (made.train, made.test):
    for record in pickle.loads(pickle.dumps(source)):
      image, label = records[record['id']]
      grey = np.repeat(image[..., None], 3, -1)
      np.testing.assert_array_equal(record['image'], grey)
      np.testing.assert_array_equal(record['label'], label)


def test_the_download_has_all_twice(tmp_path):
  files, records = built()
  top = 'Lung Segmentation'
  files = {f'{x}{top}/{k}': v for k, v in files.items() for x in ('', 'data/')}
  raw = put(files, tmp_path / 'raw')
  manifest, _ = chestxray.prepare(raw, tmp_path / 'd')
  assert sorted(row['id'] for row in manifest['records']) == sorted(records)


def test_pool(tmp_path):
  chestxray.prepare(pack(tree(), tmp_path / 'x.zip'), tmp_path / 'd')
  made = chestxray.load(tmp_path / 'd')
  for part, ids in (
    ('train', made.train.ids),
    ('test', made.test.ids),
    ('all', made.train.ids + made.test.ids),
  ):
    pool = chestxray.pool(tmp_path / 'd', part)
    assert pool.source.ids == ids
    assert pool.classes == ('lung',)
    assert pool.values.tolist() == [1]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    assert pool.pairs.tolist() == [[i, 0] for i in order]
    assert [record['id'] for record in pool.source] == list(ids)
  assert len(chestxray.pool(tmp_path / 'd').source) == COUNT
  with pytest.raises(ValueError, match="part 'val' is not one of"):
    chestxray.pool(tmp_path / 'd', 'val')
  with pytest.raises(FileNotFoundError, match='--dataset chestxray'):
    chestxray.pool(tmp_path)


def test_bad_files_are_named_and_left_out(tmp_path):
  files, records = built()
  a, b, c, d = reference(records)[0][:4]
  del files[f'CXR_png/{a}.png']
  files[f'CXR_png/{b}.png'] = files[f'CXR_png/{b}.png'][:30]
  files[f'masks/{c}_mask.png'] = b'no picture'
  files[f'masks/{d}_mask.png'] = encode(np.ones((5, 7)))
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match='4 of 10 images') as caught:
    chestxray.prepare(raw, tmp_path / 'd')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    f'CXR_png/{a}.png: is missing',
    f'CXR_png/{b}.png: cannot be decoded',
    f'masks/{c}_mask.png: cannot be decoded',
    f'masks/{d}_mask.png: mask is 7x5, its image 10x14',
    '--skip_bad',
  ):
    assert part in message
  assert not (tmp_path / 'd').exists()
  manifest, _ = chestxray.prepare(raw, tmp_path / 'd', skip_bad=True)
  assert set(manifest['skipped']) == {a, b, c, d}
  assert len(manifest['records']) == 6


def test_wrong_layout_and_split(tmp_path):
  montgomery = {k: v for k, v in tree().items() if 'MCUCXR' in k}
  images = {k: v for k, v in tree().items() if 'masks' not in k}
  for i, files in enumerate((montgomery, images, {'a.png': b''})):
    with pytest.raises(ValueError, match='has no folder with') as caught:
      chestxray.prepare(put(files, tmp_path / f'raw{i}'), tmp_path / 'd')
    assert 'chest-xray-masks-and-labels' in str(caught.value)
  with pytest.raises(ValueError, match='--raw is not given'):
    chestxray.prepare(None, tmp_path / 'd')
  with pytest.raises(FileNotFoundError, match='--dataset chestxray'):
    chestxray.load(tmp_path)
  with pytest.raises(ValueError, match="'odd' is not one of"):
    chestxray.prepare(tmp_path, tmp_path / 'd', split='odd')


def test_raw_is_never_written_into_and_twice_returns_at_once(tmp_path):
  raw = put(tree(), tmp_path / 'LungSegmentation')
  with pytest.raises(ValueError, match='inside the raw folder'):
    chestxray.prepare(raw, raw / 'prepared')
  first, _ = chestxray.prepare(raw, tmp_path / 'd')
  assert chestxray.prepare('gone', tmp_path / 'd') == (first, False)
