"""Polyp: PraNet's collection, one training set and five test sets.

Fan et al., "PraNet: Parallel Reverse Attention Network for Polyp
Segmentation", MICCAI 2020. The training images are of Kvasir-SEG and
CVC-ClinicDB; CVC-300, CVC-ColonDB and ETIS-LaribPolypDB are of other
hospitals. All five are prepared, each as a split of its own; what is tested is
chosen when it is loaded.
"""

import collections
import dataclasses
import logging
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, prepared

SPLITS = ('published',)
TRAIN = 'train'
COUNTS = {
  TRAIN: 1450,  # 900 of Kvasir-SEG, 550 of CVC-ClinicDB
  'CVC-300': 60,
  'CVC-ClinicDB': 62,
  'Kvasir': 100,
  'CVC-ColonDB': 380,
  'ETIS-LaribPolypDB': 196,
}
TESTS = tuple(COUNTS)[1:]
_FILE = re.compile(
  r'(?P<top>(?:[^/]+/)?)(?:TrainDataset|TestDataset/(?P<set>[^/]+))/'
  r'(?P<kind>images|masks)/(?P<name>[^/]+)\.(?i:png|jpe?g|tiff?)'
)


class Polyp(builder.SegmentationBuilder):
  """Polyps in colonoscopy images of five sources, as PraNet divides them."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('polyp',)
  PALETTE = ((0, 0, 0), (86, 180, 233))
  DOWNLOAD = (
    'get TrainDataset.zip and TestDataset.zip from '
    'https://github.com/DengPingFan/PraNet (for research and education; each '
    'source has a licence of its own), unpack both into one folder, and give '
    'it, or a zip of it, as --raw'
  )


def load(data_dir='data', test='all'):
  """Loads the training set and a test set.

  Args:
    data_dir: folder of all prepared datasets.
    test: 'all', or one of `TESTS`; its `sets` are these, one by one.

  Raises:
    FileNotFoundError: when it was not prepared.
    ValueError: for a test set that is unknown or was not there.
  """
  if test not in ('all', *TESTS):
    raise ValueError(f'test {test!r} is not one of {("all", *TESTS)}')
  made = prepared.manifest(Polyp, data_dir)
  splits = {row['split'] for row in made['records']} if made else ()
  there = [name for name in TESTS if split_of(name) in splits]
  if made and test not in ('all', *there):
    raise ValueError(
      f'test set {test} was not in the download when polyp was prepared in '
      f'{str(data_dir)!r}, only {", ".join(there)}: choose one of these, or '
      'add it, remove the prepared folder and prepare again'
    )
  chosen = there if test == 'all' else [test]
  made = prepared.load_prepared(
    Polyp, data_dir, test=tuple(split_of(name) for name in chosen)
  )
  sets = {
    name: tuple(
      i for i, id_ in enumerate(made.test.ids) if id_.startswith(f'{name}/')
    )
    for name in chosen
  }
  return dataclasses.replace(made, sets={k: v for k, v in sets.items() if v})


def split_of(name):
  """The split of a set: 'train', 'test_cvc_300', 'test_kvasir', ..."""
  return name if name == TRAIN else 'test_' + name.lower().replace('-', '_')


def prepare(raw, data_dir, *, split='published', skip_bad=False):
  """Turns the six sets into ArrayRecord; see `builder.prepare`.

  The only `split` is the published one, of the folders. A test set that is not
  there is left out, with a warning.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  return builder.prepare(Polyp, Layout, raw, data_dir, skip_bad=skip_bad)


class Layout:
  """TrainDataset/ and TestDataset/<set>/, at the top or one folder down.

  Parity: the original pairs images and masks by their places in two sorted
  lists, and drops pairs of unequal size without a word; here they are paired
  by name, and what does not fit is named.
  """

  def __init__(self, files):
    """Finds the pairs; ValueError without a training and a test set."""
    self._files = files
    found = [x for x in map(_FILE.fullmatch, files.names) if x]
    # No group `set`: a training image.
    tops = {x['top'] for x in found if not x['set']}
    tops &= {x['top'] for x in found if x['set'] in TESTS}
    if not tops:
      raise ValueError(
        f'{files} has no TrainDataset/images, TrainDataset/masks and '
        'TestDataset/<set>/images and masks, at its top or one folder down '
        f'({len(files.names)} files in all): {Polyp.DOWNLOAD}'
      )
    self.top = min(tops, key=lambda x: (len(x), x))
    self._paths = collections.defaultdict(list)  # (kind, id) -> paths
    ids, others = set(), collections.Counter()
    for x in found:
      set_ = x['set'] or TRAIN
      if x['top'] != self.top:
        continue
      if set_ not in COUNTS:
        others[set_] += x['kind'] == 'images'
        continue
      id_ = f'{set_}/{x["name"]}'
      ids.add(id_)
      self._paths[x['kind'], id_].append(x[0])
    for set_, count in others.items():
      # Such as test/, the union of the five that the original's users make.
      logging.info('polyp: %s (%d images) is passed over', set_, count)
    self.ids = sorted(ids)
    self._warn()

  def _warn(self):
    there = collections.Counter(id_.split('/')[0] for id_ in self.ids)
    for set_, count in COUNTS.items():
      if there[set_] != count:
        logging.warning(
          'polyp: %s has %d images, its owners publish %d%s',
          set_,
          there[set_],
          count,
          '' if there[set_] else ': it is left out',
        )

  def split(self, ids):
    """Divides the ids by their sets, each sorted."""
    return {
      split_of(set_): [i for i in ids if i.split('/')[0] == set_]
      for set_ in COUNTS
    }

  def _path(self, kind, id_):
    paths = self._paths.get((kind, id_), [])
    if len(paths) == 1:
      return paths[0]
    what = f'has several: {", ".join(paths)}' if paths else 'has none'
    raise download.BadFileError(f'{id_}: {what} in {kind}/, expected one file')

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(self._path('images', id_), 'RGB')

  def encoded(self, id_):
    """The image as JPEG or PNG: the file itself unless it is a TIFF."""
    path = self._path('images', id_)
    if path.lower().endswith(('.tif', '.tiff')):
      return download.png(self.image(id_))
    return self._files.read(path)

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W] in {0, 1}.

    Parity: above a half, as the published evaluation has it. The original
    trains on the grey masks as they are, whose borders are soft in places.
    """
    path = self._path('masks', id_)
    mask = self._files.decode(path, 'L')
    download.same_size(path, mask, size)
    return (mask > 127).astype(np.uint8)
