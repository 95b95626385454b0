"""Folder: your own images and masks, as a dataset of any name.

    my_cells/             or a zip of it
      images/             png, jpg, bmp, tif, webp, gif, ppm; subfolders too
      masks/              or labels/ or annotations/: the same names, or with
                          _mask, _label, _segmentation or the like appended
      annotations.json    COCO polygons or RLE, in place of masks/; LabelMe's
                          JSON or YOLO's txt files, one for each image, may be
      classes.txt         optional, a class a line: `name`, `value name` for
                          grey masks, `r g b name` for colour masks
      train.txt test.txt  optional, an id a line; without them 20 % are test
      groups.txt          optional, `id group` a line: a group is not divided

What the masks mean is decided over all of them together, see `mask_meaning.py`,
and `summary` says what was found. The id of an image is its path below images/,
with dots, without the suffix. Images are turned as their EXIF orientation says,
which is how one sees them in a viewer. docs/own-images.md has all of it.
"""

import collections
import contextlib
import hashlib
import logging
import pathlib
import re
import typing
import zlib

import tensorflow_datasets as tfds
import yaml
from tqdm import tqdm

from distillfss_jax import datasets
from distillfss_jax.data import (
  builder,
  download,
  forms,
  mask_meaning,
  notes,
  pairs,
  prepared,
)

SPLITS = ('files', 'held_out')
_TEXTS = ('.txt', '.json', '.xml', '.csv', '.yaml', '.yml', '.md')
_IMAGE_FOLDERS = ('images', 'image', 'imgs', 'img', 'imagestr', 'jpegimages')
_MASK_FOLDERS = (
  'masks', 'mask', 'labels', 'label', 'annotations', 'annotation',
  'segmentations', 'segmentation', 'labelstr', 'segmentationclass', 'gt',
)  # fmt: skip
_COCO = 'annotations.json'
_COCOS = (
  _COCO, '_annotations.coco.json', 'instances_default.json',
  'annotations/instances_default.json', 'coco.json', 'result.json',
)  # fmt: skip
_LISTS = ('classes.txt', 'train.txt', 'test.txt', 'groups.txt')
_KEPT_AS_IT_IS = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n')  # JPEG, PNG

summary = notes.summary


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


def builder_of(name, given='--name is not given'):
  """Makes the builder class of one folder; ValueError where `name` is bad.

  Args:
    name: of the dataset.
    given: what to say where there is none.
  """
  if not name:
    raise ValueError(f'{given}: how shall the dataset be called?')
  if not re.fullmatch('[a-z][a-z0-9_]*', str(name)):
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
  made = builder_of(
    name,
    'the name of the prepared folder is not given (--config '
    'configs/folder.py:name=my_cells, or --name my_cells)',
  )
  if prepared.manifest(made, data_dir) is None:
    raise FileNotFoundError(
      prepared.unprepared(made, data_dir, f'folder --name {name}')
    )
  return prepared.load_prepared(made, data_dir)


def prepare(
  raw,
  data_dir,
  *,
  name=None,
  split=None,
  skip_bad=False,
  meaning=None,
  group_by=None,
):
  """Turns the folder into ArrayRecord; see `builder.prepare`.

  Args:
    raw: the folder or zip.
    data_dir: folder of all prepared datasets.
    name: of the dataset that is made; has to be given.
    split: 'files' is train.txt and test.txt, 'held_out' a random 20 % for
      testing; None is 'files' where there are any.
    skip_bad: leave out images with a bad file instead of failing; where only
      some objects of COCO cannot be painted, their boxes become void.
    meaning: a file that says what masks mean, in place of classes.txt.
    group_by: regular expression that finds the group of an image in its id: its
      first (...), or all that it matches. In place of groups.txt.
  """
  if split not in (None, *SPLITS):
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  made, found = builder_of(name), []
  done = prepared.manifest(made, data_dir)
  lines = None if meaning is None else _lines_of(meaning)
  options = {
    'split': split,
    'contents': None,
    'meaning': None if lines is None else ' | '.join(lines),
    'group_by': group_by,
  }
  stamp = ''
  if raw and pathlib.Path(raw).expanduser().exists():
    with download.Files(raw, Folder.DOWNLOAD) as files:
      options['contents'], stamp = _contents(files), _stamp(files)
      # Files that nobody has written to since then are not read again, and what
      # an older version prepared cannot be compared.
      untouched = stamp and done and stamp == done.get('stamp')
      if done is None or ('checksum' in done['options'] and not untouched):
        options['checksum'] = _checksum(files)

  def layout(files):
    found.append(
      Layout(files, made, split, (meaning, lines), group_by, skip_bad)
    )
    found[0].said['stamp'] = stamp
    return found[0]

  return builder.prepare(
    made, layout, raw, data_dir, skip_bad=skip_bad, **options
  )


