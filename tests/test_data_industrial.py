"""Preparing and loading Industrial from trees with a data.json."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from distillfss_jax import datasets
from distillfss_jax.data import core
from distillfss_jax.datasets import industrial

NAMES = [f'{name}{i:02d}' for i, name in enumerate('tsrqponmlkjihgfedcba')]
# data.json visits the classes in another order than it numbers them.
VISITED = NAMES[3:] + NAMES[:3]


def encode(array, form='PNG'):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, form)
  return buffer.getvalue()


def tree(per_class=3, seed=0):
  """Files {name: bytes}, ids in the order of data.json, records by id."""
  random = np.random.RandomState(seed)
  files, records, listed = {}, {}, {}
  for name in VISITED:
    paths = []
    for k in reversed(range(per_class)):
      size = (6 + k, 9)
      image = random.randint(0, 256, (*size, 3)).astype(np.uint8)
      mask = np.zeros(size, np.uint8)
      mask[1:3, 2:5] = 255
      mask[4, 4] = 1  # any grey counts
      files[f'{name}/bad/{k:03d}.crop.png'] = encode(image)
      files[f'{name}/bad/{k:03d}.crop.bmp'] = encode(mask, 'BMP')
      paths.append(f'data/{name}/bad/{k:03d}.crop.png')
      label = np.where(mask > 0, NAMES.index(name) + 1, 0)
      records[f'{name}_{k:03d}'] = image, label
    good = [f'data/{name}/good/000.png']
    listed[name] = {'good': good, 'bad': paths}
    files[f'{name}/good/000.png'] = b'not read'
  files['data.json'] = json.dumps({'clsName': NAMES, 'clsDic': listed}).encode()
  return files, list(records), records


def reference(ids):
  """The rule of the reference on rows in the order of data.json."""
  shuffled = np.random.RandomState(42).permutation(len(ids))
  test = [ids[i] for i in shuffled[: -(-len(ids) // 5)]]
  return [i for i in ids if i not in test], test


@pytest.mark.parametrize('top', ['', 'Industrial/', 'x/data/'])
def test_prepare_and_load_folds(tmp_path, top):
  files, ids, records = tree()
  raw = pack(files, tmp_path / 'x.zip', top)
  manifest, new = industrial.prepare(raw, tmp_path / 'data')
  assert new
  assert manifest['classes'] == NAMES
  assert len(manifest['records']) == 60
  assert len(manifest['palette']) == 21
  train, test = reference(ids)
  found = set()
  for fold in range(4):
    made = datasets.load('industrial', data_dir=tmp_path / 'data', fold=fold)
    kept = NAMES[fold::4]
    assert made.name == 'industrial'
    assert made.classes == tuple(kept)
    assert len(set(made.palette)) == 6
    for source, rows in ((made.train, train), (made.test, test)):
      assert list(source.ids) == [i for i in rows if i.split('_')[0] in kept]
      source = pickle.loads(pickle.dumps(source))
      assert len(source) == len(source.present) == len(source.sizes)
      for i, record in enumerate(source):
        image, label = records[record['id']]
        new = kept.index(record['id'].split('_')[0]) + 1
        assert record['id'] == source.ids[i]
        assert source.sizes[i].tolist() == list(label.shape)
        assert source.present[i].tolist() == [j + 1 == new for j in range(5)]
        np.testing.assert_array_equal(record['image'], image)
        np.testing.assert_array_equal(record['label'], np.sign(label) * new)
        assert record['label'].dtype == np.uint8
      found |= set(source.ids)
  assert found == set(ids)


def test_labels_of_other_folds_become_background():
  class Source:
    ids, sizes = ('x',), np.array([[1, 4]], np.int32)
    present = np.eye(20, dtype=bool)[1:2]

    def __len__(self):
      return 1

    def __getitem__(self, i):
      return {'id': 'x', 'label': np.array([[0, 2, 3, 255]], np.uint8)}

  chosen = core.Chosen(Source(), (2, 6))
  assert chosen[0]['label'].tolist() == [[0, 1, 0, 255]]
  assert chosen.present.tolist() == [[True, False]]


def test_folder_with_data_beside_its_list(tmp_path):
  files, ids, _ = tree()
  listed = files.pop('data.json')
  raw = put(files, tmp_path / 'raw' / 'data').parent
  (raw / 'data.json').write_bytes(listed)
  manifest, _ = industrial.prepare(raw, tmp_path / 'data')
  assert sorted(row['id'] for row in manifest['records']) == sorted(ids)


def test_twice_returns_at_once(tmp_path):
  files, _, _ = tree(2)
  first, _ = industrial.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'd')
  assert industrial.prepare('gone.zip', tmp_path / 'd') == (first, False)


def test_bad_files_are_named_and_left_out(tmp_path):
  files, ids, _ = tree()
  train, test = reference(ids)
  a, b, c, d, e = [
    f'{i.split("_")[0]}/bad/{i.split("_")[1]}.crop'
    for i in (*train[:4], test[0])
  ]
  del files[f'{a}.bmp']
  files[f'{b}.png'] = files[f'{b}.png'][:30]
  files[f'{c}.bmp'] = encode(np.ones((5, 7), np.uint8), 'BMP')
  size = Image.open(io.BytesIO(files[f'{d}.bmp'])).size[::-1]
  files[f'{d}.bmp'] = encode(np.zeros(size, np.uint8), 'BMP')
  files[f'{e}.bmp'] = b'no picture'
  raw = pack(files, tmp_path / 'x.zip', 'Industrial/')
  with pytest.raises(ValueError, match='5 of 60 images') as caught:
    industrial.prepare(raw, tmp_path / 'data')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    f'Industrial/{a}.bmp: is missing',
    f'{b}.png: cannot be decoded',
    f'{c}.bmp: mask is 7x5, its image 9x',
    f'{d}.bmp: mask has no defect',
    f'{e}.bmp: cannot be decoded',
    '--skip_bad',
  ):
    assert part in message
  manifest, _ = industrial.prepare(raw, tmp_path / 'data', skip_bad=True)
  assert set(manifest['skipped']) == {*train[:4], test[0]}
  rows = manifest['records']  # the others are divided as before
  assert [r['id'] for r in rows if r['split'] == 'train'] == train[4:]
  assert [r['id'] for r in rows if r['split'] == 'test'] == test[1:]


def changed(files, change):
  said = json.loads(files['data.json'])
  change(said)
  return {**files, 'data.json': json.dumps(said).encode()}


def same_id(said):
  said['clsDic'][NAMES[0]]['bad'].append(f'data/other/{NAMES[0]}/x/000.png')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (same_id, rf'share an id .*{NAMES[0]}_000 \(2\)'),
    (lambda x: x['clsName'].pop(), '19 different classes, expected 20'),
    (lambda x: x['clsName'].__setitem__(0, 'z'), 'not in clsName'),
    (lambda x: x.pop('clsDic'), 'no clsName and clsDic'),
    (lambda x: x['clsDic'][NAMES[0]].pop('bad'), 'no clsName and clsDic'),
    (lambda x: x['clsDic'][NAMES[0]]['bad'].append(3), 'are no texts'),
    (
      lambda x: x['clsDic'][NAMES[0]]['bad'].append('data/x.png'),
      "lists 'data/x.png', expected",
    ),
  ],
)
def test_wrong_list(tmp_path, change, message):
  files, _, _ = tree(1)
  raw = pack(changed(files, change), tmp_path / 'x.zip')
  with pytest.raises(ValueError, match=message) as caught:
    industrial.prepare(raw, tmp_path / 'data')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()


def test_paths_out_of_the_download_are_not_followed(tmp_path):
  files, _, _ = tree(1)
  outside = 'data/../../secret/x.png'
  files = changed(files, lambda x: x['clsDic'][NAMES[0]]['bad'].append(outside))
  image = np.zeros((4, 4, 3), np.uint8)
  put({'x.png': encode(image), 'x.bmp': encode(image)}, tmp_path / 'secret')
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match=r'secret/x\.png: is missing'):
    industrial.prepare(raw, tmp_path / 'data')


def test_wrong_layout_fold_and_split(tmp_path):
  (tmp_path / 'empty').mkdir()
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'empty', 'has no data.json'),
    (pack({'data.json': b'['}, tmp_path / 'x.zip'), 'has no clsName'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      industrial.prepare(raw, tmp_path / 'data')
    assert 'Industrial-5i' in str(caught.value)
  with pytest.raises(FileNotFoundError, match='--dataset industrial'):
    industrial.load(tmp_path)
  with pytest.raises(ValueError, match=r'fold 4 is not one of 0\.\.3'):
    industrial.load(tmp_path, fold=4)
  with pytest.raises(ValueError, match="'odd' is not one of"):
    industrial.prepare(tmp_path, tmp_path / 'data', split='odd')


def test_raw_is_never_written_into(tmp_path):
  files, _, _ = tree(1)
  raw = put(files, tmp_path / 'Industrial')
  with pytest.raises(ValueError, match='inside the raw folder'):
    industrial.prepare(raw, raw / 'prepared')
