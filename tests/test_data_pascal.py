"""Preparing and loading PASCAL VOC, SBD and the folds from small raw trees."""

import io
import logging
import pickle

import numpy as np
import pytest
import scipy.io
from PIL import Image
from trees import pack, put

from configs import pascal as config
from distillfss_jax import datasets
from distillfss_jax.data import download
from distillfss_jax.datasets import pascal

VOC = 'VOCdevkit/VOC2012/'
SBD = 'benchmark_RELEASE/dataset/'
SIZE = (12, 15)


def encode(image, form='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, form, **options)
  return buffer.getvalue()


def palette_png(label, colours=None):
  """A palette PNG whose colours are not its indices."""
  image = Image.fromarray(label).convert('P')
  image.putpalette(colours or sum(pascal.Pascal.PALETTE, ()) + (0,) * 705)
  return encode(image)


def mat(label, field='Segmentation', struct='GTcls'):
  buffer = io.BytesIO()
  inside = {field: label, 'CategoriesPresent': np.unique(label[label > 0])}
  scipy.io.savemat(buffer, {struct: inside}, do_compression=True)
  return buffer.getvalue()


def photo(seed):
  """A JPEG file and its pixels."""
  pixels = np.random.RandomState(seed).randint(0, 256, (*SIZE, 3))
  contents = encode(Image.fromarray(pixels.astype(np.uint8)), 'JPEG')
  return contents, np.asarray(Image.open(io.BytesIO(contents)))


def drawn(i, border=255):
  """A label with two of the 20 classes, 24 and 12 pixels, and a border."""
  label = np.zeros(SIZE, np.uint8)
  label[1:5, 2:8] = 1 + i % 20
  label[6:8, 2:8] = 1 + (i + 5) % 20
  label[10] = border
  return label


def made(count=20):
  """Files, and {split: {id: (pixels, label)}}."""
  ids = {
    'train': [f'2007_{i:06d}' for i in range(count)],
    'sbd': [f'2008_{i:06d}' for i in range(count)],
    'test': [f'2009_{i:06d}' for i in range(count)],
  }
  files, records, sets = {}, {}, f'{VOC}ImageSets/Segmentation/'
  for number, (split, listed) in enumerate(ids.items()):
    records[split] = {}
    for i, id_ in enumerate(listed):
      contents, pixels = photo(1000 * number + i)
      files[f'{VOC}JPEGImages/{id_}.jpg'] = contents
      label = drawn(i, 0 if split == 'sbd' else 255)
      records[split][id_] = pixels, label
      # SBD holds images of VOC's lists, too; its labels of them do not count.
      files[f'{SBD}img/{id_}.jpg'] = contents
      files[f'{SBD}cls/{id_}.mat'] = mat(label if split == 'sbd' else label * 0)
      files[f'{SBD}inst/{id_}.mat'] = b'not read'
      if split != 'sbd':
        files[f'{VOC}SegmentationClass/{id_}.png'] = palette_png(label)
        files[f'{VOC}SegmentationObject/{id_}.png'] = b'not read'
      files[f'{VOC}Annotations/{id_}.xml'] = b'not read'
  del files[f'{VOC}JPEGImages/{ids["sbd"][0]}.jpg']  # only in SBD
  files[f'{VOC}JPEGImages/2011_000001.jpg'] = b'has no label'
  lists = {
    f'{sets}train.txt': ids['train'],
    f'{sets}val.txt': ids['test'],
    f'{sets}trainval.txt': ids['train'] + ids['test'],
    f'{VOC}ImageSets/Main/train.txt': ['2011_000001'],
    # Its own division crosses that of VOC.
    f'{SBD}train.txt': ids['sbd'][::2] + ids['test'][::2] + ids['train'][:3],
    f'{SBD}val.txt': ids['sbd'][1::2] + ids['test'][1::2],
  }
  files |= {name: '\n'.join(x).encode() + b'\n' for name, x in lists.items()}
  return files, records


def tree():
  """Files {name: bytes} with each class in several images of every split."""
  return made()[0]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """(data_dir, records, manifest) of the tree."""
  files, records = made()
  place = tmp_path_factory.mktemp('pascal')
  raw = put(files, place / 'raw')
  manifest, new = pascal.prepare(raw, place / 'data')
  assert new
  return place / 'data', records, manifest


def changed(files, old, new):
  return {name.replace(old, new, 1): x for name, x in files.items()}


def splits(manifest):
  found = {}
  for row in manifest['records']:
    found.setdefault(row['split'], []).append(row['id'])
  return found


def same(source, records):
  assert list(source.ids) == list(records)
  assert len(source) == len(records)
  for i, record in enumerate(source):
    image, label = records[record['id']]
    assert record['label'].dtype == np.uint8
    np.testing.assert_array_equal(record['image'], image)
    np.testing.assert_array_equal(record['label'], label)
    assert source.sizes[i].tolist() == list(SIZE)
    occur = np.flatnonzero(source.present[i]) + 1
    assert occur.tolist() == np.setdiff1d(label, (0, 255)).tolist()


def test_names_and_colours():
  assert len(pascal.Pascal.CLASSES) == 20
  assert pascal.Pascal.PALETTE[:4] == (
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0),
  )  # fmt: skip
  assert pascal.Pascal.PALETTE[8] == (64, 0, 0)
  assert pascal.Pascal.PALETTE[15] == (192, 128, 128)
  assert pascal.Pascal.PALETTE[20] == (0, 64, 128)
  assert [pascal.fold_labels(f) for f in (0, 3)] == [
    (1, 2, 3, 4, 5), (16, 17, 18, 19, 20),
  ]  # fmt: skip


