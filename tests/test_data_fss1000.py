"""Preparing and loading FSS-1000 from trees of the owners' form."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from configs import fss1000 as config
from distillfss_jax import datasets
from distillfss_jax.datasets import fss1000

NAMES = ['abes_flyingfish', 'ab_wheel', 'bus', 'cd', 'fish', 'key', 'owl']
LISTING = [1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
SIZE = (12, 12)


def encode(array, form='PNG'):
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(array, np.uint8)).save(buffer, form)
  return buffer.getvalue()


def built(names=NAMES):
  """Files {name: bytes} and {id: (image, label)}: ten images of each class."""
  random = np.random.RandomState(0)
  files, records = {}, {}
  for name in names:
    for n in range(1, 11):
      photo = encode(random.randint(0, 256, (*SIZE, 3)), 'JPEG')
      mask = np.zeros(SIZE, np.uint8)
      mask[2:8, n % 6 : n % 6 + 4] = 255
      mask[8, :4], mask[9, :4] = 127, 128
      grey = np.repeat(mask[..., None], 3, -1)
      files[f'{name}/{n}.jpg'] = photo
      files[f'{name}/{n}.png'] = encode(grey if n % 2 else mask)
      image = np.asarray(Image.open(io.BytesIO(photo)))
      records[f'{name}/{n}'] = image, (mask >= 128).astype(np.uint8)
  # The owners' download has seven such, without a mask.
  files[f'{names[-1]}/10.jpeg'] = files[f'{names[-1]}/Thumbs.db'] = b'not read'
  return files, records


def tree():
  return built()[0]


def drawn(names=NAMES):
  """Splits of classes by the rule of the docstring."""
  names = sorted(names)

  def draw(names, count):
    order = np.random.RandomState(42).permutation(len(names))
    return {names[i] for i in order[:count]}

  test = draw(names, round(0.24 * len(names)))
  rest = sorted(set(names) - test)
  val = draw(rest, round(len(rest) * 240 / 760))
  return {'train': set(rest) - val, 'val': val, 'test': test}


def classes_of(manifest):
  found = {}
  for row in manifest['records']:
    found.setdefault(row['split'], set()).add(row['id'].split('/')[0])
  return found


def test_a_copy_within_a_class_is_no_support(tmp_path):
  files = tree()
  class_ = min(files).split('/')[0]
  for form in ('jpg', 'png'):  # image 7, for testing, is image 2 once more
    files[f'{class_}/7.{form}'] = files[f'{class_}/2.{form}']
  fss1000.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  made = fss1000.load(tmp_path / 'data', category=class_)
  assert made.train.ids == tuple(f'{class_}/{i}' for i in (1, 3, 4, 5))
  assert f'{class_}/7' in made.test.ids


@pytest.mark.parametrize('top', ['', 'FSS-1000/', 'fewshot_data/fewshot_data/'])
def test_prepare_and_load(tmp_path, top, caplog):
  files, records = built()
  raw = pack(files, tmp_path / 'x.zip', top)
  manifest, new = fss1000.prepare(raw, tmp_path / 'd')
  assert new
  assert not manifest['skipped']
  assert len(manifest['records']) == 70
  assert classes_of(manifest) == drawn()
  assert '70 images are there, its owners publish 10000' in caplog.text
  assert 'classes of train, val, test are drawn, by our rule' in caplog.text
  for name in NAMES:
    made = datasets.load('fss1000', data_dir=tmp_path / 'd', category=name)
    assert (made.name, made.classes) == ('fss1000', (name,))
    assert list(made.train.ids) == [f'{name}/{n}' for n in range(1, 6)]
    assert list(made.test.ids) == [f'{name}/{n}' for n in range(6, 11)]
    for source in (made.train, made.test):
      source = pickle.loads(pickle.dumps(source))
      assert source.present.tolist() == [[True]] * 5
      for record in source:
        image, label = records[record['id']]
        np.testing.assert_array_equal(record['image'], image)
        np.testing.assert_array_equal(record['label'], label)
  first = min(drawn()['test'])
  assert fss1000.load(tmp_path / 'd').classes == (first,)


def test_unknown_category_lists_near_ones(tmp_path):
  fss1000.prepare(pack(tree(), tmp_path / 'x.zip'), tmp_path / 'd')
  with pytest.raises(ValueError, match="no category 'flying fish'") as caught:
    fss1000.load(tmp_path / 'd', category='flying fish')
  assert 'abes_flyingfish' in str(caught.value)
  with pytest.raises(ValueError, match='ab_wheel, abes_flyingfish, bus'):
    fss1000.load(tmp_path / 'd', category='??')


def test_pool(tmp_path):
  """Every image once, in the order of the original's listing."""
  fss1000.prepare(pack(tree(), tmp_path / 'x.zip'), tmp_path / 'd')
  for part, names in drawn().items():
    pool = fss1000.pool(tmp_path / 'd', part)
    names = sorted(names)
    assert pool.classes == tuple(names)
    assert pool.values.tolist() == [1] * len(names)
    assert pool.pairs.dtype == pool.values.dtype == np.int32
    assert pool.source.ids == tuple(f'{x}/{n}' for x in names for n in LISTING)
    assert pool.pairs.tolist() == [
      [10 * i + j, i] for i in range(len(names)) for j in range(10)
    ]
    assert pool.source[0]['label'].max() == 1
  with pytest.raises(ValueError, match="part 'trn' is not one of"):
    fss1000.pool(tmp_path / 'd', 'trn')
  with pytest.raises(FileNotFoundError, match='--dataset fss1000'):
    fss1000.pool(tmp_path)


