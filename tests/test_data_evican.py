"""Preparing and loading EVICAN from trees with two COCO files."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from distillfss_jax import datasets
from distillfss_jax.data import download
from distillfss_jax.datasets import evican

SIZE = (24, 32)
LIST = 'annotations_EVICAN2/instances_{}2019_EVICAN2.json'
COUNTS = {'train': 12, 'val': 5}


def encode(array, form='JPEG'):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, form)
  return buffer.getvalue()


def box(top, bottom, left, right):
  """The polygon that covers these rows and columns, ends left out."""
  return [left, top, right, top, right, bottom, left, bottom]


def filled(*boxes):
  """Paints (top, bottom, left, right, label) one over the other."""
  label = np.zeros(SIZE, np.uint8)
  for top, bottom, left, right, value in boxes:
    label[top:bottom, left:right] = value
  return label


def boxes(i):
  """Cells and nuclei of image i, in the order of their annotations."""
  return [
    (2, 12, 2 + i % 7, 14, 1),
    (5, 9, 6, 10 + i % 3, 2),
    (14, 22, 16, 30, 1),
    (16, 20, 18, 24, 2),
  ]


def file_name(part, i):
  return f'{i + 1}_{"ACHN" if part == "train" else "HeLa"}.jpg'


def pixels(part, i):
  return np.random.RandomState(100 * (part == 'val') + i).randint(
    0, 256, SIZE, np.uint8
  )


def listed(part):
  """What a COCO file says; ids of images and categories are the file's own."""
  cell, nucleus = (1, 2) if part == 'train' else (7, 3)
  images = [
    {
      'id': 50 - i,
      'file_name': file_name(part, i),
      'height': SIZE[0],
      'width': SIZE[1],
    }
    for i in range(COUNTS[part])
  ]
  annotations = [
    {
      'id': 10 * i + k,
      'image_id': 50 - i,
      'category_id': (cell, nucleus)[label - 1],
      'segmentation': [box(*ends)],
      'iscrowd': 0,
    }
    for i in range(COUNTS[part])
    for k, (*ends, label) in enumerate(boxes(i))
  ]
  # One names its categories the other way round, and in small letters.
  categories = [
    {'id': cell, 'name': 'Cell'},
    {'id': nucleus, 'name': 'Nucleus'},
  ]
  if part == 'val':
    categories = [
      {'id': x['id'], 'name': x['name'].lower()} for x in reversed(categories)
    ]
  return {
    'images': images,
    'annotations': annotations,
    'categories': categories,
  }


def tree():
  """Files {name: bytes}, with the owners' evaluation images, passed over."""
  files = {
    'Images/eval/1_PC3.jpg': b'not read',
    LIST.format('eval').replace('2019_', '2019_easy_'): b'not read',
  }
  for part, count in COUNTS.items():
    files[LIST.format(part)] = json.dumps(listed(part)).encode()
    for i in range(count):
      files[f'Images/{part}/{file_name(part, i)}'] = encode(pixels(part, i))
  return files


def changed(change, part='train'):
  """The tree with another list of a part."""
  said = listed(part)
  change(said)
  return {**tree(), LIST.format(part): json.dumps(said).encode()}


@pytest.mark.parametrize('top', ['', 'EVICAN/', 'x/y/'])
def test_prepare_and_load(tmp_path, top):
  pytest.importorskip('pycocotools')
  files = tree()
  raw = pack(files, tmp_path / 'x.zip', top)
  manifest, new = evican.prepare(raw, tmp_path / 'data')
  assert new
  assert not manifest['skipped']
  made = datasets.load('evican', data_dir=tmp_path / 'data')
  assert (made.name, made.classes) == ('evican', ('Cell', 'Nucleus'))
  assert len(set(made.palette)) == 3
  for part, source in (('train', made.train), ('val', made.test)):
    count = COUNTS[part]
    assert list(source.ids) == [
      f'{part}/{file_name(part, i)}' for i in range(count)
    ]
    source = pickle.loads(pickle.dumps(source))
    assert source.present.all()
    for i, record in enumerate(source):
      contents = files[f'Images/{record["id"]}']
      assert source.sizes[i].tolist() == list(SIZE)
      np.testing.assert_array_equal(
        record['image'], download.decode(contents, '', 'RGB')
      )
      np.testing.assert_array_equal(record['label'], filled(*boxes(i)))


