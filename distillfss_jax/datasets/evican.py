"""EVICAN: cells and their nuclei under microscopes.

Schwendy et al., "EVICAN: a balanced dataset for algorithm development in cell
and nucleus segmentation", Bioinformatics 36 (2020). Grey images of 30 cell
lines. The owners outlined some cells of an image, not all: what has no outline
is background here, too.

    annotations_EVICAN2/instances_train2019_EVICAN2.json    outlines, as COCO
    annotations_EVICAN2/instances_val2019_EVICAN2.json      has them
    Images/train/    or Images/EVICAN_train2019/, as the owners' zips call it
    Images/val/      or Images/EVICAN_val2019/

The val images are for testing, as in the original. The owners' 98 evaluation
images, easy to difficult, have no part in it and are passed over.
"""

import collections
import logging
import typing

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, forms, masks, prepared

SPLITS = ('published',)
_PARTS = {'train': 'train', 'test': 'val'}  # ours: the owners'
_LIST = 'annotations_EVICAN2/instances_{}2019_EVICAN2.json'
_FOLDERS = ('Images/{}/', 'Images/EVICAN_{}2019/')


class Evican(builder.SegmentationBuilder):
  """Cells and nuclei of 30 cell lines under microscopes, EVICAN."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('Cell', 'Nucleus')
  PALETTE = ((0, 0, 0), (86, 180, 233), (230, 159, 0))
  DOWNLOAD = (
    'get EVICAN_train2019.zip, EVICAN_val2019.zip and the two files '
    'instances_{train,val}2019_EVICAN2.json from Edmond, '
    'https://doi.org/10.17617/3.AJBV1S (CC BY 4.0), put the images into '
    'Images/train and Images/val and the other two into annotations_EVICAN2, '
    'and give the folder of both, or a zip of it, as --raw'
  )


def load(data_dir='data'):
  """Loads the prepared dataset; FileNotFoundError when there is none."""
  return prepared.load_prepared(Evican, data_dir)


def prepare(raw, data_dir, *, split='published', skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  The only `split` is the published one, of the two lists.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  return builder.prepare(Evican, Layout, raw, data_dir, skip_bad=skip_bad)


class _Row(typing.NamedTuple):
  """One image, and what is painted on it, in this order."""

  path: str
  source: str  # the list it is of
  size: tuple
  instances: list  # (id, label, polygons or RLE)


class Layout:
  """annotations_EVICAN2/ and Images/, in one folder, wherever it lies.

  The ids are train/<file> and val/<file>, in the order of their lists.
  """

  def __init__(self, files):
    """Reads both lists; ValueError where a list or all its images miss."""
    self._files, self._there = files, set(files.names)
    self._rows = {}
    ends = [_LIST.format(part) for part in _PARTS.values()]
    tops = {x.removesuffix(end) for x in files.names for end in ends}
    tops = {x for x in tops.difference(files.names) if not x or x[-1] == '/'}
    self.top = min(tops, key=lambda x: (x.count('/'), x), default='')
    folders = [self._folder(part) for part in _PARTS.values()]
    lacking = [x for x in ends if self.top + x not in self._there]
    lacking += [x for x in folders if not self._inside(x)]
    if lacking:
      raise ValueError(
        f'{files} has no {" and no ".join(lacking)} ({len(files.names)} files '
        f'in all): {Evican.DOWNLOAD}'
      )
    self._painter = masks.Painter(ends[0])
    for part, end, folder in zip(_PARTS.values(), ends, folders, strict=True):
      self._list(part, self.top + end, self.top + folder)
    self.ids = list(self._rows)

  def _inside(self, folder):
    return [x for x in self._there if x.startswith(self.top + folder)]

  def _folder(self, part):
    """The folder of a part: the first that is there, or the first."""
    folders = [x.format(part) for x in _FOLDERS]
    return next((x for x in folders if self._inside(x)), folders[0])

  def _list(self, part, name, folder):
    """Makes the rows of a part."""
    images, instances = _read(name, self._files)
    for number, (file_name, size) in images.items():
      id_ = f'{part}/{file_name}'
      if id_ in self._rows:
        raise ValueError(f'{name} lists {file_name!r} twice')
      self._rows[id_] = _Row(folder + file_name, name, size, instances[number])

  def split(self, ids):
    """Divides the ids by their lists; val is for testing."""
    return {
      name: [i for i in ids if i.startswith(f'{part}/')]
      for name, part in _PARTS.items()
    }

  def _read_file(self, id_):
    row = self._rows[id_]
    if row.path not in self._there:
      raise download.BadFileError(
        f'{row.path}: is missing, {row.source} has it'
      )
    return self._files.read(row.path)

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return download.decode(self._read_file(id_), self._rows[id_].path, 'RGB')

  def encoded(self, id_):
    """The image as JPEG or PNG: the file itself where it is one."""
    if id_.lower().endswith(('.jpg', '.jpeg', '.png')):
      return self._read_file(id_)
    return download.png(self.image(id_))

  def label(self, id_, size):
    """Paints the annotations of an id, uint8 [H, W], later over earlier."""
    row = self._rows[id_]
    if row.size != tuple(size):
      raise download.BadFileError(
        f'{row.path}: {row.source} says {row.size[1]}x{row.size[0]}, the image '
        f'is {size[1]}x{size[0]}'
      )
    label = np.zeros(size, np.uint8)
    for number, value, form in row.instances:
      try:
        label[self._decode(form, size)] = value
      except (ValueError, TypeError, OverflowError) as error:
        raise download.BadFileError(
          f'{row.path}: annotation {number} of {row.source} cannot be decoded '
          f'({error})'
        ) from error
    return label

  def _decode(self, form, size):
    """One instance as bool [H, W]."""
    if isinstance(form, list):
      return self._fill(form, size)
    return self._painter.paint(form, size)

  def _fill(self, polygons, size):
    """The inside of polygons as bool [H, W]: a pixel at least.

    Parity: where no pixel is inside, as in the original the one that the first
    point lies in, or the nearest to it.
    """
    if not polygons or any(not x or len(x) % 2 for x in polygons):
      raise ValueError('it has no polygon, or half a point')
    made = np.zeros(size, bool)
    # Parity: two points enclose nothing; the original takes them for a box.
    if wide := [x for x in polygons if len(x) >= 6]:
      made = self._painter.paint(wide, size)
    if not made.any():
      x, y = polygons[0][:2]
      made[np.clip(int(y), 0, size[0] - 1), np.clip(int(x), 0, size[1] - 1)] = 1
    return made


def _read(name, files):
  """({number: (file name, (H, W))}, {number: instances}) of a list."""
  try:
    said = files.json(name)
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
    names = dict(named)
    made = [
      (
        forms.identity(x['image_id']),
        forms.identity(x['category_id']),
        x['segmentation'],
        x.get('id'),
      )
      for x in said['annotations']
      if not x.get('iscrowd')
    ]
    labels = {x.lower(): i for i, x in enumerate(Evican.CLASSES, 1)}
    strange = [x for x in names.values() if x.lower() not in labels]
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{name} is no COCO file of instances ({type(error).__name__}: '
      f'{error!s:.100}): {Evican.DOWNLOAD}'
    ) from error
  if strange:
    raise ValueError(
      f'{name}: category {strange[0]!r} is not one of {Evican.CLASSES}; is it '
      f'the right file? {Evican.DOWNLOAD}'
    )
  forms.refuse_twice(name, 'category', named)
  if crowds := len(said['annotations']) - len(made):
    logging.info('%s: %d crowds are left out, as in the original', name, crowds)
  if len(images) < len(listed):
    raise ValueError(f'{name} gives one id to several images')
  instances = collections.defaultdict(list)
  for number, category, form, id_ in made:
    if number not in images or category not in names:
      raise ValueError(
        f'{name}: annotation {id_} names image {number} and category '
        f'{category}, of which one is not listed'
      )
    instances[number].append((id_, labels[names[category].lower()], form))
  return images, instances
