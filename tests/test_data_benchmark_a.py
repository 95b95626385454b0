"""Kvasir, Pothole, ISIC and DeepGlobe from trees laid out as published."""

import csv
import dataclasses
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from distillfss_jax import datasets, prepare
from distillfss_jax.data import download, prepared
from distillfss_jax.datasets import deepglobe, isic, kvasir, pothole

SIZE = (16, 24)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encode(array, form):
  buffer = io.BytesIO()
  options = {'quality': 100, 'subsampling': 0} if form == 'JPEG' else {}
  Image.fromarray(np.asarray(array, np.uint8)).save(buffer, form, **options)
  return buffer.getvalue()


def photo(seed, size=SIZE):
  """A JPEG and its pixels."""
  pixels = np.random.RandomState(seed).randint(0, 256, (*size, 3))
  contents = encode(pixels, 'JPEG')
  return contents, np.asarray(Image.open(io.BytesIO(contents)))


def kvasir_tree():
  """Ten images, whose masks have all that a blurred JPEG may hold."""
  files, records = {}, {}
  for i in range(10):
    id_ = f'cju{i:02d}'
    files[f'images/{id_}.jpg'], image = photo(i)
    mask = np.zeros(SIZE)
    mask[:8, 8:16], mask[8:, :8], mask[8:, 8:16] = 245, 246, 255
    grey = np.repeat(mask[..., None], 3, -1)
    files[f'masks/{id_}.jpg'] = encode(grey, 'JPEG')
    records[id_] = image, (mask > 245).astype(np.uint8)
  files['kavsir_bboxes.json'] = b'{}'
  test = [f'cju{i:02d}' for i in np.random.RandomState(42).permutation(10)[:2]]
  return files, records, test


def pothole_tree():
  """Three subsets, masks of potholes and cracks, names with many dots."""
  files, records, test = {}, {}, []
  named = (
    ('training/edmcrack600', 'b.jpg', 'edmcrack600.b'),
    ('training/edmcrack600', 'a.JPG', 'edmcrack600.a'),
    ('training/pothole600', '0001.png', 'pothole600.0001'),
    ('training/cnr', 'img.1.jpg', 'training.cnr.img.1.jpg'),
    ('training/cnr', 'img.2.jpg', 'training.cnr.img.2.jpg'),
    ('testing/pothole600', 'z.x.jpg', 'pothole600.z'),
    ('testing/edmcrack600', 'a2.JPG', 'edmcrack600.a2'),
  )
  for i, (folder, file, id_) in enumerate(named):
    contents, image = photo(i)
    if file.endswith('png'):
      contents = encode(image, 'PNG')
    files[f'{folder}/images/{file}'] = contents
    mask = np.zeros((*SIZE, 3))
    mask[:3, : 4 + i], mask[6:8, :5] = RED, BLUE
    name = file.removesuffix('.jpg').removesuffix('.JPG').removesuffix('.png')
    files[f'{folder}/masks/{name}.png'] = encode(mask, 'PNG')
    records[id_] = image, mask.any(-1).astype(np.uint8)
    if folder.startswith('testing'):
      test.append(id_)
  files['validation/cnr/images/v.jpg'] = photo(99)[0]
  files['training/cnr/images/Thumbs.db'] = b''
  return files, records, sorted(test)


def isic_table(rows):
  """The owners' table: {image: column with the 1}."""
  columns = ('MEL', 'NV', 'BCC', 'AK', 'BKL', 'DF', 'VASC', 'SCC', 'UNK')
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(('image', *columns))
  for image, column in rows.items():
    writer.writerow((image, *(f'{float(c == column)}' for c in columns)))
  return text.getvalue().encode()


