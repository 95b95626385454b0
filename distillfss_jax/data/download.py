"""A download as its owners publish it: its files, and how they are decoded."""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import threading
import unicodedata
import zipfile
import zlib

import numpy as np
from PIL import Image
from tqdm import tqdm

# What the content of a picture may be, whatever its name says. Pillow reads
# more, of which some unpack to sizes that their heads do not tell.
FORMATS = ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP', 'GIF', 'PPM')
SUFFIXES = (
  '.png', '.jpg', '.jpeg', '.jfif', '.bmp', '.tif', '.tiff', '.webp', '.gif',
  '.ppm', '.pgm', '.pbm', '.pnm',
)  # fmt: skip
MEGAPIXELS = 200  # of a picture, if `allow` says nothing else
_LARGEST = 1 << 31  # bytes of a file that is read at once
_LONGEST = 1 << 26  # bytes of a list or table
_PIECE = 1 << 16  # bytes: packed zeros are unpacked no further than needed
_STRIP = 1 << 22  # pixels that are converted at a time
_ROOM = 1 << 26  # pixels that threads decode at the same time
_WORDS = {
  'UnidentifiedImageError': f'it is none of {", ".join(FORMATS)}',
  'MemoryError': 'there is not enough memory for it',
  'RecursionError': 'it is nested too deep',
  'UnicodeEncodeError': 'it has half a character, which is no text',
}
_TURNS = dict(
  enumerate(
    (
      Image.Transpose.FLIP_LEFT_RIGHT,
      Image.Transpose.ROTATE_180,
      Image.Transpose.FLIP_TOP_BOTTOM,
      Image.Transpose.TRANSPOSE,
      Image.Transpose.ROTATE_270,
      Image.Transpose.TRANSVERSE,
      Image.Transpose.ROTATE_90,
    ),
    2,
  )
)
_HALF = re.compile(r'\\u[dD][89a-fA-F]')  # maybe half a character

# Our own limit stands in `picture`, and names what changes it.
Image.MAX_IMAGE_PIXELS = None


class BadFileError(ValueError):
  """A file of a raw download that cannot be used; the message names it."""


class _Limit:
  """Pixels that a picture may have; for the process, as Pillow has its own."""

  pixels = MEGAPIXELS * 10**6


def allow(megapixels):
  """Sets how large a picture of a raw download may be."""
  if megapixels < 1:
    raise ValueError(f'--max_megapixels {megapixels} must be 1 or more')
  _Limit.pixels = megapixels * 10**6


def refuse_large(name, width, height):
  """Raises BadFileError for a picture with more pixels than `allow` says."""
  if width * height > _Limit.pixels:
    millions = math.ceil(width * height / 10**6)
    raise BadFileError(
      f'{name}: has {millions} megapixels ({width}x{height}), '
      f'{_Limit.pixels // 10**6} are the most: cut it into tiles, or allow '
      f'it with --max_megapixels {millions} (about 1 GB of memory for each '
      '100)'
    )


@contextlib.contextmanager
def guard(name, what):
  """Makes one BadFileError of whatever goes wrong with a file.

  Decoders raise what damaged bytes happen to lead them to: no list of errors
  would be complete.

  Args:
    name: of the file.
    what: is wrong then, as 'cannot be decoded'.
  """
  try:
    yield
  except BadFileError:
    raise
  except Exception as error:
    raise BadFileError(f'{name}: {what} ({reason(error)})') from error


def reason(error):
  """Why something failed, in a line of bounded length."""
  kind = type(error).__name__
  text = _WORDS.get(kind) or ' '.join(str(error)[:300].split())
  text = re.sub(r'<[\w.]+ object at 0x\w+>', 'it', text)
  text = text.encode('utf-8', 'backslashreplace').decode()
  said = isinstance(error, OSError | ValueError) or kind in _WORDS
  return text if said and text else f'{kind}: {text}'.removesuffix(': ')


