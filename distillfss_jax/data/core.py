"""What a dataset is, and how a raw download becomes one.

A dataset's file in this folder has `load(**kwargs) -> Dataset`; one that lies
on disk also has `prepare(raw, data_dir, ...)`, which turns its owners' download
into ArrayRecord once, through a TFDS builder. It says what a *layout* is there:
which ids there are, and how the files of one become an image and a label. The
rest is here. Beside the records lies a manifest with the id, the size and the
labels of every record, so that choosing a support set or ordering a test set
decodes nothing.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
import pathlib
import pkgutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from distillfss_jax import data

MANIFEST = 'manifest.json'
SHARD = 1 << 29  # bytes of decoded images in a file of records
_NOT_DATASETS = (
  'augment', 'core', 'episodes', 'masks', 'meaning', 'pipeline', 'support',
  'transforms',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Named classes and two random-access sources of records.

  A source has `len`, `ids` (tuple of str), `sizes` (int32 [N, 2], rows and
  columns), `present` (bool [N, n], which class occurs) and `[i]`, a record:
  'image' uint8 [H, W, 3], 'label' uint8 [H, W] (0 background, 1..n, 255 void)
  and 'id' str. Sources can be pickled.
  """

  name: str
  classes: tuple[str, ...]  # of labels 1..n
  palette: tuple[tuple[int, int, int], ...]  # of labels 0..n
  train: Sequence
  test: Sequence


class Chosen(Sequence):
  """A source with some of its labels, numbered anew; others are background."""

  def __init__(self, source, labels, *, void=True):
    """Takes a source, the labels to be 1, 2, ..., and whether void stays."""
    self._source = source
    self._table = np.zeros(256, np.uint8)
    self._table[255] = 255 if void else 0
    self._table[list(labels)] = np.arange(1, len(labels) + 1)
    self.ids, self.sizes = source.ids, source.sizes
    self.present = source.present[:, np.array(labels) - 1]

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    record = self._source[i]
    return {**record, 'label': self._table[record['label']]}


def select(dataset, labels):
  """A Dataset with some of the classes as labels 1, 2, ...; all its records.

  Args:
    dataset: a Dataset.
    labels: of the classes to keep, 1..n.
  """
  return Dataset(
    dataset.name,
    tuple(dataset.classes[i - 1] for i in labels),
    (dataset.palette[0], *(dataset.palette[i] for i in labels)),
    Chosen(dataset.train, labels),
    Chosen(dataset.test, labels),
  )


def without_void(dataset):
  """The same Dataset with background where it is void."""
  labels = range(1, len(dataset.classes) + 1)
  return dataclasses.replace(
    dataset,
    train=Chosen(dataset.train, labels, void=False),
    test=Chosen(dataset.test, labels, void=False),
  )


@dataclasses.dataclass(frozen=True)
class Pool:
  """What episodes are drawn from: images, and the classes to ask of each.

  source: of records, as in `Dataset`. classes: names, n of them. pairs: int32
  [e, 2], (image, class 0..n-1). values: int32 [n], the label of each class in
  the records.
  """

  source: Sequence
  classes: tuple[str, ...]
  pairs: np.ndarray
  values: np.ndarray


def pool(source, classes, labels, min_area=1, *, exclusive=False):
  """The images of a prepared source, with the classes that are large in them.

  Args:
    source: a `Prepared`.
    classes: names, n of them.
    labels: of these classes in the records, n of them.
    min_area: pixels of a class that an image must have at least.
    exclusive: without the images that also hold a class not in `labels`.

  Returns:
    A Pool whose pairs are sorted by image, then class.

  Raises:
    ValueError: where a class has no image.
  """
  labels = np.asarray(labels, np.int32)
  large = source.areas[:, labels - 1] >= max(min_area, 1)
  if exclusive:
    others = np.setdiff1d(np.arange(source.present.shape[1]), labels - 1)
    large &= ~source.present[:, others].any(1, keepdims=True)
  if not large.any(0).all():
    empty = [classes[i] for i in np.flatnonzero(~large.any(0))]
    raise ValueError(
      f'no image has {min_area} pixels of {", ".join(empty)}: take a smaller '
      'min_area, or fewer classes'
    )
  pairs = np.argwhere(large).astype(np.int32)
  return Pool(source, tuple(classes), pairs, labels)


def names():
  """Lists the datasets that exist."""
  modules = (module.name for module in pkgutil.iter_modules(data.__path__))
  return tuple(sorted(set(modules) - set(_NOT_DATASETS)))


