"""Preparing and loading COCO and COCO-20i from trees with JSON or PNG."""

import io
import json
import logging
import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from trees import pack, put

from configs import coco as config
from distillfss_jax import datasets
from distillfss_jax.data import support
from distillfss_jax.datasets import coco

# Of 1..90, these are no categories.
GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
CATEGORIES = [i for i in range(1, 91) if i not in GAPS]
FOLD = list(range(1, 81, 4))  # fold 0, interleaved
OTHERS = [i for i in range(1, 81) if i not in FOLD]
TRAIN, VAL = 'annotations/instances_train2014', 'annotations/instances_val2014'


def encode(array, form='PNG', **options):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, form, **options)
  return buffer.getvalue()


def polygon(box):
  top, left, bottom, right = box
  return [left, top, right, top, right, bottom, left, bottom]


def runs(mask):
  """Lengths of runs down the columns, of 0 first: the RLE of crowds."""
  flat = mask.T.ravel()
  ends = np.flatnonzero(np.diff(flat)) + 1
  made = np.diff([0, *ends, flat.size]).tolist()
  return [0, *made] if flat[0] else made


def compressed(counts):
  """The text form of runs: 5 bits a letter, differences from the third on."""
  text = ''
  for i, x in enumerate(counts):
    x -= counts[i - 2] if i > 2 else 0
    while True:
      low, x = x & 31, x >> 5
      last = x == (-1 if low & 16 else 0)
      text += chr(48 + low + (0 if last else 32))
      if last:
        break
  return text


def annotation(k, label, box, size, form):
  mask = np.zeros(size, int)
  mask[box[0] : box[2], box[1] : box[3]] = 1
  shape = {
    'polygon': lambda: [[float(x) for x in polygon(box)]],
    'rle': lambda: {'counts': runs(mask), 'size': list(size)},
    'text': lambda: {'counts': compressed(runs(mask)), 'size': list(size)},
  }[form]()
  return {
    'id': 1000 + k,
    'category_id': CATEGORIES[label - 1],
    'segmentation': shape,
    'iscrowd': int(form != 'polygon'),
    'area': 12.0,
    'bbox': [1.0, 2.0, 3.0, 4.0],
  }


def records(count, seed):
  """(JPEG, size, [(label, box, form)]) of images, three classes in each."""
  random = np.random.RandomState(seed)
  for k in range(count):
    size = (32 + k % 9, 40 + k % 5)
    shape = size if k % 10 == 4 else (*size, 3)  # some JPEGs are grey
    image = random.randint(0, 256, shape).astype(np.uint8)
    boxes = [
      (FOLD[k % 20], (2, 3, 14, 20)),
      (OTHERS[k % 60], (10, 15, 24, 30)),  # overlaps the first
      (FOLD[(k + 7) % 20], (25, 1, 31, 38)),
    ]
    forms = [('polygon', 'polygon', 'rle'), ('polygon', 'text', 'polygon')]
    rows = [
      (*x, form) for x, form in zip(boxes, forms[k % 4 == 3], strict=True)
    ]
    yield encode(image, 'JPEG', quality=30), size, rows


def tree(form='json', counts=(60, 20), year='2014'):
  """Files {path: bytes}: every class in three images or more of train."""
  return parts(form, counts, year)[0]