def plain(text):
  """Text in Unicode's one form: names that look equal are equal."""
  return unicodedata.normalize('NFC', text)


class Files:
  """A download as its owners publish it: a folder, or a zip read in place.

  names: paths of its files, sorted, with '/'; hidden ones are left out.
  odd: those whose names are no text, as they can be shown; they are not used.
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
        with guard(path, 'is neither a folder nor a whole zip file'):
          self._zips.append(zipfile.ZipFile(self._path))
      except BadFileError as error:
        raise ValueError(f'{error}: {download}') from error
      names = [x for x in self._zips[0].namelist() if not x.endswith('/')]
    else:
      raise ValueError(f'{path} does not exist: {download}')
    names = sorted(x for x in names if not _hidden(x))
    self.names = tuple(x for x in names if _is_text(x))
    self.odd = tuple(ascii(x) for x in names if not _is_text(x))

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for archive in self._zips:
      archive.close()

  def __str__(self):
    return str(self._path)

  def read(self, name, most=_LARGEST):
    """The bytes of a file; BadFileError where that fails.

    Args:
      name: of the file.
      most: bytes that it may have, None for any number.
    """
    with guard(name, 'cannot be read'):
      most = self.size(name) if most is None else most
      if self.size(name) > most:
        raise ValueError(f'it has more than {most >> 20} MiB')
      if self.root is not None:
        return (self.root / name).read_bytes()
      with self._archive() as archive, archive.open(name) as member:
        # A zip may say that a member is smaller than it is.
        parts, left = [], most
        while part := member.read(min(_PIECE, left + 1)):
          parts.append(part)
          left -= len(part)
          if left < 0:
            raise ValueError(f'it has more than {most >> 20} MiB')
        return b''.join(parts)

  def text(self, name, errors='strict'):
    """A text file, UTF-8; BadFileError where it is none."""
    contents = self.read(name, _LONGEST)
    try:
      return contents.decode('utf-8-sig', errors)
    except UnicodeDecodeError as error:
      raise BadFileError(f'{name} is not UTF-8 text: {error}') from error

  def json(self, name, hook=None):
    """What a JSON file holds; BadFileError where it is none.

    Args:
      name: of the file.
      hook: what to make of each object of it, None to leave it a dict.
    """
    contents = self.read(name)
    with guard(name, 'is no JSON that can be read'):
      text = contents.decode(json.detect_encoding(contents))
      if _HALF.search(text):
        json.dumps(json.loads(text), ensure_ascii=False).encode()
      return json.loads(text, object_hook=hook)

  def size(self, name):
    """Bytes of a file."""
    if self.root is not None:
      return (self.root / name).stat().st_size
    with self._archive() as archive:
      return archive.getinfo(name).file_size

  def checksum(self, name):
    """CRC-32 of a file's contents: a zip has it written down."""
    with guard(name, 'cannot be read'):
      if self.root is None:
        with self._archive() as archive:
          return archive.getinfo(name).CRC
      found = 0
      with (self.root / name).open('rb') as file:
        while part := file.read(1 << 20):
          found = zlib.crc32(part, found)
      return found

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
    """An image file as uint8: [H, W, 3] in 'RGB', [H, W] in 'L'; `decode`."""
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


def _is_text(name):
  return not any('\ud800' <= letter <= '\udfff' for letter in name)


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


