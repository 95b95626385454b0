"""Outlines as label tools write them: COCO, LabelMe and YOLO, made to labels.

Each is a class with `classes`, `palette` and `meaning`, as those of
`mask_meaning.Coding`, `label(id, size)`, and `voided`: what was not painted.
"""

import base64
import collections
import logging
import math

import numpy as np

from distillfss_jax.data import download, mask_meaning, masks, pairs

VOID = 255


def _of_image(name, source, stated, size):
  """Raises BadFileError where a list says another size than an image has."""
  if tuple(stated) != tuple(size):
    raise download.BadFileError(
      f'{name}: {source} says {stated[1]}x{stated[0]}, its image is '
      f'{size[1]}x{size[0]}'
    )


def identity(said):
  """An id of COCO, a whole number or a text; TypeError where it is none."""
  if isinstance(said, float) and said.is_integer():
    return int(said)
  if isinstance(said, bool) or not isinstance(said, int | str):
    raise TypeError(f'{said!r:.40} is no id')
  return said


def word(said):
  """A name in a list, also a number; TypeError where it is none."""
  if isinstance(said, bool) or not isinstance(said, int | str) or said == '':
    raise TypeError(f'{said!r:.40} is no name')
  return str(said)


def refuse_twice(source, what, said):
  """Raises ValueError where one id is that of two.

  Args:
    source: the list, for the message.
    what: has ids.
    said: (id, name) of each.
  """
  of = collections.defaultdict(dict)
  for number, name in said:
    of[number][name] = None
  if twice := {n: names for n, names in of.items() if len(names) > 1}:
    shown = [f'{n} ({" and ".join(names)})' for n, names in twice.items()]
    raise ValueError(
      f'{source} gives one {what} id to several: {download.few(shown)}. Were '
      'two exports put together? Number those of the second anew'
    )


class _Form:
  """What the three have in common."""

  classes: tuple
  meaning: tuple

  def __init__(self, name, images):
    """Takes the name of the list, for messages, and {id: image file}."""
    self._name, self._images = name, images
    self.voided = {}  # id -> why some of it is void
    self._bad = {}  # id -> error of a file that cannot be used

  @property
  def palette(self):
    """The colours of labels 0..n."""
    return mask_meaning.palette(len(self.classes))

  def _number(self, names, there, what, order=None):
    """Numbers the classes that occur 1..n; {key: label}.

    Args:
      names: dict of key -> name of the class.
      there: the keys that occur.
      what: they are called.
      order: of the keys; sorted without.
    """
    unused = [name for key, name in names.items() if key not in there]
    if unused:
      # Exports list a root, or all 80 of COCO.
      logging.warning(
        '%d %s have no annotation and are no class: %s',
        len(unused),
        what,
        download.few(unused),
      )
    order = [key for key in (order or sorted(names)) if key in there]
    if not order and self._bad:  # what is wrong is told for each image
      self.classes, self.meaning = ('?',), ()
      return {}
    self.classes = tuple(names[key] for key in order)
    if not 1 <= len(order) <= 254 or len(set(self.classes)) != len(order):
      raise ValueError(
        f'{self._name} has {len(order)} {what} with annotations '
        f'({download.few(self.classes)}): 1 to 254 of different names are '
        'needed'
      )
    self.meaning = tuple(f'{key} {names[key]}' for key in order)
    return {key: label for label, key in enumerate(order, 1)}


# ------------------------------------------------------------------------ COCO