def test_folders_as_the_owners_call_them(tmp_path):
  pytest.importorskip('pycocotools')
  files = {
    x.replace('/train/', '/EVICAN_train2019/').replace(
      '/val/', '/EVICAN_val2019/'
    ): y
    for x, y in tree().items()
  }
  manifest, _ = evican.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  assert len(manifest['records']) == 17
  assert manifest['records'][0]['id'] == 'train/1_ACHN.jpg'


def test_files_are_kept_unless_they_are_of_another_form(tmp_path):
  pytest.importorskip('pycocotools')
  files = changed(lambda x: x['images'][1].update(file_name='a.tif'))
  del files[f'Images/train/{file_name("train", 1)}']
  files['Images/train/a.tif'] = encode(pixels('train', 1), 'TIFF')
  raw = put(files, tmp_path / 'raw')
  with download.Files(raw, '') as opened:
    layout = evican.Layout(opened)
    first, second = layout.ids[:2]
    assert layout.encoded(first) == files[f'Images/{first}']
    assert layout.encoded(second).startswith(b'\x89PNG')
  evican.prepare(raw, tmp_path / 'data')
  image = evican.load(tmp_path / 'data').train[1]['image']
  np.testing.assert_array_equal(image[..., 2], pixels('train', 1))


def painted(tmp_path, annotations):
  """The label of the first image where the list has these for it."""
  files = changed(
    lambda x: x.update(
      annotations=[
        {'id': k, 'image_id': 50, 'category_id': 1, **one}
        for k, one in enumerate(annotations)
      ]
    )
  )
  with download.Files(put(files, tmp_path / 'raw'), '') as opened:
    layout = evican.Layout(opened)
    assert not layout.label(layout.ids[1], SIZE).any()
    return layout.label(layout.ids[0], SIZE)


def test_later_over_earlier_and_no_crowds(tmp_path):
  pytest.importorskip('pycocotools')
  label = painted(
    tmp_path,
    [
      {'segmentation': [box(4, 8, 4, 8)], 'category_id': 2},
      {'segmentation': [box(2, 6, 2, 6), box(20, 22, 20, 23)]},
      {'segmentation': [box(0, 24, 0, 32)], 'iscrowd': 1},
    ],
  )
  wanted = filled((4, 8, 4, 8, 2), (2, 6, 2, 6, 1), (20, 22, 20, 23, 1))
  np.testing.assert_array_equal(label, wanted)


@pytest.mark.parametrize(
  ('polygons', 'pixel'),
  [
    ([[5.7, 3.2] * 3], (3, 5)),  # nothing inside
    ([[5.7, 3.2, 9.0, 3.4]], (3, 5)),  # a line, no box
    ([[5.7, 3.2]], (3, 5)),
    ([[40.0, -3.0] * 3, [8.0, 9.0] * 3], (0, 31)),  # outside: the nearest
  ],
)
def test_an_empty_polygon_is_a_pixel(tmp_path, polygons, pixel):
  pytest.importorskip('pycocotools')
  label = painted(tmp_path, [{'segmentation': polygons, 'category_id': 2}])
  assert np.argwhere(label).tolist() == [list(pixel)]
  assert label[pixel] == 2


def test_rle(tmp_path):
  painter = pytest.importorskip('pycocotools.mask')
  first, second = filled((1, 5, 3, 9, 1)), filled((9, 12, 0, 4, 1))
  packed = painter.encode(np.asfortranarray(first))
  counts = [9, 3, 21, 3, 21, 3, 21, 3, 24 * 32 - 84]  # by columns
  label = painted(
    tmp_path,
    [
      {
        'segmentation': {
          'size': list(SIZE),
          'counts': packed['counts'].decode(),
        }
      },
      {'segmentation': {'size': list(SIZE), 'counts': counts}},
    ],
  )
  np.testing.assert_array_equal(label, first | second)


def test_twice_returns_at_once(tmp_path, monkeypatch):
  pytest.importorskip('pycocotools')
  raw = pack(tree(), tmp_path / 'x.zip')
  first, new = evican.prepare(raw, tmp_path / 'd')
  assert new
  # Only preparing needs pycocotools.
  monkeypatch.setitem(sys.modules, 'pycocotools', None)
  assert evican.prepare('gone.zip', tmp_path / 'd') == (first, False)
  assert len(evican.load(tmp_path / 'd').train) == 12


