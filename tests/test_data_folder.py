"""Preparing and loading plain folders of images and masks, and their traps."""

import io
import json
import logging
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from distillfss_jax import datasets
from distillfss_jax.data import download, mask_meaning, prepared
from distillfss_jax.datasets import folder

SIZE = (12, 16)
IDS = ['a', 'b', 'c', 'd', 'e']


def encoded(array, form='PNG', **options):
  buffer = io.BytesIO()
  picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
  picture.save(buffer, form, **options)
  return buffer.getvalue()


def photo(seed, size=SIZE):
  random = np.random.RandomState(seed)
  return random.randint(0, 256, (*size, 3)).astype(np.uint8)


def drawn(values, size=SIZE):
  """A mask with a bar of each value, on 0: int [H, W]."""
  mask = np.zeros(size, int)
  for i, value in enumerate(values):
    mask[2:6, 2 * i + 1 : 2 * i + 3] = value
  return mask


def grey(values, size=SIZE):
  return encoded(drawn(values, size).astype(np.uint8))


def colour(colours):
  """A mask with a bar of each colour, on black."""
  every = np.array([(0, 0, 0), *colours], np.uint8)
  return encoded(every[drawn(range(1, len(every)))])


def indexed(values, palette, bits=8):
  picture = Image.fromarray(drawn(values).astype(np.uint8)).convert('P')
  picture = Image.frombytes('P', SIZE[::-1], picture.tobytes())
  picture.putpalette([x for rgb in palette for x in rgb])
  return encoded(picture, bits=bits)


def _chunk(kind, data):
  crc = struct.pack('>I', zlib.crc32(kind + data))
  return struct.pack('>I', len(data)) + kind + data + crc


def few_bits(values, bits):
  """A grey PNG of 2 or 4 bits, which Pillow cannot write."""
  flat = drawn(values).astype(np.uint8)[..., None]
  wide = np.unpackbits(flat, axis=2)[..., 8 - bits :]
  rows = np.packbits(wide.reshape(SIZE[0], -1), axis=1)
  head = struct.pack('>IIBBBBB', SIZE[1], SIZE[0], bits, 0, 0, 0, 0)
  body = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    _chunk(*x) for x in ((b'IHDR', head), (b'IDAT', body), (b'IEND', b''))
  )


def deep_colour(values):
  """A colour PNG of 16 bits, which Pillow cannot write: int [H, W] to it."""
  rows = np.repeat(values[..., None], 3, 2).astype('>u2')
  head = struct.pack('>IIBBBBB', *values.shape[::-1], 16, 2, 0, 0, 0)
  body = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    _chunk(*x) for x in ((b'IHDR', head), (b'IDAT', body), (b'IEND', b''))
  )


def tree(masks, **more):
  """Files of IDS with these masks, one each, the last for all that follow."""
  files = {}
  for i, id_ in enumerate(IDS):
    files[f'images/{id_}.png'] = encoded(photo(i))
    files[f'masks/{id_}.png'] = masks[min(i, len(masks) - 1)]
  return files | {f'{k}.txt': v.encode() for k, v in more.items()}


def made(files, tmp_path, name='mine', **options):
  """Prepares and loads: (Dataset, {id: record})."""
  raw = put(files, tmp_path / 'raw')
  folder.prepare(raw, tmp_path / 'data', name=name, **options)
  dataset = datasets.load('folder', data_dir=tmp_path / 'data', name=name)
  records = {x['id']: x for part in (dataset.train, dataset.test) for x in part}
  return dataset, records


def decided(files, tmp_path):
  """What the masks are taken for: (classes, palette, {id: label})."""
  builder = folder.builder_of('mine')
  with download.Files(put(files, tmp_path / 'raw'), 'x') as listed:
    layout = folder.Layout(listed, builder)
    labels = {id_: layout.label(id_, SIZE) for id_ in layout.ids}
  return builder.CLASSES, builder.PALETTE, labels


def refused(files, tmp_path, message):
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match=message) as caught:
    folder.prepare(raw, tmp_path / 'data', name='mine')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()
  return str(caught.value)


def warnings(caplog):
  return [x.getMessage() for x in caplog.records if x.levelno > logging.INFO]


def listing(place):
  return {p.relative_to(place): p.stat().st_mtime_ns for p in place.rglob('*')}


# ---------------------------------------------------------- layouts and names