def module(name):
  """Imports the file of a dataset; ValueError lists those that exist."""
  if name not in names():
    raise ValueError(f'no dataset {name!r}; there are: {", ".join(names())}')
  return importlib.import_module(f'{data.__name__}.{name}')


def load(name, /, **kwargs):
  """Loads a dataset by the name of its file."""
  return module(name).load(**kwargs)


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
      raise ValueError(unprepared(type(self), self.data_path.parents[1]))
    super()._download_and_prepare(*args, **kwargs)
    (self.data_path / MANIFEST).write_text(json.dumps(self.manifest, indent=1))

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
      self._bar = _bar([], f'writing {split}', len(self.splits[split]))
    encoded = ahead(lambda one: one.image(), checked, lambda one: one.whole)
    for i, (one, image) in enumerate(zip(checked, encoded, strict=True)):
      yield (
        first + i,
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


class BadFileError(ValueError):
  """A file of a raw download that cannot be used; the message names it."""


class Files:
  """A download as its owners publish it: a folder, or a zip read in place.

  names: paths of its files, sorted, with '/'; hidden ones are left out.
  root: the folder, or None for a zip.
  """

  def __init__(self, path, download):
    """Lists the files; ValueError where there are none, with `download`."""
    if not path:
      raise ValueError(f'--raw is not given: {download}')
    self._path = pathlib.Path(path).expanduser()
    self.root, self._zips = None, []  # open ones that nobody reads from
    if self._path.is_dir():
      self.root = self._path
      names = list(_below(self._path))
    elif self._path.is_file():
      try:
        self._zips.append(zipfile.ZipFile(self._path))
      except zipfile.BadZipFile as error:
        raise ValueError(
          f'{path} is neither a folder nor a whole zip file ({error}): '
          f'{download}'
        ) from error
      names = [x for x in self._zips[0].namelist() if not x.endswith('/')]
    else:
      raise ValueError(f'{path} does not exist: {download}')
    self.names = tuple(sorted(x for x in names if not _hidden(x)))

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for archive in self._zips:
      archive.close()

  def __str__(self):
    return str(self._path)

  def read(self, name):
    """The bytes of a file; BadFileError where that fails."""
    try:
      if self.root is not None:
        return (self.root / name).read_bytes()
      with self._archive() as archive:
        return archive.read(name)
    except (
      OSError,
      KeyError,
      RuntimeError,
      zipfile.BadZipFile,
      zlib.error,
    ) as error:
      # RuntimeError: a member that is encrypted or packed in an unknown way.
      raise BadFileError(f'{name}: cannot be read ({error})') from error

  def size(self, name):
    """Bytes of a file."""
    if self.root is not None:
      return (self.root / name).stat().st_size
    with self._archive() as archive:
      return archive.getinfo(name).file_size

  @contextlib.contextmanager
  def _archive(self):
    """An open zip that no other thread reads from: they would disturb it."""
    try:
      archive = self._zips.pop()
    except IndexError:
      archive = zipfile.ZipFile(self._path)
    try:
      yield archive
    finally:
      self._zips.append(archive)

  def decode(self, name, mode):
    """An image file as uint8: [H, W, 3] in 'RGB', [H, W] in 'L'."""
    return decode(self.read(name), name, mode)


def _below(folder, within='', above=()):
  """Yields the paths of all files of a folder, through links, too."""
  place = os.path.realpath(folder)
  if place in above:
    return  # a link to a folder above would lead round for ever
  with os.scandir(folder) as entries:
    for entry in sorted(entries, key=lambda entry: entry.name):
      if entry.is_dir():
        yield from _below(entry, f'{within}{entry.name}/', (*above, place))
      elif entry.is_file():
        yield f'{within}{entry.name}'


def _hidden(name):
  parts = name.split('/')
  return any(part.startswith('.') or part == '__MACOSX' for part in parts)


@dataclasses.dataclass(frozen=True)
class Checked:
  """One image of a raw download that was read through and found good."""

  id: str
  image: Callable  # () -> encoded, read again when it is written
  label: bytes  # PNG
  size: tuple[int, int]
  areas: dict[int, int]  # pixels of the labels that occur, but 0 and void
  digest: str  # of the image's pixels; '' where all are alike
  whole: str  # the file that it is cut from, or its id


def few(items, most=5):
  """Names a few of many, in a line."""
  items = [str(x) for x in items]
  more = [f'and {len(items) - most} more'] if len(items) > most else []
  return ', '.join([*items[:most], *more])


def png(array):
  """Encodes uint8 [H, W] or [H, W, 3] as PNG: fast, a little larger."""
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, 'PNG', compress_level=2)
  return buffer.getvalue()