def _lines_of(path):
  path = pathlib.Path(path).expanduser()
  with download.Files(path.parent, '') as files:
    if path.name not in files.names:
      raise ValueError(f'--meaning {path} does not exist')
    return [line.strip() for line in files.text(path.name).splitlines()]


def _contents(files):
  """Tells a folder from what it was before: by names, sizes and small texts."""
  digest = hashlib.blake2b(digest_size=4)
  for name in files.names:
    digest.update(f'{name}\0{files.size(name)}\0'.encode())
    if name.endswith(('.txt', '.json')):
      digest.update(files.read(name))
  return f'{len(files.names)} files ({digest.hexdigest()})'


def _stamp(files):
  """When the files of a folder were written to, as a digest; '' for a zip."""
  if files.root is None:
    return ''
  digest = hashlib.blake2b(digest_size=8)
  for name in files.names:
    found = (files.root / name).stat()
    digest.update(f'{name}\0{found.st_size}\0{found.st_mtime_ns}\0'.encode())
  return digest.hexdigest()


def _checksum(files):
  """Tells what the files hold: a repainted mask may be as large as before."""
  found, sums = 0, download.ahead(files.checksum, files.names)
  for one in download.bar(sums, 'reading', len(files.names)):
    found = zlib.crc32(one.to_bytes(4, 'little'), found)
  return f'{found:08x}'


# ---------------------------------------------------------------- the layout


