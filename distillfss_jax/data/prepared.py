"""Reading what was prepared: records, and the manifest beside them.

Both may be damaged after they were written: the manifest carries a digest of
itself and of every record, which are compared when they are read.
"""

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import core, download

MANIFEST = 'manifest.json'


def load_prepared(
  builder,
  data_dir,
  keep=None,
  train=('train',),
  test=('test',),
  validation=(),
):
  """The Dataset of a prepared folder, divided as it was prepared.

  Args:
    builder: subclass of SegmentationBuilder.
    data_dir: folder of all prepared datasets.
    keep: row of the manifest -> whether it counts; None for all.
    train: names of the splits that are the training part.
    test: of those that are the test part.
    validation: of those that the owners keep to choose by; () for none.

  Raises:
    FileNotFoundError: when it was not prepared.
  """
  made = manifest(builder, data_dir)
  if made is None:
    raise FileNotFoundError(unprepared(builder, data_dir))
  classes = tuple(made.get('classes', builder.CLASSES))
  palette = tuple(map(tuple, made.get('palette', builder.PALETTE)))
  rows = [row for row in made['records'] if keep is None or keep(row)]
  parts = [
    [row for name in names for row in rows if row['split'] == name]
    for names in (train, test, validation)
  ]
  place = folder(builder, data_dir)
  sources = list(divided(place, len(classes), *parts[:2]))
  if parts[2]:
    sources.append(Prepared(place, parts[2], len(classes)))
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


def unprepared(builder, data_dir, dataset=''):
  """Says what to do when the records are not there.

  Args:
    builder: subclass of SegmentationBuilder.
    data_dir: where they were looked for.
    dataset: what `prepare` is to be told, if not the builder's name.
  """
  return (
    f'{builder.name} is not prepared in {str(data_dir)!r}: run python -m '
    f'distillfss_jax.prepare --dataset {dataset or builder.name} --raw '
    f'<folder or zip> --data_dir {data_dir}; if it lies elsewhere, say where '
    'with --config.data.args.data_dir'
  )


def manifest(builder, data_dir):
  """Reads the manifest of a prepared dataset, or None where there is none.

  Raises:
    ValueError: it is damaged, or of an older version.
  """
  path = folder(builder, data_dir) / MANIFEST
  return read(path) if path.is_file() else None


def read(path):
  """Reads a manifest file; ValueError where it is damaged."""
  try:
    made = json.loads(path.read_text())
    if not isinstance(made, dict):
      raise TypeError('it is no object')
    if 'options' in made:
      _check(made)
  except Exception as error:
    raise _damaged(path.parent, f'{path.name}: {download.reason(error)}') from (
      error
    )
  if 'options' not in made:
    raise ValueError(
      f'{path.parent} was prepared by an older version: remove the folder and '
      'prepare it again'
    )
  return made


def seal(made):
  """The digest of a manifest, hex, which tells its data from all others."""
  rest = {key: value for key, value in made.items() if key != 'seal'}
  text = json.dumps(rest, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest(id_, image, label):
  """The digest of a record, hex, from its id and both files as they lie."""
  made = hashlib.blake2b(f'{id_}\0{len(image)}\0'.encode(), digest_size=8)
  made.update(image)
  made.update(label)
  return made.hexdigest()


def _check(made):
  """Raises an error of any kind where a manifest is not as it was written."""
  if made.get('seal', '') not in ('', seal(made)):
    raise ValueError('it is not as it was written')
  ways = len(made['classes'])
  if len(made['palette']) != ways + 1 or not isinstance(made['skipped'], dict):
    raise ValueError('it has not a colour for each class, or no skipped')
  # What an older version wrote has no seal.
  if not isinstance(made['records'], list) or not made['records']:
    raise ValueError('it has no list of records')
  there = {}
  for row in made['records']:
    there.setdefault(row['split'], []).append(row['index'])
    height, width = row['size']
    if not (
      isinstance(row['id'] + row['digest'], str)
      and min(height, width) > 0
      and len(row['present']) == len(row['areas'])
      and all(0 < label <= ways for label in row['present'])
    ):
      raise ValueError(f'the row of {row["id"]} says what cannot be')
  for split, indices in there.items():
    if sorted(indices) != list(range(len(indices))):
      raise ValueError(f'its rows of {split} are not numbered 0, 1, ...')


def _damaged(place, why):
  return ValueError(
    f'{place} is damaged ({why}): remove the folder and prepare it again with '
    'python -m distillfss_jax.prepare'
  )


@functools.cache
def _say_unchecked(place):
  logging.info(
    '%s was prepared by an older version: its records have no digests and are '
    'not checked when they are read',
    place,
  )


class Prepared(Sequence):
  """Records of a prepared folder, in the order of `rows` of its manifest.

  Beside what a source has: areas, int64 [N, n], pixels of each class; contents,
  a digest of each image's pixels, '' of one that is all alike.
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
    self.digests = tuple(row.get('stored') for row in rows)
    self.contents = tuple(row['digest'] for row in rows)
    if None in self.digests:
      _say_unchecked(self._place)

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
    where = f'record {index} of {split}'
    try:
      record = self._sources[split][index]
      found = record['id'].decode()
      image, label = record['image'], record['label']
    except Exception as error:  # TFDS and its files raise errors of any kind
      raise _damaged(
        self._place, f'{where}: {download.reason(error)}'
      ) from error
    if found != self.ids[i]:
      raise _damaged(
        self._place, f'{where} is {found}, the manifest says {self.ids[i]}'
      )
    if self.digests[i] not in (None, digest(found, image, label)):
      raise _damaged(self._place, f'{where}, {found}, is not as it was written')
    # What was prepared may be as large as it is.
    decode = functools.partial(download.decode, limited=False)
    return {
      'image': decode(image, f'image of {found}', 'RGB'),
      'label': decode(label, f'label of {found}', 'L'),
      'id': found,
    }