def test_all_classes(prepared, caplog):
  data_dir, records, manifest = prepared
  assert splits(manifest) == {x: list(y) for x, y in records.items()}
  loaded = datasets.load('pascal', data_dir=data_dir)
  assert loaded.name == 'pascal'
  assert loaded.classes == pascal.Pascal.CLASSES
  assert loaded.palette == pascal.Pascal.PALETTE
  same(loaded.train, records['train'] | records['sbd'])
  same(loaded.test, records['test'])
  same(pascal.load(data_dir, augmented=False).train, records['train'])
  assert 'SBD was not there' not in caplog.text


def test_void_as_background(prepared):
  data_dir, records, _ = prepared
  loaded = pascal.load(data_dir, void=False)
  test = pickle.loads(pickle.dumps(loaded.test))
  plain = {
    id_: (image, np.where(label == 255, 0, label))
    for id_, (image, label) in records['test'].items()
  }
  same(test, plain)
  assert any((x['label'] == 255).any() for x in pascal.load(data_dir).test)
  fold = pascal.load(data_dir, fold=1, void=False)
  assert {v for x in fold.test for v in x['label'].flat} == set(range(6))


def test_folds(prepared):
  data_dir, records, _ = prepared
  for fold in range(4):
    loaded = pascal.load(data_dir, fold=fold)
    labels = pascal.fold_labels(fold)
    assert loaded.classes == pascal.Pascal.CLASSES[5 * fold : 5 * fold + 5]
    assert loaded.palette[1:] == tuple(pascal.Pascal.PALETTE[i] for i in labels)
    table = np.zeros(256, np.uint8)
    table[list(labels)], table[255] = range(1, 6), 255
    for source, rows in (
      (loaded.train, records['train'] | records['sbd']),
      (loaded.test, records['test']),
    ):
      kept = {
        id_: (image, table[label])
        for id_, (image, label) in rows.items()
        if np.isin(label, labels).any()
      }
      assert 0 < len(kept) < len(rows)
      same(source, kept)
  with pytest.raises(ValueError, match=r'fold 4 is not one of 0\.\.3'):
    pascal.load(data_dir, fold=4)


def test_jpeg_stays_as_it_is(tmp_path):
  files, _ = made(2)
  with download.Files(put(files, tmp_path), '') as raw:
    layout = pascal.Layout(raw)
    for id_ in layout.ids:
      assert layout.encoded(id_) == files[f'{SBD}img/{id_}.jpg']


