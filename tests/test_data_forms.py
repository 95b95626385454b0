"""Outlines of COCO, LabelMe and YOLO: what is painted, and what is refused."""

import base64
import json
import logging

import numpy as np
import pytest
from test_data_folder import (
  SIZE,
  coco,
  decided,
  encoded,
  grey,
  made,
  photo,
  refused,
  tree,
  warnings,
  with_json,
)
from trees import put

from distillfss_jax.data import forms, masks, notes
from distillfss_jax.datasets import folder

BOX = [1, 2, 9, 2, 9, 6, 1, 6]


def boxed():
  mask = np.zeros(SIZE, np.uint8)
  mask[2:6, 1:9] = 1
  return mask


# ------------------------------------------------------------------------ COCO


@pytest.fixture
def painter():
  pytest.importorskip('pycocotools')
  return masks.Painter('x')


def test_run_lengths_are_those_of_pycocotools(painter):
  library = pytest.importorskip('pycocotools.mask')
  random = np.random.RandomState(0)
  for height, width in ((1, 1), (7, 30), (40, 9), (300, 200)):
    for share in (0, 0.02, 0.5, 1):
      mask = (random.rand(height, width) < share).astype(np.uint8)
      packed = library.encode(np.asfortranarray(mask))
      for counts in (packed['counts'], packed['counts'].decode()):
        form = {'size': [height, width], 'counts': counts}
        found = painter.paint(form, (height, width))
        np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize(
  ('form', 'message'),
  [
    ([[1e9, 2, 9, 2, 9, 6]], r'x = 1e\+09, far outside its image of 16x12'),
    ([[1, 2, 9, float('nan'), 9, 6]], 'y = nan, far outside'),
    ([[1, 2, -1e7, 2, 9, 6]], r'x = -1e\+07'),
    ([[1, 2, 9, float('inf'), 9, 6]], 'y = inf'),
    ([[1, 2, 3, 40, 9, 6]], 'y = 40'),
    ([[1, 2, 9, 2, 9, 10**400]], 'must be a list of numbers'),
    ([['1', 'two', 3, 4, 5, 6]], 'must be a list of numbers'),
    ([{'x': 1}], 'must be a list of numbers'),
    ([[1, 2, 3, 4]], 'three points'),
    ([[1, 2, 3, 4, 5, 6, 7]], 'three points'),
    ('text', 'no polygon and no run lengths'),
    (7, 'no polygon and no run lengths'),
    ({'counts': [192]}, 'need size and counts'),
    ({'size': 9, 'counts': [192]}, 'its size is 9'),
    ({'size': [12, 17], 'counts': [204]}, 'not .12, 16.'),
    ({'size': [12, 16], 'counts': [-8, 200]}, 'no list of run lengths'),
    ({'size': [12, 16], 'counts': [1.5, 190.5]}, 'no list of run lengths'),
    ({'size': [12, 16], 'counts': [10**30]}, 'another number of pixels'),
    ({'size': [12, 16], 'counts': 7}, 'no list of run lengths'),
    ({'size': [12, 16], 'counts': 'zz~~'}, 'counts'),
    ({'size': [12, 16], 'counts': 'oooooooooooo'}, 'counts'),
    ({'size': [12, 16], 'counts': 'P'}, 'counts'),
    ({'size': [12, 16], 'counts': '\u20ac'}, 'no text of run lengths'),
  ],
)
def test_what_would_end_the_process_is_refused(painter, form, message):
  with pytest.raises(ValueError, match=message):
    painter.paint(form, SIZE)


def test_outlines_may_reach_a_little_outside(painter):
  found = painter.paint([[-5, -5, 20, -5, 20, 6, -5, 6]], SIZE)
  assert found[:6].all()
  assert not found[6:].any()


