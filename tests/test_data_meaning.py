"""What masks mean where two readings fit, and what must not be guessed."""

import io
import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_data_folder import (
  IDS,
  SIZE,
  colour,
  decided,
  drawn,
  encoded,
  grey,
  indexed,
  made,
  photo,
  refused,
  tree,
  warnings,
)
from trees import put

from distillfss_jax.data import builder, mask_meaning, notes
from distillfss_jax.datasets import folder

BIG = (48, 64)


def blob(value=255, size=BIG):
  mask = np.zeros(size, np.uint8)
  mask[10:34, 16:48] = value
  return mask


def large(masks, **more):
  """A tree of images of size BIG with these masks, {suffix: contents}."""
  files = {}
  for i, id_ in enumerate(IDS):
    suffix, contents = masks[min(i, len(masks) - 1)]
    files[f'images/{id_}.png'] = encoded(photo(i, BIG))
    files[f'masks/{id_}.{suffix}'] = contents
  return files | {f'{k}.txt': v.encode() for k, v in more.items()}


def labels_of(files, tmp_path, **options):
  """(classes, {id: label}) of a tree that is prepared."""
  dataset, records = made(files, tmp_path, **options)
  return dataset.classes, {i: x['label'] for i, x in records.items()}


# ------------------------------------------------------- lists that begin at 0


@pytest.mark.parametrize(
  ('values', 'names'),
  [
    ([1, 2, 3, 4], 'sky\nroad\ntree\ncar\nvoid'),
    ([1, 2], 'sky\nroad\ntree'),
    ([1, 2, 255], 'sky\nroad\ncar\nvoid'),
    ([2], 'sky\nroad\ntree\ncar'),
    ([1], 'sky\nvoid\nroad'),
  ],
)
def test_a_list_that_may_begin_at_0(tmp_path, values, names):
  files = tree([grey(values)], classes=names)
  message = refused(files, tmp_path, "is 'sky' label 0, or label 1")
  assert '`0 sky`' in message


@pytest.mark.parametrize(
  ('values', 'names', 'classes', 'expected'),
  [
    ([1, 2, 3], '0 sky\n1 road\n2 car\n3 void', 'sky road car', [1, 2, 3, 255]),
    ([1, 2], 'background\nroad\ncar', 'road car', [0, 1, 2]),
    ([1, 2, 3], 'road\ncar\nvoid', 'road car', [0, 1, 2, 255]),
    ([1, 2, 255], 'road\ncar\nvoid', 'road car', [0, 1, 2, 255]),
    ([1, 2, 3], 'background\nroad\ncar\nvoid', 'road car', [0, 1, 2, 255]),
    ([1, 2], 'background\nvoid\ncar', 'car', [0, 255, 1]),
    ([9], '0 sky\n9 void', 'sky', [1, 255]),
  ],
)
def test_lists_that_say_what_0_is(tmp_path, values, names, classes, expected):
  found, _, labels = decided(tree([grey(values)], classes=names), tmp_path)
  assert found == tuple(classes.split())
  in_order = [int(labels['a'][0, 0])]
  in_order += [int(labels['a'][3, 2 * i + 1]) for i in range(len(values))]
  assert in_order == expected


def test_background_is_the_first_line(tmp_path):
  files = tree([grey([1, 2])], classes='cat\nbackground\ndog')
  refused(files, tmp_path, 'background must be its first line')


# ----------------------------------------------------- classes that no mask has


@pytest.mark.parametrize(
  ('value', 'names'),
  [(255, '0 background\n1 nucleus'), (255, '7 x\n8 y'), (3, '2 x\n3 void')],
)
def test_no_mask_has_a_class(tmp_path, value, names):
  files = tree([grey([value])], classes=names)
  message = refused(files, tmp_path, 'no mask has a pixel of a class')
  assert f'hold 0, {value}' in message


