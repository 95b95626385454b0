"""How a raw download becomes a prepared dataset: checked, then written once.

A dataset's file gives a *layout*: which ids there are, and how the files of
one become an image and a label. The rest is here. Beside the records lies a
manifest with the id, the size and the labels of every record, so that choosing
a support set or ordering a test set decodes nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import borders, copies, download, prepared

_LARGE = 1 << 24  # pixels: so large images are written one by one
SHARD = 1 << 29  # bytes of decoded images in a file of records


class _Info(tfds.core.DatasetInfo):
  """What a prepared dataset is; does not ask Google's servers about it."""

  def initialize_from_bucket(self):
    """Does nothing: the dataset is the user's own."""


class SegmentationBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
  """The TFDS builder all datasets on disk share: encoded image, PNG label.

  A dataset derives from it, gives these attributes and a docstring, and calls
  `prepare`. Sizes are kept as the owners publish them.

  CLASSES: names of labels 1..n. PALETTE: colours of labels 0..n.
  DOWNLOAD: where to get the raw files, what to give as --raw, and the licence.
  COUNT: images that the owners publish, or the numbers of several releases;
    None where they do not say.
  """

  CLASSES: tuple[str, ...]
  PALETTE: tuple[tuple[int, int, int], ...]
  DOWNLOAD: str
  COUNT: int | tuple[int, ...] | None = None
  splits = None  # dict of split name -> list of Checked; `write` sets both
  manifest = None

  def _info(self):
    # The format is left open: what the owners publish as JPEG stays as it is.
    return _Info(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(None, None, 3)),
          'label': tfds.features.Image(
            shape=(None, None, 1), encoding_format='png'
          ),
          'id': tfds.features.Text(),
          'height': tfds.features.Scalar(np.int32),
          'width': tfds.features.Scalar(np.int32),
        }
      ),
      disable_shuffling=True,  # the manifest lists the records in their order
    )

  def _download_and_prepare(self, *args, **kwargs):
    if self.splits is None:
      raise ValueError(
        prepared.unprepared(type(self), self.data_path.parents[1])
      )
    self._digests = {}
    super()._download_and_prepare(*args, **kwargs)
    for row in self.manifest['records']:
      row['stored'] = self._digests[row['split'], row['index']]
    self.manifest['seal'] = prepared.seal(self.manifest)
    (self.data_path / prepared.MANIFEST).write_text(
      json.dumps(self.manifest, indent=1)
    )

  # TFDS collects the records of a shard, and more than a gigabyte of a split
  # only with TensorFlow. So shards are small, and written one after the other.
  def _shard_iterators_per_split(self, dl_manager):
    del dl_manager  # the owners' download is read by `prepare`
    return {
      name: [
        functools.partial(self._records, name, first, shard)
        for first, shard in _shards(checked)
      ]
      for name, checked in self.splits.items()
    }

  def _split_generators(self, dl_manager):
    raise NotImplementedError('see _shard_iterators_per_split')

  def _records(self, split, first, checked):
    if not first:
      self._bar = download.bar([], f'writing {split}', len(self.splits[split]))
    if max(one.size[0] * one.size[1] for one in checked) > _LARGE:
      encoded = (one.image() for one in checked)
    else:
      encoded = download.ahead(
        lambda one: one.image(), checked, lambda one: one.whole
      )
    numbered = enumerate(zip(checked, encoded, strict=True), first)
    for i, (one, image) in numbered:
      self._digests[split, i] = prepared.digest(one.id, image, one.label)
      yield (
        i,
        {
          'image': io.BytesIO(image),
          'label': io.BytesIO(one.label),
          'id': one.id,
          'height': one.size[0],
          'width': one.size[1],
        },
      )
      self._bar.update()
    if first + len(checked) == self._bar.total:
      self._bar.close()


def _shards(checked):
  """Divides images into lists of at most `SHARD` bytes of pixels.

  Yields (index of its first, shard).
  """
  shard, first, total = [], 0, 0
  for i, one in enumerate(checked):
    size = 3 * one.size[0] * one.size[1]
    if shard and total + size > SHARD:
      yield first, shard
      shard, first, total = [], i, 0
    shard.append(one)
    total += size
  yield first, shard


@dataclasses.dataclass(frozen=True)
class Checked:
  """One image of a raw download that was read through and found good."""

  id: str
  image: Callable  # () -> encoded, read again when it is written
  label: bytes  # PNG
  size: tuple[int, int]
  areas: dict[int, int]  # pixels of the labels that occur, but 0 and void
  void: int  # pixels
  edges: dict[int, int]  # of `areas`, pixels that only part two other labels
  digest: str  # of the image's pixels; '' where all are alike
  mask: str  # digest of the label; '' where it has no class
  look: np.ndarray  # see `copies`
  whole: str  # the file that it is cut from, or its id


