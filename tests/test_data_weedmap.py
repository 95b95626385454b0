"""Preparing and loading WeedMap from trees of fields as published."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from distillfss_jax import datasets
from distillfss_jax.datasets import weedmap

STEMS = ['frame0009_2', 'frame0000_0', 'frame0021_1']
DONE = ['frame0000_0', 'frame0009_2', 'frame0021_1']  # sorted


def png(array):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, 'PNG')
  return buffer.getvalue()


def tree(fields=('000', '003'), seed=0):
  """Files {name: bytes} and records (image, label) by id."""
  random = np.random.RandomState(seed)
  files, records = {}, {}
  for field in fields:
    for stem in STEMS:
      image = random.randint(1, 256, (8, 10, 3)).astype(np.uint8)
      for i, channel in enumerate('RGB'):
        files[f'{field}/tile/{channel}/{stem}.png'] = png(image[..., i])
      files[f'{field}/tile/NIR/{stem}.png'] = b'not read'
      label = random.randint(0, 3, (8, 10)).astype(np.uint8)
      values = np.array([0, 10000, 2], np.uint16)[label]
      files[truth(field, stem)] = png(values)
      files[f'{field}/mask/{field}_{stem}.png'] = b'not read'
      records[f'{field}_{stem}'] = image, label
  return files, records


def truth(field, stem):
  return f'{field}/groundtruth/{field}_{stem}_GroundTruth_iMap.png'


def test_the_maps_are_of_16_bit():
  files, _ = tree()
  assert Image.open(io.BytesIO(files[truth('000', STEMS[0])])).mode == 'I;16'


@pytest.mark.parametrize(
  'top', ['', 'RedEdge/', '2018-weedMap-dataset-release/Tiles/RedEdge/']
)
@pytest.mark.parametrize('packed', [True, False])
def test_prepare_and_load(tmp_path, top, packed):
  files, records = tree(['000', '001', '003'])
  if packed:
    raw = pack(files, tmp_path / 'x.zip', top)
  else:
    put(files, tmp_path / 'raw' / top)
    raw = tmp_path / 'raw'
  first, new = weedmap.prepare(raw, tmp_path / 'data')
  assert new
  assert weedmap.prepare('gone', tmp_path / 'data') == (first, False)
  made = datasets.load('weedmap', data_dir=tmp_path / 'data')
  assert made.classes == ('crop', 'weed')
  assert len(made.palette) == 3
  assert list(made.train.ids) == [f'000_{stem}' for stem in DONE]
  assert list(made.test.ids) == [f'003_{stem}' for stem in DONE]
  for source in (made.train, pickle.loads(pickle.dumps(made.test))):
    for i, record in enumerate(source):
      image, label = records[source.ids[i]]
      assert source.sizes[i].tolist() == [8, 10]
      assert source.present[i].tolist() == [1 in label, 2 in label]
      np.testing.assert_array_equal(record['image'], image)
      np.testing.assert_array_equal(record['label'], label)


def test_fields_by_split(tmp_path):
  files, _ = tree(['000', '001', '002', '003'])
  raw, data_dir = pack(files, tmp_path / 'x.zip'), tmp_path / 'data'
  weedmap.prepare(raw, data_dir, split='002,000:003')
  made = weedmap.load(data_dir)
  assert [i[:3] for i in made.train.ids] == ['002'] * 3 + ['000'] * 3
  assert {i[:3] for i in made.test.ids} == {'003'}
  assert not weedmap.prepare(raw, data_dir, split='002,000:003')[1]
  for other in ({}, {'split': '003:000,002'}):
    said = f'with split 002,000:003, not {other.get("split", weedmap.SPLIT)}'
    with pytest.raises(ValueError, match=said):
      weedmap.prepare(raw, data_dir, **other)


@pytest.mark.parametrize(
  ('split', 'message'),
  [
    ('frozen', "split 'frozen' does not name fields"),
    ('000', "split '000' does not name fields"),
    ('000:003,000', 'names a field twice'),
    ('000,005:003', 'has no 005/tile/R'),
  ],
)
def test_bad_split(tmp_path, split, message):
  raw = pack(tree()[0], tmp_path / 'x.zip')
  with pytest.raises(ValueError, match=message):
    weedmap.prepare(raw, tmp_path / 'data', split=split)
  assert not (tmp_path / 'data').exists()


def blacken(files, id_, pixels):
  field, stem = id_.split('_', 1)
  for channel in 'RGB':
    name = f'{field}/tile/{channel}/{stem}.png'
    array = np.array(Image.open(io.BytesIO(files[name])))
    array.reshape(-1)[:pixels] = 0
    files[name] = png(array)


def test_remove_black_images(tmp_path):
  files, _ = tree()
  blacken(files, f'000_{DONE[0]}', 11)
  blacken(files, f'000_{DONE[1]}', 10)
  blacken(files, f'003_{DONE[2]}', 80)
  # Not black: one channel is dark, the sum of two is 256.
  name = f'000/tile/R/{DONE[2]}.png'
  files[name] = png(np.zeros((8, 10), np.uint8))
  for channel in 'GB':
    files[f'000/tile/{channel}/{DONE[2]}.png'] = png(
      np.full((8, 10), 128, np.uint8)
    )
  weedmap.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'data')
  assert len(weedmap.load(tmp_path / 'data').train) == 3
  made = weedmap.load(tmp_path / 'data', remove_black_images=True)
  assert list(made.train.ids) == [f'000_{stem}' for stem in DONE[1:]]
  assert [x['id'] for x in made.train] == list(made.train.ids)
  assert len(made.test) == 3


def test_all_train_tiles_are_black(tmp_path):
  files, _ = tree()
  for stem in DONE:
    blacken(files, f'000_{stem}', 80)
  weedmap.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'data')
  with pytest.raises(ValueError, match='all 3 train tiles'):
    weedmap.load(tmp_path / 'data', remove_black_images=True)


def test_bad_files_are_named_and_left_out(tmp_path):
  files, _ = tree()
  a, b, c = DONE
  del files[f'000/tile/G/{a}.png']
  files[f'000/tile/B/{b}.png'] = png(np.ones((8, 9), np.uint8))
  values = np.zeros((8, 10), np.uint16)
  values[0, :3] = 1, 255, 10000
  files[truth('003', a)] = png(values)
  files[truth('003', b)] = png(values[:, :9])
  raw = pack(files, tmp_path / 'x.zip', 'RedEdge/')
  with pytest.raises(ValueError, match='4 of 6 images') as caught:
    weedmap.prepare(raw, tmp_path / 'data')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    f'RedEdge/000/tile/G/{a}.png: is missing',
    f'000/tile/B/{b}.png: channel is 9x8, that of RedEdge/000/tile/R/{b}.png '
    '10x8',
    f'RedEdge/{truth("003", a)}: has values 1, 255; expected 0, 2',
    f'{truth("003", b)}: mask is 9x8, its image 10x8',
  ):
    assert part in message
  weedmap.prepare(raw, tmp_path / 'data', skip_bad=True)
  made = weedmap.load(tmp_path / 'data')
  assert (made.train.ids, made.test.ids) == ((f'000_{c}',), (f'003_{c}',))


def test_missing_or_undecodable_map(tmp_path):
  files, _ = tree()
  del files[truth('000', DONE[0])]
  files[truth('003', DONE[0])] = files[truth('003', DONE[0])][:40]
  files[f'003/tile/R/{DONE[1]}.png'] = b''
  with pytest.raises(ValueError, match='3 of 6 images') as caught:
    weedmap.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'data')
  message = str(caught.value)
  assert f'{truth("000", DONE[0])}: is missing' in message
  assert f'{truth("003", DONE[0])}: cannot be decoded' in message
  assert f'003/tile/R/{DONE[1]}.png: cannot be decoded' in message


def test_wrong_layout(tmp_path):
  (tmp_path / 'empty').mkdir()
  only = {x: y for x, y in tree()[0].items() if x.startswith('000')}
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'empty', 'has no 000/tile/R'),
    (pack(only, tmp_path / 'x.zip'), 'has no 003/tile/R'),
    (pack(tree()[0], tmp_path / 'y.zip', 'Sequoia/'), 'has no 000/tile/R'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      weedmap.prepare(raw, tmp_path / 'data')
    assert 'projects.asl.ethz.ch' in str(caught.value)
  with pytest.raises(FileNotFoundError, match='--dataset weedmap'):
    weedmap.load(tmp_path)


def test_raw_is_never_written_into(tmp_path):
  raw = put(tree()[0], tmp_path / 'RedEdge')
  with pytest.raises(ValueError, match='inside the raw folder'):
    weedmap.prepare(raw, raw / 'prepared')