class Coco(_Form):
  """annotations.json: polygons or RLE, painted in their order.

  A crowd is painted like an object: tools write whatever was drawn with a brush
  as one.
  """

  def __init__(self, files, name, known, images, lenient=False):
    """Reads the file; ValueError where it is not as COCO says.

    Args:
      files: the raw download.
      name: of the file.
      known: dict of what an image may be called -> its id.
      images: dict of id -> image file.
      lenient: make the box of an object void where it cannot be painted.
    """
    super().__init__(name, images)
    self._painter, self._lenient = masks.Painter(name), lenient
    entries, categories, annotations = self._read(files)
    find = pairs.lookup(known)
    self._entries = {}  # id -> entry
    by_number, strangers, renamed = {}, [], {}
    for number, file_name, entry in entries:
      id_ = find(file_name)
      if id_ is None:
        strangers.append(file_name)
      elif id_ in self._entries:
        raise ValueError(f'{name} lists {file_name!r} twice')
      else:
        self._entries[id_] = entry
        if file_name.removeprefix('./') not in known:
          renamed[file_name] = images[id_]
      by_number[number] = id_
    if not self._entries:
      raise ValueError(
        f'{name} lists none of the {len(images)} images (it has '
        f'{download.few(strangers, 3) or "none"}, there is '
        f'{download.few(images.values(), 3)})'
      )
    if renamed:
      listed = min(renamed)
      logging.info(
        '%d images of %s have other names in it: %s is taken for %s, and so on',
        len(renamed),
        name,
        listed,
        renamed[listed],
      )
    if strangers:
      logging.warning(
        '%s lists %d images that are not there: %s',
        name,
        len(strangers),
        download.few(strangers),
      )
    self._of = collections.defaultdict(list)
    for number, category, annotation in annotations:
      if number not in by_number or category not in categories:
        raise ValueError(
          f'{name}: annotation {annotation.get("id")} names image {number} and '
          f'category {category}, of which one is not listed'
        )
      self._of[by_number[number]].append((category, annotation))
    there = {category for _, category, _ in annotations}
    self._labels = self._number(categories, there, 'categories')

  def _read(self, files):
    """(entries, {category: name}, annotations), each id of a kind it may be."""
    try:
      made = files.json(self._name)
      entries = [
        (identity(x['id']), word(x['file_name']), x) for x in made['images']
      ]
      names = [(identity(x['id']), word(x['name'])) for x in made['categories']]
      annotations = [
        (identity(x['image_id']), identity(x['category_id']), x)
        for x in made['annotations']
      ]
      sorted(number for number, _ in names)  # of one kind
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(
        f'{self._name} is not COCO ({download.reason(error)}): it needs '
        'images (id, file_name), annotations (image_id, category_id, '
        'segmentation) and categories (id, name)'
      ) from error
    refuse_twice(self._name, 'image', [x[:2] for x in entries])
    refuse_twice(self._name, 'category', names)
    crowds = sum(bool(x.get('iscrowd')) for _, _, x in annotations)
    if crowds:
      logging.info(
        '%s: %d annotations are crowds (iscrowd) and painted as the others',
        self._name,
        crowds,
      )
    return entries, dict(names), annotations

  def label(self, id_, size):
    """Paints the annotations of an id, uint8 [H, W]."""
    if id_ not in self._entries:
      raise download.BadFileError(
        f'no entry in {self._name} for {self._images[id_]}'
      )
    entry = self._entries[id_]
    stated = (entry.get('height') or size[0], entry.get('width') or size[1])
    _of_image(self._images[id_], self._name, stated, size)
    label, boxes = np.zeros(size, np.uint8), []
    for category, annotation in self._of[id_]:
      try:
        painted = self._painted(id_, annotation, size)
        label[painted] = self._labels[category]
      except download.BadFileError as error:
        box = _box(annotation.get('bbox'), size)
        if box is None or not self._lenient:
          raise
        boxes.append((box, error))
    for box, _ in boxes:
      label[box] = VOID
    if boxes:
      self.voided[id_] = (
        f'{len(boxes)} objects cannot be painted, their boxes are void '
        f'({boxes[0][1]})'
      )
    return label

  def _painted(self, id_, annotation, size):
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


def _box(said, size):
  """COCO's box x, y, width, height as slices, or None where it is no box."""
  try:
    x, y, width, height = map(float, said)
  except (TypeError, ValueError):
    return None
  if not all(map(math.isfinite, (x, y, width, height))):
    return None
  top, left = max(0, math.floor(y)), max(0, math.floor(x))
  bottom = min(size[0], math.ceil(y + height))
  right = min(size[1], math.ceil(x + width))
  if bottom <= top or right <= left:
    return None
  return slice(top, bottom), slice(left, right)


# --------------------------------------------------------------------- LabelMe


class LabelMe(_Form):
  """A JSON file of LabelMe beside each image, its shapes painted in order."""

  def __init__(self, files, of, images, listed=None):
    """Reads all files; what is wrong with one is told when it is painted.

    Args:
      files: the raw download.
      of: dict of id -> JSON file.
      images: dict of id -> image file.
      listed: a `mask_meaning.Listed` of names, in their order; or None.
    """
    super().__init__('LabelMe', images)
    self._of, self._read, there = of, {}, set()
    for id_, name in of.items():
      try:
        self._read[id_] = _labelme(name, files.json(name))
        there.update(label for label, _, _ in self._read[id_][1])
      except download.BadFileError as error:
        self._bad[id_] = error
    special = {'_background_': 0, '__ignore__': VOID}
    there -= special.keys()
    order = sorted(there)
    if listed and listed.kind == 'name':
      order = list(listed.names)
      if odd := sorted(there.difference(order)):
        raise ValueError(
          f'{listed.file} does not name {download.few(odd)}, which '
          f'{download.few(of.values(), 1)} or another has'
        )
    names = {name: name for name in order}
    self._labels = {**self._number(names, there, 'labels', order), **special}

  def label(self, id_, size):
    """Paints the shapes of an id, uint8 [H, W]."""
    if id_ not in self._of:
      raise download.BadFileError(
        f'no LabelMe file for {self._images[id_]}: expected one of the same '
        'name, .json'
      )
    if id_ in self._bad:
      raise self._bad[id_]
    stated, shapes = self._read[id_]
    _of_image(self._images[id_], self._of[id_], stated or size, size)
    label = np.zeros(size, np.uint8)
    for name, kind, shape in shapes:
      with download.guard(f'{self._of[id_]}: {name!r}', 'cannot be painted'):
        made = _shape(kind, shape, size, self._of[id_])
        label[made] = self._labels[name]
    return label