@contextlib.contextmanager
def picture(contents, name, *, upright=False, limited=True):
  """Opens an image file of a raw download: decoded, and whole.

  What is raised within is a BadFileError that names the file, too.

  Args:
    contents: bytes of the file.
    name: of the file.
    upright: turn it as its EXIF orientation says, as viewers do.
    limited: refuse what is larger than `allow` says.

  Yields:
    (Pillow image, whether it is turned).
  """
  with (
    guard(name, 'cannot be decoded'),
    Image.open(io.BytesIO(contents), formats=FORMATS) as found,
  ):
    width, height = found.size
    if limited:
      refuse_large(name, width, height)
    if (pages := _pages(found)) > 1:
      raise BadFileError(
        f'{name}: has {pages} pages (a stack, or an animation), and one is '
        'needed: save each as a file of its own'
      )
    if _deep(found):
      raise BadFileError(
        f'{name}: a colour {found.format} of 16 bits, of which 8 would be '
        'lost: save it with 8, scaled as it should look, or as grey'
      )
    _room.take(width * height)
    turned = upright and _orientation(found) in _TURNS
    found.load()
    # Pillow turns a TIFF itself when it loads it.
    turn = _TURNS.get(_orientation(found)) if upright else None
    kept = found if turn is None else found.transpose(turn)
    kept.format = found.format
    yield kept, turned


def _orientation(found):
  """The EXIF orientation, 1..8, or what else is written there."""
  said = found.getexif().get(0x0112, 1)
  return said if isinstance(said, int) else 1


def _pages(found):
  """How many pictures a file holds, without small copies of the first."""
  count = getattr(found, 'n_frames', 1)
  if found.format == 'MPO':
    return 1  # a phone keeps depth or light beside a photograph
  if found.format == 'TIFF' and count > 1:
    kinds = []
    for page in range(count):
      found.seek(page)
      kinds.append(found.tag_v2.get(254, 0))
    found.seek(0)
    # Bits: a smaller copy of another page, a page's mask of transparency.
    count = sum(not int(kind) & 5 for kind in kinds)
  return count


def _deep(found):
  """Whether Pillow would keep 8 of more bits and say nothing."""
  if found.mode[0] in 'IF':
    return False
  if found.format == 'PPM':
    return any(isinstance(x[3], tuple) and x[3][1] > 255 for x in found.tile)
  return any(re.search(r';(1[0-9]|32)', str(x[3])) for x in found.tile)


def pixels(found, change=np.asarray):
  """The pixels of a Pillow image, [H, W] or [H, W, C].

  They are taken in strips: Pillow's copies of a large image would add up.

  Args:
    found: the image.
    change: what to make of a strip, an image or an array of as many rows.
  """

  def part(top, rows):
    if rows == found.height:
      return change(found)
    return change(found.crop((0, top, found.width, top + rows)))

  return _joined(part, found.height, found.width)


def changed(array, change):
  """What `change` makes of an array [H, W, ...], in strips of rows."""
  return _joined(
    lambda top, rows: change(array[top : top + rows]), *array.shape[:2]
  )