class Layout:
  """images/ with masks/ or annotations.json, at the top or one folder down.

  `images` and `keys` map ids to file names and to paths without suffix; `said`
  is what the manifest says of what was found.
  """

  def __init__(
    self,
    files,
    made,
    split=None,
    meaning=(None, None),
    group_by=None,
    skip_bad=False,
  ):
    """Finds all and decides what the masks mean, which `made` is told."""
    self._files, self._turned, self._good = files, set(), set()
    place = _find(files)
    if place.warning:
      logging.warning(place.warning)
    logging.info(
      'images are %s..., %s %s...',
      min(place.images),
      place.kind,
      min(place.labels),
    )
    self.top = place.top
    self.images, self.keys = _images(place)
    self.ids = sorted(self.images)
    known = self._known()
    self._parts = _parts(files, place.prefix, known, split)
    self._groups = _groups(files, place.prefix, known, self.ids, group_by)
    listed = self._listed(place, *meaning)
    if place.kind == 'masks':
      self._labels = Masks(files, place, self.images, self.keys, listed)
    elif place.kind == 'coco':
      if listed:
        logging.warning(
          '%s is not used: %s names the classes', listed.file, place.labels[0]
        )
      self._labels = forms.Coco(
        files, place.labels[0], known, self.images, skip_bad
      )
    else:
      of = {key: id_ for id_, key in self.keys.items()}
      texts = {
        of[key]: name
        for name in place.labels
        if (key := _key(name, place.of_labels)) in of
      }
      if place.kind == 'labelme':
        self._labels = forms.LabelMe(files, texts, self.images, listed)
      else:
        names = _yolo_names(files, place.prefix, listed)
        self._labels = forms.Yolo(files, texts, self.images, names)
    made.CLASSES, made.PALETTE = self._labels.classes, self._labels.palette
    self.said = {
      'meaning': list(self._labels.meaning),
      'forms': _forms(place, self.images),
    }
    logging.info('masks are taken to mean: %s', ', '.join(self._labels.meaning))

  def _listed(self, place, path, lines):
    """What --meaning or classes.txt says, or None."""
    name = f'{place.prefix}classes.txt'
    if lines is not None:
      if name in self._files.names:
        logging.warning('%s is not used: %s is given', name, path)
      return mask_meaning.parse_classes(lines, str(path))
    lines = _text(self._files, name)
    return None if lines is None else mask_meaning.parse_classes(lines, name)

  def _known(self):
    """What an image may be called in a list: {as written: id}."""
    known = {}
    for id_, name in self.images.items():
      key, suffix = self.keys[id_], pathlib.PurePosixPath(name).suffix
      base = '/'.join(pathlib.PurePosixPath(name).parts[bool(self.top) :])
      for text in (id_, key, id_ + suffix, key + suffix, base):
        known.setdefault(download.plain(text), id_)
    return known

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    name = self.images[id_]
    pixels, turned = download.photo(self._files.read(name), name)
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
    return download.png(download.photo(contents, name)[0])

  def label(self, id_, size):
    """Reads the labels of an id, uint8 [H, W]."""
    try:
      label = self._labels.label(id_, size)
    except download.BadFileError as error:
      if id_ not in self._turned:
        raise
      raise download.BadFileError(
        f'{error} ({self.images[id_]} is turned as its EXIF orientation says: '
        'its mask must be drawn on what a viewer shows)'
      ) from error
    self._good.add(id_)
    return label

  def split(self, ids):
    """Divides the ids; ValueError where they are fewer than two."""
    if self._turned:
      logging.warning(
        '%d images are turned as their EXIF orientation says (%s): masks must '
        'be drawn on what a viewer shows',
        len(self._turned),
        download.few(sorted(self._turned)),
      )
    if self._labels.voided:
      self.said['voided'] = dict(sorted(self._labels.voided.items()))
    # Of the images that can be used: of many, few may have a mask yet.
    ids = [i for i in ids if i in self._good]
    group_of = {i: self._groups[i] for i in ids} if self._groups else None
    if group_of:
      self.said['groups'] = len(set(group_of.values()))
    if self._parts is not None:
      train, test = self._parts
      if group_of:
        _refuse_divided(group_of, train, test)
      return {'train': train, 'test': test}
    if len(ids) < 2:
      raise ValueError(
        f'{len(ids)} image is too few: one for train and one for test are the '
        'least'
      )
    if group_of is None:
      test = download.held_out(ids)
    elif len(set(group_of.values())) > 1:
      test = download.held_out_groups(group_of)
    else:
      raise ValueError(
        f'all {len(ids)} images are of the group {group_of[ids[0]]!r}, which '
        'cannot be divided: groups must be two or more'
      )
    return {'train': sorted(set(ids).difference(test)), 'test': test}


def _is_image(name):
  return name.lower().endswith(download.SUFFIXES)


class _Place(typing.NamedTuple):
  """Where the files of a dataset lie.

  top: folder of all, '' or one name. images: files of images, whose names begin
  with of_images. kind: 'masks', 'coco', 'labelme' or 'yolo'. labels: files of
  masks or texts, whose names begin with of_labels, or the one list. other:
  files beside the images that are of no form that is read.
  """

  top: str
  images: tuple
  of_images: str
  kind: str
  labels: tuple
  of_labels: str
  other: tuple = ()
  warning: str = ''

  @property
  def prefix(self):
    """What the names of all files begin with."""
    return f'{self.top}/' if self.top else ''


