"""Folder: your own images and masks, as a dataset of any name.

    my_cells/             or a zip of it
      images/             png, jpg, jpeg, bmp, tif, tiff, webp; subfolders too
      masks/              or labels/ or annotations/: the same names, or with
                          _mask, _label, _segmentation or the like appended
      annotations.json    COCO polygons or RLE, in place of masks/
      classes.txt         optional, a class a line: `name`, `value name` for
                          grey masks, `r g b name` for colour masks
      train.txt test.txt  optional, an id a line; without them 20 % are test

What the masks mean is decided over all of them together, never per file: two
values are one class, small integers and indexed PNG are labels (255 is void),
colours are a class each on black. `summary` says what was found. The id of an
image is its path below images/, with dots, without the suffix. Images are
turned as their EXIF orientation says, which is how one sees them in a viewer.
"""

import collections
import colorsys
import io
import json
import logging
import pathlib
import re
import typing

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from tqdm import tqdm

from distillfss_jax.data import core, masks

SPLITS = ('files', 'held_out')
_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
_MASK_FOLDERS = ('masks', 'labels', 'annotations')
_ENDINGS = ('_mask', '-mask', '_segmentation', '_label', '_gt')
_ENDING = re.compile(rf'(.+)(?:{"|".join(_ENDINGS)})', re.IGNORECASE)
_COCO = 'annotations.json'
_MOST = 32  # values or colours that are still taken for classes
_KEPT = 4096  # colours of one mask that are looked at: far too many
_VOID = ('void', 'ignore')
_WHITE = 0xFFFFFF
_UNREADABLE = (
  OSError,
  SyntaxError,
  ValueError,
  Image.DecompressionBombError,
)


class Folder(core.SegmentationBuilder, skip_registration=True):
  """Images and masks of the user's own."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ()  # `Layout` finds both; when loaded they are the manifest's
  PALETTE = ()
  DOWNLOAD = (
    'put the images into images/ and a mask of the same name for each into '
    f'masks/ (or COCO polygons into {_COCO} beside images/), and give the '
    'folder that holds both, or a zip of it, as --raw'
  )


def builder(name):
  """Makes the builder class of one folder; ValueError where `name` is bad."""
  if not name:
    raise ValueError('--name is not given: how shall the dataset be called?')
  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise ValueError(
      f'--name {name!r} must be small letters, digits and _, and begin with a '
      'letter, as in my_cells'
    )
  if name in core.names():
    raise ValueError(f'--name {name!r} is another dataset: choose another name')
  body = {
    '__doc__': f'{name}: images and masks of a folder.',
    '__module__': __name__,
    'name': name,
  }
  return type(Folder)(name, (Folder,), body, skip_registration=True)


def load(data_dir='data', name=None):
  """Loads a prepared folder by the name it was given.

  Raises:
    FileNotFoundError: when it was not prepared.
  """
  made = builder(name)
  if core.manifest(made, data_dir) is None:
    raise FileNotFoundError(
      f'{name} is not prepared in {str(data_dir)!r}: run python -m '
      f'distillfss_jax.prepare --dataset folder --name {name} '
      f'--raw <folder or zip> --data_dir {data_dir}'
    )
  return core.load_prepared(made, data_dir)


def prepare(raw, data_dir, *, name=None, split=None, skip_bad=False):
  """Turns the folder into ArrayRecord; see `core.prepare`.

  The manifest of a first call also has 'pixels', a count of each label, which
  `summary` shows.

  Args:
    raw: the folder or zip.
    data_dir: folder of all prepared datasets.
    name: of the dataset that is made; has to be given.
    split: 'files' is train.txt and test.txt, 'held_out' a random 20 % for
      testing; None is 'files' where there are any.
    skip_bad: leave out images with a bad file instead of failing.
  """
  if split not in (None, *SPLITS):
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  made, found = builder(name), []

  def layout(files):
    found.append(Layout(files, made, split))
    return found[0]

  manifest, new = core.prepare(made, layout, raw, data_dir, skip_bad=skip_bad)
  if new:
    manifest = {**manifest, 'pixels': found[0].pixels(manifest)}
  return manifest, new


# ---------------------------------------------------------------- the layout


class Layout:
  """images/ with masks/ or annotations.json, at the top or one folder down.

  `images` and `keys` map ids to file names and to paths without suffix.
  """

  def __init__(self, files, made, split=None):
    """Finds all and decides what the masks mean, which `made` is told."""
    self._files, self._counts, self._turned = files, {}, set()
    self.top, folder, masks = _find_top(files)
    prefix = f'{self.top}/' if self.top else ''
    self.images, self.keys = _images(files, f'{prefix}{folder}/')
    self.ids = sorted(self.images)
    known = self._known()
    self._parts = _parts(files, prefix, known, split)
    listed = _read_classes(files, f'{prefix}classes.txt')
    if masks is None:
      self._masks = Coco(files, f'{prefix}{_COCO}', known, self.images)
      if listed:
        logging.warning('classes.txt is not used: %s names the classes', _COCO)
    else:
      self._masks = Masks(
        files, f'{prefix}{masks}/', self.images, self.keys, listed
      )
    made.CLASSES, made.PALETTE = self._masks.classes, self._masks.palette

  def _known(self):
    """What an image may be called in a list: {as written: id}."""
    known = {}
    for id_, name in self.images.items():
      key, suffix = self.keys[id_], pathlib.PurePosixPath(name).suffix
      base = pathlib.PurePosixPath(name).parts[bool(self.top) :]
      for text in (id_, key, id_ + suffix, key + suffix, '/'.join(base)):
        known.setdefault(text, id_)
    return known

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    name = self.images[id_]
    pixels, turned = _decode_image(self._files.read(name), name)
    if turned:
      self._turned.add(id_)
    return pixels

  def label(self, id_, size):
    """Reads the labels of an id, uint8 [H, W], and counts them."""
    label = self._masks.label(id_, size)
    self._counts[id_] = np.bincount(label.ravel(), minlength=256)
    return label

  def pixels(self, manifest):
    """Counts the pixels of each label in a manifest's records."""
    counts = sum(self._counts[row['id']] for row in manifest['records'])
    return {i: int(counts[i]) for i in np.flatnonzero(counts).tolist()}

  def split(self, ids):
    """Divides the ids; ValueError where they are fewer than two."""
    if self._turned:
      logging.warning(
        '%d images are turned as their EXIF orientation says (%s): masks must '
        'be drawn on what a viewer shows',
        len(self._turned),
        _few(sorted(self._turned)),
      )
    if self._parts is None:
      if len(ids) < 2:
        raise ValueError(
          f'{len(ids)} image is too few: one for train and one for test are '
          'the least'
        )
      test = core.held_out(ids)
      train = sorted(set(ids).difference(test))
    else:
      there = set(ids)
      train, test = ([i for i in part if i in there] for part in self._parts)
    return {'train': train, 'test': test}