def test_a_thousand_classes_are_divided_as_published():
  class Files:
    names = tuple(f'{i:03d}/1.jpg' for i in range(1000))

  layout = fss1000.Layout(Files())
  parts = layout.split(layout.ids)
  counts = {part: len(ids) for part, ids in parts.items()}
  assert counts == {'train': 520, 'val': 240, 'test': 240}
  assert len(set().union(*parts.values())) == 1000


LISTS = {
  'trn.txt': b'key\nbus\r\n\ncd',
  'val.txt': b'owl\n',
  # The owners write it so, and their folder without the apostrophe.
  'test.txt': b"fish\nabe's_flyingfish\n",
}
PUBLISHED = {
  'train': {'key', 'bus', 'cd'},
  'val': {'owl'},
  'test': {'fish', 'abes_flyingfish'},
}


@pytest.mark.parametrize('below', ['', 'splits/'])
def test_lists(tmp_path, below, caplog):
  lists = {f'{below}{name}': text for name, text in LISTS.items()}
  raw = pack({**tree(), **lists}, tmp_path / 'x.zip', 'FSS-1000/')
  manifest, _ = fss1000.prepare(raw, tmp_path / 'd', split='lists')
  assert classes_of(manifest) == PUBLISHED
  assert '1 classes are in no list and left out: ab_wheel' in caplog.text
  assert 'are drawn' not in caplog.text


def test_the_owners_list_of_test_classes_alone(tmp_path, caplog):
  raw = put(tree(), tmp_path / 'raw', 'fewshot_data/')
  text = LISTS['test.txt'] + b'zebra\n'
  (raw / 'fss_test_set.txt').write_bytes(text)
  manifest, _ = fss1000.prepare(raw, tmp_path / 'd', split='lists')
  found = classes_of(manifest)
  assert found['test'] == PUBLISHED['test']
  assert [len(found[part]) for part in ('train', 'val')] == [3, 2]
  assert '1 listed classes are not there: zebra' in caplog.text
  assert 'classes of train, val are drawn, by our rule' in caplog.text