def _find(files):
  """Finds the one _Place of a folder; ValueError where there is not one."""
  tops = {''} | {x.split('/')[0] for x in files.names if '/' in x}
  found, wrong = [], []
  for top in sorted(tops):
    prefix = f'{top}/' if top else ''
    names = [x for x in files.names if x.startswith(prefix)]
    inside = collections.defaultdict(list)
    for name in names:
      folder, slash, _ = name.removeprefix(prefix).partition('/')
      inside[f'{folder}/' if slash else ''].append(name)
    try:
      place = _place(files, top, prefix, inside)
    except ValueError as error:
      wrong.append(error)
      continue
    if place:
      found.append(place)
  # The folder itself comes first, what lies in it is then its own affair.
  found = [x for x in found if not x.top] or found
  if not found and wrong:
    raise wrong[0]
  if not found:
    raise ValueError(
      f'{files} has no images/ with masks/ or {_COCO} beside it, at its top or '
      f'one folder down ({len(files.names)} files are there: '
      f'{download.few(files.names, 3) or "none"}): {Folder.DOWNLOAD}'
    )
  if len(found) > 1:
    raise ValueError(
      f'{files} has {len(found)} folders with images/ and masks/: '
      f'{download.few(x.top for x in found)}. Give one of them as --raw, or '
      f'put all into one, as in images/{found[0].top}/ and masks/'
      f'{found[0].top}/, with train.txt and test.txt beside them'
    )
  return found[0]


def images_of(files):
  """The images of a raw folder that may have no masks yet, sorted.

  Those below folders such as images/, wherever these lie, if there are any;
  else all that lie in no folder of masks.
  """
  images = [x for x in files.names if _is_image(x)]

  def within(known):
    return [
      x
      for x in images
      if any(part.lower() in known for part in x.split('/')[:-1])
    ]

  masks = set(within(_MASK_FOLDERS))
  chosen = within(_IMAGE_FOLDERS) or images
  return sorted(x for x in chosen if x not in masks)


def _place(files, top, prefix, inside):
  """The _Place of one folder, or None where it has no images with labels.

  Args:
    files: the raw download.
    top: the folder.
    prefix: of all files in it.
    inside: dict of folder below it, with '/', or '' -> its files.
  """
  folders = [x for x in inside if x[:-1].lower() in _IMAGE_FOLDERS]
  masks = [
    x
    for x in inside
    if x[:-1].lower() in _MASK_FOLDERS and any(map(_may_be_image, inside[x]))
  ]
  coco = _coco(prefix, inside)
  if len(folders) > 1:
    raise ValueError(
      f'{files} has {" and ".join(sorted(folders))}: which are the images? '
      'Leave one of them'
    )
  # Where images lie among other files, there must be labels for them.
  within = folders[0] if folders else ''
  beside = [x for x in inside[within] if _may_be_image(x)]
  images = tuple(x for x in beside if _is_image(x))
  other = tuple(x for x in inside[within] if within and not _is_image(x))
  here = _Place(top, images, f'{prefix}{within}', '', (), '', other)
  if beside and not images and (folders or coco):
    raise _unread(here.of_images, beside)
  if not images:
    return None
  if len(masks) > 1 and folders:
    raise ValueError(
      f'{files} has {" and ".join(sorted(masks))}: which are the masks? Leave '
      'one of them beside images/'
    )
  if masks and folders:
    of_labels = f'{prefix}{masks[0]}'
    labels = tuple(x for x in inside[masks[0]] if _is_image(x))
    if not labels:
      raise _unread(of_labels, inside[masks[0]])
    said = f'{_COCO} is not used: there is {masks[0]}'
    return here._replace(
      kind='masks',
      labels=labels,
      of_labels=of_labels,
      warning=said * (coco == f'{prefix}{_COCO}'),
    )
  if coco:
    return here._replace(kind='coco', labels=(coco,))
  keys = {_key(x, here.of_images) for x in images}
  for folder in (within, *sorted(inside)):
    if folder != within and folder[:-1].lower() not in _MASK_FOLDERS:
      continue
    start = f'{prefix}{folder}'
    for kind, suffix in (('labelme', '.json'), ('yolo', '.txt')):
      labels = tuple(
        x
        for x in inside[folder]
        if x.lower().endswith(suffix) and _key(x, start) in keys
      )
      if labels and not (folder == '' and set(labels) <= _lists(prefix)):
        return here._replace(kind=kind, labels=labels, of_labels=start)
  if pairs_ := _beside(images, here.of_images):
    return here._replace(
      images=tuple(x for x, _ in pairs_),
      kind='masks',
      labels=tuple(x for _, x in pairs_),
      of_labels=here.of_images,
    )
  return None


def _lists(prefix):
  return {f'{prefix}{name}' for name in _LISTS}