def test_prepare_and_load(tmp_path, caplog):
  files = tree([grey([1, 2, 255]), grey([2])], classes='cat\nbig dog\n')
  raw = put(files, tmp_path / 'raw')
  before = listing(raw)
  manifest, new = folder.prepare(raw, tmp_path / 'data', name='my_pets')
  assert new
  assert listing(raw) == before
  place = tmp_path / 'data' / 'my_pets' / '1.0.0'
  info = json.loads((place / 'dataset_info.json').read_text())
  assert (info['name'], (place / prepared.MANIFEST).is_file()) == (
    'my_pets',
    True,
  )
  dataset = folder.load(tmp_path / 'data', 'my_pets')
  assert dataset.name == manifest['name'] == 'my_pets'
  assert dataset.classes == ('cat', 'big dog')
  assert dataset.palette == mask_meaning.palette(2)
  assert list(dataset.test.ids) == download.held_out(IDS)
  assert list(dataset.train.ids) == sorted(set(IDS) - {*dataset.test.ids})
  labels = {'a': drawn([1, 2, 255])}
  for part in (dataset.train, dataset.test):
    for record in part:
      id_ = record['id']
      np.testing.assert_array_equal(record['image'], photo(IDS.index(id_)))
      label = labels.get(id_, drawn([2]))
      np.testing.assert_array_equal(record['label'], label)
  again = folder.prepare('gone', tmp_path / 'data', name='my_pets')
  assert again == (manifest, False)
  assert not warnings(caplog)


def test_a_folder_that_has_changed_is_not_passed_over(tmp_path):
  files = tree([grey([1])], classes='cat\n')
  raw = put(files, tmp_path / 'raw')
  folder.prepare(raw, tmp_path / 'data', name='pets')
  assert not folder.prepare(raw, tmp_path / 'data', name='pets')[1]
  for name, contents in (
    ('classes.txt', b'dog\n'),  # as long as it was
    ('masks/a.png', grey([1], (20, 20))),
    ('images/z.png', encoded(photo(9))),
  ):
    put({name: contents}, raw)
    with pytest.raises(ValueError, match=r'contents \d+ files .*, not \d+'):
      folder.prepare(raw, tmp_path / 'data', name='pets')
    if name in files:
      put(files, raw)


def test_numbered_objects_are_asked_about(tmp_path):
  """Masks of one class whose objects are numbered look like many classes."""
  numbered = [grey(range(1, 2 + i)) for i in range(5)]
  named = dict.fromkeys(('classes',), 'a\nb\nc\nd\ne\n')
  for i, (files, asked) in enumerate(
    [(tree(numbered), True), (tree(numbered, **named), False)]
  ):
    raw = put(files, tmp_path / f'{i}')
    manifest, _ = folder.prepare(raw, tmp_path / f'd{i}', name='cells')
    assert len(manifest['classes']) == 5
    assert ('if they number objects' in folder.summary(manifest)) == asked


def test_photographs_are_kept_as_they_are(tmp_path):
  files = tree([grey([1])])
  jpeg = encoded(photo(0), 'JPEG')
  turned = Image.Exif()
  turned[0x0112] = 3  # upside down
  files = {k: v for k, v in files.items() if not k.startswith('images/')}
  for i, id_ in enumerate(IDS):
    files[f'images/{id_}.jpg'] = encoded(photo(i), 'JPEG')
  files['images/b.jpg'] = encoded(photo(1), 'JPEG', exif=turned)
  files['images/c.bmp'] = encoded(photo(2), 'BMP')
  del files['images/c.jpg']
  with download.Files(put(files, tmp_path / 'raw'), '') as listed:
    layout = folder.Layout(listed, folder.builder_of('pets'))
    found = {}
    for id_ in layout.ids:
      pixels = layout.image(id_)
      found[id_] = layout.encoded(id_)
      again = download.decode(found[id_], id_, 'RGB')
      np.testing.assert_array_equal(again, pixels)
  assert found['a'] == jpeg
  assert [found[x][:4] == b'\x89PNG' for x in 'abc'] == [False, True, True]


def test_two_names_beside_each_other(tmp_path):
  one, _ = made(tree([grey([255])]), tmp_path, name='one')
  files = tree([colour([(9, 0, 0), (0, 9, 0)])])
  raw = pack(files, tmp_path / 'x.zip', top='export/')
  folder.prepare(raw, tmp_path / 'data', name='two')
  two = folder.load(tmp_path / 'data', 'two')
  one = folder.load(tmp_path / 'data', 'one')
  assert (one.name, len(one.classes), two.name, len(two.classes)) == (
    'one', 1, 'two', 2,
  )  # fmt: skip
  assert sorted(p.name for p in (tmp_path / 'data').iterdir()) == ['one', 'two']


@pytest.mark.parametrize('masks', ['masks', 'labels', 'annotations', 'Masks'])
@pytest.mark.parametrize('top', ['', 'my data/'])
def test_folders_endings_and_suffixes(tmp_path, masks, top, caplog):
  forms = [
    ('one.JPG', 'one_mask.png', 'JPEG'), ('two.jpeg', 'two-mask.PNG', 'JPEG'),
    ('s/three.TIF', 's/three_segmentation.png', 'TIFF'),
    ('four.tiff', 'four_label.png', 'TIFF'),
    ('s/t/five.bmp', 's/t/five_GT.bmp', 'BMP'),
    ('six.webp', 'six.webp', 'WEBP'), ('s.s.png', 's.s.tif', 'PNG'),
  ]  # fmt: skip
  files = {}
  for i, (image, mask, form) in enumerate(forms):
    files[f'{top}images/{image}'] = encoded(photo(i), form)
    kind = {'bmp': 'BMP', 'tif': 'TIFF', 'webp': 'WEBP'}.get(mask[-3:], 'PNG')
    kind = 'WEBP' if mask.endswith('webp') else kind
    options = {'lossless': True} if kind == 'WEBP' else {}
    pixels = drawn([255]).astype(np.uint8)
    files[f'{top}{masks}/{mask}'] = encoded(pixels, kind, **options)
  files[f'{top}images/.DS_Store'] = b''
  classes, _, labels = decided(files, tmp_path)
  assert classes == ('foreground',)
  assert sorted(labels) == [
    'four', 'one', 's.s', 's.t.five', 's.three', 'six', 'two',
  ]  # fmt: skip
  for label in labels.values():
    np.testing.assert_array_equal(label, drawn([1]))
  assert not warnings(caplog)