def test_without_pycocotools(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pycocotools', None)
  raw = put(tree(), tmp_path / 'raw')
  with pytest.raises(ValueError, match='pip install pycocotools') as caught:
    evican.prepare(raw, tmp_path / 'data')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()


def test_bad_files_are_named_and_left_out(tmp_path):
  pytest.importorskip('pycocotools')

  def change(said):
    def form(i, value):
      said['annotations'][4 * i]['segmentation'] = value

    said['images'][2]['width'] = 99
    form(3, [])
    form(4, [[1.0, 2.0, 3.0]])
    form(5, {'size': [5, 5], 'counts': [25]})
    form(6, {'size': list(SIZE), 'counts': [25]})
    form(7, None)

  files = changed(change)
  del files['Images/train/1_ACHN.jpg']
  files['Images/train/2_ACHN.jpg'] = b'no picture'
  raw = pack(files, tmp_path / 'x.zip', 'EVICAN/')
  with pytest.raises(ValueError, match='8 of 17 images') as caught:
    evican.prepare(raw, tmp_path / 'data')
  message = str(caught.value)
  assert '\n' not in message
  source = f'EVICAN/{LIST.format("train")}'
  for part in (
    f'EVICAN/Images/train/1_ACHN.jpg: is missing, {source} has it',
    'train/2_ACHN.jpg: cannot be decoded',
    f'train/3_ACHN.jpg: {source} says 99x24, the image is 32x24',
    f'4_ACHN.jpg: annotation 30 of {source} cannot be decoded (it has no',
    f'5_ACHN.jpg: annotation 40 of {source} cannot be decoded (it has no',
    f'6_ACHN.jpg: annotation 50 of {source} cannot be decoded (its ',
    f'7_ACHN.jpg: annotation 60 of {source} cannot be decoded (its ',
    f'8_ACHN.jpg: annotation 70 of {source} cannot be decoded',
    '--skip_bad',
  ):
    assert part in message
  manifest, _ = evican.prepare(raw, tmp_path / 'data', skip_bad=True)
  assert set(manifest['skipped']) == {
    f'train/{i}_ACHN.jpg' for i in range(1, 9)
  }


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda x: x.pop('annotations'), 'is no COCO file of instances .KeyError'),
    (lambda x: x['images'][0].pop('width'), 'is no COCO file of instances'),
    (
      lambda x: x['categories'][0].update(name='ACHN_cell'),
      "category 'ACHN_cell' is not one of .'Cell', 'Nucleus'",
    ),
    (lambda x: x['categories'].pop(), 'category 2, of which one is not listed'),
    (lambda x: x['images'].pop(), 'names image 39 and category'),
    (lambda x: x['images'][1].update(id=50), 'gives one id to several'),
    (
      lambda x: x['images'][1].update(file_name='1_ACHN.jpg'),
      "lists '1_ACHN.jpg' twice",
    ),
  ],
)
def test_wrong_list(tmp_path, change, message):
  pytest.importorskip('pycocotools')
  raw = pack(changed(change), tmp_path / 'x.zip')
  with pytest.raises(ValueError, match=message) as caught:
    evican.prepare(raw, tmp_path / 'data')
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()


def test_paths_out_of_the_download_are_not_followed(tmp_path):
  pytest.importorskip('pycocotools')
  files = changed(lambda x: x['images'][0].update(file_name='../../../x.jpg'))
  (tmp_path / 'x.jpg').write_bytes(encode(pixels('train', 0)))
  with pytest.raises(ValueError, match=r'x\.jpg: is missing'):
    evican.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')


@pytest.mark.parametrize(
  'lacking', ['Images/val/', LIST.format('train'), LIST.format('val')]
)
def test_something_is_missing(tmp_path, lacking):
  files = {x: y for x, y in tree().items() if not x.startswith(lacking)}
  raw = pack(files, tmp_path / 'x.zip', 'EVICAN/')
  with pytest.raises(ValueError, match=f'has no {lacking} ') as caught:
    evican.prepare(raw, tmp_path / 'data')
  assert '10.17617/3.AJBV1S' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_wrong_layout_and_split(tmp_path):
  (tmp_path / 'empty').mkdir()
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'empty', 'has no annotations_EVICAN2'),
    (tmp_path / 'nowhere', 'does not exist'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      evican.prepare(raw, tmp_path / 'data')
    assert '10.17617/3.AJBV1S' in str(caught.value)
  with pytest.raises(FileNotFoundError, match='--dataset evican'):
    evican.load(tmp_path)
  with pytest.raises(ValueError, match="'odd' is not one of"):
    evican.prepare(tmp_path, tmp_path / 'data', split='odd')


def test_raw_is_never_written_into(tmp_path):
  pytest.importorskip('pycocotools')
  raw = put(tree(), tmp_path / 'EVICAN')
  with pytest.raises(ValueError, match='inside the raw folder'):
    evican.prepare(raw, raw / 'prepared')
