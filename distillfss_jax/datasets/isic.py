"""ISIC: skin lesions, masks of the 2018 and classes of the 2019 challenge.

Codella et al., "Skin lesion analysis toward melanoma detection 2018",
arXiv 1902.03368. One lesion per image: the mask is that of task 1 in 2018, the
class that of the image's row in the 2019 table. Of its classes three occur.
"""

import contextlib
import csv
import functools
import io
import logging
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, prepared

SPLITS = ('reference', 'drawn')
TABLE = 'ISIC_2019_Training_GroundTruth.csv'
IMAGES = 'ISIC2018_Task1-2_Training_Input'
MASKS = 'ISIC2018_Task1_Training_GroundTruth'
_MASK = re.compile(
  rf'(?P<top>(?:ISIC/)?){MASKS}/(?P<id>[^/]+)_segmentation\.png'
)
# The order in which the reference numbers the columns from 1.
_COLUMNS = ('NV', 'MEL', 'BKL', 'BCC', 'AK', 'DF', 'VASC', 'SCC', 'UNK')


class Isic(builder.SegmentationBuilder):
  """Skin lesions of three classes in dermoscopic images, ISIC 2018."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('nevus', 'melanoma', 'seborrheic_keratosis')
  PALETTE = ((0, 0, 0), (86, 180, 233), (213, 94, 0), (240, 228, 66))
  COUNT = 2594
  DOWNLOAD = (
    'get the training data and masks of 2018 task 1 and the training table of '
    '2019 from https://challenge.isic-archive.com/data (CC BY-NC 4.0), unpack '
    f'them side by side as {IMAGES}/, {MASKS}/ and {TABLE}, and give that '
    'folder as --raw'
  )


def load(data_dir='data'):
  """Loads the prepared dataset; FileNotFoundError when there is none."""
  return prepared.load_prepared(Isic, data_dir)


def prepare(raw, data_dir, *, split=None, skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  `split`: 'reference' takes the test ids from test.csv (column id) beside the
  table; 'drawn' is ours: 20 % of the sorted ids of each class. None is the
  first where there is a test.csv, else the second.

  Parity: the reference needs a test.csv, which it neither has nor makes.
  """
  if split not in (None, *SPLITS):
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  layout = functools.partial(Layout, split_name=split)
  return builder.prepare(
    Isic, layout, raw, data_dir, skip_bad=skip_bad, split=split
  )


class Layout:
  """The owners' two folders and table, at the top or in ISIC/."""

  def __init__(self, files, split_name=None):
    """Finds the ids; ValueError when a part of the download is not there."""
    self._files = files
    found = [x for x in map(_MASK.fullmatch, files.names) if x]
    self.top = max((x['top'] for x in found), default='')
    masks = {x['id'] for x in found if x['top'] == self.top}
    table, test = f'{self.top}{TABLE}', f'{self.top}test.csv'
    if not masks or table not in files.names:
      what = table if masks else f'{MASKS}/<id>_segmentation.png'
      raise ValueError(
        f'{files} has no {what} ({len(files.names)} files of other names): '
        f'{Isic.DOWNLOAD}'
      )
    # Parity: some images of 2019 are smaller copies and named so; the image
    # that belongs to the mask is the one of 2018.
    self._rows = {
      row['image'].removesuffix('_downsampled'): row
      for row in self._read(table, ('image', *_COLUMNS))
    }
    self.ids = sorted(masks.intersection(self._rows))
    logging.info(
      'isic: %d rows of the table without a mask and %d masks without a row '
      'are left out',
      len(self._rows) - len(self.ids),
      len(masks) - len(self.ids),
    )
    self._test = None
    if split_name == 'reference' and test not in files.names:
      raise ValueError(
        f"split 'reference' needs test.csv beside {TABLE}, and {files} has no "
        f'{test}: add it, or choose --split drawn'
      )
    if split_name != 'drawn' and test in files.names:
      rows = self._read(test, ('id',))
      self._test = dict.fromkeys(row['id'] for row in rows)

  def _read(self, name, columns):
    text = self._files.text(name, 'replace')
    with download.guard(name, 'is no table'):
      table = csv.DictReader(io.StringIO(text))
      rows, fields = list(table), table.fieldnames or ()
    if missing := set(columns).difference(fields):
      raise ValueError(
        f'{name} has no column {", ".join(sorted(missing))}: its first line '
        f'should name {", ".join(columns)}'
      )
    return rows

  def split(self, ids):
    """Divides the ids: train sorted, test in the order of its list or rule."""
    if self._test is None:
      of_class = [[], [], []]
      for i in ids:
        with contextlib.suppress(download.BadFileError):  # it was named
          of_class[self._class(i) - 1].append(i)
      test = [i for part in of_class for i in download.held_out(part)]
    else:
      there = set(ids)
      test = [i for i in self._test if i in there]
      logging.info(
        'isic: %d of the %d ids of test.csv are there',
        len(test),
        len(self._test),
      )
    return {'train': sorted(set(ids).difference(test)), 'test': test}

  def _class(self, id_):
    """The label of an id, 1..3; BadFileError where its row gives none."""
    row = self._rows[id_]
    ones = [name for name in _COLUMNS if row[name] in ('1', '1.0')]
    known = _COLUMNS[: len(Isic.CLASSES)]
    if len(ones) != 1 or ones[0] not in known:
      raise download.BadFileError(
        f'{id_}: its row in {TABLE} has a 1 in {ones}, not in one of {known}'
      )
    return 1 + known.index(ones[0])

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(f'{self.top}{IMAGES}/{id_}.jpg', 'RGB')

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(f'{self.top}{IMAGES}/{id_}.jpg')

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W]: 0 and the label of its class."""
    name = f'{self.top}{MASKS}/{id_}_segmentation.png'
    mask = self._files.decode(name, 'L')
    download.same_size(name, mask, size)
    return np.where(mask >= 128, self._class(id_), 0).astype(np.uint8)