def _few(items, most=5):
  """Names a few of many, in a line."""
  items = [str(x) for x in items]
  more = [f'and {len(items) - most} more'] if len(items) > most else []
  return ', '.join([*items[:most], *more])


def _is_image(name):
  return name.lower().endswith(_SUFFIXES)


def _find_top(files):
  """Finds (folder of all, images folder, masks folder or None for COCO)."""
  inside = collections.defaultdict(lambda: collections.defaultdict(set))
  for name in files.names:
    parts = name.split('/')
    for depth in (0, 1):
      if len(parts) > depth + 1 and _is_image(name):
        inside['/'.join(parts[:depth])]['folders'].add(parts[depth])
      if len(parts) == depth + 1 and parts[depth] == _COCO:
        inside['/'.join(parts[:depth])]['coco'].add(_COCO)
  found = []
  for top, what in inside.items():
    folders = sorted(what['folders'])
    images = [x for x in folders if x.lower() == 'images']
    masks = [x for x in folders if x.lower() in _MASK_FOLDERS]
    if len(images) == 1 and (masks or what['coco']):
      found.append((top, images[0], masks, bool(what['coco'])))
  # The folder itself comes first, what lies in it is then its own affair.
  found = [x for x in found if not x[0]] or sorted(found)
  if not found:
    raise ValueError(
      f'{files} has no images/ with masks/ or {_COCO} beside it, at its top or '
      f'one folder down ({len(files.names)} files are there: '
      f'{_few(files.names, 3) or "none"}): {Folder.DOWNLOAD}'
    )
  if len(found) > 1:
    raise ValueError(
      f'{files} has {len(found)} folders with images/ and masks/: '
      f'{_few(x[0] for x in found)}. Give one of them as --raw, or put all '
      f'into one, as in images/{found[0][0]}/ and masks/{found[0][0]}/, with '
      'train.txt and test.txt beside them'
    )
  top, images, masks, coco = found[0]
  if len(masks) > 1:
    raise ValueError(
      f'{files} has {" and ".join(f"{x}/" for x in masks)}: which are the '
      'masks? Leave one of them beside images/'
    )
  if masks and coco:
    logging.warning('%s is not used: there is %s/', _COCO, masks[0])
  return top, images, masks[0] if masks else None


def _key(name, prefix):
  """A path below `prefix` without its suffix."""
  return name.removeprefix(prefix).rpartition('.')[0]


def _images(files, prefix):
  """Lists the images: ({id: file name}, {id: path without suffix})."""
  names, keys, other = {}, {}, []
  for name in files.names:
    if not name.startswith(prefix):
      continue
    if not _is_image(name):
      other.append(name)
      continue
    key = _key(name, prefix)
    id_ = key.replace('/', '.')
    if id_ in names:
      raise ValueError(
        f'{names[id_]} and {name} would both be called {id_!r}: rename one'
      )
    names[id_], keys[id_] = name, key
  if other:
    logging.warning(
      '%d files in %s are not used (%s): images are %s',
      len(other),
      prefix,
      _few(other),
      ', '.join(x[1:] for x in _SUFFIXES),
    )
  return names, keys


def _text(files, name):
  """The lines of a text file, stripped, or None where there is no such."""
  if name not in files.names:
    return None
  try:
    text = files.read(name).decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{name} is not UTF-8 text: {error}') from error
  return [line.strip() for line in text.splitlines()]