def check(layout, *, skip_bad):
  """Reads a whole raw download through before anything is written.

  Args:
    layout: as `prepare` has it.
    skip_bad: leave out images with a bad file instead of failing.

  Returns:
    (list of Checked in the order of its ids, dict of left out id -> reason).

  Raises:
    ValueError: naming every bad file.
  """

  def one(id_):
    try:
      pixels = layout.image(id_)
      made = layout.label(id_, pixels.shape[:2])
    except download.BadFileError as error:
      return str(error)
    counts = download.count(made)
    areas = {int(v): int(counts[v]) for v in np.flatnonzero(counts[1:255]) + 1}
    raw = np.ascontiguousarray(pixels)
    blank = not any((x != pixels[0, 0]).any() for x in download.strips(pixels))
    return Checked(
      id_,
      functools.partial(encoded, id_),
      download.png(made),
      pixels.shape[:2],
      areas,
      int(counts[255]),
      _edges(made, areas) if len(areas) > 1 else dict.fromkeys(areas, 0),
      '' if blank else _digest(raw),
      _digest(np.ascontiguousarray(made)) if areas else '',
      copies.look(pixels),
      whole(id_),
    )

  ids = layout.ids
  encoded = getattr(
    layout, 'encoded', lambda id_: download.png(layout.image(id_))
  )
  whole = getattr(layout, 'whole', lambda id_: id_)
  found = list(
    download.bar(download.ahead(one, ids, whole), 'checking', len(ids))
  )
  good = [x for x in found if isinstance(x, Checked)]
  bad = {i: x for i, x in zip(ids, found, strict=True) if isinstance(x, str)}
  if bad and not skip_bad:
    reasons = '; '.join(dict.fromkeys(bad.values()))
    raise ValueError(
      f'{len(bad)} of {len(ids)} images cannot be used: {reasons}. Repair '
      'them, or leave them out with --skip_bad'
    )
  if not good:
    raise ValueError(f'none of the {len(ids)} images can be used')
  if not any(one.areas for one in good):
    raise ValueError(
      f'none of the {len(good)} images has a pixel of a class in its mask: '
      'there is nothing to learn'
    )
  return good, bad


def _digest(array):
  return hashlib.blake2b(array, digest_size=16).hexdigest()


def _edges(label, areas):
  """Counts the pixels of `areas` that part two other labels: {label: pixels}.

  They lie within two pixels of two other labels, as the soft edges of objects
  do, or their painted outlines. Void is no label here.
  """
  found = np.zeros(256, np.int64)
  for here, around in borders.met(label, borders.WIDE):
    around = around.astype(np.int16)
    other = np.where((around == here) | (around == 255), 0, around + 1)
    high = other.max(0)
    low = np.where(other, other, 256).min(0)
    found += np.bincount(here[low < high], minlength=256)
  return {label: int(found[label]) for label in areas}


def prepare(builder, layout, raw, data_dir, *, skip_bad=False, **options):
  """Turns the owners' download into ArrayRecord under `data_dir`, once.

  The raw files are only read, a zip without unpacking it.

  Args:
    builder: subclass of SegmentationBuilder.
    layout: of a `Files`, makes an object with `ids`, `image(id)` uint8
      [H, W, 3], `label(id, (H, W))` uint8 [H, W], both of which may raise
      BadFileError, and `split(ids)`, which divides all of them: {'train':
      [...], 'test': [...]}, or more splits; all whose names start with 'test'
      are for testing. It may give the file, `encoded(id)`, that `image(id)`
      decodes, JPEG or PNG, to be kept as it is. It may say below which folder,
      `top`, its files lie, and raises ValueError where nothing of its form is
      there. Its methods are called by several threads. Those that follow each
      other of one file, `whole(id)`, are left to one of them, which may keep
      it. What it puts into a dict `said` is for the manifest.
    raw: the folder or zip.
    data_dir: folder of all prepared datasets.
    skip_bad: leave out images with a bad file instead of failing. The others
      are divided as if they were there.
    **options: what else the records depend on; None for what is not asked.

  Returns:
    (manifest, True), or at once (manifest, False) when it is there already.

  Raises:
    ValueError: without a usable download, naming every bad file, or where the
      dataset is there with other options.
    OSError: `data_dir` cannot be written.
  """
  place = prepared.folder(builder, data_dir)
  done = prepared.manifest(builder, data_dir)
  if done is not None:
    _check_options(place, done['options'], options)
    return done, False
  with download.Files(raw, builder.DOWNLOAD) as files:
    _check_place(place, files.root)
    if files.odd:
      logging.warning(
        '%d files are not used, their names are no text (UTF-8): %s',
        len(files.odd),
        download.few(files.odd),
      )
    found = layout(files)
    counts = np.atleast_1d(builder.COUNT or []).tolist()
    if counts and len(found.ids) not in counts:
      logging.warning(
        '%s: %d images are there, its owners publish %s',
        builder.name,
        len(found.ids),
        ' or '.join(map(str, counts)),
      )
    good, skipped = check(found, skip_bad=skip_bad)
    by_id = {one.id: one for one in good}
    splits = {
      name: [by_id[i] for i in ids if i in by_id]
      for name, ids in found.split(found.ids).items()
    }
    skipped |= _drop_copies(builder.name, splits)
    splits = {name: checked for name, checked in splits.items() if checked}
    tests = [name for name in splits if name.startswith('test')]
    if 'train' not in splits or not tests:
      counts = ', '.join(f'{len(made)} {name}' for name, made in splits.items())
      raise ValueError(
        f'{files} divides into {counts or "no"} images, {len(skipped)} being '
        'left out, and both train and test images are needed: '
        f'{builder.DOWNLOAD}'
      )
    near = copies.near(splits)
    said = {**getattr(found, 'said', {}), 'near': near}
    return write(builder, data_dir, splits, skipped, options, said), True