def test_objects_of_a_brush_are_painted(tmp_path, caplog):
  """Label tools write whatever was drawn with a brush as a crowd."""
  caplog.set_level(logging.INFO)
  files, content = coco()
  for one in content['annotations']:
    one['iscrowd'] = 1
  classes, _, labels = decided(with_json(files, content), tmp_path)
  assert classes == ('cat', 'dog')
  assert set(labels['b'][:, 0]) == {1}
  assert labels['b'][3, 5] == 2
  assert '4 annotations are crowds' in caplog.text


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda j: j['images'][1].update(id=7), r'7 \(a.png and images/b.png\)'),
    (
      lambda j: j['images'].append({'id': 9, 'file_name': 'gone too.png'}),
      r'image id to several: 9 \(c.png and gone too.png\)',
    ),
    (lambda j: j['categories'][2].update(id=5), r'5 \(dog and root\)'),
    (
      lambda j: j['categories'].append({'id': 3, 'name': 'bird'}),
      r'category id to several: 3 \(cat and bird\)',
    ),
    (lambda j: j['categories'][0].update(id='5'), 'TypeError'),
    (lambda j: j['images'][0].update(id={'of': 1}), r"\{'of': 1\} is no id"),
    (lambda j: j['images'][0].update(id=None), 'None is no id'),
    (lambda j: j['images'][0].update(file_name=['a']), r"\['a'\] is no name"),
    (lambda j: j['categories'][0].update(name=None), 'None is no name'),
    (lambda j: j['annotations'][0].update(image_id=[1]), r'\[1\] is no id'),
    (lambda j: j['annotations'][0].update(category_id=1.5), '1.5 is no id'),
    (lambda j: j['annotations'].append(7), 'TypeError'),
    (lambda j: j.update(images={'a': 1}), 'TypeError'),
    (lambda j: j.update(categories=[{'id': 1}]), 'KeyError'),
  ],
)
def test_lists_that_are_not_as_coco_says(tmp_path, change, message):
  pytest.importorskip('pycocotools')
  files, content = coco()
  change(content)
  refused(with_json(files, content), tmp_path, message)


def test_ids_may_be_whole_numbers_of_any_kind(tmp_path):
  pytest.importorskip('pycocotools')
  files, content = coco()
  content['annotations'][0]['image_id'] = 7.0
  content['categories'].append({'id': 5, 'name': 'dog'})  # as it was
  assert decided(with_json(files, content), tmp_path)[0] == ('cat', 'dog')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (b'[' * 100_000 + b']' * 100_000, 'nested too deep'),
    (b'{"images": ' * 20_000 + b'1' + b'}' * 20_000, 'nested too deep'),
    (b'[]', 'TypeError'),
    (b'7', 'TypeError'),
    (b'{"images": [{"id": 1, "file_name": "\\ud800.png"}]}', 'half a char'),
    (b'{"images": "\xff\xfe"}', 'is not COCO'),
    (b'\xed\xa0\x80', 'is not COCO'),
  ],
)
def test_json_that_cannot_be_read(tmp_path, text, message):
  pytest.importorskip('pycocotools')
  files, _ = coco()
  refused(files | {'annotations.json': text}, tmp_path, message)


def test_whole_characters_are_read(tmp_path):
  pytest.importorskip('pycocotools')
  files, content = coco()
  content['categories'][0]['name'] = '\U0001f415'
  assert decided(with_json(files, content), tmp_path)[0][1] == '\U0001f415'