def _parts(files, prefix, known, split):
  """Reads train.txt and test.txt: (train ids, test ids), or None."""
  lists = {}
  for part in ('train', 'test'):
    name = f'{prefix}{part}.txt'
    lines = _text(files, name)
    if lines is None or split == 'held_out':
      continue
    lines = list(dict.fromkeys(line for line in lines if line))
    unknown = [line for line in lines if line not in known]
    if unknown:
      raise ValueError(
        f'{name} names {len(unknown)} images that are not in images/: '
        f'{_few(unknown)}'
      )
    lists[part] = list(dict.fromkeys(known[line] for line in lines))
  if 'test' not in lists:
    if lists or split == 'files':
      raise ValueError(
        f'{prefix}test.txt is missing: it lists the test images, an id a line; '
        '--split held_out does without'
      )
    return None
  every, test = set(known.values()), lists['test']
  train = lists.get('train', sorted(every.difference(test)))
  both = set(train) & set(test)
  if both:
    raise ValueError(
      f'{len(both)} images are in both {prefix}train.txt and test.txt: '
      f'{_few(sorted(both))}'
    )
  for part, ids in (('train', train), ('test', test)):
    if not ids:
      raise ValueError(
        f'{prefix}train.txt and test.txt leave no image to {part}'
      )
  rest = sorted(every.difference(train, test))
  if rest:
    logging.warning(
      '%d images are in neither train.txt nor test.txt and are left out: %s',
      len(rest),
      _few(rest),
    )
  return train, test


def _decode_image(contents, name):
  """Decodes an image: (uint8 [H, W, 3], whether EXIF says it is turned)."""
  try:
    with Image.open(io.BytesIO(contents)) as picture:
      mode = picture.mode
      turned = picture.getexif().get(0x0112, 1) in range(2, 9)
      upright = ImageOps.exif_transpose(picture) if turned else picture
      pixels = np.asarray(upright.convert('RGB'))
  except _UNREADABLE as error:
    reason = str(error).replace('\n', ' ')
    raise core.BadFileError(f'{name}: cannot be decoded ({reason})') from error
  if mode.startswith(('I', 'F')):
    # Pillow would clip the values to 255: a white image, without a word.
    raise core.BadFileError(
      f'{name}: has more than 8 bits a pixel (mode {mode}), save it with 8'
    )
  return pixels, turned


# ----------------------------------------------------------------- classes.txt


class _Listed(typing.NamedTuple):
  """What classes.txt says: of 'name', 'value' or 'colour' lines.

  table: value, or colour as 0xRRGGBB, to label; empty for names alone.
  """

  kind: str
  names: tuple
  table: dict


_COLOUR_LINE = re.compile(r'(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,:]+(\S.*)')
_VALUE_LINE = re.compile(r'(\d+)[\s,:]+(\S.*)')


def _parse(line):
  """One line of classes.txt: (kind, value or colour or None, name)."""
  if found := _COLOUR_LINE.fullmatch(line):
    r, g, b = map(int, found.groups()[:3])
    if max(r, g, b) > 255:
      raise ValueError(f'classes.txt: no colour in {line!r}: 0 to 255 each')
    return 'colour', r << 16 | g << 8 | b, found[4]
  if found := _VALUE_LINE.fullmatch(line):
    return 'value', int(found[1]), found[2]
  return 'name', None, line


def _read_classes(files, name):
  """Reads classes.txt, or None where there is none."""
  lines = _text(files, name)
  if lines is None:
    return None
  lines = [re.sub(r'(^|\s)#.*', '', line).strip() for line in lines]
  lines = [line for line in lines if line]
  parsed = [_parse(line) for line in lines]
  kinds = {kind for kind, _, _ in parsed}
  if len(kinds) != 1:
    odd = {kind: line for (kind, _, _), line in zip(parsed, lines, strict=True)}
    raise ValueError(
      f'{name} must have lines of one form, `name`, `value name` or `r g b '
      f'name`, and has {" and ".join(map(repr, odd.values())) or "none"}'
    )
  kind = kinds.pop()
  names, table = [], {}
  for number, (_, key, text) in enumerate(parsed):
    small = text.lower().strip('_')
    if kind == 'name':
      # Lists of labels often begin with the background, which has label 0.
      if number == 0 and small == 'background':
        continue
      if number == len(parsed) - 1 and small in _VOID:
        continue
      names.append(text)
      continue
    if key in table:
      raise ValueError(f'{name}: {lines[number]!r}: its {kind} is there twice')
    if small == 'background':
      table[key] = 0
    elif small in _VOID:
      table[key] = 255
    elif key == 0:
      raise ValueError(
        f'{name}: {lines[number]!r}: 0 and black are background and no class'
      )
    else:
      names.append(text)
      table[key] = len(names)
  twice = [x for x, n in collections.Counter(names).items() if n > 1]
  if twice or not 1 <= len(names) <= 254:
    raise ValueError(
      f'{name} names {len(names)} classes'
      + (
        f', {_few(twice)} more than once' if twice else ': 1 to 254 are needed'
      )
    )
  return _Listed(kind, tuple(names), table)


# -------------------------------------------------------------- the mask files


