"""Reading what was prepared: records, and the manifest beside them."""

import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import core, download

MANIFEST = 'manifest.json'


def load_prepared(
  builder, data_dir, keep=None, train=('train',), test=('test',)
):
  """The Dataset of a prepared folder, divided as it was prepared.

  Args:
    builder: subclass of SegmentationBuilder.
    data_dir: folder of all prepared datasets.
    keep: row of the manifest -> whether it counts; None for all.
    train: names of the splits that are the training part.
    test: of those that are the test part.

  Raises:
    FileNotFoundError: when it was not prepared.
  """
  made = manifest(builder, data_dir)
  if made is None:
    raise FileNotFoundError(unprepared(builder, data_dir))
  classes = tuple(made.get('classes', builder.CLASSES))
  palette = tuple(map(tuple, made.get('palette', builder.PALETTE)))
  rows = [row for row in made['records'] if keep is None or keep(row)]
  parts = (
    [row for name in names for row in rows if row['split'] == name]
    for names in (train, test)
  )
  sources = divided(folder(builder, data_dir), len(classes), *parts)
  return core.Dataset(builder.name, classes, palette, *sources)


def divided(place, ways, train, test):
  """The training and the test part of a prepared folder, as sources.

  Training images that are copies of test images are left out. They are when the
  folder is made, but it can be divided in other ways, too.

  Args:
    place: the folder.
    ways: number of classes.
    train: rows of its manifest.
    test: rows of its manifest.
  """
  tested = {row['digest'] for row in test} - {''}
  train = [row for row in train if row['digest'] not in tested]
  return Prepared(place, train, ways), Prepared(place, test, ways)


def folder(builder, data_dir):
  """Where the records of a builder class lie under `data_dir`."""
  root = pathlib.Path(data_dir).expanduser()
  return root / builder.name / str(builder.VERSION)


def unprepared(builder, data_dir):
  """Says what to do when the records are not there."""
  return (
    f'{builder.name} is not prepared in {str(data_dir)!r}: run python -m '
    f'distillfss_jax.prepare --dataset {builder.name} --raw <folder or zip> '
    f'--data_dir {data_dir}'
  )


def manifest(builder, data_dir):
  """Reads the manifest of a prepared dataset, or None where there is none."""
  path = folder(builder, data_dir) / MANIFEST
  if not path.is_file():
    return None
  made = json.loads(path.read_text())
  if 'options' not in made:
    raise ValueError(
      f'{path.parent} was prepared by an older version: remove the folder and '
      'prepare it again'
    )
  return made


class Prepared(Sequence):
  """Records of a prepared folder, in the order of `rows` of its manifest.

  Beside what a source has: areas, int64 [N, n], pixels of each class.
  """

  def __init__(self, place, rows, ways):
    """Takes the folder, rows of the manifest and the number of classes."""
    self._place = str(place)
    self._where = tuple((row['split'], row['index']) for row in rows)
    self.ids = tuple(row['id'] for row in rows)
    sizes = [row['size'] for row in rows]
    self.sizes = np.array(sizes, np.int32).reshape(-1, 2)
    self.areas = np.zeros((len(rows), ways), np.int64)
    for i, row in enumerate(rows):
      self.areas[i, np.array(row['present'], int) - 1] = row['areas']
    self.present = self.areas > 0

  @functools.cached_property
  def _sources(self):
    builder = tfds.builder_from_directory(self._place)
    splits = sorted({split for split, _ in self._where})
    # Pillow decodes: TFDS would take OpenCV where there is one, and ask for it.
    encoded = dict.fromkeys(('image', 'label'), tfds.decode.SkipDecoding())
    return {
      split: builder.as_data_source(split, decoders=encoded) for split in splits
    }

  def __getstate__(self):
    """Drops the open files: each worker opens its own."""
    return {k: v for k, v in self.__dict__.items() if k != '_sources'}

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, i):
    split, index = self._where[i]
    record = self._sources[split][index]
    found = record['id'].decode()
    if found != self.ids[i]:
      raise ValueError(
        f'{self._place} is damaged: record {index} of {split} is {found}, its '
        f'manifest says {self.ids[i]}; remove the folder and prepare it again'
      )
    return {
      'image': download.decode(record['image'], f'image of {found}', 'RGB'),
      'label': download.decode(record['label'], f'label of {found}', 'L'),
      'id': found,
    }