@pytest.mark.parametrize(
  ('values', 'names', 'classes'),
  [
    ([2, 3], None, ('class2', 'class3')),
    ([5, 7, 255], None, ('class5', 'class7')),
    ([1, 3], 'background\na\nb\nc\nd', ('a', 'c')),
    ([4, 9], '4 x\n6 y\n9 z', ('x', 'z')),
  ],
)
def test_labels_that_no_mask_has_are_no_classes(
  tmp_path, values, names, classes
):
  more = {} if names is None else {'classes': names}
  found, palette, labels = decided(tree([grey(values)], **more), tmp_path)
  assert (found, len(palette)) == (classes, 3)
  bars = [1, 2, 255][: len(values)]
  np.testing.assert_array_equal(labels['a'], drawn(bars))


def test_no_image_has_a_class(tmp_path):
  """Where masks are of two forms, each of them is read; all may be void."""

  class Layout:
    ids = ('a', 'b')

    def image(self, id_):
      return photo(ord(id_))

    def label(self, id_, size):
      return np.full(size, 255, np.uint8)

  with pytest.raises(ValueError, match='none of the 2 images has a pixel of a'):
    builder.check(Layout(), skip_bad=False)


# -------------------------------------------------------------- smoothed edges


def enlarged(mask, times=4, how=Image.Resampling.BILINEAR):
  small = Image.fromarray(mask[::times, ::times])
  return np.asarray(small.resize(mask.shape[::-1], how))