def test_one_bad_object_makes_its_box_void(tmp_path):
  """With --skip_bad; without a box its image is left out."""
  pytest.importorskip('pycocotools')
  files, content = coco()
  files['images/d.png'] = encoded(photo(9))
  content['images'].append({'id': 4, 'file_name': 'd.png'})
  content['annotations'] += [
    {'id': 8, 'image_id': 7, 'category_id': 5, 'bbox': [10, 1, 3.5, 4],
     'segmentation': [[1, 2, 3, 4]]},
    {'id': 9, 'image_id': 9, 'category_id': 5, 'bbox': [10, 1, 0, 4],
     'segmentation': [[1e9, 2, 3, 4, 5, 6]]},
    {'id': 9, 'image_id': 4, 'category_id': 5, 'segmentation': [BOX]},
  ]  # fmt: skip
  message = refused(with_json(files, content), tmp_path / '1', '2 of 4 images')
  assert 'annotation 8' in message
  raw = put(with_json(files, content), tmp_path / '2')
  manifest, _ = folder.prepare(raw, tmp_path / 'd', name='mine', skip_bad=True)
  assert list(manifest['skipped']) == ['c']
  assert list(manifest['voided']) == ['a']
  label = {
    x['id']: x['label'] for part in _parts(tmp_path / 'd') for x in part
  }['a']
  assert (label[1:5, 10:14] == 255).all()
  assert (label == 255).sum() == 16
  assert (label[2:6, 1:9] == 2).all()
  said = [x for x in notes.notes(manifest) if 'boxes are void' in x]
  assert said[0].startswith('a: 1 objects cannot be painted')


def _parts(data_dir):
  dataset = folder.load(data_dir, 'mine')
  return dataset.train, dataset.test


@pytest.mark.parametrize(
  ('image', 'listed'),
  [
    ('scan_jpg.rf.0a1b2c3d.jpg', 'scan_jpg.rf.0a1b2c3d.jpg'),
    ('scan.jpg', 'scan_jpg.rf.0a1b2c3d4e5f.jpg'),
    ('scan.jpg', 'task 7/day 1/scan.jpg'),
    ('scan.jpg', '..\\media\\upload\\scan.jpg'),
    ('e\u0301.jpg', '\u00e9.jpg'),
  ],
)
@pytest.mark.parametrize(
  'name',
  [
    'annotations.json', '_annotations.coco.json', 'instances_default.json',
    'annotations/instances_default.json', 'my export.json',
  ],
)  # fmt: skip
def test_names_of_label_tools(tmp_path, image, listed, name):
  pytest.importorskip('pycocotools')
  content = {
    'images': [{'id': 1, 'file_name': listed}, {'id': 2, 'file_name': 'b.png'}],
    'annotations': [
      {'id': i, 'image_id': i, 'category_id': 1, 'segmentation': [BOX]}
      for i in (1, 2)
    ],
    'categories': [{'id': 1, 'name': 'cell'}],
  }
  files = {
    f'images/{image}': encoded(photo(0), 'JPEG'),
    'images/b.png': encoded(photo(1)),
    name: json.dumps(content).encode(),
  }
  _, _, labels = decided(files, tmp_path)
  assert len(labels) == 2
  for label in labels.values():
    np.testing.assert_array_equal(label, boxed())


def test_images_beside_their_list(tmp_path):
  """A part of what Roboflow exports is a folder of both."""
  pytest.importorskip('pycocotools')
  files, content = coco()
  files = {f'train/{k.removeprefix("images/")}': v for k, v in files.items()}
  files['train/_annotations.coco.json'] = json.dumps(content).encode()
  assert sorted(decided(files, tmp_path)[2]) == ['a', 'b', 'c']


# --------------------------------------------------------------------- LabelMe


def shape(label, points, kind='polygon', **more):
  return {'label': label, 'points': points, 'shape_type': kind, **more}


def labelme(*shapes, **more):
  said = {'version': '5.4', 'shapes': list(shapes), 'imageData': 'eA=='}
  size = {'imageHeight': SIZE[0], 'imageWidth': SIZE[1]}
  return json.dumps({**said, **size, **more}).encode()


def with_labelme(texts, place='images'):
  files = {}
  for i, text in enumerate(texts):
    files[f'images/{"abc"[i]}.png'] = encoded(photo(i))
    files[f'{place}/{"abc"[i]}.json'] = text
  return files