def test_a_mask_of_the_same_name_comes_first(tmp_path, caplog):
  files = tree([grey([255])])
  files['masks/a_mask.png'] = files['masks/zz.png'] = grey([255])
  assert decided(files, tmp_path)[0] == ('foreground',)
  assert warnings(caplog) == [
    '2 masks have no image and are not used: masks/a_mask.png, masks/zz.png'
  ]
  files['images/a_mask.png'] = encoded(photo(9))
  assert len(decided(files, tmp_path)[2]) == 6


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    (None, 'is not given'),
    ('My-Cells', 'small letters, digits and _'),
    ('1st', 'begin with a letter'),
    ('../x', 'small letters'),
    ('nucleus', "'nucleus' is another dataset"),
    ('folder', "'folder' is another dataset"),
  ],
)
def test_names(tmp_path, name, message):
  with pytest.raises(ValueError, match=message):
    folder.prepare(tmp_path, tmp_path / 'data', name=name)
  with pytest.raises(ValueError, match=message):
    folder.load(tmp_path, name)


def test_unprepared(tmp_path):
  with pytest.raises(FileNotFoundError, match='cells is not prepared') as got:
    datasets.load('folder', data_dir=tmp_path, name='cells')
  assert '--dataset folder --name cells --raw' in str(got.value)


def test_wrong_layouts(tmp_path):
  pixels = encoded(photo(0))
  torn = tmp_path / 'torn.zip'
  torn.write_bytes(b'PK\x03\x04 and no more')
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'gone', 'does not exist'),
    (torn, 'neither a folder nor a whole zip'),
    (pack({}, tmp_path / 'none.zip'), 'has no images/ with masks/'),
    (put({'a.png': pixels}, tmp_path / 'flat'), r'files are there: a\.png\)'),
    (put({'images/a.png': pixels}, tmp_path / 'alone'), 'has no images/ with'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      folder.prepare(raw, tmp_path / 'data', name='mine')
    assert 'put the images into images/' in str(caught.value)


def test_several_folders(tmp_path):
  files = tree([grey([255])])
  both = {f'{top}/{k}': v for top in ('train', 'val') for k, v in files.items()}
  message = refused(both, tmp_path, '2 folders with images/ and masks/')
  assert 'images/train/' in message
  more = files | {'labels/a.png': grey([1])}
  with pytest.raises(ValueError, match='has labels/ and masks/: which'):
    decided(more, tmp_path / 'x')
  yolo = files | {'labels/a.txt': b'0 0.5 0.5 0.1 0.1'}
  assert decided(yolo, tmp_path / 'y')[0] == ('foreground',)


def test_two_images_of_one_id(tmp_path):
  files = tree([grey([255])])
  refused(files | {'images/a.jpg': b''}, tmp_path / '1', "be called 'a'")
  files |= {'images/x/y.png': b'', 'images/x.y.png': b''}
  refused(
    files, tmp_path / '2', r"x\.y\.png and images/x/y\.png would .*'x\.y'"
  )


def test_data_dir_inside_raw_is_refused(tmp_path):
  raw = put(tree([grey([255])]), tmp_path / 'raw')
  with pytest.raises(ValueError, match='inside the raw folder'):
    folder.prepare(raw, raw / 'data', name='mine')
  with pytest.raises(ValueError, match='inside the raw folder'):
    folder.prepare(raw, tmp_path, name='raw')


# ------------------------------------------------------------------ bad files


def test_all_bad_files_are_named(tmp_path):
  files = tree([grey([255])])
  files['images/a.png'] = files['images/a.png'][:60]
  files['masks/b.png'] = grey([255], (5, 7))
  files['masks/c.png'] = b'no picture'
  del files['masks/d.png']
  files['images/f.png'] = encoded(photo(5))
  files['masks/f.png'] = files['masks/f.bmp'] = grey([255])
  files['images/g.png'] = encoded(photo(6))
  files['masks/g.png'] = grey([255])
  wide = np.full(SIZE, 4000, np.uint16)
  files['images/h.tif'] = encoded(wide, 'TIFF')
  files['masks/h.png'] = grey([255])
  message = refused(files, tmp_path, '6 of 8 images cannot be used')
  for part in (
    'images/a.png: cannot be decoded',
    'masks/b.png: mask is 7x5, its image 16x12',
    'masks/c.png: cannot be decoded',
    'no mask for images/d.png: expected masks/d.png, masks/d_mask.png',
    'images/f.png has 2 masks: masks/f.bmp, masks/f.png',
    'images/h.tif: has more than 8 bits a pixel',
    '--skip_bad',
  ):
    assert part in message
  dataset, records = made(files, tmp_path, skip_bad=True)
  assert sorted(records) == ['e', 'g']
  assert (len(dataset.train), len(dataset.test)) == (1, 1)


def test_no_image_has_a_mask(tmp_path):
  files = {k.replace('masks/', 'masks/m_'): v for k, v in tree([b'']).items()}
  message = refused(files, tmp_path, 'none of the 5 images has a mask in masks')
  assert 'masks/m_a.png' in message
  assert 'expected masks/a.png' in message


def test_all_masks_damaged_or_empty(tmp_path):
  refused(tree([b'x']), tmp_path / '1', '5 of 5 images cannot be used')
  refused(tree([grey([])]), tmp_path / '2', 'all 5 masks are empty')


def test_images_are_turned_upright(tmp_path, caplog):
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  files = tree([grey([255])])
  flat = np.full((*SIZE[::-1], 3), 90, np.uint8)
  flat[0, 0] = 91
  files['images/a.png'] = encoded(flat, exif=exif)
  _, records = made(files, tmp_path)
  assert records['a']['image'].shape == (*SIZE, 3)
  assert any('1 images are turned' in x for x in warnings(caplog))


# ---------------------------------------------------------------------- splits


def test_split_files(tmp_path, caplog):
  files = tree([grey([255])], train='c.png\na\n\n', test='e\nimages/b.png\n')
  dataset, _ = made(files, tmp_path)
  assert dataset.train.ids == ('c', 'a')
  assert dataset.test.ids == ('e', 'b')
  assert warnings(caplog) == [
    '1 images are in neither train.txt nor test.txt and are left out: d'
  ]
  other, _ = made(files, tmp_path, name='other', split='held_out')
  assert list(other.test.ids) == download.held_out(IDS)


def test_only_a_test_file(tmp_path):
  dataset, _ = made(tree([grey([255])], test='d\nb\n'), tmp_path)
  assert (dataset.train.ids, dataset.test.ids) == (('a', 'c', 'e'), ('d', 'b'))


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    ({'test': 'b\nx\ny.png'}, r'test\.txt names 2 images .* x, y\.png'),
    ({'test': 'b', 'train': 'a\nb.png'}, r'1 images are in both .*: b'),
    ({'train': 'a'}, r'test\.txt is missing'),
    ({'test': '\n'}, 'leave no image to test'),
    ({'test': 'a\nb\nc\nd\ne'}, 'leave no image to train'),
  ],
)
def test_bad_split_files(tmp_path, more, message):
  refused(tree([grey([255])], **more), tmp_path, message)