@pytest.mark.parametrize('top', ['VOC2012/', 'VOCdevkit2012/VOC2012/', ''])
@pytest.mark.parametrize('sbd', ['dataset/', 'SBD/dataset/', SBD])
def test_places(tmp_path, top, sbd):
  files, records = made(2)
  files = changed(changed(files, VOC, top), SBD, sbd)
  manifest, _ = pascal.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'd')
  assert splits(manifest) == {x: list(y) for x, y in records.items()}


def test_voc_alone(tmp_path, caplog):
  files, records = made(2)
  files = {x: y for x, y in files.items() if x.startswith(VOC)}
  manifest, _ = pascal.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  assert set(splits(manifest)) == {'train', 'test'}
  said = 'pascal: SBD was not there when it was prepared: 2 images train'
  alone = pascal.load(tmp_path / 'data', augmented=False).train
  same(alone, records['train'])
  assert said not in caplog.text
  same(pascal.load(tmp_path / 'data').train, records['train'])
  assert said in caplog.text


@pytest.mark.parametrize('top', [VOC, ''])
@pytest.mark.parametrize('with_sbd', [False, True])
def test_augmented_labels(tmp_path, top, with_sbd):
  """VOC's own come first, then SegmentationClassAug, then SBD's."""
  files, records = made(3)
  first, second, third = records['sbd']
  if not with_sbd:
    files = {
      x: y
      for x, y in files.items()
      if not x.startswith(SBD) or x == f'{SBD}img/{first}.jpg'
    }
    files[f'{VOC}JPEGImages/{first}.jpg'] = files.pop(f'{SBD}img/{first}.jpg')
  aug = f'{top}SegmentationClassAug/'
  new = drawn(9)
  files[f'{aug}{first}.png'] = palette_png(new)
  files[f'{aug}{second}.png'] = encode(Image.fromarray(new))
  for split in ('train', 'test'):
    for id_ in records[split]:
      files[f'{aug}{id_}.png'] = encode(Image.fromarray(new))
  raw = put(files, tmp_path / 'raw')
  pascal.prepare(raw, tmp_path / 'data')
  expected = records['train'] | records['sbd']
  expected |= {i: (expected[i][0], new) for i in (first, second)}
  if not with_sbd:
    del expected[third]
  loaded = pascal.load(tmp_path / 'data')
  same(loaded.train, expected)
  same(loaded.test, records['test'])


def test_colours_of_a_palette_change_nothing(tmp_path):
  files, records = made(2)
  for number, id_ in enumerate(records['test']):
    colours = np.random.RandomState(number).randint(0, 256, 768).tolist()
    name = f'{VOC}SegmentationClass/{id_}.png'
    files[name] = palette_png(records['test'][id_][1], colours)
  few = np.minimum(drawn(0), 1)  # one bit a pixel
  id_ = next(iter(records['train']))
  image = Image.fromarray(few).convert('P')
  image.putpalette([200, 100, 0, 7, 8, 9])
  files[f'{VOC}SegmentationClass/{id_}.png'] = encode(image, bits=1)
  records['train'][id_] = records['train'][id_][0], few
  pascal.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  loaded = pascal.load(tmp_path / 'data')
  same(loaded.test, records['test'])
  assert (loaded.test[0]['label'] == 255).sum() == SIZE[1]
  same(pascal.load(tmp_path / 'data', augmented=False).train, records['train'])