def _may_be_image(name):
  """Whether a file is an image, of a form that is read or not."""
  return not name.lower().endswith(_TEXTS)


def _unread(folder, names):
  """What to say where images are of no form that is read."""
  suffixes = sorted({pathlib.PurePosixPath(x).suffix[1:] for x in names})
  return ValueError(
    f'{folder} holds {len(names)} files, none of a form that is read: '
    f'{download.few(suffixes)}. Save them as PNG (or '
    f'{", ".join(x[1:] for x in download.SUFFIXES[1:])})'
  )


def _coco(prefix, inside):
  """The list in COCO's form beside the images, or None."""
  lists = [
    x for x in (*inside[''], *inside['annotations/']) if x.endswith('.json')
  ]
  for name in _COCOS:
    if f'{prefix}{name}' in lists:
      return f'{prefix}{name}'
  # One that has the name of an image is LabelMe's.
  images = {
    _key(x, '') for names in inside.values() for x in names if _is_image(x)
  }
  stems = {pathlib.PurePosixPath(x).name for x in images}
  lists = [x for x in lists if pathlib.PurePosixPath(x).stem not in stems]
  return lists[0] if len(lists) == 1 else None


def _beside(images, prefix):
  """[(image, mask)] where each image has its mask beside it; else None.

  It has its name with _mask appended, or where all are JPEG that name as PNG.
  """
  names = {name: _key(name, prefix) for name in images}
  by_key = collections.defaultdict(list)
  for name, key in names.items():
    by_key[key].append(name)
  made = []
  if all(len(x) == 2 for x in by_key.values()):
    for two in by_key.values():
      jpeg = [x for x in two if x.lower().endswith(('.jpg', '.jpeg', '.jfif'))]
      if len(jpeg) != 1:
        return None
      made.append((jpeg[0], next(x for x in two if x not in jpeg)))
    return made
  for name, key in names.items():
    if (whole := pairs.without_ending(key)) in by_key:
      made.append((by_key[whole][0], name))
  masks = {x for _, x in made}
  whole = {x for x, _ in made}
  return made if made and whole | masks == set(images) else None


def _key(name, prefix):
  """A path below `prefix` without its suffix."""
  return name.removeprefix(prefix).rpartition('.')[0]


def _images(place):
  """Lists the images: ({id: file name}, {id: path without suffix})."""
  names, keys = {}, {}
  for name in place.images:
    key = _key(name, place.of_images)
    id_ = download.plain(key.replace('/', '.'))
    if id_ in names:
      raise ValueError(
        f'{names[id_]} and {name} would both be called {id_!r}'
        + (
          ', their letters differ in Unicode form only'
          if keys[id_] != key
          and download.plain(keys[id_]) == download.plain(key)
          else ''
        )
        + ': rename one'
      )
    names[id_], keys[id_] = name, key
  if place.other:
    logging.warning(
      '%d files in %s are not used (%s): images are %s',
      len(place.other),
      place.of_images,
      download.few(place.other),
      ', '.join(x[1:] for x in download.SUFFIXES),
    )
  return names, keys


def _forms(place, images):
  """Of which forms the files are, in words."""
  said = []
  for what, names in (('images', images.values()), (place.kind, place.labels)):
    counts = collections.Counter(
      pathlib.PurePosixPath(x).suffix[1:].lower() for x in names
    )
    said.append(
      f'{what} {", ".join(f"{n} {x}" for x, n in sorted(counts.items()))}'
    )
  return '; '.join(said)


def _text(files, name):
  """The lines of a text file, stripped, or None where there is no such."""
  if name not in files.names:
    return None
  return [line.strip() for line in files.text(name).splitlines()]


def _parts(files, prefix, known, split):
  """Reads train.txt and test.txt: (train ids, test ids), or None."""
  lists = {}
  for part in ('train', 'test'):
    name = f'{prefix}{part}.txt'
    lines = _text(files, name)
    if lines is None or split == 'held_out':
      continue
    lines = list(dict.fromkeys(download.plain(line) for line in lines if line))
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