def test_bad_splits(tmp_path):
  raw = put(tree([grey([255])]), tmp_path / 'raw')
  with pytest.raises(ValueError, match="'odd' is not one of"):
    folder.prepare(raw, tmp_path / 'data', name='mine', split='odd')
  with pytest.raises(ValueError, match=r'test\.txt is missing'):
    folder.prepare(raw, tmp_path / 'data', name='mine', split='files')
  one = {k: v for k, v in tree([grey([255])]).items() if k[-5] == 'a'}
  refused(one, tmp_path / 'one', '1 image is too few')
  (tmp_path / 'raw' / 'test.txt').write_bytes('b\n'.encode('utf-16'))
  with pytest.raises(ValueError, match=r'test\.txt is not UTF-8'):
    folder.prepare(raw, tmp_path / 'data', name='mine')


def test_copies_of_test_images_are_named(tmp_path, caplog):
  files = tree([grey([255])], test='e')
  files['images/b.png'] = encoded(photo(4), compress_level=0)
  made(files, tmp_path)
  assert any('b' in x and 'test image' in x for x in warnings(caplog))


# ------------------------------------------------------------------ grey masks


@pytest.mark.parametrize('value', [1, 7, 128, 255])
def test_one_value_is_binary(tmp_path, value, caplog):
  classes, palette, labels = decided(tree([grey([]), grey([value])]), tmp_path)
  assert (classes, len(palette)) == (('foreground',), 2)
  assert not labels['a'].any()
  np.testing.assert_array_equal(labels['b'], drawn([1]))
  assert labels['b'].dtype == np.uint8
  assert not warnings(caplog)