def test_bad_files_are_named_and_left_out(tmp_path):
  files, records = made(6)
  train, sbd, _ = (list(records[x]) for x in records)
  label = f'{VOC}SegmentationClass/{{}}.png'.format
  files[label(train[0])] = encode(
    Image.fromarray(drawn(0)).convert('RGB')
  )  # colours where indices belong
  files[label(train[1])] = encode(Image.fromarray(drawn(21, 25) * 3))
  files[label(train[2])] = palette_png(np.zeros((4, 7), np.uint8))
  files[label(train[3])] = files[label(train[3])][:50]
  files[label(train[4])] = encode(Image.fromarray(drawn(4).astype(np.uint16)))
  del files[f'{SBD}cls/{sbd[0]}.mat']
  files[f'{SBD}cls/{sbd[1]}.mat'] = mat(drawn(0), struct='GTinst')
  files[f'{SBD}cls/{sbd[2]}.mat'] = files[f'{SBD}cls/{sbd[2]}.mat'][:140]
  files[f'{SBD}cls/{sbd[3]}.mat'] = mat(drawn(0) + 20)
  for top in (f'{VOC}JPEGImages', f'{SBD}img'):
    del files[f'{top}/{sbd[4]}.jpg']
  files[f'{VOC}JPEGImages/{sbd[5]}.jpg'] = b'no picture'
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match='11 of 18 images') as caught:
    pascal.prepare(raw, tmp_path / 'data')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    f'{label(train[0])}: is a picture of mode RGB, expected class indices',
    f'{label(train[1])}: has values [21, 75], expected 0..20 and 255',
    f'{label(train[2])}: mask is 7x4, its image 15x12',
    f'{label(train[3])}: cannot be decoded',
    f'{label(train[4])}: is a picture of mode I;16',
    f'{VOC}SegmentationClass/{sbd[0]}.png: is missing',
    f'{SBD}cls/{sbd[1]}.mat: has no GTcls.Segmentation',
    f'{SBD}cls/{sbd[2]}.mat: has no GTcls.Segmentation',
    f'{SBD}cls/{sbd[3]}.mat: has values [',
    f'{VOC}JPEGImages/{sbd[4]}.jpg: is missing',
    f'{VOC}JPEGImages/{sbd[5]}.jpg: cannot be decoded',
    '--skip_bad',
  ):
    assert part in message
  manifest, _ = pascal.prepare(raw, tmp_path / 'data', skip_bad=True)
  assert set(manifest['skipped']) == {*train[:5], *sbd}
  assert splits(manifest) == {'train': train[5:], 'test': [*records['test']]}


def test_each_split_is_counted(tmp_path, caplog):
  files, _ = made(2)
  with download.Files(put(files, tmp_path), '') as raw:
    pascal.Layout(raw)
  assert [x.getMessage().split(': ')[1] for x in caplog.records] == [
    f'2 images of split {split} are there, {count} are published'
    for split, count in (('train', 1464), ('sbd', 9118), ('test', 1449))
  ]


def test_an_id_of_both_lists_is_a_test_image(tmp_path):
  files, records = made(2)
  for name in ('train', 'trainval'):
    lines = '\n'.join([*records['train'], *records['test']])
    files[f'{VOC}ImageSets/Segmentation/{name}.txt'] = lines.encode()
  manifest, _ = pascal.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  assert splits(manifest) == {x: list(y) for x, y in records.items()}


@pytest.mark.parametrize(
  ('gone', 'message'),
  [
    (f'{VOC}ImageSets/Segmentation/val.txt', 'has no ImageSets/Segmentation/'),
    (f'{SBD}val.txt', f'has no {SBD}val.txt'),
  ],
)
def test_missing_lists(tmp_path, gone, message):
  files, _ = made(2)
  del files[gone]
  with pytest.raises(ValueError, match=message) as caught:
    pascal.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()