def _joined(part, height, width):
  """Joins `part(first row, rows)`, arrays of that many rows."""
  most, whole = max(1, _STRIP // width), None
  for top in range(0, height, most):
    rows = min(most, height - top)
    found = np.asarray(part(top, rows))
    if rows == height:
      return found
    if whole is None:
      whole = np.empty((height, *found.shape[1:]), found.dtype)
    whole[top : top + rows] = found
  return whole


def strips(array):
  """Yields an array of an image in bands of rows, each of some megapixels."""
  rows = max(1, _STRIP // max(1, array.shape[1]))
  for top in range(0, len(array), rows):
    yield array[top : top + rows]


def count(labels):
  """How many pixels have each label, int64 [256], of uint8 [H, W]."""
  # In strips, as numpy counts 8 bytes to a pixel.
  return sum(np.bincount(x.ravel(), minlength=256) for x in strips(labels))


def decode(contents, name, mode, *, limited=True):
  """Decodes an image file to uint8: [H, W, 3] in 'RGB', [H, W] in 'L'.

  Alpha is dropped, not blended. Raises BadFileError where that fails, and where
  values of more than 8 bits would be cut; mode 'I' keeps them, int32.
  """
  with picture(contents, name, limited=limited) as (found, _):
    return _converted(found, name, mode)


def photo(contents, name):
  """Decodes an image as a viewer shows it: (uint8 [H, W, 3], if it is turned).

  Raises:
    BadFileError: as `decode`.
  """
  with picture(contents, name, upright=True) as (found, turned):
    return _converted(found, name, 'RGB'), turned


def _converted(found, name, mode):
  if found.mode[0] in 'IF' and (
    mode == 'RGB' or (mode == 'L' and found.getextrema()[1] > 255)
  ):
    # Pillow would clip the values to 255: a white image, without a word.
    raise BadFileError(
      f'{name}: has more than 8 bits a pixel (mode {found.mode}), save it '
      'with 8'
    )
  return pixels(found, lambda part: part.convert(mode))


def bar(items, what, total):
  """Shows how far a loop over images is."""
  return tqdm(items, desc=what, unit='image', mininterval=0.5, total=total)


class _Room:
  """Lets threads decode only so many pixels at once, however many they are.

  A thread that holds some already is not kept waiting: two that did would wait
  for each other.
  """

  def __init__(self, most):
    """Takes the number of pixels; one image may have more."""
    self._held, self._change, self._most = {}, threading.Condition(), most

  @contextlib.contextmanager
  def seat(self):
    """What this thread takes within is given back at the end."""
    me = threading.get_ident()
    with self._change:
      self._held[me] = 0
    try:
      yield
    finally:
      with self._change:
        del self._held[me]
        self._change.notify_all()

  def take(self, count):
    """Waits until there is room for as many pixels."""
    me = threading.get_ident()

    def free():
      held = sum(self._held.values())
      return self._held[me] or not held or held + count <= self._most

    with self._change:
      if me in self._held:
        self._change.wait_for(free)
        self._held[me] += count


_room = _Room(_ROOM)


def ahead(function, items, whole=lambda item: item):
  """Maps in threads, in order, only a few items ahead of who reads.

  Neighbours that are the same `whole` are left to one thread, one by one.
  """

  def together(group):
    with _room.seat():
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


def photos(found: Files, names, change) -> tuple[dict, list]:
  """Decodes images, with a bar: {name: what `change` makes}, and those bad."""
  made, bad = {}, []

  def read(name):
    try:
      pixels, _ = photo(found.read(name), name)
    except BadFileError:
      return name, None
    return name, change(pixels)

  for name, image in bar(ahead(read, names), 'reading', len(names)):
    if image is None:
      bad.append(name)
    else:
      made[name] = image
  return made, bad


def held_out(ids, share=0.2, seed=42):
  """Gives the test ids that the reference's rule picks, in its order.

  Parity: scikit-learn's train_test_split, which the reference calls with these
  values on ids in the order of a directory listing; ours are sorted.
  """
  ids = sorted(ids)
  shuffled = np.random.RandomState(seed).permutation(len(ids))
  return [ids[i] for i in shuffled[: math.ceil(share * len(ids))]]


def held_out_groups(group_of, share=0.2, seed=42):
  """Gives test ids as `held_out` does, each group whole on one side.

  Groups are taken in the order of the rule as long as they fit into the share;
  at least the smallest is.

  Args:
    group_of: dict of id -> group, of two groups or more.
    share: of the ids that are for testing, at most.
    seed: of the order.
  """
  members = {}
  for id_ in sorted(group_of):
    members.setdefault(group_of[id_], []).append(id_)
  most, test = math.ceil(share * len(group_of)), []
  for group in held_out(members, 1, seed):
    if len(test) + len(members[group]) <= most:
      test += members[group]
  return test or min(members.values(), key=len)


def same_size(name, mask, size):
  """Raises BadFileError where a mask is not of its image's size."""
  if mask.shape[:2] != tuple(size):
    sizes = [f'{w}x{h}' for h, w in (mask.shape[:2], size)]
    raise BadFileError(f'{name}: mask is {sizes[0]}, its image {sizes[1]}')
