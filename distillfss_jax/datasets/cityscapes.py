"""Cityscapes: streets of 50 cities, seen from a car.

Cordts et al., "The Cityscapes dataset for semantic urban scene understanding",
CVPR 2016. 19 classes, the owners' train ids + 1, in images of 2048x1024.

Background (0) never occurs: a pixel has one of the 19 classes or is void, and a
score of background says nothing. The owners' val images are for testing here;
the labels of their own test images are kept secret (the files that are there
are all void), so that these are passed over.
"""

import collections
import logging
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, prepared

SPLITS = ('published',)
COUNTS = {'train': 2975, 'val': 500}  # that the owners publish
_IMAGES = ('leftImg8bit', 'images')  # the first that is there
# leftImg8bit/{train,val}/<city>/<name>_leftImg8bit.png, or images/...
# gtFine/{train,val}/<city>/<name>_gtFine_labelIds.png
_FILE = re.compile(
  r'(?P<top>(?:[^/]+/)?)(?P<folder>leftImg8bit|images|gtFine)/'
  r'(?P<part>train|val)/(?P<city>[^/]+)/(?P<id>[^/]+)_'
  r'(?:leftImg8bit|gtFine_labelIds)\.png'
)
_CLASSES = {  # raw id in labelIds: name and official colour
  7: ('road', (128, 64, 128)),
  8: ('sidewalk', (244, 35, 232)),
  11: ('building', (70, 70, 70)),
  12: ('wall', (102, 102, 156)),
  13: ('fence', (190, 153, 153)),
  17: ('pole', (153, 153, 153)),
  19: ('traffic light', (250, 170, 30)),
  20: ('traffic sign', (220, 220, 0)),
  21: ('vegetation', (107, 142, 35)),
  22: ('terrain', (152, 251, 152)),
  # Parity: the original (AttnFD) has (0, 130, 180) here, a slip; only what it
  # draws depends on it.
  23: ('sky', (70, 130, 180)),
  24: ('person', (220, 20, 60)),
  25: ('rider', (255, 0, 0)),
  26: ('car', (0, 0, 142)),
  27: ('truck', (0, 0, 70)),
  28: ('bus', (0, 60, 100)),
  31: ('train', (0, 80, 100)),
  32: ('motorcycle', (0, 0, 230)),
  33: ('bicycle', (119, 11, 32)),
}
# Licence plates are -1, which 8 bits make 255.
_VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255)
_LABELS = np.zeros(256, np.uint8)  # by raw id; 0 is no raw id
_LABELS[list(_CLASSES)] = np.arange(1, len(_CLASSES) + 1)
_LABELS[list(_VOID)] = 255


class Cityscapes(builder.SegmentationBuilder):
  """Streets of 50 cities with 19 classes and no background, Cityscapes."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = tuple(name for name, _ in _CLASSES.values())
  PALETTE = ((0, 0, 0), *(colour for _, colour in _CLASSES.values()))
  COUNT = sum(COUNTS.values())
  DOWNLOAD = (
    'get gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip from '
    'https://www.cityscapes-dataset.com (after registering; for non-commercial '
    'use), unpack both into one folder, and give it, or a zip of it, as --raw'
  )


def load(data_dir='data'):
  """Loads the prepared dataset; FileNotFoundError when there is none."""
  return prepared.load_prepared(Cityscapes, data_dir)


def prepare(raw, data_dir, *, split='published', skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  The only `split` is the published one, of the folders.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  return builder.prepare(Cityscapes, Layout, raw, data_dir, skip_bad=skip_bad)


class Layout:
  """The folders of images and labels, at the top or one folder down.

  The ids are names without their ends, train before val, sorted by city.
  """

  def __init__(self, files):
    """Finds images and labels; ValueError where there are not both."""
    self._files = files
    found = [x for x in map(_FILE.fullmatch, files.names) if x]
    folders = collections.defaultdict(set)
    for x in found:
      folders[x['top']].add(x['folder'])
    tops = [x for x, at in folders.items() if 'gtFine' in at and len(at) > 1]
    if not tops:
      raise ValueError(
        f'{files} has no leftImg8bit/{{train,val}}/<city>/*_leftImg8bit.png '
        'and gtFine/{train,val}/<city>/*_gtFine_labelIds.png, both at its top '
        f'or in one folder of it ({len(files.names)} files in all): '
        f'{Cityscapes.DOWNLOAD}'
      )
    self.top = min(tops, key=lambda x: (len(x), x))
    self._folder = next(x for x in _IMAGES if x in folders[self.top])
    places = sorted(
      {
        (x['part'], x['city'], x['id'])
        for x in found
        if x['top'] == self.top and x['folder'] in (self._folder, 'gtFine')
      }
    )
    self._places = {id_: (part, city) for part, city, id_ in places}
    self.ids = [id_ for _, _, id_ in places]
    if len(self._places) < len(places):
      twice = [i for i, n in collections.Counter(self.ids).items() if n > 1]
      raise ValueError(
        f'{files}: {len(twice)} names are in several cities, or in train and '
        f'val: {", ".join(twice[:5])}. Each image must be there once'
      )
    there = collections.Counter(part for part, _, _ in places)
    for part, count in COUNTS.items():
      if there[part] != count:
        logging.warning(
          'cityscapes: %s has %d images, its owners publish %d',
          part,
          there[part],
          count,
        )

  def split(self, ids):
    """Divides the ids by their folders; val is for testing."""
    return {
      name: [i for i in ids if self._places[i][0] == part]
      for name, part in (('train', 'train'), ('test', 'val'))
    }

  def _path(self, folder, id_, end):
    part, city = self._places[id_]
    return f'{self.top}{folder}/{part}/{city}/{id_}_{end}.png'

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(
      self._path(self._folder, id_, 'leftImg8bit'), 'RGB'
    )

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(self._path(self._folder, id_, 'leftImg8bit'))

  def label(self, id_, size):
    """Reads the raw ids of an id as labels, uint8 [H, W], 1..19 and 255."""
    path = self._path('gtFine', id_, 'gtFine_labelIds')
    raw = self._files.decode(path, 'L')
    download.same_size(path, raw, size)
    label = _LABELS[raw]
    if not label.all():
      raise download.BadFileError(
        f'{path}: value {raw[label == 0][0]} is no raw id, those are 0..33 and '
        '255'
      )
    return label