def test_wrong_layout(tmp_path):
  (tmp_path / 'empty').mkdir()
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'gone', 'does not exist'),
    (tmp_path / 'empty', 'has no ImageSets/Segmentation/train.txt'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      pascal.prepare(raw, tmp_path / 'data')
    assert 'VOCtrainval_11-May-2012.tar' in str(caught.value)
  with pytest.raises(FileNotFoundError, match='--dataset pascal'):
    pascal.load(tmp_path)
  with pytest.raises(FileNotFoundError, match='--dataset pascal'):
    pascal.pool(tmp_path)


def test_raw_is_never_written_into(tmp_path):
  raw = put(made(2)[0], tmp_path / 'raw')
  with pytest.raises(ValueError, match='inside the raw folder'):
    pascal.prepare(raw, raw / VOC / 'prepared')


def test_twice_returns_at_once(prepared):
  data_dir, _, manifest = prepared
  again, new = pascal.prepare('gone.zip', data_dir)
  assert not new
  assert splits(again) == splits(manifest)


def listed(pool):
  """{(id, label in the records)} of a pool, in its order."""
  return [(pool.source.ids[i], int(pool.values[c])) for i, c in pool.pairs]


@pytest.mark.parametrize('fold', range(5))
def test_pool_for_training(prepared, fold):
  data_dir, records, _ = prepared
  own = pascal.fold_labels(fold) if fold < 4 else ()
  pool = pascal.pool(data_dir, fold, 'train', min_area=20)
  assert pool.values.tolist() == [x for x in range(1, 21) if x not in own]
  assert pool.classes == tuple(
    pascal.Pascal.CLASSES[x - 1] for x in pool.values
  )
  expected = [
    (id_, 1 + i % 20)
    for split in ('train', 'sbd')
    for i, id_ in enumerate(records[split])
    if 1 + i % 20 not in own
  ]
  assert listed(pool) == expected
  record = pool.source[pool.pairs[3, 0]]
  assert (record['label'] == pool.values[pool.pairs[3, 1]]).sum() == 24
  every = pascal.pool(data_dir, fold, 'train', min_area=1)
  assert len(every.pairs) == 2 * (40 if fold == 4 else 30)
  alone = pascal.pool(data_dir, fold, 'train', min_area=1, exclusive=True)
  for i in alone.pairs[:, 0]:
    assert not np.isin(alone.source[i]['label'], own).any()
  assert len(alone.pairs) == 2 * (40 if fold == 4 else 20)


def test_pool_for_testing(prepared):
  data_dir, records, _ = prepared
  pool = pascal.pool(data_dir, 2, 'test', min_area=20)
  assert pool.values.tolist() == [11, 12, 13, 14, 15]
  assert pool.classes == pascal.Pascal.CLASSES[10:15]
  ids = list(records['test'])
  assert listed(pool) == [(ids[k], k + 1) for k in range(10, 15)]


def test_pool_arguments(prepared):
  data_dir, _, _ = prepared
  with pytest.raises(ValueError, match="part 'val' is not one of"):
    pascal.pool(data_dir, 0, 'val')
  for fold, part in ((5, 'train'), (4, 'test'), (-1, 'test')):
    with pytest.raises(ValueError, match=f'fold {fold} of part {part!r}'):
      pascal.pool(data_dir, fold, part)
  with pytest.raises(ValueError, match='exclusive'):
    pascal.pool(data_dir, exclusive=True, lists='x')
  with pytest.raises(ValueError, match='no image has 2048 pixels'):
    pascal.pool(data_dir)


def published(records, folder):
  """Lists like those of HSNet, not sorted; {(part, fold): lines}."""
  lines = {}
  for part, kept in (('trn', ('train', 'sbd')), ('val', ('test',))):
    for fold in range(4):
      lines[part, fold] = [
        f'{id_}__{label:02d}'
        for split in reversed(kept)
        for id_, (_, image) in records[split].items()
        for label in pascal.fold_labels(fold)
        if (image == label).sum() > 20
      ]
  files = {
    f'{part}/fold{fold}.txt': '\n'.join(x).encode()
    for (part, fold), x in lines.items()
  }
  put(files, folder)
  return lines


def test_published_lists(prepared, tmp_path):
  data_dir, records, _ = prepared
  lines = published(records, tmp_path)
  for fold, part, folds in (
    (1, 'train', (0, 2, 3)),
    (4, 'train', (0, 1, 2, 3)),
    (3, 'test', (3,)),
  ):
    pool = pascal.pool(data_dir, fold, part, lists=tmp_path)
    kept = [x for f in folds for x in lines[pascal.PARTS[part], f]]
    assert [f'{id_}__{label:02d}' for id_, label in listed(pool)] == kept
    assert pool.pairs.dtype == pool.values.dtype == np.int32
    order = [x for f in folds for x in pascal.fold_labels(f)]
    assert pool.values.tolist() == order
    for (i, c), line in zip(pool.pairs, kept, strict=True):
      assert pool.classes[c] == pascal.Pascal.CLASSES[int(line[-2:]) - 1]
      assert (pool.source[i]['label'] == pool.values[c]).sum() == 24


def write(folder, line, name='val/fold0.txt'):
  put({name: f'{line}\n'.encode()}, folder)


def test_a_list_of_images(prepared, tmp_path):
  """As BAM has it: its images, with our areas."""
  data_dir, _, _ = prepared
  whole = pascal.pool(data_dir, 0, 'train', min_area=1)
  ids = [whole.source.ids[i] for i in sorted(set(whole.pairs[:, 0]))][:4]
  path = tmp_path / 'merge.txt'
  line = 'JPEGImages/{0}.jpg SegmentationClassAug/{0}.png\n'
  path.write_text(''.join(line.format(x) for x in [*ids, 'unknown']))
  pool = pascal.pool(data_dir, 0, 'train', min_area=1, lists=str(path))
  keep = [whole.source.ids[i] in ids for i in whole.pairs[:, 0]]
  assert pool.pairs.tolist() == whole.pairs[keep].tolist()
  tested = pascal.pool(data_dir, 0, 'test', min_area=1)
  other = pascal.pool(data_dir, 0, 'test', min_area=1, lists=str(path))
  assert other.pairs.tolist() == tested.pairs.tolist()
  path.write_text('JPEGImages/unknown.jpg x\n')
  with pytest.raises(ValueError, match='names none of the'):
    pascal.pool(data_dir, 0, 'train', min_area=1, lists=str(path))


def test_wrong_lists(prepared, tmp_path):
  data_dir, records, _ = prepared
  id_ = next(iter(records['test']))
  for line, message in (
    (f'{id_}__06', r'fold0\.txt:1: .* with a class of 1\.\.5'),
    (id_, 'is not <image>__<class>'),
    (f'{id_}__x', 'is not <image>__<class>'),
    ('2012_9__01', "image '2012_9' is not one of the 20 test images"),
    ('', 'are empty'),
  ):
    write(tmp_path, line)
    with pytest.raises(ValueError, match=message):
      pascal.pool(data_dir, 0, 'test', lists=tmp_path)
  with pytest.raises(FileNotFoundError, match=r'fold1\.txt does not exist'):
    pascal.pool(data_dir, 1, 'test', lists=tmp_path)


def test_pairs_without_the_class_are_left_out(prepared, tmp_path, caplog):
  data_dir, records, _ = prepared
  first, second, *_ = records['test']
  write(tmp_path, f'{first}__01\n{second}__01')
  pool = pascal.pool(data_dir, 0, 'test', lists=str(tmp_path))
  assert listed(pool) == [(first, 1)]
  (said,) = caplog.messages
  assert '1 of 2 pairs' in said
  assert f'{second}__01' in said


def test_left_out_images_of_the_lists(tmp_path, caplog):
  files, records = made(20)
  first, second, *_ = records['test']
  files[f'{VOC}SegmentationClass/{first}.png'] = b'no picture'
  raw = put(files, tmp_path / 'raw')
  pascal.prepare(raw, tmp_path / 'data', skip_bad=True)
  write(tmp_path, f'{first}__01\n{second}__02')
  caplog.clear()
  pool = pascal.pool(tmp_path / 'data', 0, 'test', lists=tmp_path)
  assert listed(pool) == [(second, 2)]
  assert f'{first}__01' in caplog.text


def test_another_count_of_pairs_is_said(prepared, monkeypatch, caplog):
  data_dir, _, _ = prepared
  pascal.pool(data_dir, 0, 'train', min_area=20)
  assert not caplog.messages  # the images are not all there
  monkeypatch.setattr(pascal, '_WHOLE', {'train': 40, 'test': 20})
  with caplog.at_level(logging.WARNING):
    pascal.pool(data_dir, 4, 'train', min_area=20)
    pascal.pool(data_dir, 2, 'test', min_area=20)
    pascal.pool(data_dir, 1, 'train', min_area=20)
    pascal.pool(data_dir, 1, 'train', min_area=1, exclusive=True)
  for (ours, theirs), said in zip(
    ((40, 13680), (5, 725), (30, 13680 - 3425)), caplog.messages, strict=True
  ):
    assert f'{ours} pairs of image and class have 20 pixels' in said
    assert f'lists have {theirs}:' in said


def test_config():
  made = config.get_config('fold=2,shots=25')
  assert made.data.args.to_dict() == {
    'data_dir': 'data', 'fold': 2, 'augmented': True, 'void': True,
  }  # fmt: skip
  assert made.support.rule == 'per_class'
  assert made.support.shots == 25