def test_bits_are_read_right(tmp_path):
  one = encoded(Image.fromarray(drawn([255]).astype(np.uint8)).convert('1'))
  deep = encoded(drawn([1, 10000]).astype(np.uint16))
  low = encoded(drawn([256]).astype(np.uint16))
  classes, _, labels = decided(tree([one, grey([255])]), tmp_path / '1')
  assert classes == ('foreground',)
  np.testing.assert_array_equal(labels['a'], labels['b'])
  np.testing.assert_array_equal(labels['a'], drawn([1]))
  classes, _, labels = decided(tree([deep, grey([])]), tmp_path / '2')
  assert classes == ('value1', 'value10000')
  np.testing.assert_array_equal(labels['a'], drawn([1, 2]))
  classes, _, labels = decided(tree([low]), tmp_path / '3')
  np.testing.assert_array_equal(labels['a'], drawn([1]))
  # 2 bits among themselves are labels, beside 8 bits what is drawn.
  classes, _, labels = decided(tree([few_bits([1, 3], 2)]), tmp_path / '4')
  assert classes == ('class1', 'class3')
  np.testing.assert_array_equal(labels['a'], drawn([1, 2]))
  masks = [few_bits([1, 2], 4), grey([17, 34])]
  _, _, labels = decided(tree(masks), tmp_path / '5')
  np.testing.assert_array_equal(labels['a'], labels['b'])


def test_label_map(tmp_path, caplog):
  files = tree([grey([1]), grey([4, 255, 2]), grey([])])
  classes, _, labels = decided(files, tmp_path)
  assert classes == ('class1', 'class2', 'class4')
  np.testing.assert_array_equal(labels['b'], drawn([3, 255, 2]))
  assert not warnings(caplog)


def test_many_labels(tmp_path):
  """150 classes are no soft edges, and need no names."""
  mask = np.arange(12 * 16).reshape(SIZE) % 151
  mask[0, :4] = 255
  classes, _, labels = decided(tree([encoded(mask.astype(np.uint8))]), tmp_path)
  assert len(classes) == 150
  np.testing.assert_array_equal(labels['a'], mask)


def test_named_labels_that_do_not_occur(tmp_path, caplog):
  names = 'background\n' + ''.join(f'c{i}  # why\n\n' for i in range(1, 41))
  files = tree([grey([40])], classes=names)
  classes, _, labels = decided(files, tmp_path)
  assert classes == ('c40',)
  np.testing.assert_array_equal(labels['a'], drawn([1]))
  assert '39 of 40 classes are in no mask' in warnings(caplog)[0]


def test_other_values_are_classes_in_order(tmp_path, caplog):
  caplog.set_level('INFO')
  files = tree([grey([255]), grey([85, 170])])
  classes, _, labels = decided(files, tmp_path / '1')
  assert classes == ('value85', 'value170', 'value255')
  np.testing.assert_array_equal(labels['a'], drawn([3]))
  np.testing.assert_array_equal(labels['b'], drawn([1, 2]))
  assert 'values 85, 170, 255: each is a class' in caplog.text
  files['classes.txt'] = b'low\nmiddle\nhigh'
  assert decided(files, tmp_path / '2')[0] == ('low', 'middle', 'high')


def test_values_named_one_by_one(tmp_path):
  files = tree(
    [grey([15, 200]), grey([128])],
    classes='0 background\n15 person\n200: big dog\n128 void',
  )
  classes, _, labels = decided(files, tmp_path)
  assert classes == ('person', 'big dog')
  np.testing.assert_array_equal(labels['a'], drawn([1, 2]))
  np.testing.assert_array_equal(labels['b'], drawn([255]))


def test_masks_of_two_sources(tmp_path):
  files = tree([grey([1]), grey([255])])
  message = refused(files, tmp_path / '1', 'some masks hold 0 and 1')
  assert 'masks/a.png' in message
  assert 'masks/b.png' in message
  files['classes.txt'] = b'1 cat'
  _, _, labels = decided(files, tmp_path / '2')
  np.testing.assert_array_equal(labels['b'], drawn([255]))


@pytest.mark.parametrize('form', ['JPEG', 'JPEG of colour', 'WEBP', 'soft'])
def test_soft_black_and_white(tmp_path, form, caplog):
  """Also those few values that a small JPEG has are no classes."""
  size = (40, 60)
  mask = np.zeros(size, np.uint8)
  mask[7:29, 11:43] = 255
  if form == 'soft':
    saved = mask.copy()
    saved[29, 11:51] = np.arange(40) * 6
    contents = encoded(saved)
  elif form == 'WEBP':
    contents = encoded(mask, 'WEBP', quality=60)
  else:
    mode = 'RGB' if 'colour' in form else 'L'
    contents = encoded(Image.fromarray(mask).convert(mode), 'JPEG', quality=80)
  files = tree([contents])
  builder = folder.builder_of('mine')
  with download.Files(put(files, tmp_path), 'x') as listed:
    layout = folder.Layout(listed, builder)
    label = layout.label('a', size)
  assert builder.CLASSES == ('foreground',)
  expected = mask // 255
  if form == 'soft':
    expected[29, 33:51] = 1
  np.testing.assert_array_equal(label, expected)
  assert 'taken for black and white' in warnings(caplog)[0]


def test_soft_and_nothing_else(tmp_path):
  ramp = np.arange(12 * 16).reshape(SIZE).astype(np.uint8) + 60
  message = refused(tree([encoded(ramp)]), tmp_path / '1', '192 grey values')
  assert 'save them as PNG with a value per class, at most 32' in message
  mid = encoded(drawn([80, 160]).astype(np.uint8), 'JPEG')
  refused(tree([mid]), tmp_path / '2', r'lossy compression .*masks/a\.png')
  names = {'classes': 'x\ny'}
  mask = encoded(drawn([255]).astype(np.uint8), 'JPEG', quality=50)
  refused(tree([mask], **names), tmp_path / '3', r'2 classes \(x, y\).*1 are')