class _Mask(typing.NamedTuple):
  """A decoded mask as its file has it.

  values: int [H, W]: grey values, indices, or colours as 0xRRGGBB.
  step: what Pillow multiplied the values of 2 and 4 bits with.
  """

  kind: str  # 'grey', 'index' or 'colour'
  values: np.ndarray
  palette: np.ndarray | None = None  # int [256] of 0xRRGGBB
  step: int = 1
  lossy: bool = False


class _Seen(typing.NamedTuple):
  """The distinct values of one mask, and the pixels that have them."""

  name: str
  mask: _Mask  # its values are the distinct ones, [v]
  counts: np.ndarray


class _Coding(typing.NamedTuple):
  """What the masks mean: values of a kind, and the label of each.

  palette: colours of labels 0..n as 0xRRGGBB, or None for colours of ours.
  """

  kind: str
  step: int
  classes: tuple
  table: dict | None  # None: whatever is 128 or more has label 1
  palette: tuple | None = None


def _decode_mask(contents, name):
  """Decodes a mask without changing its values; see `_Mask`."""
  png = contents[:8] == b'\x89PNG\r\n\x1a\n' and len(contents) > 25
  depth, sort = (contents[24], contents[25]) if png else (8, None)
  if depth == 16 and sort in (2, 4, 6):
    # Pillow keeps the upper 8 bits of these, and says nothing.
    raise core.BadFileError(
      f'{name}: a colour PNG of 16 bits, save it with 8 or as grey'
    )
  try:
    with Image.open(io.BytesIO(contents)) as picture:
      lossy = picture.format in ('JPEG', 'MPO') or contents[12:16] == b'VP8 '
      mode, palette = picture.mode, None
      if mode in ('P', 'PA'):
        palette = np.zeros((256, 3), int)
        colours = np.array(picture.getpalette('RGB'), int).reshape(-1, 3)[:256]
        palette[: len(colours)] = colours
        palette = _pack(palette)
      elif mode not in ('1', 'L', 'LA', 'RGB', 'RGBA') and mode[0] not in 'IF':
        picture = picture.convert('RGB')
      pixels = np.asarray(picture)
  except _UNREADABLE as error:
    reason = str(error).replace('\n', ' ')
    raise core.BadFileError(f'{name}: cannot be decoded ({reason})') from error
  if mode == '1':
    pixels = pixels * np.uint8(255)
  if mode == 'F' and not np.array_equal(pixels, np.rint(pixels)):
    raise core.BadFileError(f'{name}: values are fractions, not labels')
  pixels = pixels.astype(np.int64)
  if mode in ('LA', 'PA', 'RGBA'):
    pixels = _opaque(pixels)
  if palette is not None:
    return _Mask('index', pixels, palette)
  if pixels.ndim == 3:
    # Lossy colours of a grey mask are off grey by rounding.
    if lossy and np.ptp(pixels, axis=2).max(initial=0) <= 8:
      return _Mask('grey', pixels[..., 1], lossy=True)
    return _Mask('colour', _pack(pixels), lossy=lossy)
  step = {2: 85, 4: 17}.get(depth, 1) if sort == 0 else 1
  return _Mask('grey', pixels, step=step, lossy=lossy)


def _opaque(pixels):
  """Drops alpha; what is seen through is background, unless all is."""
  alpha, pixels = pixels[..., -1:], pixels[..., :-1]
  if alpha.any():
    pixels = np.where(alpha > 0, pixels, 0)
  return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _pack(colours):
  """Colours [..., 3] as 0xRRGGBB [...]."""
  return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def _unpack(colour):
  return int(colour) >> 16, int(colour) >> 8 & 255, int(colour) & 255


def _view(mask, kind, step=1):
  """The values of a mask as those of another kind: as drawn."""
  values = mask.values
  if mask.kind == kind or not values.any():
    return values // step if kind == 'grey' else values
  if mask.kind == 'index':
    drawn = mask.palette[values]
    return drawn if kind == 'colour' else drawn & 255
  return values * 0x010101 if kind == 'colour' else values & 255


def _is_grey(colours):
  return all(len(set(_unpack(c))) == 1 for c in colours)


