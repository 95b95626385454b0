"""A download as its owners publish it: its files, and how they are decoded."""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import math
import os
import pathlib
import zipfile
import zlib

import numpy as np
from PIL import Image
from tqdm import tqdm


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


def bar(items, what, total):
  """Shows how far a loop over images is."""
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