def _labelme(name, said):
  """((H, W) or None, [(label, type, shape)]) of a LabelMe file."""
  with download.guard(name, 'is not LabelMe'):
    height, width = said.get('imageHeight'), said.get('imageWidth')
    shapes = [
      (word(x['label']), x.get('shape_type') or 'polygon', x)
      for x in said['shapes']
    ]
    return (height, width) if height and width else None, shapes


def _shape(kind, said, size, name):
  """One shape of LabelMe as bool [H, W]."""
  points = np.array(said['points'], np.float64).reshape(-1, 2)
  if kind == 'polygon':
    return masks.fill(points, size)
  if kind in ('rectangle', 'circle', 'mask') and len(points) == 2:
    (left, top), (right, bottom) = points
    if kind == 'rectangle':
      corners = [left, top, right, top, right, bottom, left, bottom]
      return masks.fill(corners, size)
    if kind == 'circle':  # its centre and a point of its rim
      turns = np.linspace(0, 2 * np.pi, 100, endpoint=False)
      rim = np.stack([np.cos(turns), np.sin(turns)], 1)
      radius = np.hypot(right - left, bottom - top)
      return masks.fill(points[0] + radius * rim, size)
    drawn = np.zeros(size, bool)
    contents = base64.b64decode(said['mask'])
    part = download.decode(contents, f'a mask in {name}', 'L') > 0
    top, left = round(top), round(left)
    if min(top, left) < 0:
      raise ValueError('its mask lies outside the image')
    where = drawn[top : top + part.shape[0], left : left + part.shape[1]]
    if where.shape != part.shape:
      raise ValueError('its mask lies outside the image')
    where[:] = part
    return drawn
  raise ValueError(f'a {kind} of {len(points)} points has no inside')


# ------------------------------------------------------------------------ YOLO


class Yolo(_Form):
  """A text file beside each image: a class and an outline a line.

  `0 0.1 0.2 0.4 0.2 0.3 0.5` is class 0 and x, y, ... in parts of the image.
  """

  def __init__(self, files, of, images, names=None):
    """Reads all files; what is wrong with one is told when it is painted.

    Args:
      files: the raw download.
      of: dict of id -> text file.
      images: dict of id -> image file.
      names: of classes 0, 1, ...; None calls them class0, class1, ...
    """
    super().__init__('YOLO', images)
    self._of, self._read, there = of, {}, {}
    for id_, name in of.items():
      try:
        self._read[id_] = _yolo(name, files.text(name))
        there.update((number, name) for number, _ in self._read[id_])
      except download.BadFileError as error:
        self._bad[id_] = error
    if names is None:
      names = {number: f'class{number}' for number in there}
    else:
      names = dict(enumerate(names))
    if odd := sorted(there.keys() - names.keys()):
      raise ValueError(
        f'{there[odd[0]]} has class {odd[0]}, and {len(names)} are named, from '
        '0 on'
      )
    self._labels = self._number(names, there.keys(), 'classes')

  def label(self, id_, size):
    """Paints the outlines of an id, uint8 [H, W]."""
    if id_ not in self._of:
      raise download.BadFileError(
        f'no text file for {self._images[id_]}: an image without objects needs '
        'an empty one'
      )
    if id_ in self._bad:
      raise self._bad[id_]
    label = np.zeros(size, np.uint8)
    for number, outline in self._read[id_]:
      with download.guard(self._of[id_], 'cannot be painted'):
        # Such files have six digits: less is no part of a pixel.
        points = (outline * [size[1], size[0]]).round(2)
        label[masks.fill(points, size)] = self._labels[number]
    return label


def _yolo(name, text):
  """[(class, outline float [p, 2])] of a text file."""
  made = []
  for number, line in enumerate(text.splitlines(), 1):
    words = line.split()
    if not words:
      continue
    with download.guard(f'{name}:{number}', 'is no outline'):
      if len(words) == 5:
        raise ValueError('five numbers are a box, and no outline')
      class_, outline = int(words[0]), np.array(words[1:], np.float64)
      if class_ < 0 or len(outline) < 6 or len(outline) % 2:
        raise ValueError('it needs a class and three points or more')
      if not ((outline > -0.01) & (outline < 1.01)).all():
        raise ValueError('coordinates must be parts of the image, 0 to 1')
    made.append((class_, outline.reshape(-1, 2)))
  return made