@pytest.mark.parametrize('place', ['images', 'labels', 'annotations', ''])
def test_labelme(tmp_path, place):
  stamp = base64.b64encode(encoded(np.full((2, 3), 1, np.uint8))).decode()
  texts = [
    labelme(
      shape('dog', [[1, 2], [8, 2], [8, 5], [1, 5]]),
      shape('cat', [[2, 3], [4, 4]], 'rectangle'),
      shape('__ignore__', [[12, 8], [14, 10]], 'rectangle'),
    ),
    labelme(shape('cat', [[8, 6], [8, 9]], 'circle')),
    labelme(
      shape('dog', [[0, 0], [15, 11]], 'rectangle'),
      shape('_background_', [[4, 4], [6, 5]], 'mask', mask=stamp),
    ),
  ]
  files = with_labelme(texts, place or 'x')
  if not place:  # all in one folder
    files = {k.split('/')[1]: v for k, v in files.items()}
  classes, palette, labels = decided(files, tmp_path)
  assert (classes, len(palette)) == (('cat', 'dog'), 3)
  expected = np.zeros(SIZE, np.uint8)
  expected[2:6, 1:9] = 2
  expected[3:5, 2:5] = 1
  expected[8:11, 12:15] = 255
  np.testing.assert_array_equal(labels['a'], expected)
  rows, columns = np.indices(SIZE)
  far = np.hypot(rows - 6, columns - 8)
  assert labels['b'][far < 2.5].all()
  assert not labels['b'][far > 4.3].any()
  expected = np.full(SIZE, 2)
  expected[4:6, 4:7] = 0
  np.testing.assert_array_equal(labels['c'], expected)


def test_labelme_in_the_order_of_classes_txt(tmp_path):
  bar = [[1, 2], [8, 2], [8, 5]]
  files = with_labelme([labelme(shape('a', bar), shape('b', bar))] * 2)
  files['classes.txt'] = b'b\na\nc\n'
  assert decided(files, tmp_path / '1')[0] == ('b', 'a')
  files['classes.txt'] = b'b\nc\n'
  refused(files, tmp_path / '2', r'classes\.txt does not name a, which')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (labelme(shape('x', [[1, 2], [3, 4]], 'line')), 'a line of 2 points'),
    (labelme(shape('x', [[1, 2], [3, 4]])), 'three points'),
    (labelme(shape('x', [[1, 2], [3, 1e9], [4, 4]])), 'far outside'),
    (labelme(shape('x', 'abc')), r"a\.json: 'x': cannot be painted"),
    (labelme(shape('x', [[1, 1], [3, 3]], 'mask', mask='?')), r'in images/a'),
    (labelme(shape('x', [[14, 1], [3, 3]], 'mask',
      mask=base64.b64encode(grey([1])).decode())), 'lies outside'),
    (labelme(shape(7.5, [[1, 2]])), 'is not LabelMe'),
    (labelme(shape('x', [[1, 2]]), imageWidth=99), 'says 99x12'),
    (b'{}', r"a\.json: is not LabelMe \(KeyError: 'shapes'\)"),
    (b'{', 'is no JSON'),
    (b'[[' * 50_000, 'is no JSON'),
  ],
)  # fmt: skip
def test_labelme_that_cannot_be_painted(tmp_path, text, message):
  good = labelme(shape('y', [[1, 2], [8, 2], [8, 5]]))
  said = refused(with_labelme([text, good]), tmp_path / '1', message)
  assert '1 of 2 images' in said
  refused(with_labelme([text, text]), tmp_path / '2', '2 of 2 images')


# ------------------------------------------------------------------------ YOLO


def with_yolo(texts, place='labels', **more):
  files = {}
  for i, text in enumerate(texts):
    files[f'images/{"abc"[i]}.png'] = encoded(photo(i))
    files[f'{place}/{"abc"[i]}.txt'] = text.encode()
  return files | {k.replace('_', '.'): v.encode() for k, v in more.items()}


def outline(class_, box):
  top, left, bottom, right = box
  points = [left, top, right, top, right, bottom, left, bottom]
  height, width = SIZE
  parts = [x / (width, height)[i % 2] for i, x in enumerate(points)]
  return f'{class_} ' + ' '.join(f'{x:.6f}' for x in parts)