class Masks:
  """masks/: a file per image, and what their values mean."""

  def __init__(self, files, prefix, images, keys, listed):
    """Reads all masks once to decide; ValueError where that fails."""
    self._files, self._prefix = files, prefix
    self._images, self._keys = images, keys
    self._of, orphans = _match(files, prefix, keys)
    if not self._of:
      id_ = min(images)
      raise ValueError(
        f'none of the {len(images)} images has a mask in {prefix} '
        f'(there is {_few(orphans, 3)}): {self._missing(id_)}'
      )
    if orphans:
      logging.warning(
        '%d masks have no image and are not used: %s',
        len(orphans),
        _few(orphans),
      )
    seen = self._survey()
    coding = _decide(seen, listed) if seen else _Coding('grey', 1, ('?',), {})
    self._coding, self.classes = coding, coding.classes
    self.palette = _palette(coding)
    if coding.table is not None:
      self._values = np.array(sorted(coding.table), np.int64)
      labels = [coding.table[v] for v in self._values]
      self._labels = np.array(labels, np.uint8)

  def _missing(self, id_):
    stem = f'{self._prefix}{self._keys[id_]}'
    return (
      f'no mask for {self._images[id_]}: expected {stem}.png, '
      f'{stem}_mask.png or the like'
    )

  def _survey(self):
    seen = []
    for names in tqdm(
      [x for x in self._of.values() if len(x) == 1],
      desc='reading masks',
      unit='mask',
      mininterval=0.5,
    ):
      try:
        mask = _decode_mask(self._files.read(names[0]), names[0])
      except core.BadFileError:
        continue  # it is named when all images are checked
      values, counts = _count(mask.values)
      if len(values) > _KEPT:  # too many in any case: keep the frequent ones
        most = np.sort(np.argsort(-counts, kind='stable')[:_KEPT])
        values, counts = values[most], counts[most]
      seen.append(_Seen(names[0], mask._replace(values=values), counts))
    return seen

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W]."""
    names = self._of.get(id_)
    if not names:
      raise core.BadFileError(self._missing(id_))
    if len(names) > 1:
      raise core.BadFileError(
        f'{self._images[id_]} has {len(names)} masks: {", ".join(names)}'
      )
    mask = _decode_mask(self._files.read(names[0]), names[0])
    core.same_size(names[0], mask.values, size)
    values = _view(mask, self._coding.kind, self._coding.step)
    if self._coding.table is None:
      return (values >= 128).astype(np.uint8)
    return self._labels[np.searchsorted(self._values, values)]


def _count(values):
  """Distinct values, sorted, and how often; by runs: masks have few."""
  flat = values.ravel()
  starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
  lengths = np.diff(starts, append=flat.size)
  found, which = np.unique(flat[starts], return_inverse=True)
  return found, np.bincount(which, lengths).astype(np.int64)


def _match(files, prefix, keys):
  """Finds the masks: ({id: file names}, masks without an image)."""
  exact, ended = (collections.defaultdict(list) for _ in range(2))
  for name in files.names:
    if name.startswith(prefix) and _is_image(name):
      key = _key(name, prefix)
      exact[key].append(name)
      if found := _ENDING.fullmatch(key):
        ended[found[1]].append(name)
  taken = {name for key in keys.values() for name in exact.get(key, ())}
  of = {}
  for id_, key in keys.items():
    names = exact.get(key) or [x for x in ended.get(key, ()) if x not in taken]
    if names:
      of[id_] = names
  used = {name for names in of.values() for name in names}
  every = [name for names in exact.values() for name in names]
  return of, sorted(set(every) - used)


# ---------------------------------------------------- what mask values mean


def _decide(seen, listed):
  """Decides what the masks mean, over all of them.

  Args:
    seen: list of _Seen.
    listed: _Listed, or None.

  Returns:
    _Coding.

  Raises:
    ValueError: where they mean nothing that is known here.
  """
  used = [x for x in seen if x.mask.values.any()]
  if not used:
    raise ValueError(
      f'all {len(seen)} masks are empty: every pixel of them is 0 or black'
    )
  kind = _kind(used, listed)
  steps = {x.mask.step for x in used}
  # Files of 2 or 4 bits that are alike hold labels, among others grey values.
  step = steps.pop() if len(steps) == 1 and kind == 'grey' else 1
  total, where = collections.Counter(), {}
  for one in seen:
    values = _view(one.mask, kind, step).tolist()
    for value, count in zip(values, one.counts.tolist(), strict=True):
      total[value] += count
      where.setdefault(value, one.name)
  decide = _colours if kind == 'colour' else _values
  coding = decide(kind, total, where, used, listed)
  if coding.table is not None:
    missing = set(coding.table.values()) - {
      label for value, label in coding.table.items() if value in total
    }
    if missing := sorted(missing - {0, 255}):
      logging.warning(
        '%d of %d classes are in no mask: %s',
        len(missing),
        len(coding.classes),
        _few(coding.classes[i - 1] for i in missing),
      )
    for value in total:
      coding.table.setdefault(value, 0)
  if listed and listed.kind == 'colour' and coding.palette is None:
    # Colours beside a label map are how its classes are to be drawn.
    coding = coding._replace(palette=_listed_palette(listed))
  return coding._replace(step=step)


def _kind(used, listed):
  """Whether values, indices or colours tell the classes."""
  kinds = {x.mask.kind for x in used}
  drawn = [_view(x.mask, 'colour') for x in used]
  colours = set(np.unique(np.concatenate(drawn)).tolist()) - {0}
  if listed and listed.kind == 'colour' and colours <= set(listed.table):
    return 'colour'
  if kinds == {'index'}:
    return _kind_of_indexed(used, listed, colours)
  if kinds == {'grey'}:
    return 'grey'
  if _is_grey(colours):
    return 'grey'
  # Programs save a mask with little colour as grey; others mix in labels.
  of_colour = [
    d for x, d in zip(used, drawn, strict=True) if x.mask.kind != 'grey'
  ]
  known = set(np.unique(np.concatenate(of_colour)).tolist()) | {0}
  for one, values in zip(used, drawn, strict=True):
    if one.mask.kind == 'grey' and not set(values.tolist()) <= known:
      other = next(x for x in used if x.mask.kind != 'grey')
      raise ValueError(
        f'masks are of two kinds: {one.name} is grey and {other.name} has '
        'colours; save all of them as one kind'
      )
  return 'colour'


def _kind_of_indexed(used, listed, colours):
  """Indices, or colours where programs gave each file indices of its own."""
  first = {}  # index -> (colour, name)
  for one in used:
    for index in one.mask.values.tolist():
      colour = int(one.mask.palette[index])
      before = first.setdefault(index, (colour, one.name))
      if before[0] == colour or (listed and listed.kind != 'colour'):
        continue
      if len(colours | {0}) <= len(first.keys() | {0}):
        logging.warning(
          'index %d has another colour in %s than in %s: colours are taken '
          'for classes, not indices',
          index,
          one.name,
          before[1],
        )
        return 'colour'
      raise ValueError(
        f'index {index} is {_unpack(before[0])} in {before[1]} and '
        f'{_unpack(colour)} in {one.name}: are indices or colours the classes? '
        'Say so in classes.txt beside images/, with lines `value name` or '
        '`r g b name`'
      )
  return 'index'


def _values(kind, total, where, used, listed):
  """Grey values or indices: binary, a label map, or a class a value."""
  values = sorted(set(total) - {0})
  rest = [v for v in values if v != 255]
  names = listed.names if listed else ()
  by_value = listed is not None and listed.kind == 'value'
  # Names that fit make one value the label that it says.
  if len(values) == 1 and not (
    by_value or (len(names) > 1 and 1 <= values[0] <= len(names))
  ):
    names = _fit(names, 1, f'hold one value besides 0, {values[0]}')
    return _Coding(
      kind,
      1,
      names or ('foreground',),
      {values[0]: 1},
      _own(used, kind, values),
    )
  lossy = kind == 'grey' and any(x.mask.lossy for x in used)
  many = kind == 'grey' and len(total) > _MOST and not by_value
  if lossy or (many and not _is_label_map(rest, names)):
    return _soft(total, where, used, names, lossy)
  if by_value:
    return _by_value(kind, values, where, used, listed)
  if kind == 'index' or _is_label_map(rest, names):
    return _label_map(kind, values, rest, where, used, names)
  names = _fit(names, len(values), f'hold the values {_few(values, _MOST)}')
  logging.info(
    'masks hold the values %s: each is a class, in this order',
    _few(values, _MOST),
  )
  names = names or tuple(f'value{v}' for v in values)
  return _Coding(kind, 1, names, {v: i for i, v in enumerate(values, 1)})


def _fit(names, count, what):
  """Gives names that are none or as many as classes; else a ValueError."""
  if names and len(names) != count:
    raise ValueError(
      f'classes.txt names {len(names)} classes ({_few(names)}), but the masks '
      f'{what}: {count} are needed'
    )
  return names


def _is_label_map(rest, names):
  """Whether values besides 0 and 255 look like labels 1..k."""
  if not rest or rest[0] < 1 or rest[-1] > 254:
    return False
  if names:
    return rest[-1] <= len(names)
  # Grey ramps and soft edges reach up to white, and do not begin with 1, 2.
  return rest[-1] <= _MOST or (rest[-1] < 224 and 2 * len(rest) >= rest[-1])


def _label_map(kind, values, rest, where, used, names):
  count = rest[-1]
  if names and len(names) < count:
    raise ValueError(
      f'classes.txt names {len(names)} classes ({_few(names)}), but the masks '
      f'hold labels up to {count} (in {where[count]})'
    )
  if kind == 'grey' and len(rest) == 1 and len(values) == 2:
    # Masks of 0 and 1 beside masks of 0 and 255 are of two sources.
    held = [set(_view(x.mask, 'grey').tolist()) for x in used]
    if not any({*values} <= x for x in held):
      raise ValueError(
        f'some masks hold 0 and {rest[0]} ({where[rest[0]]}), others 0 and 255 '
        f'({where[255]}): save all alike, or, if 255 is void, write '
        f'`{rest[0]} <name>` into classes.txt'
      )
  names = names or tuple(f'class{i}' for i in range(1, count + 1))
  table = {i: i for i in range(len(names) + 1)}
  table[255] = 255
  own = _own(used, kind, range(1, len(names) + 1))
  return _Coding(kind, 1, names, table, own)


def _by_value(kind, values, where, used, listed):
  odd = [v for v in values if v not in listed.table and v != 255]
  if odd:
    raise ValueError(
      f'classes.txt names {len(listed.names)} classes of the values '
      f'{_few(listed.table)}, but the masks hold {len(values)} values besides '
      f'0, also {_few(odd)} (in {where[odd[0]]})'
    )
  table = {255: 255, **listed.table}
  by_label = sorted(
    (label, value) for value, label in listed.table.items() if 0 < label < 255
  )
  own = _own(used, kind, [value for _, value in by_label])
  return _Coding(kind, 1, listed.names, table, own)


def _own(used, kind, values):
  """The colours that indexed masks give to 0 and `values`, or None."""
  values = [0, *values]
  if kind != 'index' or max(values) > 255:
    return None
  for one in used:
    colours = tuple(int(one.mask.palette[v]) for v in values)
    if len(set(colours)) == len(colours):
      return colours
  return None


def _soft(total, where, used, names, lossy):
  """Masks with soft edges or JPEG noise: binary, or a ValueError."""
  pixels = sum(total.values())
  low = sum(n for v, n in total.items() if v < 32)
  high = sum(n for v, n in total.items() if 224 <= v <= 255)
  if lossy:
    name = next(x.name for x in used if x.mask.lossy)
    what = f'values that lossy compression changed, as in {name}'
  else:
    what = f'{len(total)} grey values, as in {where[max(total)]}'
  if not (low and high and low + high >= 0.9 * pixels and max(total) <= 255):
    common = [v for v, _ in total.most_common(5)]
    raise ValueError(
      f'masks hold {what} (most often {_few(sorted(common))}), which are '
      'neither black and white nor labels: save them as PNG with a value per '
      f'class, at most {_MOST}, or as labels 1, 2, ... named in classes.txt; '
      'where every object has a number, give all objects of a class the same'
    )
  names = _fit(names, 1, f'hold {what}, and are taken for black and white')
  logging.warning(
    'masks hold %s: taken for black and white, 128 and more is %s',
    what,
    (names or ('foreground',))[0],
  )
  return _Coding('grey', 1, names or ('foreground',), None)


def _colours(kind, total, where, used, listed):
  """Colours: a class each, black is background."""
  found = sorted((c for c in total if c), key=lambda c: (-total[c], c))
  if listed and listed.kind == 'colour':
    odd = [c for c in found if c not in listed.table]
    if odd:
      raise ValueError(
        f'classes.txt names {len(listed.names)} classes, but the masks hold '
        f'{len(found)} colours besides black, also '
        f'{_few(map(_unpack, odd))} (in {where[odd[0]]})'
      )
    own = _listed_palette(listed)
    return _Coding(kind, 1, listed.names, dict(listed.table), own)
  if len(found) > _MOST:
    lossy = [x.name for x in used if x.mask.lossy]
    raise ValueError(
      f'masks hold {len(found)} colours besides black, {_MOST} are the most '
      f'(most often {_few(map(_unpack, found), 3)}): '
      + (f'{lossy[0]} is lossy, ' if lossy else 'their edges may be soft, ')
      + 'save masks as PNG with exactly one colour per class'
    )
  names = listed.names if listed else ()
  if listed and (len(names) > 1 or len(found) > 1):
    raise ValueError(
      f'classes.txt names {len(names)} classes and the masks hold '
      f'{len(found)} colours: write `r g b name` for each of '
      f'{_few(map(_unpack, found), _MOST)}'
    )
  if not names and len(found) == 1:
    names = ('foreground',)
  if not names:
    names = tuple('rgb_{}_{}_{}'.format(*_unpack(c)) for c in found)
    logging.info('masks hold %d colours: each is a class', len(found))
  table = {c: i for i, c in enumerate(found, 1)}
  return _Coding(kind, 1, names, table, (0, *found))


def _listed_palette(listed):
  """The colours of labels 0..n of classes.txt, black where it has no 0."""
  of = {label: colour for colour, label in reversed(listed.table.items())}
  return (of.get(0, 0), *(of[i] for i in range(1, len(listed.names) + 1)))


def _palette(coding):
  if coding.palette is not None:
    return tuple(map(_unpack, coding.palette))
  return palette(len(coding.classes))


def palette(count):
  """Black and `count` colours that are well apart, 0 to 255 each."""
  made = [(0, 0, 0)]
  for i in range(count):
    # The golden ratio spreads any number of hues.
    rgb = colorsys.hsv_to_rgb((0.55 + 0.618034 * i) % 1, 0.7, 1 - 0.1 * (i % 4))
    made.append(tuple(round(255 * x) for x in rgb))
  return tuple(made)


# ------------------------------------------------------------ annotations.json


class Coco:
  """annotations.json: polygons or RLE, painted in their order, no crowds."""

  def __init__(self, files, name, known, images):
    """Reads the file; ValueError where it is not as COCO says."""
    self._painter, self._images = masks.Painter(name), images
    self._name = name
    try:
      made = json.loads(files.read(name))
      entries = [(x['id'], x['file_name'], x) for x in made['images']]
      categories = {x['id']: str(x['name']) for x in made['categories']}
      painted = [
        (x['image_id'], x['category_id'], x)
        for x in made['annotations']
        if not x.get('iscrowd')
      ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f'{name} is not COCO ({type(error).__name__}: {error}): it needs '
        'images (id, file_name), annotations (image_id, category_id, '
        'segmentation) and categories (id, name)'
      ) from error
    self._entries = {}  # id -> entry
    by_number, strangers = {}, []
    for number, file_name, entry in entries:
      id_ = known.get(file_name.replace('\\', '/').removeprefix('./'))
      if id_ is None:
        strangers.append(file_name)
      elif id_ in self._entries:
        raise ValueError(f'{name} lists {file_name!r} twice')
      else:
        self._entries[id_] = entry
      by_number[number] = id_
    if not self._entries:
      raise ValueError(
        f'{name} lists none of the {len(images)} images (it has '
        f'{_few(strangers, 3) or "none"}, there is {_few(images.values(), 3)})'
      )
    if strangers:
      logging.warning(
        '%s lists %d images that are not there: %s',
        name,
        len(strangers),
        _few(strangers),
      )
    self._of = collections.defaultdict(list)
    for number, category, annotation in painted:
      if number not in by_number or category not in categories:
        raise ValueError(
          f'{name}: annotation {annotation.get("id")} names image {number} and '
          f'category {category}, of which one is not listed'
        )
      self._of[by_number[number]].append((category, annotation))
    self._number(categories, painted)

  def _number(self, categories, painted):
    """Numbers the categories that occur 1..n in the order of their ids."""
    there = {category for _, category, _ in painted}
    unused = [x for i, x in categories.items() if i not in there]
    if unused:
      # Exports list a root, or all 80 of COCO.
      logging.warning(
        '%d categories have no annotation and are no class: %s',
        len(unused),
        _few(unused),
      )
    order = sorted(i for i in categories if i in there)
    self._labels = {category: i for i, category in enumerate(order, 1)}
    self.classes = tuple(categories[i] for i in order)
    self.palette = palette(len(order))
    if not 1 <= len(order) <= 254 or len(set(self.classes)) != len(order):
      raise ValueError(
        f'{self._name} has {len(order)} categories with annotations '
        f'({_few(self.classes)}): 1 to 254 of different names are needed'
      )

  def label(self, id_, size):
    """Paints the annotations of an id, uint8 [H, W]."""
    if id_ not in self._entries:
      raise core.BadFileError(
        f'no entry in {self._name} for {self._images[id_]}'
      )
    entry = self._entries[id_]
    stated = (entry.get('height', size[0]), entry.get('width', size[1]))
    if stated != tuple(size):
      raise core.BadFileError(
        f'{self._images[id_]}: {self._name} says {stated[1]}x{stated[0]}, its '
        f'image is {size[1]}x{size[0]}'
      )
    label = np.zeros(size, np.uint8)
    for category, annotation in self._of[id_]:
      label[self._decode(id_, annotation, size)] = self._labels[category]
    return label

  def _decode(self, id_, annotation, size):
    """One annotation as bool [H, W]."""
    form = annotation.get('segmentation')
    where = f'{self._images[id_]}: annotation {annotation.get("id")}'
    if not form:
      raise core.BadFileError(f'{where} has no segmentation, maybe a box only')
    try:
      return self._painter.paint(form, size)
    except ValueError as error:
      raise core.BadFileError(f'{where} cannot be decoded ({error})') from error


# ----------------------------------------------------------------- the summary


def summary(manifest):
  """Says in some lines what a prepared folder holds and what may be wrong.

  Takes a manifest as `prepare` returns it, or as it is read again: that has no
  count of pixels, and percentages are of images.
  """
  rows, classes = manifest['records'], manifest['classes']
  pixels = manifest.get('pixels')
  images = collections.Counter(
    (row['split'], label) for row in rows for label in row['present']
  )
  splits = collections.Counter(row['split'] for row in rows)
  head = ('label', 'class', 'train images', 'test images')
  lines = [(*head, '% of images' if pixels is None else '% of pixels')]
  for i, name in enumerate(classes, 1):
    train, test = images['train', i], images['test', i]
    if pixels is None:
      share = (train + test) / len(rows)
    else:
      share = pixels.get(i, 0) / sum(pixels.values())
    lines.append((str(i), name, str(train), str(test), f'{100 * share:.2f}'))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  made = [
    f'{manifest["name"]}: {len(rows)} images ({splits["train"]} train, '
    f'{splits["test"]} test), {len(classes)} '
    + ('class' if len(classes) == 1 else 'classes')
  ]
  for line in lines:
    cells = [
      cell.ljust(width) if i == 1 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    made.append('  ' + '  '.join(cells))
  if pixels and 255 in pixels:
    share = pixels[255] / sum(pixels.values())
    made.append(f'  void: {100 * share:.2f} % of pixels')
  sizes = sorted((row['size'] for row in rows), key=lambda x: (x[0] * x[1], x))
  small, middle, large = (
    f'{columns}x{height}'
    for height, columns in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
  )
  made.append(
    f'  width x height: {small} smallest, {middle} median, {large} largest'
  )
  return '\n'.join(made + [f'  note: {x}' for x in _hints(manifest, images)])


def _hints(manifest, images):
  """Yields what a practitioner may want to look at."""
  rows = manifest['records']
  for i, name in enumerate(manifest['classes'], 1):
    count = images['train', i]
    if count < 5:
      yield (
        f'{name} is in {count} train image{"s" * (count != 1)}: fewer than 5 '
        'give no 5 shots'
      )
  areas = [row['size'][0] * row['size'][1] for row in rows]
  if max(areas) > 10 * min(areas):
    yield (
      f'the largest image has {max(areas) / min(areas):.0f} times the pixels '
      'of the smallest: all are resized to one size when read'
    )
  empty = [row['id'] for row in rows if not row['present']]
  if empty:
    yield f'{len(empty)} images have no class in their mask: {_few(empty)}'