@pytest.mark.parametrize('value', [255, 100, 40])
@pytest.mark.parametrize(
  'how', [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]
)
@pytest.mark.parametrize('times', [2, 4])
def test_edges_of_enlarged_masks_are_no_classes(
  tmp_path, value, how, times, caplog
):
  mask = enlarged(blob(value), times, how)
  assert len(np.unique(mask)) > 3
  classes, labels = labels_of(large([('png', encoded(mask))]), tmp_path)
  assert classes == ('foreground',)
  np.testing.assert_array_equal(labels['a'], mask >= (value + 1) // 2)
  assert any('soft edges' in x for x in warnings(caplog))


def test_an_antialiased_outline(tmp_path):
  big = Image.new('L', (BIG[1] * 8, BIG[0] * 8))
  # Drawn large and made small, as editors do.
  ImageDraw.Draw(big).ellipse((100, 80, 380, 300), fill=255)
  mask = np.asarray(big.resize(BIG[::-1], Image.Resampling.BOX))
  classes, labels = labels_of(large([('png', encoded(mask))]), tmp_path)
  assert classes == ('foreground',)
  np.testing.assert_array_equal(labels['a'], mask >= 128)


def smooth(levels):
  """Two areas of these levels, enlarged."""
  mask = blob(levels[0])
  mask[36:46, 4:40] = levels[1]
  return enlarged(mask)


@pytest.mark.parametrize('levels', [(255, 128), (3, 7), (60, 200)])
def test_smoothed_masks_of_several_values(tmp_path, levels):
  message = refused(
    large([('png', encoded(smooth(levels)))]), tmp_path, 'only on edges'
  )
  assert 'nearest neighbour' in message


def outlined(inside, rim):
  mask = blob(rim)
  mask[11:33, 17:47] = inside
  return mask


def test_one_value_on_edges_has_to_be_said(tmp_path):
  """Soft edges of one step and painted outlines look the same."""
  files = large([('png', encoded(outlined(255, 128)))])
  refused(files, tmp_path / '1', r'masks hold 128 .* only on edges')
  for i, (word, label, classes) in enumerate(
    [
      ('void', 255, ('cell',)),
      ('rim', 2, ('cell', 'rim')),
      ('background', 0, ('cell',)),
    ]
  ):
    files['classes.txt'] = f'255 cell\n128 {word}\n'.encode()
    found, labels = labels_of(files, tmp_path / f'_{i}')
    assert found == classes
    assert labels['a'][10, 20] == label
    assert labels['a'][20, 30] == 1


def test_outlines_among_labels_are_said(tmp_path):
  files = large([('png', encoded(outlined(2, 1)))])
  raw = put(files, tmp_path / 'raw')
  manifest, _ = folder.prepare(raw, tmp_path / 'data', name='mine')
  said = [x for x in notes.notes(manifest) if 'only on edges' in x]
  assert len(said) == 1
  assert said[0].startswith('class1 sits only on edges')


@pytest.mark.parametrize('ink', [(255, 0, 0), (20, 90, 200), (0, 0, 255)])
def test_smoothed_colours(tmp_path, ink):
  mask = np.zeros((*BIG, 3), np.uint8)
  mask[10:34, 16:48] = ink
  soft = Image.fromarray(mask[::4, ::4]).resize(BIG[::-1], 2)
  refused(large([('png', encoded(soft))]), tmp_path, 'only on edges, between')


def test_a_white_outline_is_a_class(tmp_path):
  """It is no blend of what lies on its two sides."""
  mask = np.zeros((*BIG, 3), np.uint8)
  mask[10:34, 16:48] = 255
  mask[11:33, 17:47] = (200, 10, 10)
  files = large([('png', encoded(mask))])
  assert len(decided_classes(files, tmp_path)) == 2


def decided_classes(files, tmp_path):
  raw = put(files, tmp_path / 'raw')
  return folder.prepare(raw, tmp_path / 'data', name='mine')[0]['classes']


@pytest.mark.parametrize('quality', [40, 75, 95])
@pytest.mark.parametrize('level', [80, 128, 180])
def test_a_third_level_of_jpeg_masks(tmp_path, quality, level):
  mask = blob()
  mask[36:46, 4:20] = level
  files = large([('jpg', encoded(mask, 'JPEG', quality=quality))])
  message = refused(files, tmp_path, 'grey areas beside black and white')
  assert 'PNG' in message


@pytest.mark.parametrize('quality', [30, 60, 90])
@pytest.mark.parametrize('form', ['JPEG', 'WEBP'])
def test_two_levels_of_lossy_masks(tmp_path, quality, form):
  random = np.random.RandomState(quality)
  mask = np.zeros(BIG, np.uint8)
  for _ in range(9):
    y, x = random.randint(2, 40, 2)
    mask[y : y + random.randint(3, 9), x : x + random.randint(3, 20)] = 255
  contents = encoded(mask, form, quality=quality)
  files = large([(form.lower().replace('jpeg', 'jpg'), contents)])
  _, labels = labels_of(files, tmp_path)
  assert (labels['a'] != (mask > 0)).mean() < 0.02


def test_lossy_colours(tmp_path):
  flat = np.zeros((*BIG, 3), np.uint8)
  flat[:, 22:] = (255, 0, 0)
  flat[:, 44:] = (0, 0, 255)
  files = large([('jpg', encoded(flat, 'JPEG', quality=100, subsampling=0))])
  refused(files, tmp_path, r'masks/a\.jpg is lossy')


# ------------------------------------------------------- palettes and inversion


def quantized(*inks):
  """Bars of these colours on black, numbered by how often they are."""
  mask = np.zeros((*BIG, 3), np.uint8)
  for i, ink in enumerate(inks):
    mask[10:34, 8 + 18 * i : 24 + 18 * i] = ink
  return mask, Image.fromarray(mask).quantize(len(inks) + 1)


@pytest.mark.parametrize(
  'inks',
  [
    [(255, 0, 0)],
    [(250, 200, 10), (10, 20, 240)],
    [(9, 200, 9), (200, 9, 9), (250, 250, 9)],
  ],
)
def test_black_is_background_wherever_it_is_in_a_palette(
  tmp_path, inks, caplog
):
  mask, picture = quantized(*inks)
  order = [3, 1, 0, 2][: len(inks) + 1] if len(inks) > 2 else [1, 0, 2]
  picture = picture.remap_palette(order[: len(inks) + 1])
  if tuple(picture.getpalette()[:3]) == (0, 0, 0):
    picture = picture.remap_palette([1, 0, *range(2, len(inks) + 1)])
  files = large([('png', encoded(picture))])
  classes, labels = labels_of(files, tmp_path)
  assert len(classes) == len(inks)
  np.testing.assert_array_equal(labels['a'] == 0, ~mask.any(-1))
  assert any('black is not index 0' in x for x in warnings(caplog))


def test_a_palette_without_black(tmp_path):
  white, red, blue = (255, 255, 255), (200, 0, 0), (0, 0, 200)
  files = tree([indexed([1, 2], [white, red, blue])])
  refused(files, tmp_path / '1', r'index 0 is \(255, 255, 255\)')
  for i, (names, classes) in enumerate(
    [
      ('background\nx\ny', ('x', 'y')),
      ('0 background\n1 x\n2 y', ('x', 'y')),
      ('0 sky\n1 x\n2 y', ('sky', 'x', 'y')),
      ('255 255 255 background\n200 0 0 x\n0 0 200 y', ('x', 'y')),
    ]
  ):
    files['classes.txt'] = names.encode()
    found, _, labels = decided(files, tmp_path / f'_{i}')
    assert found == classes
    assert labels['a'][0, 0] == ('sky' in names)


def white_is_zero(mask):
  """A TIFF as ImageJ writes an image with an inverted table."""
  buffer = io.BytesIO()
  Image.fromarray(mask).save(buffer, 'TIFF')
  contents = bytearray(buffer.getvalue())
  entry = contents.index(b'\x06\x01\x03\x00')  # 262, a short
  contents[entry + 8] = 0
  return bytes(contents)


def inverted_ramp(mask):
  picture = Image.frombytes('P', mask.shape[::-1], mask.tobytes())
  picture.putpalette([x for i in range(255, -1, -1) for x in (i, i, i)])
  return encoded(picture)


@pytest.mark.parametrize(
  ('suffix', 'write'), [('tif', white_is_zero), ('png', inverted_ramp)]
)
def test_inverted_tables_have_to_be_said(tmp_path, suffix, write):
  files = large([(suffix, write(blob()))])
  message = refused(files, tmp_path / '1', 'has an inverted table')
  assert '`255 255 255 background`' in message
  # A viewer shows black objects on white.
  files['classes.txt'] = b'255 255 255 background\n0 0 0 nucleus'
  classes, labels = labels_of(files, tmp_path / '2')
  assert classes == ('nucleus',)
  np.testing.assert_array_equal(labels['a'], blob(1))
  files['classes.txt'] = b'0 0 0 background'
  _, labels = labels_of(files, tmp_path / '3')
  np.testing.assert_array_equal(labels['a'], 1 - blob(1))


def test_black_objects_on_white(tmp_path):
  raw = put(large([('png', encoded(255 - blob()))]), tmp_path / 'raw')
  manifest, _ = folder.prepare(raw, tmp_path / 'data', name='mine')
  said = [x for x in notes.notes(manifest) if 'inverted' in x]
  assert said[0].startswith('foreground covers 75 % of all pixels')
  assert '--meaning' in said[0]


@pytest.mark.parametrize(
  ('lines', 'classes'),
  [
    ('0 nucleus\n255 background', ('nucleus',)),
    ('255 background', ('foreground',)),
    ('0 0 0 nucleus\n255 255 255 background', ('nucleus',)),
    ('255 255 255 background', ('foreground',)),
  ],
)
def test_white_may_be_background(tmp_path, lines, classes):
  files = large([('png', encoded(255 - blob()))], classes=lines)
  found, labels = labels_of(files, tmp_path)
  assert found == classes
  np.testing.assert_array_equal(labels['a'], blob(1))


# -------------------------------------------------------------- what is unsaid


@pytest.mark.parametrize(
  ('unlabelled', 'kind'),
  [(-1, np.int32), (65535, np.uint16), (-1, np.float32)],
)
def test_minus_one(tmp_path, unlabelled, kind):
  mask = drawn([1, 2]).astype(kind)
  mask[0] = unlabelled
  files = {k: v for k, v in tree([b'']).items() if k.startswith('images')}
  files |= {f'masks/{i}.tif': encoded(mask, 'TIFF') for i in IDS}
  refused(
    files, tmp_path / '1', rf'masks hold {unlabelled} .*{unlabelled} void'
  )
  files['classes.txt'] = f'{unlabelled} void\n1 x\n2 y'.encode()
  classes, _, labels = decided(files, tmp_path / '2')
  assert classes == ('x', 'y')
  assert set(labels['a'][0]) == {255}
  np.testing.assert_array_equal(labels['a'][1:], drawn([1, 2])[1:])


# ------------------------------------------------- what is said of the meaning


def test_meaning_is_told_and_may_be_given(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  files = tree([grey([1, 2, 255])], classes='cat\ndog\n')
  raw = put(files, tmp_path / 'raw')
  said = tmp_path / 'said.txt'
  said.write_text('1 tree\n2 void\n')
  manifest, _ = folder.prepare(raw, tmp_path / 'd', name='one')
  assert manifest['meaning'] == ['0 background', '1 cat', '2 dog', '255 void']
  manifest, _ = folder.prepare(raw, tmp_path / 'd', name='two', meaning=said)
  assert manifest['classes'] == ['tree']
  assert manifest['meaning'] == [
    '0 background', '1 tree', '2 void', '255 void',
  ]  # fmt: skip
  assert f'{said} is given' in caplog.text
  said.write_text('1 bush\n2 void\n')
  with pytest.raises(ValueError, match=r'with meaning 1 tree \| 2 void, not 1'):
    folder.prepare(raw, tmp_path / 'd', name='two', meaning=said)
  with pytest.raises(ValueError, match='does not exist'):
    folder.prepare(raw, tmp_path / 'e', name='x', meaning=tmp_path / 'gone')


def test_meaning_in_words():
  word = mask_meaning.Coding('colour', 1, ('sea',), {0: 0, 250: 1, 9: 255})
  assert word.meaning == (
    '(0, 0, 0) background', '(0, 0, 250) sea', '(0, 0, 9) void',
  )  # fmt: skip
  soft = mask_meaning.Coding('grey', 1, ('x',), None, threshold=50)
  assert soft.meaning == ('less than 50 background', 'the rest x')


def test_notes_of_classes(tmp_path):
  """One that is nearly everywhere, one in one image, void over all."""
  most = np.full(SIZE, 1)
  most[0, :3] = 0
  void = np.full(SIZE, 255)
  void[0] = 1
  once = most.copy()
  once[5:9, 5:9] = 2
  files = tree([encoded(x.astype(np.uint8)) for x in (once, most)])
  raw = put(files, tmp_path / '1')
  manifest, _ = folder.prepare(raw, tmp_path / 'd', name='most')
  said = list(notes.notes(manifest))
  assert said[0].startswith('class1 covers 97 % of all pixels')
  assert 'class2 occurs in one image, a' in said
  raw = put(tree([encoded(void.astype(np.uint8))]), tmp_path / '2')
  manifest, _ = folder.prepare(raw, tmp_path / 'd', name='void')
  assert any(x.startswith('void covers 92 %') for x in notes.notes(manifest))


def test_what_parts_two_labels():
  label = np.zeros((40, 40), np.uint8)
  label[5:25, 5:25] = 3
  label[7:23, 7:23] = 9  # a rim of two pixels
  label[30:34, 2:10] = 4
  found = builder._edges(label, (3, 4, 9))
  assert found[3] == (label == 3).sum()
  assert found[4] == 0
  assert found[9] == 0  # it touches one
  label[label == 9] = 255  # void is no label
  assert builder._edges(label, (3, 4)) == {3: 0, 4: 0}


def test_strips_change_nothing(monkeypatch):
  """Large masks are looked at in parts."""
  random = np.random.RandomState(0)
  label = random.randint(0, 5, (70, 50)).astype(np.uint8)
  before = builder._edges(label, range(1, 5))
  mask = mask_meaning.Mask('grey', label * np.uint8(40))
  counted = mask_meaning._count(mask.values)
  before_too = mask_meaning._between(mask, *counted)

  monkeypatch.setattr('distillfss_jax.data.borders._PART', 300)
  monkeypatch.setattr('distillfss_jax.data.download._STRIP', 300)
  assert builder._edges(label, range(1, 5)) == before
  after = mask_meaning._between(mask, *counted)
  assert sum(after[0]) > 100
  for one, other in zip(before_too, after, strict=True):
    np.testing.assert_array_equal(one, other)
  for one, other in zip(mask_meaning._count(mask.values), counted, strict=True):
    np.testing.assert_array_equal(one, other)


def test_colour_masks_may_name_black(tmp_path):
  lines = '0 0 0 sky\n200 10 10 roof'
  classes, _, labels = decided(
    tree([colour([(200, 10, 10)])], classes=lines), tmp_path
  )
  assert classes == ('sky', 'roof')
  np.testing.assert_array_equal(labels['a'], drawn([1]) + 1)
