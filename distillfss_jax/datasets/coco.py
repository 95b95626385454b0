"""COCO and COCO-20i: 80 kinds of everyday things, in 4 folds of 20.

Lin et al., "Microsoft COCO: Common objects in context", ECCV 2014; the folds
of Nguyen and Todorovic, ICCV 2019, and of Wang et al. (PANet), ICCV 2019.

    annotations/instances_train2014.json    polygons and RLE of instances
    annotations/instances_val2014.json
    annotations/train2014/<stem>.png        in their place, where both folders
    annotations/val2014/<stem>.png          are there: labels ready made
    train2014/<stem>.jpg, val2014/<stem>.jpg

It is prepared once with all classes, train2014 for training and val2014 for
testing; a fold is chosen when it is loaded. AttnFD's 21 classes of COCO, whose
labels are painted without the other instances, are not among them.
"""

import collections
import logging
import re
import typing

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import (
  builder,
  core,
  download,
  forms,
  masks,
  prepared,
)

SPLITS = ('2014', '2017')  # the same images, divided otherwise
FOLDS = 4
RULES = ('interleaved', 'contiguous')
_NAMES = (
  'person', 'bicycle', 'car', 'motorcycle', 'airplane', 'bus', 'train', 'truck',
  'boat', 'traffic light', 'fire hydrant', 'stop sign', 'parking meter',
  'bench', 'bird', 'cat', 'dog', 'horse', 'sheep', 'cow', 'elephant', 'bear',
  'zebra', 'giraffe', 'backpack', 'umbrella', 'handbag', 'tie', 'suitcase',
  'frisbee', 'skis', 'snowboard', 'sports ball', 'kite', 'baseball bat',
  'baseball glove', 'skateboard', 'surfboard', 'tennis racket', 'bottle',
  'wine glass', 'cup', 'fork', 'knife', 'spoon', 'bowl', 'banana', 'apple',
  'sandwich', 'orange', 'broccoli', 'carrot', 'hot dog', 'pizza', 'donut',
  'cake', 'chair', 'couch', 'potted plant', 'bed', 'dining table', 'toilet',
  'tv', 'laptop', 'mouse', 'remote', 'keyboard', 'cell phone', 'microwave',
  'oven', 'toaster', 'sink', 'refrigerator', 'book', 'clock', 'vase',
  'scissors', 'teddy bear', 'hair drier', 'toothbrush',
)  # fmt: skip


def _colour(label):
  """VOC's rule: the bits of a label are in turn high bits of R, G and B."""
  bits = [label >> i & 1 for i in range(9)]
  return tuple(
    bits[k] << 7 | bits[k + 3] << 6 | bits[k + 6] << 5 for k in (0, 1, 2)
  )