def test_fractions_and_deep_colours(tmp_path):
  files = tree([grey([1])])
  half = drawn([1]).astype(np.float32) / 2
  files['masks/a.tif'] = encoded(half, 'TIFF')
  del files['masks/a.png']
  whole = drawn([1]).astype(np.float32)
  files['masks/b.tif'] = encoded(whole, 'TIFF')
  del files['masks/b.png']
  files['masks/c.png'] = deep_colour(drawn([1]))
  message = refused(files, tmp_path, '2 of 5')
  assert 'masks/a.tif: values are fractions' in message
  assert 'masks/c.png: a colour PNG of 16 bits' in message


@pytest.mark.parametrize(
  ('values', 'names', 'message'),
  [
    ([1, 2, 3], 'x\ny', r'names 2 classes \(x, y\).*1, 2, 3: 3 are needed'),
    ([255], 'x\ny', 'names 2 classes .* one value besides 0, 255'),
    ([1, 2, 9], '1 x\n2 y', r'names 2 classes .* 3 values .* 9 \(in masks/a'),
    ([1], '', 'must have lines of one form'),
    ([1], 'x\n2 y', "must have lines of one form.*'x' and '2 y'"),
    ([1], 'x\ny\nx', 'x more than once'),
    ([1], '1 x\n1 y', 'its value is there twice'),
    ([1], '300 0 0 x', 'no colour'),
    ([1], '# all\nbackground', '1 to 254 are needed'),
  ],
)
def test_bad_classes(tmp_path, values, names, message):
  refused(tree([grey(values)], classes=names), tmp_path, message)


# --------------------------------------------------------------- indexed masks

