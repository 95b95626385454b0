"""Folder: your own images and masks, as a dataset of any name.

    my_cells/             or a zip of it
      images/             png, jpg, jpeg, bmp, tif, tiff, webp; subfolders too
      masks/              or labels/ or annotations/: the same names, or with
                          _mask, _label, _segmentation or the like appended
      annotations.json    COCO polygons or RLE, in place of masks/
      classes.txt         optional, a class a line: `name`, `value name` for
                          grey masks, `r g b name` for colour masks
      train.txt test.txt  optional, an id a line; without them 20 % are test

What the masks mean is decided over all of them together, see `mask_meaning.py`,
and `summary` says what was found. The id of an image is its path below images/,
with dots, without the suffix. Images are turned as their EXIF orientation says,
which is how one sees them in a viewer.
"""

import collections
import contextlib
import hashlib
import io
import json
import logging
import pathlib
import re

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps
from tqdm import tqdm

from distillfss_jax import datasets
from distillfss_jax.data import builder, download, mask_meaning, masks, prepared

SPLITS = ('files', 'held_out')
_SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')
_MASK_FOLDERS = ('masks', 'labels', 'annotations')
_ENDINGS = ('_mask', '-mask', '_segmentation', '_label', '_gt')
_ENDING = re.compile(rf'(.+)(?:{"|".join(_ENDINGS)})', re.IGNORECASE)
_COCO = 'annotations.json'
_KEPT_AS_IT_IS = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n')  # JPEG, PNG


class Folder(builder.SegmentationBuilder, skip_registration=True):
  """Images and masks of the user's own."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ()  # `Layout` finds both; when loaded they are the manifest's
  PALETTE = ()
  DOWNLOAD = (
    'put the images into images/ and a mask of the same name for each into '
    f'masks/ (or COCO polygons into {_COCO} beside images/), and give the '
    'folder that holds both, or a zip of it, as --raw'
  )


def builder_of(name):
  """Makes the builder class of one folder; ValueError where `name` is bad."""
  if not name:
    raise ValueError('--name is not given: how shall the dataset be called?')
  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise ValueError(
      f'--name {name!r} must be small letters, digits and _, and begin with a '
      'letter, as in my_cells'
    )
  if name in datasets.names():
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
  made = builder_of(name)
  if prepared.manifest(made, data_dir) is None:
    raise FileNotFoundError(
      f'{name} is not prepared in {str(data_dir)!r}: run python -m '
      f'distillfss_jax.prepare --dataset folder --name {name} '
      f'--raw <folder or zip> --data_dir {data_dir}'
    )
  return prepared.load_prepared(made, data_dir)


def prepare(raw, data_dir, *, name=None, split=None, skip_bad=False):
  """Turns the folder into ArrayRecord; see `builder.prepare`.

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
  made, found, contents = builder_of(name), [], None

  def layout(files):
    found.append(Layout(files, made, split))
    return found[0]

  if raw and pathlib.Path(raw).expanduser().exists():
    with download.Files(raw, Folder.DOWNLOAD) as files:
      contents = _contents(files)
  options = {'split': split, 'contents': contents}
  manifest, new = builder.prepare(
    made, layout, raw, data_dir, skip_bad=skip_bad, **options
  )
  if new:
    manifest = {**manifest, 'pixels': found[0].pixels(manifest)}
  return manifest, new