def _groups(files, prefix, known, ids, group_by):
  """{id: group} by --group_by or groups.txt, or None without both."""
  name, found = f'{prefix}groups.txt', {}
  lines = _text(files, name)
  if group_by is not None:
    try:
      form = re.compile(group_by)
    except re.error as error:
      raise ValueError(
        f'--group_by {group_by!r} is no regular expression: {error}'
      ) from error
    if lines is not None:
      logging.warning('%s is not used: --group_by is given', name)
    matches = {id_: form.search(id_) for id_ in ids}
    # The first (...) that took part, else all that was matched.
    found = {
      id_: next((x for x in match.groups() if x is not None), match[0])
      for id_, match in matches.items()
      if match
    }
    said = f'--group_by {group_by!r} matches'
  elif lines is None:
    return None
  else:
    for line in lines:
      if not line:
        continue
      image, group = (line.rsplit(None, 1) + [''])[:2]
      id_ = known.get(download.plain(image.rstrip(' ,;')))
      if id_ is None or not group:
        raise ValueError(
          f'{name}: {line!r} is not `<image> <group>` with an image that is '
          f'there, such as {download.few(ids, 1)}'
        )
      if found.setdefault(id_, group) != group:
        raise ValueError(f'{name} gives {id_} two groups: {line!r}')
    said = f'{name} names a group for'
  if left := [id_ for id_ in ids if id_ not in found]:
    raise ValueError(
      f'{said} {len(found)} of {len(ids)} images, and not for '
      f'{download.few(left)}: each needs a group, if one of its own'
    )
  return found


def _refuse_divided(group_of, train, test):
  """Raises ValueError where train and test have images of one group."""
  sides = [{group_of[i] for i in ids if i in group_of} for ids in (train, test)]
  if both := sorted(sides[0] & sides[1]):
    raise ValueError(
      f'{len(both)} groups have images in both train and test '
      f'({download.few(both)}): move them in test.txt, or let --split held_out '
      'divide by groups'
    )


def _yolo_names(files, prefix, listed):
  """The names of YOLO's classes 0, 1, ... by classes.txt or data.yaml."""
  if listed and listed.kind == 'name':
    return listed.lines
  for name in dict.fromkeys((f'{prefix}data.yaml', 'data.yaml')):
    if name not in files.names:
      continue
    text = files.text(name)
    with download.guard(name, 'has no names that can be read'):
      names = yaml.safe_load(text)['names']
      if isinstance(names, dict):
        names = [names[i] for i in range(len(names))]
      return [str(x) for x in names]
  return None


# -------------------------------------------------------------- the mask files


class Masks:
  """masks/: a file per image, and what their values mean."""

  voided: typing.ClassVar[dict] = {}  # masks are painted whole

  def __init__(self, files, place, images, keys, listed):
    """Reads all masks once to decide; ValueError where that fails."""
    self._files, self._prefix = files, place.of_labels
    self._images, self._keys = images, keys
    masks = {x: _key(x, place.of_labels) for x in place.labels}
    self._of, orphans = pairs.match(keys, masks)
    if not self._of:
      id_ = min(images)
      pairs_ = pairs.suggested(images.values(), orphans)
      raise ValueError(
        f'none of the {len(images)} images has a mask in {self._prefix} '
        f'(there is {download.few(orphans, 3)}): {self._missing(id_)}'
        + (f'. In order they would be {pairs_}: rename one side' * bool(pairs_))
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
    self.meaning = self._coding.meaning

  def _missing(self, id_):
    stem = f'{self._prefix}{self._keys[id_]}'
    return (
      f'no mask for {self._images[id_]}: expected {stem}.png, '
      f'{stem}_mask.png or the like'
    )

  def _survey(self):
    def look(name):
      # What cannot be read is named when all images are checked.
      with contextlib.suppress(download.BadFileError):
        return mask_meaning.survey(self._files.read(name), name)

    names = [x[0] for x in self._of.values() if len(x) == 1]
    seen = tqdm(
      download.ahead(look, names),
      desc='reading masks',
      unit='mask',
      mininterval=0.5,
      total=len(names),
    )
    return [x for x in seen if x is not None]

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