def _check_options(place, were, options):
  """Raises ValueError where records were made with other options."""
  for name, asked in options.items():
    if asked not in (None, were.get(name)):
      raise ValueError(
        f'{place} was prepared with {name} {were.get(name)}, not {asked}: '
        'remove that folder to prepare it again, or choose another --data_dir'
      )


def _check_place(place, root):
  """Raises an error, before any long work, where nothing can be written."""
  if root and any(p.exists() and p.samefile(root) for p in place.parents):
    raise ValueError(
      f'{place} would lie inside the raw folder {root}, which is only read: '
      'choose another --data_dir'
    )
  if place.exists():
    raise ValueError(
      f'{place} exists but holds no whole dataset: remove it and start again'
    )
  there = next(p for p in place.parents if p.exists())
  try:
    with tempfile.TemporaryFile(dir=there):
      pass
  except OSError as error:
    raise OSError(
      f'{place} cannot be made ({there}: {os.strerror(error.errno)}): choose '
      'another --data_dir'
    ) from error


def _drop_copies(name, splits):
  """Takes images out of other splits that are test images too; {id: reason}.

  A support set must not hold a test image, under whatever name. Blank images,
  such as the tiles beside a field, say nothing and stay.
  """
  tests = [x for x in splits if x.startswith('test')]
  tested = {one.digest: one.id for x in tests for one in splits[x]}
  tested.pop('', None)
  copies = {}
  for split in set(splits).difference(tests):
    twice = [one for one in splits[split] if one.digest in tested]
    splits[split] = [one for one in splits[split] if one.digest not in tested]
    for one in twice:
      other = tested[one.digest]
      copies[one.id] = f'its pixels are those of the test image {other}'
  if copies:
    logging.warning(
      '%s: %d training images are left out, being test images too: %s',
      name,
      len(copies),
      ', '.join(list(copies)[:5]),
    )
  return copies


def write(builder, data_dir, splits, skipped, options, said=None):
  """Writes checked images as ArrayRecord, all of them or nothing.

  Records and manifest are made in a folder of another name that is renamed
  when it is whole; what an interrupted run left of such folders is removed.

  Args:
    builder: subclass of SegmentationBuilder.
    data_dir: folder of all prepared datasets.
    splits: dict of split name -> list of Checked, none empty.
    skipped: dict of left out id -> reason, for the manifest.
    options: what the records depend on, for the manifest.
    said: what else the manifest is to say, a dict.

  Returns:
    The manifest, a dict.
  """
  place = prepared.folder(builder, data_dir)
  for left in place.parent.glob(f'incomplete.*_{place.name}'):
    logging.info('removing %s, left by an interrupted run', left)
    tfds.core.Path(left).rmtree()
  rows = [
    {
      'id': one.id,
      'split': split,
      'index': i,
      'size': list(one.size),
      'present': list(one.areas),
      'areas': list(one.areas.values()),
      'edges': [one.edges[label] for label in one.areas],
      'void': one.void,
      'digest': one.digest,
    }
    for split, checked in splits.items()
    for i, one in enumerate(checked)
  ]
  tfds.disable_progress_bar()  # ours counts images
  task = builder(data_dir=str(place.parents[1]))
  task.splits = splits
  task.manifest = {
    'name': builder.name,
    'classes': list(builder.CLASSES),
    'palette': [list(colour) for colour in builder.PALETTE],
    'options': options,
    'records': rows,
    'skipped': skipped,
    **(said or {}),
  }
  with (
    tempfile.TemporaryDirectory() as nothing,  # for downloads of TFDS: none
    contextlib.redirect_stdout(None),  # where it says that it downloads
  ):
    task.download_and_prepare(file_format='array_record', download_dir=nothing)
  return task.manifest