@pytest.mark.parametrize('place', ['labels', 'images'])
def test_yolo(tmp_path, place):
  texts = [
    outline(0, (2, 1, 5, 8)) + '\n' + outline(2, (8, 10, 10, 14)),
    outline(2, (0, 0, 11, 15)) + '\n\n',
    '',
  ]
  named = with_yolo(texts, place, data_yaml='names: [cat, tree, dog]\nnc: 3')
  classes, _, labels = decided(named, tmp_path / '1')
  assert classes == ('cat', 'dog')
  expected = np.zeros(SIZE, np.uint8)
  expected[2:6, 1:9] = 1
  expected[8:11, 10:15] = 2
  np.testing.assert_array_equal(labels['a'], expected)
  assert (labels['b'] == 2).all()
  assert not labels['c'].any()
  for i, more in enumerate(
    (
      {'data_yaml': 'names:\n  0: cat\n  1: tree\n  2: dog\n'},
      {'classes_txt': 'cat\ntree\ndog\n'},
    )
  ):
    files = with_yolo(texts, place, **more)
    assert decided(files, tmp_path / f'_{i}')[0] == ('cat', 'dog')
  assert decided(with_yolo(texts, place), tmp_path / '2')[0] == (
    'class0', 'class2',
  )  # fmt: skip


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (
      '0 0.5 0.5 0.2 0.2',
      r'labels/a\.txt:1: is no outline .five numbers are a',
    ),
    ('0 1 2 3 4 5 6', '0 to 1'),
    ('0 0.1 0.1 0.2 0.2 nan 0.3', '0 to 1'),
    ('\n0 0.1 0.1 0.2', r'a\.txt:2: .*three points'),
    ('cat 0.1 0.1 0.2 0.2 0.3 0.3', 'is no outline'),
    ('-1 0.1 0.1 0.2 0.2 0.3 0.3', 'needs a class'),
    ('0 0.1 0.1 0.2 0.2 0.3 0.3 0.9', 'three points or more'),
  ],
)
def test_yolo_that_cannot_be_painted(tmp_path, text, message):
  files = with_yolo([text, outline(0, (2, 1, 5, 8))])
  assert '1 of 2 images' in refused(files, tmp_path, message)


def test_yolo_as_a_whole(tmp_path):
  text = outline(3, (2, 1, 5, 8))
  files = with_yolo([text] * 3, data_yaml='names: [a, b]')
  refused(files, tmp_path / '1', 'has class 3, and 2 are named')
  for i, odd in enumerate(('names: 7', 'nothing', '[', '- ' * 9000)):
    files = with_yolo([text] * 3, data_yaml=odd)
    refused(files, tmp_path / f'_{i}', 'data.yaml: has no names')
  files = with_yolo([text] * 3)
  del files['labels/b.txt']
  refused(files, tmp_path / '2', 'needs an empty one')
  refused(with_yolo(['', '']), tmp_path / '3', '0 classes with annotations')


def test_masks_come_before_outlines(tmp_path, caplog):
  files = tree([grey([255])])
  files |= {'labels/a.txt': b'0 1', 'images/a.json': b'{}'}
  assert decided(files, tmp_path)[0] == ('foreground',)
  assert any('images/a.json' in x for x in warnings(caplog))


def test_ids_of_two(tmp_path):
  forms.refuse_twice('x', 'image', [(1, 'a'), (2, 'b'), (1, 'a')])
  with pytest.raises(ValueError, match=r'x gives one thing id .*: 2 \(b and c'):
    forms.refuse_twice('x', 'thing', [(1, 'a'), (2, 'b'), (2, 'c')])


def test_outlines_are_prepared(tmp_path):
  texts = [outline(0, (2, 1, 5, 8))] * 3
  dataset, records = made(with_yolo(texts), tmp_path)
  assert dataset.classes == ('class0',)
  np.testing.assert_array_equal(records['b']['label'], boxed())