class Coco(builder.SegmentationBuilder):
  """80 kinds of everyday things, COCO."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = _NAMES
  PALETTE = tuple(_colour(i) for i in range(len(_NAMES) + 1))
  COUNT = 122218  # with annotations, of 123287; by year 82081 and 40137 of them
  DOWNLOAD = (
    'get train2014.zip, val2014.zip and annotations_trainval2014.zip from '
    'https://cocodataset.org/#download (annotations CC BY 4.0; the images are '
    "under the terms of Flickr, each with its owner's licence), unpack them "
    'into one folder, and give it, or a zip of it, as --raw'
  )


def fold_labels(fold, rule='interleaved'):
  """The 20 labels of a fold, 0..3, ascending.

  `rule`: 'interleaved' has fold + 1, fold + 5, ..., as BAM, HDMNet and DCAMA
  do; 'contiguous' has 20 fold + 1, 20 fold + 2, ..., as PANet does.
  """
  if fold not in range(FOLDS):
    raise ValueError(f'fold {fold!r} is not one of 0..{FOLDS - 1}')
  if rule not in RULES:
    raise ValueError(f'rule {rule!r} is not one of {RULES}')
  if rule == 'interleaved':
    return tuple(range(fold + 1, len(_NAMES) + 1, FOLDS))
  each = len(_NAMES) // FOLDS
  return tuple(range(each * fold + 1, each * (fold + 1) + 1))


def load(data_dir='data', fold=None, rule='interleaved', void=True):
  """Loads all 80 classes, or the 20 of a fold as labels 1..20.

  Args:
    data_dir: folder of all prepared datasets.
    fold: 0..3, of which only images with one of its classes are there; None
      for all classes and images.
    rule: of the folds; see `fold_labels`.
    void: keep the void pixels that labels of others have (those painted here
      have none); otherwise they are background.

  Raises:
    FileNotFoundError: when it was not prepared.
  """
  if fold is None:
    made = prepared.load_prepared(Coco, data_dir)
  else:
    kept = fold_labels(fold, rule)
    made = prepared.load_prepared(
      Coco, data_dir, lambda row: not set(kept).isdisjoint(row['present'])
    )
    made = core.with_classes(made, kept)
  return made if void else core.without_void(made)


def pool(
  data_dir='data',
  fold=0,
  part='train',
  rule='interleaved',
  min_area=2048,
  exclusive=False,
):
  """The images and classes that episodes of COCO-20i are drawn from.

  Args:
    data_dir: folder of all prepared datasets.
    fold: 0..3; see `fold_labels` for it and `rule`.
    part: 'train' has the 60 classes of the other folds over the training
      images, 'test' the 20 of the fold over the test images.
    min_area: pixels of a class that an image must have at least, at its own
      size.
    exclusive: without the images that also hold a class of the other side.
      Parity: BAM and HDMNet leave them out of training, others do not.

  Returns:
    A core.Pool.
  """
  if part not in ('train', 'test'):
    raise ValueError(f"part {part!r} is not 'train' or 'test'")
  labels = fold_labels(fold, rule)
  if part == 'train':
    labels = sorted(set(range(1, len(_NAMES) + 1)).difference(labels))
  names = [_NAMES[i - 1] for i in labels]
  source = getattr(prepared.load_prepared(Coco, data_dir), part)
  return core.pool(source, names, labels, min_area, exclusive=exclusive)


def prepare(raw, data_dir, *, split='2014', skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  `split`: '2014', which COCO-20i is made of, or '2017', the same images with
  5000 for testing, in folders and files of that name.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')

  def layout(files):
    return Layout(files, split)

  return builder.prepare(
    Coco, layout, raw, data_dir, skip_bad=skip_bad, split=split
  )


class _Instance(typing.NamedTuple):
  """One annotation; `form` is its polygons (float64 arrays) or its RLE."""

  id: int
  image: int
  category: int
  form: list | dict


class _Row(typing.NamedTuple):
  """One image: where its labels are from, and what is painted of them."""

  path: str
  source: str  # a PNG, or the JSON file
  size: tuple | None = None
  instances: tuple = ()


class Layout:
  """Folders of a year, with labels as PNG where there are, or else as JSON.

  The ids are stems of image files, sorted, of train before those of val.
  """

  def __init__(self, files, year='2014'):
    """Finds the images with labels; ValueError where something is missing."""
    self._files, self._there = files, set(files.names)
    self._rows, self._parts = {}, {}
    index = re.compile(
      rf'((?:.+/)?)annotations/(?:instances_train{year}\.json|train{year}/.+)'
    )
    tops = {found[1] for found in map(index.fullmatch, files.names) if found}
    self.top = min(tops, key=lambda x: (x.count('/'), x), default='')
    folders = {'train': f'train{year}', 'test': f'val{year}'}
    ready = all(
      self._stems(f'annotations/{x}/', 'png') for x in folders.values()
    )
    self._demand(folders.values(), ready)
    for split, folder in folders.items():
      rows = self._ready(folder) if ready else self._listed(folder)
      images = self._stems(f'{folder}/', 'jpg')
      logging.info(
        'coco: labels of %s are %s; %d of its %d images have none and are left '
        'out',
        folder,
        'ready made, PNG' if ready else 'painted',
        len(images.difference(rows)),
        len(images),
      )
      if twice := sorted(set(rows).intersection(self._rows)):
        raise ValueError(
          f'{files}: {len(twice)} images of {folder} have the name of one of '
          f'train{year}: {", ".join(twice[:5])}'
        )
      self._rows |= rows
      self._parts[split] = sorted(rows)
    self.ids = [id_ for part in self._parts.values() for id_ in part]

  def _demand(self, folders, ready):
    """Raises ValueError where images or lists of a folder are missing."""
    lacking = [f'{x}/*.jpg' for x in folders if not self._stems(f'{x}/', 'jpg')]
    lists = [f'annotations/instances_{x}.json' for x in folders]
    if not ready:
      lacking += [x for x in lists if self.top + x not in self._there]
    if lacking:
      raise ValueError(
        f'{self._files} has no {" and no ".join(lacking)} '
        f'({len(self._there)} files in all; --split chooses the year): '
        f'{Coco.DOWNLOAD}'
      )

  def _stems(self, below, suffix):
    """Names of the files of a folder, without the suffix."""
    form = re.compile(rf'{re.escape(self.top + below)}([^/]+)\.{suffix}')
    return {x[1] for x in map(form.fullmatch, self._files.names) if x}

  def _ready(self, folder):
    """Makes the rows {id: _Row} of PNG labels."""
    images, labels = self.top + folder, f'{self.top}annotations/{folder}'
    return {
      x: _Row(f'{images}/{x}.jpg', f'{labels}/{x}.png')
      for x in self._stems(f'annotations/{folder}/', 'png')
    }

  def _listed(self, folder):
    """Makes the rows {id: _Row} of a JSON file."""
    name = f'{self.top}annotations/instances_{folder}.json'
    self._painter = masks.Painter(name)
    images, self._labels, instances = _read(name, self._files)
    rows = {}
    for number, of in instances.items():
      # Where the list has no such image, there is no such file.
      file_name, size = images.get(number, (f'image {number}', None))
      id_ = file_name.rpartition('.')[0] or file_name
      rows[id_] = _Row(f'{self.top}{folder}/{file_name}', name, size, of)
    return rows

  def split(self, ids):
    """Divides the ids as the owners do, both parts sorted."""
    there = set(ids)
    return {
      split: [i for i in part if i in there]
      for split, part in self._parts.items()
    }

  def encoded(self, id_):
    """The JPEG itself; one of a single channel becomes RGB when decoded."""
    row = self._rows[id_]
    if row.path not in self._there:
      raise download.BadFileError(
        f'{row.path}: is missing, {row.source} has it'
      )
    return self._files.read(row.path)

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return download.decode(self.encoded(id_), self._rows[id_].path, 'RGB')

  def label(self, id_, size):
    """Reads or paints the labels of an id, uint8 [H, W] in 0..80 and 255.

    Of instances that overlap the first wins; a crowd is one instance. The PNG
    files that papers on COCO-20i publish were painted by a rule they do not
    say: theirs may differ where instances overlap.
    """
    row = self._rows[id_]
    if row.size is None:
      label = _indices(self._files.read(row.source), row.source)
      download.same_size(row.source, label, size)
      return label
    if row.size != tuple(size):
      raise download.BadFileError(
        f'{row.path}: {row.source} says {row.size[1]}x{row.size[0]}, the image '
        f'is {size[1]}x{size[0]}'
      )
    label = np.zeros(size, np.uint8)
    for one in row.instances:
      where = f'{row.path}: annotation {one.id} of {row.source}'
      if one.category not in self._labels:
        raise download.BadFileError(f'{where}: no category {one.category}')
      made = self._decode(where, one.form, size)
      label[made & (label == 0)] = self._labels[one.category]
    return label

  def _decode(self, where, form, size):
    """One instance as bool [H, W]."""
    if not form:
      raise download.BadFileError(f'{where} has no polygon')
    if isinstance(form, list):
      # Less has no inside, and may stand beside what has.
      form = [x for x in form if x.size >= 6] or form
    try:
      return self._painter.paint(form, size)
    except ValueError as error:
      raise download.BadFileError(
        f'{where} cannot be decoded ({error})'
      ) from error


def _indices(contents, name):
  """Decodes a PNG of labels, grey or with any palette, uint8 [H, W]."""
  with download.picture(contents, name) as (found, _):
    if found.mode not in ('L', 'P'):
      raise download.BadFileError(
        f'{name}: has no single channel of 8 bits ({found.mode})'
      )
    label = download.pixels(found)
  wrong = np.setdiff1d(label, (*range(len(_NAMES) + 1), 255))
  if wrong.size:
    raise download.BadFileError(f'{name}: value {wrong[0]} is no label of COCO')
  return label


def _compact(found):
  """Makes annotations small while they are read; as lists they fill memory."""
  if 'image_id' not in found:
    return found
  form = found.get('segmentation')
  if isinstance(form, list):
    form = [np.array(polygon, np.float64) for polygon in form]
  image, category = found['image_id'], found['category_id']
  return _Instance(found.get('id'), image, category, form)


def _read(name, files):
  """({number: (file name, size)}, {category: label}, {number: instances})."""
  try:
    said = files.json(name, _compact)
    listed = [
      (forms.identity(x['id']), forms.word(x['file_name']), x)
      for x in said['images']
    ]
    images = {
      number: (file_name, (x['height'], x['width']))
      for number, file_name, x in listed
    }
    named = [
      (forms.identity(x['id']), forms.word(x['name']))
      for x in said['categories']
    ]
    categories = dict(named)
    instances = collections.defaultdict(list)
    for one in said['annotations']:
      forms.identity(one.category)
      instances[forms.identity(one.image)].append(one)
    order = sorted(categories)
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{name} is no COCO file of instances ({type(error).__name__}: '
      f'{error!s:.100}): {Coco.DOWNLOAD}'
    ) from error
  forms.refuse_twice(name, 'image', [x[:2] for x in listed])
  forms.refuse_twice(name, 'category', named)
  if tuple(categories[i] for i in order) != _NAMES:
    raise ValueError(
      f'{name}: its {len(order)} categories are not the 80 of COCO; is it the '
      f'right file? {Coco.DOWNLOAD}'
    )
  return images, {x: i for i, x in enumerate(order, 1)}, instances