RAMP = [(0, 0, 0), (200, 10, 10), (10, 200, 10), (10, 10, 200)]
FULL = RAMP + [(i, 255 - i, i // 2) for i in range(4, 256)]


def test_indexed(tmp_path):
  files = tree([indexed([1, 255], FULL), indexed([3, 2], FULL), grey([])])
  classes, palette, labels = decided(files, tmp_path)
  assert classes == ('class1', 'class2', 'class3')
  assert palette == tuple(RAMP)
  np.testing.assert_array_equal(labels['a'], drawn([1, 255]))
  np.testing.assert_array_equal(labels['b'], drawn([3, 2]))


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_indexed_of_few_bits(tmp_path, bits):
  mask = indexed([1], RAMP[:2], bits)
  classes, palette, labels = decided(tree([mask]), tmp_path)
  assert (classes, palette) == (('foreground',), tuple(RAMP[:2]))
  np.testing.assert_array_equal(labels['a'], drawn([1]))


def test_palettes_that_differ(tmp_path, caplog):
  """Programs that shrink files number the colours of each anew."""
  red, green = RAMP[1:3]
  masks = [indexed([1, 2], [RAMP[0], red, green]),
           indexed([2, 1], [RAMP[0], green, red])]  # fmt: skip
  classes, palette, labels = decided(tree(masks), tmp_path / '1')
  assert len(classes) == 2
  assert set(palette) == set(RAMP[:3])
  np.testing.assert_array_equal(labels['a'], labels['b'])
  assert 'colours are taken for classes' in warnings(caplog)[0]
  masks = [indexed([1], [RAMP[0], red]), indexed([1], [RAMP[0], green])]
  refused(tree(masks), tmp_path / '2', r'index 1 is \(200, 10, 10\) in masks/a')
  _, _, labels = decided(tree(masks, classes='1 x'), tmp_path / '3')
  np.testing.assert_array_equal(labels['b'], drawn([1]))
  lines = '200 10 10 x\n10,200,10 y'
  _, _, labels = decided(tree(masks, classes=lines), tmp_path / '4')
  np.testing.assert_array_equal(labels['b'], drawn([2]))


def test_indexed_beside_colours(tmp_path):
  masks = [indexed([2, 1], [RAMP[0], RAMP[3], RAMP[1]]), colour(RAMP[1:])]
  classes, _, labels = decided(tree(masks), tmp_path)
  assert len(classes) == 3
  np.testing.assert_array_equal(labels['a'][3, [1, 3]], labels['b'][3, [1, 5]])


# ---------------------------------------------------------------- colour masks


def test_colours_in_the_order_of_how_often(tmp_path):
  red, green, blue = RAMP[1:]
  files = tree([colour([green, green]), colour([red, red]), colour([blue])])
  files['masks/d.png'] = files['masks/e.png'] = colour([green, red])
  files['masks/c.png'] = colour([green, blue])
  classes, palette, labels = decided(files, tmp_path)
  assert classes == ('rgb_10_200_10', 'rgb_200_10_10', 'rgb_10_10_200')
  assert palette == ((0, 0, 0), green, red, blue)
  np.testing.assert_array_equal(labels['d'], drawn([1, 2]))


def test_colours_in_the_order_of_classes_txt(tmp_path, caplog):
  lines = '255,255,255 background\n0 0 250 sea\n250 0 0 red roof\n9 9 9 void'
  white = np.full((*SIZE, 3), 255, np.uint8)
  white[:3] = (250, 0, 0)
  white[3] = 9
  white[4] = 0
  classes, palette, labels = decided(
    tree([encoded(white)], classes=lines), tmp_path
  )
  assert classes == ('red roof',)
  assert palette == ((255, 255, 255), (250, 0, 0))
  assert labels['a'][:, 0].tolist() == [1, 1, 1, 255, 0, *[0] * 7]
  assert (
    '1 of 2 classes are in no mask and are left out: sea'
    in (warnings(caplog)[0])
  )


def test_white_on_black_and_grey_kept_as_colour(tmp_path):
  white = colour([(255, 255, 255)])
  classes, _, labels = decided(tree([white, grey([255])]), tmp_path / '1')
  assert classes == ('foreground',)
  np.testing.assert_array_equal(labels['a'], labels['b'])
  classes, _, labels = decided(
    tree([colour([(1, 1, 1), (2, 2, 2)]), grey([255])]), tmp_path / '2'
  )
  assert classes == ('class1', 'class2')
  np.testing.assert_array_equal(labels['b'], drawn([255]))


def test_alpha(tmp_path):
  """What is seen through is background, unless that is all there is."""
  seen = np.full((*SIZE, 4), 255, np.uint8)
  seen[..., 3] = drawn([255])
  _, _, labels = decided(tree([encoded(seen)]), tmp_path / '1')
  np.testing.assert_array_equal(labels['a'], drawn([1]))
  unseen = np.zeros((*SIZE, 4), np.uint8)
  unseen[..., 0] = drawn([255])
  _, _, labels = decided(tree([encoded(unseen)]), tmp_path / '2')
  np.testing.assert_array_equal(labels['a'], drawn([1]))


def test_colours_beside_a_label_map_are_its_palette(tmp_path):
  lines = '200 10 10 x\n10 200 10 y\n'
  files = tree([grey([1, 2, 255])], classes=lines)
  classes, palette, labels = decided(files, tmp_path)
  assert (classes, palette) == (('x', 'y'), tuple(RAMP[:3]))
  np.testing.assert_array_equal(labels['a'], drawn([1, 2, 255]))


def test_bad_colours(tmp_path):
  many = np.arange(12 * 16 * 3).reshape(*SIZE, 3).astype(np.uint8)
  refused(tree([encoded(many)]), tmp_path / '1', '192 colours .* 32 are the')
  bars = encoded(photo(0), 'JPEG')
  refused(tree([bars]), tmp_path / '2', r'masks/a\.png is lossy')
  mask = colour(RAMP[1:])
  message = refused(tree([mask], classes='x\ny'), tmp_path / '3', '2 classes')
  assert '3 colours: write `r g b name` for each of (10, 10, 200)' in message
  lines = '200 10 10 x\n10 200 10 y\n'
  refused(tree([mask], classes=lines), tmp_path / '4', '2 classes.*3 colours')
  refused(
    tree([mask, grey([1])]), tmp_path / '5', r'b\.png is grey and masks/a'
  )


# -------------------------------------------------------------------- the rest


def test_count():
  values = np.random.RandomState(0).randint(-1, 4, (9, 7)) * 1000
  for found, expected in zip(
    mask_meaning._count(values),
    np.unique(values, return_counts=True),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)


def test_summary(tmp_path):
  files = tree([grey([1, 2, 255]), grey([]), grey([1])], test='a\nb')
  files['images/e.png'] = encoded(photo(4, (60, 50)))
  files['masks/e.png'] = grey([1], (60, 50))
  raw = put(files, tmp_path / 'raw')
  manifest, _ = folder.prepare(raw, tmp_path / 'data', name='mine')
  lines = folder.summary(manifest).splitlines()
  assert lines == [
    'mine: 5 images (3 train, 2 test), 2 classes',
    '  masks are taken to mean: 0 background, 1 class1, 2 class2, 255 void',
    '  files: images 5 png; masks 5 png',
    '  label  class   train images  test images  % of pixels',
    '      1  class1             3            1         0.85',
    '      2  class2             0            1         0.21',
    '  void: 0.21 % of pixels',
    '  width x height: 16x12 smallest, 16x12 median, 50x60 largest',
    '  note: class2 occurs in one image, a',
    '  note: class1 is in 3 train images: fewer than 5 give no 5 shots',
    '  note: class2 is in 0 train images: fewer than 5 give no 5 shots, and '
    'none no run; list the test images in test.txt, without some of its',
    '  note: the largest image has 16 times the pixels of the smallest: all '
    'are resized to one size when read',
    '  note: 1 images have no class in their mask: b',
  ]
  assert folder.prepare(raw, tmp_path / 'data', name='mine') == (
    manifest,
    False,
  )
  for row in manifest['records']:  # an older version did not count void
    del row['void'], row['edges']
  assert '% of images' in folder.summary(manifest)
  assert '80.00' in folder.summary(manifest)


# ------------------------------------------------------------------------ COCO


def coco():
  """Files with annotations.json: polygons, run lengths, a crowd."""
  box = [1, 2, 9, 2, 9, 6, 1, 6]
  counts = [0, 12, 12 * 15]  # the first column
  annotations = [
    {'image_id': 7, 'category_id': 5, 'segmentation': [box]},
    {
      'image_id': 7,
      'category_id': 3,
      'segmentation': {'counts': counts, 'size': list(SIZE)},
    },
    {
      'image_id': 8,
      'category_id': 3,
      'iscrowd': 1,
      'segmentation': {'counts': counts, 'size': list(SIZE)},
    },
    {
      'image_id': 8,
      'category_id': 5,
      'segmentation': [box, [12, 8, 15, 8, 15, 11, 12, 11]],
    },
  ]
  names = [('a.png', 7), ('images/b.png', 8), ('c.png', 9), ('gone.png', 1)]
  made = {
    'images': [
      {'id': i, 'file_name': name, 'height': SIZE[0], 'width': SIZE[1]}
      for name, i in names
    ],
    'annotations': [{'id': i, **x} for i, x in enumerate(annotations)],
    'categories': [
      {'id': 5, 'name': 'dog'}, {'id': 3, 'name': 'cat'},
      {'id': 0, 'name': 'root'},
    ],
  }  # fmt: skip
  files = {f'images/{x}.png': encoded(photo(i)) for i, x in enumerate('abc')}
  return files, made


def with_json(files, made):
  return files | {'annotations.json': json.dumps(made).encode()}


def test_coco(tmp_path, caplog):
  pytest.importorskip('pycocotools')
  classes, palette, labels = decided(with_json(*coco()), tmp_path)
  assert (classes, len(palette)) == (('cat', 'dog'), 3)
  first, second = (np.zeros(SIZE, np.uint8) for _ in range(2))
  first[2:6, 1:9] = second[2:6, 1:9] = 2
  first[:, 0] = second[:, 0] = 1
  second[8:11, 12:15] = 2
  np.testing.assert_array_equal(labels['a'], first)
  np.testing.assert_array_equal(labels['b'], second)
  assert not labels['c'].any()
  assert len(warnings(caplog)) == 2
  assert 'lists 1 images that are not there: gone.png' in caplog.text
  assert '1 categories have no annotation and are no class: root' in caplog.text


def test_coco_prepared_and_compressed(tmp_path):
  painter = pytest.importorskip('pycocotools.mask')
  files, content = coco()
  mask = np.asfortranarray(drawn([1, 1]).astype(np.uint8))
  packed = painter.encode(mask)
  packed['counts'] = packed['counts'].decode()
  content['annotations'] = [
    {'id': 1, 'image_id': i, 'category_id': 5, 'segmentation': packed}
    for i in (7, 8)
  ]
  dataset, records = made(with_json(files, content), tmp_path)
  assert dataset.classes == ('dog',)
  np.testing.assert_array_equal(records['b']['label'], mask)


def test_coco_bad_files(tmp_path):
  pytest.importorskip('pycocotools')
  files, content = coco()
  content['annotations'][0]['segmentation'] = [[1, 2, 3, 4]]
  content['annotations'][3]['segmentation'] = []
  content['images'][2]['width'] = 99
  files['images/d.png'] = encoded(photo(8))
  message = refused(with_json(files, content), tmp_path, '4 of 4 images')
  for part in (
    'images/a.png: annotation 0 cannot be decoded',
    'images/b.png: annotation 3 has no segmentation, maybe a box only',
    'images/c.png: annotations.json says 99x12, its image is 16x12',
    'no entry in annotations.json for images/d.png',
  ):
    assert part in message


def test_coco_bad_json(tmp_path):
  pytest.importorskip('pycocotools')
  files, content = coco()
  raw = tmp_path / '1'
  refused(files | {'annotations.json': b'{'}, raw, 'annotations.json is not')
  for i, (key, value, message) in enumerate(
    (
      ('images', [{'id': 1}], r"is not COCO \(KeyError: 'file_name'\)"),
      ('images', [{'id': 1, 'file_name': 'x'}], 'lists none of the 3 images'),
      ('images', content['images'] * 2, "lists 'a.png' twice"),
      ('categories', [], 'category 5, of which one is not listed'),
      ('annotations', [], '0 categories with annotations'),
    )
  ):
    bad = with_json(files, content | {key: value})
    refused(bad, tmp_path / f'bad{i}', message)


def test_coco_without_pycocotools(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pycocotools', None)
  monkeypatch.delitem(sys.modules, 'pycocotools.mask', raising=False)
  files = with_json(*coco())
  refused(files, tmp_path, 'needs pycocotools: pip install pycocotools')


def test_masks_come_before_coco(tmp_path, caplog):
  files, content = coco()
  files |= {f'masks/{x}.png': grey([255]) for x in 'abc'}
  assert decided(with_json(files, content), tmp_path)[0] == ('foreground',)
  assert warnings(caplog) == ['annotations.json is not used: there is masks/']