def isic_tree():
  """Eleven images of three classes, and what belongs to none of them."""
  files, records, rows = {}, {}, {'ISIC_0073254': 'BCC'}
  for i in range(11):
    id_, label = f'ISIC_{i:07d}', (1, 2, 3, 1)[i % 4]
    files[f'{isic.IMAGES}/{id_}.jpg'], image = photo(i)
    mask = np.zeros(SIZE)
    mask[:, :7], mask[3, 8:12], mask[4, 8:12] = 255, 127, 128
    files[f'{isic.MASKS}/{id_}_segmentation.png'] = encode(mask, 'PNG')
    name = f'{id_}_downsampled' if i % 2 else id_
    rows[name] = ('NV', 'MEL', 'BKL')[label - 1]
    records[id_] = image, np.where(mask >= 128, label, 0)
  files[f'{isic.IMAGES}/LICENSE.txt'] = b'CC'
  files[f'{isic.MASKS}/ISIC_0009999_segmentation.png'] = encode(mask, 'PNG')
  files[isic.TABLE] = isic_table(rows)
  test = []
  for classes in ((0, 3), (1,), (2,)):
    of_class = [f'ISIC_{i:07d}' for i in range(11) if i % 4 in classes]
    shuffled = np.random.RandomState(42).permutation(len(of_class))
    test += [of_class[i] for i in shuffled[: -(-len(of_class) // 5)]]
  return files, records, test


COLOURS = (
  (0, 255, 255), (255, 255, 0), (255, 0, 255), (0, 255, 0), BLUE,
  (255, 255, 255), (0, 0, 0),
)  # fmt: skip


def deepglobe_tree():
  """Six images of 6x6 tiles of 20x20, five of which have tiles to keep."""
  files, records, names = {}, {}, [str(n) for n in range(100, 106)]
  for n, name in enumerate(names):
    files[f'{name}_sat.jpg'], image = photo(n, (120, 120))
    colours = np.zeros((120, 120), int)  # urban everywhere: one colour
    if n:
      colours[0:20, 20:40] = n  # tile 01: half of two
      colours[0:20, 20:30] = 6
      colours[20:25, 0:4] = n  # tile 10: 20 of 400 pixels, 5 %
      colours[20, 20:39] = n  # tile 11: 19 of 400 pixels, 4.75 %
    for at, (rows, columns) in {'01': (0, 20), '10': (20, 0)}.items():
      if n:
        tile = slice(rows, rows + 20), slice(columns, columns + 20)
        label = np.where(colours[tile] == 6, 255, colours[tile] + 1)
        records[f'{name}_{at}'] = image[tile], label
    mask = np.array(COLOURS)[colours]
    impure = np.random.RandomState(n).randint(0, 128, mask.shape)
    files[f'{name}_mask.png'] = encode(np.abs(mask - impure), 'PNG')
  files['class_dict.csv'] = b'name,r,g,b\nurban_land,0,255,255\n'
  kept = sorted({id_.partition('_')[0] for id_ in records})
  test = kept[np.random.RandomState(42).permutation(5)[0]]
  return files, records, [f'{test}_01', f'{test}_10']


@dataclasses.dataclass(frozen=True)
class Case:
  """What the tests have to know of a dataset."""

  module: object
  tree: Callable  # () -> files {name: bytes}, records {id: pixels}, test ids
  tops: tuple  # folders its files may lie in
  image: str  # of a training image
  mask: str  # of another
  bad: int  # images that have no pixels when both are gone
  advice: str  # part of where to get it

  def __str__(self):
    return self.module.__name__.rpartition('.')[2]

  @property
  def builder(self):
    return getattr(self.module, str(self).capitalize())


CASES = (
  Case(
    kvasir, kvasir_tree, ('Kvasir-SEG/', ''), 'images/cju00.jpg',
    'masks/cju03.jpg', 2, 'kvasir-seg.zip',
  ),
  Case(
    pothole, pothole_tree, ('pothole-mix/', ''),
    'training/edmcrack600/images/b.jpg', 'training/pothole600/masks/0001.png',
    2, 'Mendeley',
  ),
  Case(
    isic, isic_tree, ('ISIC/', ''), f'{isic.IMAGES}/ISIC_0000003.jpg',
    f'{isic.MASKS}/ISIC_0000005_segmentation.png', 2, 'isic-archive',
  ),
  Case(
    deepglobe, deepglobe_tree, ('Deepglobe/', 'x/land-train/', ''),
    '103_sat.jpg', '104_mask.png', 3, 'deepglobe.org',
  ),
)  # fmt: skip
every = pytest.mark.parametrize('case', CASES, ids=str)


def compare(source, records):
  for i, record in enumerate(source):
    image, label = records[source.ids[i]]
    assert record['id'] == source.ids[i]
    assert source.sizes[i].tolist() == list(label.shape)
    present = sorted(set(np.unique(label)) - {0, 255})
    assert (np.flatnonzero(source.present[i]) + 1).tolist() == present
    np.testing.assert_array_equal(record['image'], image)
    np.testing.assert_array_equal(record['label'], label)


@every
@pytest.mark.parametrize('packed', [True, False])
def test_prepare_and_load(tmp_path, case, packed):
  files, records, test = case.tree()
  for number, top in enumerate(case.tops):
    raw = tmp_path / f'raw{number}'
    raw = pack(files, raw, top) if packed else put(files, raw, top)
    data_dir = tmp_path / f'data{number}'
    manifest, new = case.module.prepare(raw, data_dir)
    assert new
    assert case.module.prepare('gone', data_dir) == (manifest, False)
    assert manifest == prepared.manifest(case.builder, data_dir)
    made = datasets.load(str(case), data_dir=data_dir)
    assert made.name == str(case)
    assert made.classes == case.builder.CLASSES
    assert len(made.palette) == len(set(made.palette)) == 1 + len(made.classes)
    assert list(made.test.ids) == test
    assert list(made.train.ids) == sorted(set(records) - set(test))
  for source in (made.train, made.test):
    compare(source, records)


@every
def test_raw_is_only_read(tmp_path, case):
  raw = put(case.tree()[0], tmp_path / 'raw', case.tops[0])
  before = {p: p.stat().st_mtime_ns for p in raw.rglob('*')}
  inside = raw / case.tops[0] / 'prepared'
  with pytest.raises(ValueError, match='inside the raw folder'):
    case.module.prepare(raw, inside)
  case.module.prepare(raw, tmp_path / 'data')
  assert before == {p: p.stat().st_mtime_ns for p in raw.rglob('*')}


@every
def test_bad_files_are_named(tmp_path, case):
  files, records, _ = case.tree()
  files[case.image] = files[case.image][:60]
  files[case.mask] = b'no picture'
  raw = pack(files, tmp_path / 'x.zip')
  with pytest.raises(ValueError, match='cannot be used: ') as caught:
    case.module.prepare(raw, tmp_path / 'data')
  message = str(caught.value)
  assert f'{case.bad} of' in message
  assert f'{case.image}: cannot be decoded' in message
  assert f'{case.mask}: cannot be decoded' in message
  assert '--skip_bad' in message
  assert '\n' not in message
  manifest, _ = case.module.prepare(raw, tmp_path / 'data', skip_bad=True)
  assert len(manifest['skipped']) == case.bad
  made = case.module.load(tmp_path / 'data')
  assert set(made.train.ids) | set(made.test.ids) < set(records)
  compare(made.train, records)


@every
def test_missing_files_and_masks_of_another_size(tmp_path, case):
  files, _, _ = case.tree()
  del files[case.image]
  size = np.add(Image.open(io.BytesIO(files[case.mask])).size[::-1], 6)
  form = 'JPEG' if case.mask.endswith('jpg') else 'PNG'
  mask = np.zeros((*size, 3))
  mask[: size[0] * 2 // 5] = 255  # not at the edge of a tile
  files[case.mask] = encode(mask, form)
  with pytest.raises(ValueError, match='cannot be used: ') as caught:
    case.module.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  assert f'{case.mask}: mask is {size[1]}x{size[0]}, its' in str(caught.value)
  if case.module is not pothole:  # where the images say which ids there are
    assert f'{case.image}: cannot be read' in str(caught.value)
  assert not (tmp_path / 'data').exists()


@every
def test_missing_mask(tmp_path, case):
  files, _, _ = case.tree()
  del files[case.mask]
  raw = pack(files, tmp_path / 'x.zip')
  if case.module is isic:  # masks say which ids there are
    manifest, _ = isic.prepare(raw, tmp_path / 'data')
    assert len(manifest['records']) == 10
    return
  with pytest.raises(ValueError, match=f'{case.mask}: cannot be read'):
    case.module.prepare(raw, tmp_path / 'data')


@every
def test_another_layout(tmp_path, case):
  (tmp_path / 'empty').mkdir()
  other = pack({'a/b.jpg': b'', 'c.txt': b''}, tmp_path / 'x.zip')
  for raw in (None, tmp_path / 'empty', tmp_path / 'gone', other):
    with pytest.raises(ValueError, match=case.advice) as caught:
      case.module.prepare(raw, tmp_path / 'data')
    assert '\n' not in str(caught.value)


@every
def test_unknown_split_and_unprepared(tmp_path, case):
  with pytest.raises(ValueError, match="split 'odd' is not one of"):
    case.module.prepare('gone', tmp_path, split='odd')
  with pytest.raises(FileNotFoundError, match=f'--dataset {case}'):
    case.module.load(tmp_path)


def test_kvasir_published_split(tmp_path, caplog):
  caplog.set_level('INFO')
  files, records, _ = kvasir_tree()
  raw = put(files, tmp_path / 'raw', 'Kvasir-SEG/')
  with pytest.raises(ValueError, match=r'has no Kvasir-SEG/train\.txt'):
    kvasir.prepare(raw, tmp_path / 'data', split='published')
  lists = {
    'train.txt': b'cju00\ncju01.jpg\n',
    'val.txt': b'cju07.jpg\r\ncju04\ngone\n',
  }
  put(lists, raw, 'Kvasir-SEG/')
  kvasir.prepare(raw, tmp_path / 'data', split='published')
  made = kvasir.load(tmp_path / 'data')
  assert made.test.ids == ('cju07', 'cju04')
  assert list(made.train.ids) == sorted(set(records) - set(made.test.ids))
  assert '6 images that neither list names' in caplog.text
  assert '10 images are there, its owners publish 1000' in caplog.text


def test_kvasir_mask_is_its_first_channel(tmp_path):
  files, _, _ = kvasir_tree()
  mask = np.zeros((*SIZE, 3))
  mask[..., 1:] = 255  # no red
  files['masks/cju00.jpg'] = encode(mask, 'JPEG')
  kvasir.prepare(pack(files, tmp_path / 'x.zip'), tmp_path)
  made = kvasir.load(tmp_path)
  assert made.train.ids[0] == 'cju00'
  assert not made.train[0]['label'].any()


def test_pothole_needs_both_folders(tmp_path, caplog):
  caplog.set_level('INFO')
  files, _, _ = pothole_tree()
  raw = pack(files, tmp_path / 'x.zip')
  pothole.prepare(raw, tmp_path)
  assert '2 images share an id' in caplog.text
  part = {k: v for k, v in files.items() if not k.startswith('testing')}
  with pytest.raises(ValueError, match='in training/ and in testing/'):
    pothole.prepare(pack(part, tmp_path / 'y.zip'), tmp_path / 'other')


def test_isic_counts_what_is_left_out(tmp_path, caplog):
  caplog.set_level('INFO')
  isic.prepare(pack(isic_tree()[0], tmp_path / 'x.zip'), tmp_path)
  assert '1 rows of the table without a mask and 1 masks' in caplog.text


def test_isic_given_split(tmp_path):
  files, records, drawn = isic_tree()
  raw = pack(files, tmp_path / 'x.zip')
  with pytest.raises(ValueError, match=r'split .reference. needs test\.csv'):
    isic.prepare(raw, tmp_path / 'data', split='reference')
  files['test.csv'] = b'\xef\xbb\xbf,id\n1,ISIC_0000007\n0,ISIC_0000002\n5,x\n'
  for top in isic_tops():
    raw = pack(files, tmp_path / 'y.zip', top)
    for split in (None, 'reference', 'drawn'):
      data_dir = tmp_path / f'{top}{split}'
      isic.prepare(raw, data_dir, split=split)
      made = isic.load(data_dir)
      given = ['ISIC_0000007', 'ISIC_0000002']
      assert list(made.test.ids) == (drawn if split == 'drawn' else given)
      assert len(made.train) + len(made.test) == len(records)


def isic_tops():
  return next(case.tops for case in CASES if case.module is isic)


def test_isic_bad_tables(tmp_path):
  files, _, _ = isic_tree()
  rows = {'ISIC_0000000': 'NV', 'ISIC_0000001': 'SCC', 'ISIC_0000002': 'none'}
  files[isic.TABLE] = isic_table(rows)
  with pytest.raises(ValueError, match='2 of 3 images') as caught:
    isic.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'data')
  assert 'ISIC_0000001: its row in' in str(caught.value)
  assert "has a 1 in ['SCC']" in str(caught.value)
  files[isic.TABLE] = b'image_id,MEL,NV\n'
  with pytest.raises(ValueError, match=r'has no column .*BCC.*, image: its'):
    isic.prepare(pack(files, tmp_path / 'y.zip'), tmp_path / 'data')
  del files[isic.TABLE]
  with pytest.raises(ValueError, match=f'has no {isic.TABLE}'):
    isic.prepare(pack(files, tmp_path / 'z.zip'), tmp_path / 'data')


def test_deepglobe_unknown(tmp_path):
  files, records, _ = deepglobe_tree()
  raw = pack(files, tmp_path / 'x.zip')
  with pytest.raises(ValueError, match="unknown 'x' is not one of"):
    deepglobe.prepare(raw, tmp_path, unknown='x')
  prepare.run('deepglobe', raw, tmp_path, unknown='reference')
  made = deepglobe.load(tmp_path)
  for record in (*made.train, *made.test):
    label = records[record['id']][1]
    expected = np.where(label == 255, 1, label)
    np.testing.assert_array_equal(record['label'], expected)


def test_deepglobe_given_split(tmp_path):
  files, _, drawn = deepglobe_tree()
  files['valid/500_sat.jpg'] = photo(500, (120, 120))[0]  # has no mask
  raw = put(files, tmp_path / 'raw', 'train/')
  with pytest.raises(ValueError, match=r'train/test\.csv or test\.csv in'):
    deepglobe.prepare(raw, tmp_path / 'data', split='reference')
  listed = ',mask\n0,105_mask_10.png\n1,102_mask_01.png\n2,102_mask_55.png\n'
  (raw / 'test.csv').write_text(listed)
  for split in (None, 'reference', 'drawn'):
    data_dir = tmp_path / f'{split}'
    deepglobe.prepare(raw, data_dir, split=split)
    given = ['105_10', '102_01']
    found = list(deepglobe.load(data_dir).test.ids)
    assert found == (drawn if split == 'drawn' else given)


def test_deepglobe_decodes_each_image_once(tmp_path, monkeypatch):
  files, _, _ = deepglobe_tree()
  read, real = [], download.Files.decode

  def decode(self, name, mode):
    read.append(name)
    return real(self, name, mode)

  monkeypatch.setattr(download.Files, 'decode', decode)
  deepglobe.prepare(pack(files, tmp_path / 'x.zip'), tmp_path)
  for n in range(101, 106):  # to check it and to write it
    assert read.count(f'{n}_sat.jpg') == 2


def test_deepglobe_masks_that_cannot_be_tiled(tmp_path):
  files, _, _ = deepglobe_tree()
  files['101_mask.png'] = encode(np.zeros((121, 120, 3)), 'PNG')
  with pytest.raises(ValueError, match='120x121 cannot be cut into 6x6'):
    deepglobe.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'data')
  plain = {k: v for k, v in files.items() if k.startswith('100')}
  with pytest.raises(ValueError, match='none of 1 images has a tile'):
    deepglobe.prepare(pack(plain, tmp_path / 'y.zip'), tmp_path / 'data')
  raw = put(files, put(files, tmp_path / 'raw', 'a/'), 'b/')
  with pytest.raises(ValueError, match='in a/, b/: give one of them'):
    deepglobe.prepare(raw, tmp_path / 'data')