@pytest.mark.parametrize(
  ('lists', 'message'),
  [
    ({}, 'has lists of nothing'),
    ({'trn.txt': b'bus', 'test.txt': b'cd'}, 'has lists of train, test: add'),
    ({**LISTS, 'val.txt': b'owl\nbus'}, 'bus: in several lists'),
  ],
)
def test_wrong_lists(tmp_path, lists, message):
  raw = put({**tree(), **lists}, tmp_path / 'raw')
  with pytest.raises(ValueError, match=message):
    fss1000.prepare(raw, tmp_path / 'd', split='lists')


def test_a_mask_of_another_size_is_resized(tmp_path, caplog):
  files, records = built()
  mask = records['bus/8'][1]
  files['bus/8.png'] = encode(mask.repeat(3, 0).repeat(2, 1) * 255)
  fss1000.prepare(put(files, tmp_path / 'raw'), tmp_path / 'd')
  assert 'bus/8.png: mask of 24x36 resized to 12x12' in caplog.text
  made = fss1000.load(tmp_path / 'd', category='bus')
  np.testing.assert_array_equal(made.test[2]['label'], mask)


def test_bad_files_are_named_and_left_out(tmp_path):
  files, _ = built()
  del files['bus/1.png'], files['cd/2.jpg']
  files['fish/3.jpg'] = files['fish/3.jpg'][:30]
  files['key/4.png'] = b'no picture'
  photo = np.random.RandomState(1).randint(0, 256, (20, 9, 3))
  files['owl/8.png'] = encode(photo)  # as peregine_falcon/8.png is
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match='5 of 70 images') as caught:
    fss1000.prepare(raw, tmp_path / 'd')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    'bus/1.png: is missing',
    'cd/2.jpg: is missing',
    'fish/3.jpg: cannot be decoded',
    'key/4.png: cannot be decoded',
    'owl/8.png: is a picture in colours, not a mask',
    '--skip_bad',
  ):
    assert part in message
  assert not (tmp_path / 'd').exists()
  manifest, _ = fss1000.prepare(raw, tmp_path / 'd', skip_bad=True)
  assert set(manifest['skipped']) == {
    'bus/1', 'cd/2', 'fish/3', 'key/4', 'owl/8',
  }  # fmt: skip
  assert classes_of(manifest) == drawn()
  made = fss1000.load(tmp_path / 'd', category='bus')
  assert made.train.ids == ('bus/2', 'bus/3', 'bus/4', 'bus/5')


def test_wrong_layout_and_split(tmp_path):
  few = {k: v for k, v in tree().items() if k.split('/')[0] in ('bus', 'cd')}
  for i, (files, count) in enumerate(((few, 2), ({'a.png': b''}, 0))):
    with pytest.raises(ValueError, match=f'has {count} folders') as caught:
      fss1000.prepare(put(files, tmp_path / f'raw{i}'), tmp_path / 'd')
    assert 'HKUSTCV/FSS-1000' in str(caught.value)
  with pytest.raises(ValueError, match='--raw is not given'):
    fss1000.prepare(None, tmp_path / 'd')
  with pytest.raises(FileNotFoundError, match='--dataset fss1000'):
    fss1000.load(tmp_path)
  with pytest.raises(ValueError, match="'odd' is not one of"):
    fss1000.prepare(tmp_path, tmp_path / 'd', split='odd')


def test_raw_is_never_written_into_and_twice_returns_at_once(tmp_path):
  raw = put(tree(), tmp_path / 'raw')
  with pytest.raises(ValueError, match='inside the raw folder'):
    fss1000.prepare(raw, raw / 'prepared')
  first, _ = fss1000.prepare(raw, tmp_path / 'd')
  assert fss1000.prepare('gone', tmp_path / 'd') == (first, False)


def test_the_config_takes_a_class_and_few_shots():
  made = config.get_config('category=bus,shots=3')
  assert made.data.args.category == 'bus'
  assert made.support.shots == 3
  with pytest.raises(ValueError, match='has 5 images to train, got shots=6'):
    config.get_config('shots=6')