def _contents(files):
  """Tells a folder from what it was before: by names, sizes and small texts."""
  digest = hashlib.blake2b(digest_size=4)
  for name in files.names:
    digest.update(f'{name}\0{files.size(name)}\0'.encode())
    if name.endswith(('.txt', '.json')):
      digest.update(files.read(name))
  return f'{len(files.names)} files ({digest.hexdigest()})'


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
    name = f'{prefix}classes.txt'
    lines = _text(files, name)
    listed = None if lines is None else mask_meaning.parse_classes(lines, name)
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

  def encoded(self, id_):
    """The file that `image` reads, if records can hold it; else PNG."""
    name = self.images[id_]
    contents = self._files.read(name)
    # A photograph as PNG would take seven times the space.
    if contents.startswith(_KEPT_AS_IT_IS) and id_ not in self._turned:
      return contents
    return download.png(_decode_image(contents, name)[0])

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
        download.few(sorted(self._turned)),
      )
    if self._parts is not None:
      train, test = self._parts
      return {'train': train, 'test': test}
    # Of the images that can be used: of many, few may have a mask yet.
    ids = [i for i in ids if i in self._counts]
    if len(ids) < 2:
      raise ValueError(
        f'{len(ids)} image is too few: one for train and one for test are the '
        'least'
      )
    test = download.held_out(ids)
    return {'train': sorted(set(ids).difference(test)), 'test': test}


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
      f'{download.few(files.names, 3) or "none"}): {Folder.DOWNLOAD}'
    )
  if len(found) > 1:
    raise ValueError(
      f'{files} has {len(found)} folders with images/ and masks/: '
      f'{download.few(x[0] for x in found)}. Give one of them as --raw, or put '
      f'all into one, as in images/{found[0][0]}/ and masks/{found[0][0]}/, '
      'with train.txt and test.txt beside them'
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
      download.few(other),
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
        f'{download.few(unknown)}'
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
      f'{download.few(sorted(both))}'
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
      download.few(rest),
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
  except mask_meaning.UNREADABLE as error:
    reason = str(error).replace('\n', ' ')
    raise download.BadFileError(
      f'{name}: cannot be decoded ({reason})'
    ) from error
  if mode.startswith(('I', 'F')):
    # Pillow would clip the values to 255: a white image, without a word.
    raise download.BadFileError(
      f'{name}: has more than 8 bits a pixel (mode {mode}), save it with 8'
    )
  return pixels, turned


# -------------------------------------------------------------- the mask files


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
        f'(there is {download.few(orphans, 3)}): {self._missing(id_)}'
      )
    if orphans:
      logging.warning(
        '%d masks have no image and are not used: %s',
        len(orphans),
        download.few(orphans),
      )
    seen = self._survey()
    # Without a readable mask there is nothing to decide: all will be named.
    nothing = mask_meaning.Coding('grey', 1, ('?',), {})
    self._coding = mask_meaning.decide(seen, listed) if seen else nothing
    self.classes, self.palette = self._coding.classes, self._coding.palette

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
      # What cannot be read is named when all images are checked.
      with contextlib.suppress(download.BadFileError):
        seen.append(mask_meaning.survey(self._files.read(names[0]), names[0]))
    return seen

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W]."""
    names = self._of.get(id_)
    if not names:
      raise download.BadFileError(self._missing(id_))
    if len(names) > 1:
      raise download.BadFileError(
        f'{self._images[id_]} has {len(names)} masks: {", ".join(names)}'
      )
    mask = mask_meaning.decode(self._files.read(names[0]), names[0])
    download.same_size(names[0], mask.values, size)
    return self._coding.label(mask)


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
        f'{download.few(strangers, 3) or "none"}, there is '
        f'{download.few(images.values(), 3)})'
      )
    if strangers:
      logging.warning(
        '%s lists %d images that are not there: %s',
        name,
        len(strangers),
        download.few(strangers),
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
        download.few(unused),
      )
    order = sorted(i for i in categories if i in there)
    self._labels = {category: i for i, category in enumerate(order, 1)}
    self.classes = tuple(categories[i] for i in order)
    self.palette = mask_meaning.palette(len(order))
    if not 1 <= len(order) <= 254 or len(set(self.classes)) != len(order):
      raise ValueError(
        f'{self._name} has {len(order)} categories with annotations '
        f'({download.few(self.classes)}): 1 to 254 of different names are '
        'needed'
      )

  def label(self, id_, size):
    """Paints the annotations of an id, uint8 [H, W]."""
    if id_ not in self._entries:
      raise download.BadFileError(
        f'no entry in {self._name} for {self._images[id_]}'
      )
    entry = self._entries[id_]
    stated = (entry.get('height', size[0]), entry.get('width', size[1]))
    if stated != tuple(size):
      raise download.BadFileError(
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
      raise download.BadFileError(
        f'{where} has no segmentation, maybe a box only'
      )
    try:
      return self._painter.paint(form, size)
    except ValueError as error:
      raise download.BadFileError(
        f'{where} cannot be decoded ({error})'
      ) from error


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
  if _seem_numbered(manifest['classes'], images):
    yield (
      'each label is in no more images than the one before: if they number '
      'objects, and are no classes, give all objects of a class one value'
    )
  areas = [row['size'][0] * row['size'][1] for row in rows]
  if max(areas) > 10 * min(areas):
    yield (
      f'the largest image has {max(areas) / min(areas):.0f} times the pixels '
      'of the smallest: all are resized to one size when read'
    )
  empty = [row['id'] for row in rows if not row['present']]
  if empty:
    yield (
      f'{len(empty)} images have no class in their mask: {download.few(empty)}'
    )


def _seem_numbered(classes, images):
  """Whether labels look like the numbers of objects in each image."""
  labels = range(1, len(classes) + 1)
  counts = [images['train', i] + images['test', i] for i in labels]
  unnamed = list(classes) == [f'class{i}' for i in labels]
  falling = counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
  return unnamed and len(classes) > 3 and falling