def decode(contents, name, mode):
  """Decodes an image file to uint8: [H, W, 3] in 'RGB', [H, W] in 'L'.

  Alpha is dropped, not blended. Raises BadFileError where Pillow fails.
  """
  try:
    return np.asarray(Image.open(io.BytesIO(contents)).convert(mode))
  except (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
  ) as error:
    reason = str(error).replace('\n', ' ')
    raise BadFileError(f'{name}: cannot be decoded ({reason})') from error


def _bar(items, what, total):
  return tqdm(items, desc=what, unit='image', mininterval=0.5, total=total)


def ahead(function, items, whole=lambda item: item):
  """Maps in threads, in order, only a few items ahead of who reads.

  Neighbours that are the same `whole` are left to one thread, one by one.
  """

  def together(group):
    return [function(item) for item in group]

  workers = os.cpu_count() or 1
  waiting = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(workers) as threads:
    for _, group in itertools.groupby(items, whole):
      waiting.append(threads.submit(together, list(group)))
      if len(waiting) > 2 * workers:
        yield from waiting.popleft().result()
    while waiting:
      yield from waiting.popleft().result()


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
    except BadFileError as error:
      return str(error)
    counts = np.bincount(made.ravel(), minlength=256)
    areas = {int(v): int(counts[v]) for v in np.flatnonzero(counts[1:255]) + 1}
    digest = ''
    if (pixels != pixels[0, 0]).any():
      raw = np.ascontiguousarray(pixels)
      digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    read = functools.partial(encoded, id_)
    size = pixels.shape[:2]
    return Checked(id_, read, png(made), size, areas, digest, whole(id_))

  ids = layout.ids
  encoded = getattr(layout, 'encoded', lambda id_: png(layout.image(id_)))
  whole = getattr(layout, 'whole', lambda id_: id_)
  found = list(_bar(ahead(one, ids, whole), 'checking', len(ids)))
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
  return good, bad


def held_out(ids, share=0.2, seed=42):
  """Gives the test ids that the reference's rule picks, in its order.

  Parity: scikit-learn's train_test_split, which the reference calls with these
  values on ids in the order of a directory listing; ours are sorted.
  """
  ids = sorted(ids)
  shuffled = np.random.RandomState(seed).permutation(len(ids))
  return [ids[i] for i in shuffled[: math.ceil(share * len(ids))]]


def same_size(name, mask, size):
  """Raises BadFileError where a mask is not of its image's size."""
  if mask.shape[:2] != tuple(size):
    sizes = [f'{w}x{h}' for h, w in (mask.shape[:2], size)]
    raise BadFileError(f'{name}: mask is {sizes[0]}, its image {sizes[1]}')


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
      it.
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
  place = folder(builder, data_dir)
  done = manifest(builder, data_dir)
  if done is not None:
    _check_options(place, done['options'], options)
    return done, False
  with Files(raw, builder.DOWNLOAD) as files:
    _check_place(place, files.root)
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
    return write(builder, data_dir, splits, skipped, options), True


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
  return Dataset(builder.name, classes, palette, *sources)


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


def write(builder, data_dir, splits, skipped, options):
  """Writes checked images as ArrayRecord, all of them or nothing.

  Records and manifest are made in a folder of another name that is renamed
  when it is whole; what an interrupted run left of such folders is removed.

  Args:
    builder: subclass of SegmentationBuilder.
    data_dir: folder of all prepared datasets.
    splits: dict of split name -> list of Checked, none empty.
    skipped: dict of left out id -> reason, for the manifest.
    options: what the records depend on, for the manifest.

  Returns:
    The manifest, a dict.
  """
  place = folder(builder, data_dir)
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
  }
  with (
    tempfile.TemporaryDirectory() as nothing,  # for downloads of TFDS: none
    contextlib.redirect_stdout(None),  # where it says that it downloads
  ):
    task.download_and_prepare(file_format='array_record', download_dir=nothing)
  return task.manifest


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
      'image': decode(record['image'], f'image of {found}', 'RGB'),
      'label': decode(record['label'], f'label of {found}', 'L'),
      'id': found,
    }