def parts(form='json', counts=(60, 20), year='2014'):
  """Files {path: bytes}, and (image, label, split) by id."""
  files, made = {}, {}
  for seed, (split, name) in enumerate((('train', 'train'), ('test', 'val'))):
    folder, listed, painted = f'{name}{year}', [], []
    for k, (jpeg, size, rows) in enumerate(records(counts[seed], seed)):
      number = 7 * k + 9
      stem = f'COCO_{folder}_{number:012d}'
      files[f'{folder}/{stem}.jpg'] = jpeg
      listed.append(
        {
          'license': 3,
          'file_name': f'{stem}.jpg',
          'height': size[0],
          'width': size[1],
          'id': number,
        }
      )
      label = np.zeros(size, np.uint8)
      for n, (value, box, shape) in enumerate(rows):
        painted.append(
          {
            **annotation(3 * k + n, value, box, size, shape),
            'image_id': number,
          }
        )
        inside = label[box[0] : box[2], box[1] : box[3]]
        inside[inside == 0] = value
      if form == 'png':
        label[0] = 255
        files[f'annotations/{folder}/{stem}.png'] = indexed(label, k)
      image = np.asarray(Image.open(io.BytesIO(jpeg)).convert('RGB'))
      made[stem] = image, label, split
    # One has no annotation at all.
    files[f'{folder}/COCO_{folder}_000000000001.jpg'] = jpeg
    blank = {**listed[-1], 'id': 1}
    blank['file_name'] = f'COCO_{folder}_000000000001.jpg'
    said = {
      'info': {'year': int(year)},
      'licenses': [{'id': 3}],
      'images': [*listed, blank],
      'annotations': painted,
      'categories': [
        {'id': i, 'name': name, 'supercategory': 'x'}
        for i, name in zip(CATEGORIES, coco.Coco.CLASSES, strict=True)
      ],
    }
    if form == 'json':
      files[f'annotations/instances_{folder}.json'] = json.dumps(said).encode()
      files[f'annotations/captions_{folder}.json'] = b'not read'
  return files, made


def indexed(label, k):
  """A PNG of labels; every second has a palette that hides its values."""
  if k % 2:
    return encode(label)
  image = Image.fromarray(label)
  image.putpalette([7, 7, 7] * 256)
  buffer = io.BytesIO()
  image.save(buffer, 'PNG')
  return buffer.getvalue()


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The folder of records of a JSON tree, and what is in them by id."""
  pytest.importorskip('pycocotools')
  place = tmp_path_factory.mktemp('coco')
  files, made = parts()
  manifest, new = coco.prepare(pack(files, place / 'x.zip'), place / 'data')
  assert new
  assert not manifest['skipped']
  return place / 'data', made


def check(dataset, made, table=None):
  """All that is there is as it was made, its labels looked up in a table."""
  table = np.arange(256) if table is None else table
  for split in ('train', 'test'):
    source = getattr(dataset, split)
    assert list(source.ids) == sorted(source.ids)
    source = pickle.loads(pickle.dumps(source))
    for i, record in enumerate(source):
      image, label, there = made[record['id']]
      assert there == split
      np.testing.assert_array_equal(record['image'], image)
      np.testing.assert_array_equal(record['label'], table[label])
      assert source.sizes[i].tolist() == list(label.shape)
      held = set(np.unique(table[label]).tolist()) - {0, 255}
      assert set((np.flatnonzero(source.present[i]) + 1).tolist()) == held


def test_all_classes(prepared):
  data_dir, made = prepared
  dataset = datasets.load('coco', data_dir=data_dir)
  assert len(dataset.classes) == len(set(dataset.classes)) == 80
  assert len(set(dataset.palette)) == len(dataset.palette) == 81
  assert dataset.palette[:4] == (
    (0,) * 3,
    (128, 0, 0),
    (0, 128, 0),
    (128,) * 2 + (0,),
  )
  check(dataset, made)
  assert set(dataset.train.ids) | set(dataset.test.ids) == set(made)


def test_category_numbers():
  """The numbers that another list of classes gives for some of the names."""
  for number, name in (
    (5, 'airplane'), (16, 'bird'), (44, 'bottle'), (62, 'chair'),
    (67, 'dining table'), (64, 'potted plant'), (72, 'tv'), (90, 'toothbrush'),
  ):  # fmt: skip
    assert coco.Coco.CLASSES[CATEGORIES.index(number)] == name


@pytest.mark.parametrize(
  ('rule', 'fold', 'labels'),
  [
    ('interleaved', 0, range(1, 78, 4)),
    ('interleaved', 3, range(4, 81, 4)),
    ('contiguous', 0, range(1, 21)),
    ('contiguous', 3, range(61, 81)),
  ],
)
def test_folds(prepared, rule, fold, labels):
  data_dir, made = prepared
  assert coco.fold_labels(fold, rule) == tuple(labels)
  dataset = coco.load(data_dir, fold, rule)
  assert dataset.classes == tuple(coco.Coco.CLASSES[i - 1] for i in labels)
  assert dataset.palette[0] == (0, 0, 0)
  assert len(dataset.palette) == 21
  table = np.zeros(256, int)
  table[list(labels)], table[255] = np.arange(1, 21), 255
  check(dataset, made, table)
  for split in ('train', 'test'):
    assert set(getattr(dataset, split).ids) == {
      i for i, (_, x, part) in made.items() if part == split and table[x].any()
    }


def test_folds_divide_the_classes():
  for rule in coco.RULES:
    labels = [i for fold in range(4) for i in coco.fold_labels(fold, rule)]
    assert sorted(labels) == list(range(1, 81))


@pytest.mark.parametrize('part', ['train', 'test'])
@pytest.mark.parametrize('exclusive', [False, True])
def test_pools(prepared, part, exclusive):
  data_dir, made = prepared
  fold, least = 0, 60
  options = {'fold': fold, 'part': part, 'exclusive': exclusive}
  labels = OTHERS if part == 'train' else FOLD
  if exclusive:  # each image has a class of either side
    with pytest.raises(ValueError, match='no image has 60 pixels of'):
      coco.pool(data_dir, min_area=least, **options)
    return
  pool = coco.pool(data_dir, min_area=least, **options)
  assert pool.classes == tuple(coco.Coco.CLASSES[i - 1] for i in labels)
  assert pool.values.tolist() == labels
  ids = sorted(i for i, x in made.items() if x[2] == part)
  assert list(pool.source.ids) == ids
  assert pool.pairs.tolist() == [
    [i, c]
    for i, id_ in enumerate(ids)
    for c, label in enumerate(labels)
    if (made[id_][1] == label).sum() >= least
  ]
  with pytest.raises(ValueError, match='no image has 2048 pixels of'):
    coco.pool(data_dir, **options)


def test_a_pool_without_images_of_the_other_side(tmp_path):
  files = {}
  for k in range(81):
    label = np.zeros((6, 6), np.uint8)
    label[:3], label[5] = max(k, 1), 255
    if not k:
      label[3] = 2  # of another fold
    image = np.random.RandomState(k).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    folder = 'train2014' if k else 'val2014'
    files[f'{folder}/{k}.jpg'] = encode(image, 'JPEG')
    files[f'annotations/{folder}/{k}.png'] = encode(label)
  files['train2014/0_.jpg'] = encode(image[::-1].copy(), 'JPEG')
  files['annotations/train2014/0_.png'] = files['annotations/val2014/0.png']
  coco.prepare(put(files, tmp_path / 'raw'), tmp_path / 'data')
  for exclusive in (False, True):
    pool = coco.pool(tmp_path / 'data', min_area=5, exclusive=exclusive)
    found = sorted(pool.source.ids[i] for i, _ in pool.pairs)
    mixed = [] if exclusive else ['0_']
    assert found == sorted([*map(str, OTHERS), *mixed])


def test_a_support_of_two_shots_of_each_class(prepared):
  for fold in range(4):
    dataset = coco.load(prepared[0], fold)
    each = 2 if fold == 0 else 1
    chosen, _ = support.choose(dataset, 20 * each, rule='per_class')
    assert (dataset.train.present[chosen].sum(0) >= each).all()
    assert dataset.test.present.any(0).all() or fold


def test_ready_labels_are_preferred(tmp_path, monkeypatch, caplog):
  """Palettes or grey, the values are the labels; pycocotools is not needed."""
  monkeypatch.setitem(sys.modules, 'pycocotools', None)
  files, made = parts('png')
  files |= {f'{x}.json': b'no JSON' for x in (TRAIN, VAL)}
  raw = put(files, tmp_path / 'raw', 'COCO2014/')
  with caplog.at_level(logging.INFO):
    coco.prepare(raw, tmp_path / 'data')
  assert 'labels of train2014 are ready made, PNG; 1 of its 61' in caplog.text
  check(coco.load(tmp_path / 'data'), made)
  without = np.arange(256)
  without[255] = 0
  check(coco.load(tmp_path / 'data', void=False), made, without)
  dataset = coco.load(tmp_path / 'data', 0, void=False)
  table = np.zeros(256, int)
  table[FOLD] = np.arange(1, 21)
  check(dataset, made, table)


def test_2017_and_what_is_said_of_it(tmp_path, caplog):
  pytest.importorskip('pycocotools')
  files, made = parts(counts=(2, 1), year='2017')
  raw = put(files, tmp_path / 'coco')
  with pytest.raises(ValueError, match=r'no train2014/\*\.jpg and no val2014'):
    coco.prepare(raw, tmp_path / 'data')
  with caplog.at_level(logging.INFO):
    coco.prepare(raw, tmp_path / 'data', split='2017')
  assert '1 of its 3 images have none' in caplog.text
  assert '3 images are there, its owners publish 122218' in caplog.text
  check(coco.load(tmp_path / 'data'), made)
  assert coco.prepare('gone', tmp_path / 'data', split='2017')[1] is False
  with pytest.raises(ValueError, match='prepared with split 2017, not 2014'):
    coco.prepare(raw, tmp_path / 'data')


def change(files, edit, name=TRAIN):
  said = json.loads(files[f'{name}.json'])
  edit(said)
  return {**files, f'{name}.json': json.dumps(said).encode()}


def refused(files, tmp_path, message, **options):
  with pytest.raises(ValueError, match=message) as caught:
    coco.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'data', **options)
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'data').exists()
  return str(caught.value)


def test_bad_files_are_named_and_left_out(tmp_path):
  pytest.importorskip('pycocotools')
  files, made = parts(counts=(16, 2))
  train = [i for i, x in made.items() if x[2] == 'train']

  def edit(said):
    listed, painted = said['images'], said['annotations']
    listed[2]['width'] += 1
    listed[15]['file_name'] = '../secret.jpg'
    painted[3 * 3]['category_id'] = 12
    painted[3 * 4]['segmentation'] = []
    painted[3 * 5]['segmentation'] = [[1.0, 2.0, 3.0, 4.0]]
    del painted[3 * 6]['segmentation']
    painted[3 * 8 + 2]['segmentation']['counts'].append(5)
    painted[3 * 9 + 2]['segmentation']['size'] = [2, 2]
    painted.append({**painted[0], 'image_id': 12345})

  files = change(files, edit)
  a, b = (f'train2014/{i}.jpg' for i in train[:2])
  del files[a]
  files[b] = files[b][:200]
  files['secret.jpg'] = files[f'train2014/{train[2]}.jpg']
  message = refused(files, tmp_path, '11 of 19 images cannot be used')
  names = {i: f'train2014/{x}.jpg' for i, x in enumerate(train)}
  for part in (
    f'{a}: is missing, {TRAIN}.json has it',
    f'{b}: cannot be decoded',
    f'{names[2]}: {TRAIN}.json says 43x34, the image is 42x34',
    f'{names[3]}: annotation 1009 of {TRAIN}.json: no category 12',
    f'{names[4]}: annotation 1012 of {TRAIN}.json has no polygon',
    f'{names[5]}: annotation 1015 of {TRAIN}.json cannot be decoded (a polygon',
    f'{names[6]}: annotation 1018 of {TRAIN}.json has no polygon',
    f'{names[8]}: annotation 1026 of {TRAIN}.json cannot be decoded (its count',
    f'{names[9]}: annotation 1029 of {TRAIN}.json cannot be decoded (its size',
    'train2014/image 12345: is missing',
    'train2014/../secret.jpg: is missing',
    '--skip_bad',
  ):
    assert part in message
  raw = tmp_path / 'x.zip'
  manifest, _ = coco.prepare(raw, tmp_path / 'data', skip_bad=True)
  good = [train[i] for i in (7, *range(10, 15))]
  assert len(manifest['skipped']) == 11
  assert list(coco.load(tmp_path / 'data').train.ids) == good


def test_bad_ready_labels(tmp_path):
  files, made = parts('png', (8, 2))
  ids = [i for i, x in made.items() if x[2] == 'train']
  names = [f'annotations/train2014/{i}.png' for i in ids]
  del files[f'train2014/{ids[0]}.jpg']
  files[names[1]] = files[names[1]][:40]
  files[names[2]] = encode(np.zeros((5, 7), np.uint8))
  files[names[3]] = encode(np.full(made[ids[3]][1].shape, 81, np.uint8))
  files[names[4]] = encode(np.zeros((*made[ids[4]][1].shape, 3), np.uint8))
  files[names[5]] = encode(np.zeros(made[ids[5]][1].shape, np.uint16))
  message = refused(files, tmp_path, '6 of 10 images')
  for part in (
    f'train2014/{ids[0]}.jpg: is missing, {names[0]} has it',
    f'{names[1]}: cannot be decoded',
    f'{names[2]}: mask is 7x5, its image 42x34',
    f'{names[3]}: value 81 is no label of COCO',
    f'{names[4]}: has no single channel of 8 bits (RGB)',
    f'{names[5]}: ',
  ):
    assert part in message


@pytest.mark.parametrize(
  ('edit', 'message'),
  [
    (lambda x: x.pop('images'), "KeyError: 'images'"),
    (lambda x: x['annotations'][0].pop('category_id'), 'no COCO file of'),
    (lambda x: x['annotations'].append(3), 'no COCO file of'),
    (lambda x: x['annotations'].append({'id': 3}), 'no COCO file of'),
    (
      lambda x: x['annotations'][0].update(segmentation=[['a', 'b']]),
      'no COCO file of',
    ),
    (lambda x: x['categories'].pop(), 'its 79 categories are not the 80'),
    (
      lambda x: x['categories'][3].update(name='x'),
      'its 80 categories are not the 80',
    ),
  ],
)
def test_wrong_lists(tmp_path, edit, message):
  pytest.importorskip('pycocotools')
  files = change(tree(counts=(2, 1)), edit)
  said = refused(files, tmp_path, message)
  assert said.startswith(f'{TRAIN}.json')
  assert 'https://cocodataset.org' in said


@pytest.mark.parametrize('contents', [b'[1, 2]', b'{', b'\xff\xfe\x01'])
def test_no_list(tmp_path, contents):
  pytest.importorskip('pycocotools')
  files = tree(counts=(2, 1)) | {f'{VAL}.json': contents}
  refused(files, tmp_path, 'instances_val2014.json is no COCO file')


def test_wrong_layout(tmp_path):
  files = tree('png', counts=(2, 1))
  (tmp_path / 'empty').mkdir()
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'gone', 'does not exist'),
    (tmp_path / 'empty', r'has no train2014/\*.jpg .*annotations/instances_t'),
    (
      pack(
        {k: x for k, x in files.items() if 'annotations/val' not in k},
        tmp_path / 'x.zip',
      ),
      'no annotations/instances_train2014.json and no .*val2014.json',
    ),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      coco.prepare(raw, tmp_path / 'data')
    assert 'annotations_trainval2014.zip' in str(caught.value)
    assert '\n' not in str(caught.value)


def test_names_of_both_years_differ(tmp_path):
  files = tree('png', counts=(2, 1))
  files = {k.replace('COCO_train', 'COCO_val'): x for k, x in files.items()}
  refused(files, tmp_path, r'1 images of val2014 have the name of one of train')


def test_without_pycocotools(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pycocotools', None)
  monkeypatch.delitem(sys.modules, 'pycocotools.mask', raising=False)
  message = 'needs pycocotools: pip install pycocotools'
  refused(tree(counts=(2, 1)), tmp_path, message)


def test_wrong_arguments(tmp_path):
  with pytest.raises(FileNotFoundError, match='--dataset coco'):
    coco.load(tmp_path)
  with pytest.raises(FileNotFoundError, match='--dataset coco'):
    coco.pool(tmp_path)
  with pytest.raises(ValueError, match=r'fold 4 is not one of 0\.\.3'):
    coco.load(tmp_path, fold=4)
  with pytest.raises(ValueError, match="rule 'odd' is not one of"):
    coco.pool(tmp_path, rule='odd')
  with pytest.raises(ValueError, match="part 'val' is not 'train' or 'test'"):
    coco.pool(tmp_path, part='val')
  with pytest.raises(ValueError, match="split '2015' is not one of"):
    coco.prepare(tmp_path, tmp_path / 'data', split='2015')


def test_raw_is_never_written_into(tmp_path):
  raw = put(tree('png', counts=(2, 1)), tmp_path / 'raw')
  with pytest.raises(ValueError, match='inside the raw folder'):
    coco.prepare(raw, raw / 'prepared')


def test_config():
  made = config.get_config('smoke,shots=40,fold=2,rule=contiguous')
  assert made.data.args.to_dict() == {
    'data_dir': 'data', 'fold': 2, 'rule': 'contiguous',
  }  # fmt: skip
  assert made.support.rule == 'per_class'
  for values in config.sweep():
    text = ','.join(f'{k}={v}' for k, v in values.items())
    assert config.get_config(text).data.args.fold == values['fold']
