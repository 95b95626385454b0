"""Scenes whose objects only shape and texture together tell apart, from a seed.

A class is a shape with a texture, such as 'striped disc'. Every shape and every
texture is that of two classes, in different folds, and objects of no class
have them too: neither shape nor texture alone tells what an object is, and
colour and brightness, drawn anew for every object, tell nothing. Objects are
of any turn and of diameters from one to four, hide each other, and lie on
patterned ground full of shards. The twelve classes are four folds of three, as
PASCAL-5i has folds, so that all kinds of systems train and test on a machine
without any data. `blobs` are the binary kind: soft growths on folded, shining
skin, as colonoscopy sees polyps.

A record is drawn when it is read and is the same on every machine, bit by bit:
random numbers are those of NumPy's generator that never changes, computed with
what IEEE 754 rounds in one way only; waves come from a rounded table, since
sines differ between machines in their last bit.
"""

import functools
from collections.abc import Sequence

import numpy as np

from distillfss_jax.data import core

FOLDS, WAYS = 4, 3  # and classes of a fold
KINDS = ('objects', 'blobs')
PARTS = ('train', 'test')
_SHAPES = ('disc', 'ring', 'star', 'triangle', 'cross', 'crescent')
_TEXTURES = ('striped', 'checked', 'dotted', 'grainy', 'patched', 'ringed')
# (texture, shape) of labels 1..12. A class shares its shape with a class of one
# other fold, and its texture with a class of another.
_PLAN = tuple(
  (_TEXTURES[(i + 3 * (i // 6)) % 6], _SHAPES[i % 6]) for i in range(12)
)
CLASSES = tuple(' '.join(pair) for pair in _PLAN)
PALETTE = (
  (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
  (0, 114, 178), (213, 94, 0), (204, 121, 167), (153, 221, 255),
  (187, 204, 51), (136, 34, 85), (170, 68, 153), (255, 170, 187),
)  # fmt: skip
_SMALLEST = 0.08  # an object's radius at least, of the image's side
_CIRCLE = 1024  # steps of a full turn
_COSINE = (
  np.round(np.cos(np.arange(_CIRCLE) * (2 * np.pi / _CIRCLE)) * 2**14) / 2**14
).astype(np.float32)


def fold_labels(fold):
  """The three labels, of 1..12, that a fold leaves for testing."""
  return tuple(range(WAYS * fold + 1, WAYS * fold + WAYS + 1))


def load(
  kind='objects',
  num_train=512,
  num_test=128,
  image_size=128,
  classes=None,
  fold=None,
  base=False,
  exclusive=False,
  seed=0,
):
  """Makes train and test images with dense labels.

  Image i always shows class i mod n of the n chosen ones.

  Args:
    kind: 'objects', or 'blobs', whose one class is 'blob'.
    num_train: images to train on, or to choose supports from.
    num_test: images to score.
    image_size: side in pixels, at least 64.
    classes: names of `CLASSES` to be labels 1, 2, ...; None for all.
    fold: 0..3 for the three classes of a fold instead.
    base: with a fold, the nine other classes, as a base learner knows them.
      They are numbered in the order of the classes of `pool`.
    exclusive: without objects of a class that was not chosen; otherwise some
      are there, as background.
    seed: 0 .. 2**32 - 1.

  Raises:
    ValueError: for unknown arguments, or numbers out of these ranges.
  """
  if kind not in KINDS:
    raise ValueError(f'kind {kind!r} is not one of {KINDS}')
  _check(
    num_train=num_train, num_test=num_test, image_size=image_size, seed=seed
  )
  counts = {'train': num_train, 'test': num_test}
  if kind == 'blobs':
    if classes is not None or fold is not None or base or exclusive:
      raise ValueError(
        "kind 'blobs' has one class: classes, fold, base and exclusive are of "
        "kind 'objects'"
      )
    parts = (Blobs(x, counts[x], image_size, seed) for x in PARTS)
    return core.Dataset('scenes', ('blob',), PALETTE[:2], *parts)
  labels = _chosen(classes, fold, base)
  parts = (
    Scenes(x, counts[x], image_size, labels, exclusive, seed) for x in PARTS
  )
  return core.with_classes(
    core.Dataset('scenes', CLASSES, PALETTE, *parts), labels
  )


def pool(
  part='train',
  fold=0,
  num_train=2048,
  num_test=512,
  image_size=128,
  exclusive=False,
  seed=0,
):
  """What episodes are drawn from; see `core.Pool`.

  The labels of its records are all twelve, 1..12, so that a base learner finds
  the base classes of a query there.

  Args:
    part: 'train', whose classes are the nine base classes, or 'test', whose
      classes are the three of the fold.
    fold: 0..3.
    num_train: images of the training part.
    num_test: images of the test part.
    image_size: side in pixels, at least 64.
    exclusive: without objects of a class of the other part (BAM).
    seed: 0 .. 2**32 - 1.

  Raises:
    ValueError: for unknown arguments, or numbers out of these ranges.
  """
  if part not in PARTS:
    raise ValueError(f'part {part!r} is not one of {PARTS}')
  _check(
    num_train=num_train, num_test=num_test, image_size=image_size, seed=seed
  )
  labels = _chosen(None, fold, base=part == 'train')
  count = num_train if part == 'train' else num_test
  source = Scenes(part, count, image_size, labels, exclusive, seed)
  return core.pool(source, [CLASSES[i - 1] for i in labels], labels)


def _check(**numbers):
  lowest = {'num_train': 1, 'num_test': 1, 'image_size': 64, 'seed': 0}
  for name, number in numbers.items():
    if type(number) is not int or not lowest[name] <= number < 2**32:
      raise ValueError(
        f'{name} must be a whole number of at least {lowest[name]}, below '
        f'{2**32}; got {number!r}'
      )


def _chosen(classes, fold, base):
  """The labels, of 1..12, that names or a fold stand for."""
  if fold is not None and (type(fold) is not int or fold not in range(FOLDS)):
    raise ValueError(f'fold {fold!r} is not one of 0..{FOLDS - 1}, or None')
  if classes is not None and fold is not None:
    raise ValueError('classes and fold both say which classes: take one')
  if base and fold is None:
    raise ValueError('base takes the classes of the other folds: name a fold')
  every = range(1, len(CLASSES) + 1)
  if fold is not None:
    return tuple(i for i in every if (i in fold_labels(fold)) != base)
  if classes is None:
    return tuple(every)
  names = tuple(classes)
  strange = [name for name in names if name not in CLASSES]
  if strange or not names or len(set(names)) < len(names):
    raise ValueError(
      f'classes {classes!r} should be different ones of: {", ".join(CLASSES)}'
    )
  return tuple(CLASSES.index(name) + 1 for name in names)


class _Drawn(Sequence):
  """Random access to records that are drawn when they are read.

  Attributes:
    present: bool [N, n], which class occurs; nothing is drawn to tell.
  """

  def __init__(self, split, count, size, seed, ways):
    self._key, self._size = (seed, PARTS.index(split)), size
    self.ids = tuple(f'{split}-{i:05d}' for i in range(count))
    self.sizes = np.full((count, 2), size, np.int32)
    self.present = np.ones((count, ways), bool)

  @property
  def areas(self):
    """Pixels that show a class at least, int64 [N, n], for `core.pool`."""
    return self.present * np.int64(_least(self._size))

  def __len__(self):
    return len(self.ids)

  def _random(self, *more):
    # A generator whose numbers no version of NumPy changes.
    return np.random.RandomState(np.random.PCG64([*self._key, *more]))

  def __getitem__(self, i):
    i = range(len(self))[i]  # IndexError beyond the end, as iteration needs
    labels = np.flatnonzero(self.present[i]) + 1
    image, label = self._draw(self._random(1, i), labels.tolist())
    return {'image': image, 'label': label, 'id': self.ids[i]}


class Scenes(_Drawn):
  """Images of objects, labels 1..12."""

  def __init__(self, split, count, size, labels, exclusive, seed):
    """Takes what `load` takes; image i shows one of `labels`, by turns."""
    super().__init__(split, count, size, seed, len(CLASSES))
    # Row i does not depend on the count.
    chances = self._random(0).rand(count, 1 + len(CLASSES))
    many = 1 + (chances[:, 0] > 0.4) + (chances[:, 0] > 0.85)  # classes
    rank, labels = chances[:, 1:], np.array(labels)
    rank[np.arange(count), labels[np.arange(count) % len(labels)] - 1] = -1
    if exclusive:
      rank[:, np.setdiff1d(np.arange(len(CLASSES)), labels - 1)] = 2
      many = np.minimum(many, len(labels))
    rank = rank.argsort(1, kind='stable').argsort(1, kind='stable')
    self.present = rank < many[:, None]

  def _draw(self, random, labels):
    return _scene(random, self._size, labels)


class Blobs(_Drawn):
  """Images of one or two growths on skin, label 1."""

  def __init__(self, split, count, size, seed):
    """Takes what `load` takes."""
    super().__init__(split, count, size, seed, 1)

  def _draw(self, random, labels):
    del labels  # there is one, in every image
    return _skin(random, self._size)


def _least(size):
  """Pixels of a class, or growth, that an image shows of it at least."""
  return int(0.006 * size**2)


# Random numbers. All come from `rand` and `bytes`, whose bits are the same on
# every machine, and are computed with in Python or NumPy: C compilers may
# round a product and a sum together.


def _between(random, low, high):
  return low + (high - low) * random.rand()


def _one(random, options):
  return options[int(random.rand() * len(options))]


def _direction(random):
  """Cosine and sine of a random angle."""
  k = int(random.rand() * _CIRCLE)
  return float(_COSINE[k]), float(_COSINE[k - _CIRCLE // 4])


def _colours(random, tries=1):
  """Two colours float32 [2, 3, 1, 1]: of some pairs, the most different."""
  pairs = 0.05 + 0.9 * random.rand(tries, 2, 3)
  gap = np.abs(pairs[:, 0] - pairs[:, 1])
  gap = 0.3 * gap[:, 0] + 0.6 * gap[:, 1] + 0.1 * gap[:, 2]
  return pairs[gap.argmax()].astype(np.float32)[..., None, None]


def _noise(random, rows, columns):
  """Independent values float32 [rows, columns], -1..1."""
  values = np.frombuffer(random.bytes(rows * columns), np.uint8)
  return values.reshape(rows, columns).astype(np.float32) / 127.5 - 1


@functools.lru_cache(maxsize=64)
def _between_values(size, cells):
  """Where pixels lie among `cells + 1` values: index, weight [size]."""
  place = (np.arange(size) + 0.5) * (cells / size)
  index = place.astype(np.intp)
  t = (place - index).astype(np.float32)
  return index, t * t * (3 - 2 * t)


def _smooth(random, size, cells):
  """Slow noise float32 [size, size], -1..1: a coarse grid, interpolated."""
  index, weight = _between_values(size, cells)
  values = _noise(random, cells + 1, cells + 1)
  down = weight[:, None]
  values = values[index] * (1 - down) + values[index + 1] * down
  return values[:, index] * (1 - weight) + values[:, index + 1] * weight


def _clip(x):
  return np.minimum(np.maximum(x, 0), 1)


def _wave(turns):
  """Cosine of so many full turns, float32; |turns| below 2**10."""
  index = ((turns + 2**10) * _CIRCLE).astype(np.int32) & (_CIRCLE - 1)
  return _COSINE[index]


# Shapes: (x, y) float32 to depth below the outline, positive inside, in units
# of the radius of a disc of the same area: no shape is told by its size.


def _disc(x, y):
  return 1 - np.sqrt(x * x + y * y)


def _ring(x, y):
  return 0.29 - np.abs(np.sqrt(x * x + y * y) - 0.86)


def _half_planes(x, y, count, away):
  """Yields the depth below each of `count` lines around the centre."""
  for k in range(0, count * _CIRCLE, _CIRCLE):
    k //= count
    cosine, sine = float(_COSINE[k]), float(_COSINE[k - _CIRCLE // 4])
    yield away - (cosine * x + sine * y)


def _triangle(x, y):
  return functools.reduce(np.minimum, _half_planes(x, y, 3, 0.778))


def _star(x, y):
  """A pentagram: what lies below all of its five lines, or all but one."""
  lowest, second = 9.0, 9.0
  for depth in _half_planes(x, y, 5, 0.517):
    second = np.minimum(second, np.maximum(lowest, depth))
    lowest = np.minimum(lowest, depth)
  return second


def _cross(x, y):
  x, y = np.abs(x), np.abs(y)
  return np.minimum(1.108 - np.maximum(x, y), 0.443 - np.minimum(x, y))


def _crescent(x, y):
  away = x - 0.72
  bite = np.sqrt(away * away + y * y) - 0.95
  return np.minimum(1.3 - np.sqrt(x * x + y * y), bite)


def _square(x, y):
  return 0.886 - np.maximum(np.abs(x), np.abs(y))


def _flower(x, y):
  """Five petals: cos 5a as a polynomial of cos a."""
  r = np.sqrt(x * x + y * y) + 1e-6
  c = x / r
  c2 = c * c
  return 0.978 * (1 + 0.3 * c * (5 + c2 * (16 * c2 - 20))) - r


# Each with how far it reaches from its centre.
_OUTLINES = {
  'disc': (_disc, 1.0),
  'ring': (_ring, 1.15),
  'star': (_star, 1.68),
  'triangle': (_triangle, 1.56),
  'cross': (_cross, 1.2),
  'crescent': (_crescent, 1.3),
  'square': (_square, 1.26),
  'flower': (_flower, 1.28),
}


# Textures: (x, y) float32 in periods from the object's centre, random shifts
# (a, b) in 0..1 and the pixels of a period, to 0..1: how much of the second of
# two colours.


def _edge(wave, pixels):
  """A wave made as steep as pixels allow."""
  return _clip(0.5 + wave * (0.12 * pixels))


def _striped(x, y, a, b, pixels):
  del y, b
  return _edge(_wave(x + a), pixels)


def _checked(x, y, a, b, pixels):
  return _edge(1.5 * _wave(0.7 * x + a) * _wave(0.7 * y + b), pixels)


def _dotted(x, y, a, b, pixels):
  return _edge(_wave(0.6 * x + a) + _wave(0.6 * y + b) - 0.9, pixels)


def _patched(x, y, a, b, pixels):
  """Large spots without order, as cows have them."""
  x, y = 0.3 * x + a, 0.3 * y + b
  waves = _wave(x + 0.3 * y) + _wave(0.6 * x - y) + _wave(1.3 * y + 0.8 * x)
  return _edge(2 * waves, pixels)


def _grainy(x, y, a, b, pixels):
  """Small tiles, light or dark as a hash of their place has it."""
  del pixels
  i = (2.6 * x + (512 + 64 * a)).astype(np.int32)
  j = (2.6 * y + (512 + 64 * b)).astype(np.int32)
  mixed = i * 73856093 ^ j * 19349663
  mixed = (mixed ^ mixed >> 7) * 40503
  return (mixed >> 9 & 1).astype(np.float32)


def _ringed(x, y, a, b, pixels):
  del b
  return _edge(2 * _wave(0.5 * np.sqrt(x * x + y * y) + a), pixels)


def _plain(x, y, a, b, pixels):
  del a, b, pixels
  return np.zeros_like(x + y)


def _cloudy(x, y, a, b, pixels):
  del pixels
  return 0.5 + 0.25 * (_wave(0.3 * x + a) + _wave(0.2 * y + 0.15 * x + b))


_PATTERNS = {
  'striped': _striped,
  'checked': _checked,
  'dotted': _dotted,
  'grainy': _grainy,
  'patched': _patched,
  'ringed': _ringed,
  'plain': _plain,
  'cloudy': _cloudy,
}


def _turned(x, y, turn):
  """Coordinates along and across a direction."""
  cosine, sine = turn
  return cosine * x + sine * y, cosine * y - sine * x


def _around(size, row, column, reach):
  """The window of pixels around a place, within the image.

  Returns:
    Its slices of rows and columns; x float32 [1, w] and y [h, 1] in it, from
    the place, in pixels.
  """
  rows, columns = (
    slice(max(int(at - reach), 0), min(int(at + reach) + 2, size))
    for at in (row, column)
  )
  y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - row
  x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] - column
  return rows, columns, x, y


class _Object:
  """An object at its place: its outline, and what it will look like."""

  def __init__(self, random, size, others, label):
    """Places it, rather where `others` are not; label 0 is of no class."""
    self.label = label
    self.texture, shape = _PLAN[label - 1] if label else _of_no_class(random)
    large = 1 + random.rand()
    self.radius = _SMALLEST * size * large * large
    places = size * (0.06 + 0.88 * random.rand(4, 2))
    self.place = max(places.tolist(), key=lambda at: self._gap(at, others))
    outline, reach = _OUTLINES[shape]
    stretch, turn = _between(random, 0.88, 1.14), _direction(random)
    reach = reach * max(stretch, 1 / stretch) + 0.2  # and its shadow
    self.rows, self.columns, self.x, self.y = _around(
      size, *self.place, self.radius * reach + 1
    )
    x, y = _turned(self.x / self.radius, self.y / self.radius, turn)
    self.depth = self.radius * outline(x * stretch, y / stretch)

  def _gap(self, place, others):
    """How near the nearest is: squared, of both radii together."""
    nearest = 9.0
    for other in others:
      down, aside = place[0] - other.place[0], place[1] - other.place[1]
      reach = self.radius + other.radius
      nearest = min(nearest, (down * down + aside * aside) / (reach * reach))
    return nearest

  def paint(self, random, image):
    """Draws it with its shadow, lit from above, into float32 [3, S, S]."""
    part = image[:, self.rows, self.columns]
    far = int(1 + 0.1 * self.radius)
    shadow = _clip(0.5 + self.depth[:-far, :-far] / (0.5 * far + 1))
    part[:, far:, far:] *= 1 - 0.4 * shadow
    period = max(image.shape[1] * _between(random, 0.045, 0.07), 4)
    x, y = _turned(self.x / period, self.y / period, _direction(random))
    mixed = _PATTERNS[self.texture](x, y, random.rand(), random.rand(), period)
    one, other = _colours(random, tries=6)
    light = 1 - (self.x + self.y) * (0.14 / self.radius)
    light *= 1 - 0.35 * _clip(1 - self.depth / (0.12 * self.radius + 1))
    part += _clip(self.depth + 0.5) * (
      (one + (other - one) * mixed) * light - part
    )


def _of_no_class(random):
  """A texture and a shape that are not together those of a class."""
  of_none = random.rand() < 0.8  # those with a class's texture are the hardest
  while True:  # 12 of all 64 pairs are of a class
    texture = _one(random, ('plain', 'cloudy') if of_none else _TEXTURES)
    pair = texture, _one(random, tuple(_OUTLINES))
    if pair not in _PLAN:
      return pair


def _scene(random, size, labels):
  """Draws an image uint8 [size, size, 3] and its label uint8 [size, size]."""
  objects, label = _layout(random, size, labels)
  image = _ground(random, size)
  for one in objects:
    one.paint(random, image)
  light = 1 + 0.15 * _smooth(random, size, 2)
  image *= light + _between(random, 0.01, 0.06) * _noise(random, size, size)
  return _bytes(image), label


def _layout(random, size, labels):
  """Places objects, anew until enough is seen of every class.

  Returns:
    The objects, the hindmost first, and the label uint8 [size, size].
  """
  while True:  # seldom twice
    wanted = [*labels, *(0, 0, 0)[: 1 + int(3 * random.rand())]]
    for _ in range(1 + (random.rand() < 0.5)):
      wanted.append(_one(random, labels))
    objects = []
    for label in wanted:
      objects.append(_Object(random, size, objects, label))
    order = np.argsort(random.rand(len(objects)), kind='stable')
    objects = [objects[k] for k in order]
    drawn = np.zeros((size, size), np.uint8)
    for one in objects:
      drawn[one.rows, one.columns][one.depth > 0] = one.label
    if all((drawn == label).sum() >= _least(size) for label in labels):
      return objects, drawn


def _ground(random, size):
  """Two patterned grounds under shards, float32 [3, size, size]."""
  _, _, x, y = _around(size, 0, 0, size)
  grounds = []
  for _ in range(2):
    pattern = _PATTERNS[_one(random, tuple(_PATTERNS))]
    period = size * _between(random, 0.04, 0.12)
    mixed = pattern(
      *_turned(x / period, y / period, _direction(random)),
      random.rand(), random.rand(), period,
    )  # fmt: skip
    mixed = 0.3 * mixed + 0.4 * _smooth(random, size, 9)
    one, other = _colours(random)
    grounds.append(one + (other - one) * mixed)
  image, other = grounds
  image += _clip(0.15 * size * _smooth(random, size, 3) + 0.5) * (other - image)
  for _ in range(10):
    radius = size * _between(random, 0.012, 0.035)
    at = size * random.rand(2)
    rows, columns, x, y = _around(size, *at.tolist(), 1.6 * radius)
    outline = _one(random, (_triangle, _square, _disc))
    x, y = _turned(x / radius, y / radius, _direction(random))
    part = image[:, rows, columns]
    part += _clip(radius * outline(x, y) + 0.5) * (_colours(random)[0] - part)
  return image


def _skin(random, size):
  """Draws growths on skin: uint8 [size, size, 3] and [size, size]."""
  depth, raised = _growths(random, size)
  _, _, x, y = _around(size, size / 2, size / 2, size)
  rough = _smooth(random, size, 12)
  # Heights, of the image's side.
  height = 0.05 * _smooth(random, size, 5) + 0.012 * rough
  for _ in range(3):
    along, across = _turned(x / size, y / size, _direction(random))
    fold = across + 0.12 * _wave(1.1 * along + random.rand())
    fold = (fold - _between(random, -0.6, 0.6)) / _between(random, 0.1, 0.22)
    fold = _clip(1 - fold * fold)
    height += 0.055 * fold * fold
  pits = _smooth(random, size, int(size * _between(random, 0.12, 0.2)))
  height += raised * (_between(random, 0.05, 0.09) + 0.012 * pits)
  # Light from above, as far as the middle.
  slope = np.zeros_like(height)
  slope[1:, 1:] = (height[1:, 1:] - height[:-1, :-1]) * size
  light = (1 + 0.32 * slope) * (1.1 - 1.6 * (x * x + y * y) / (size * size))
  vessels = _clip(1 - 9 * np.abs(_smooth(random, size, 7) + 0.3 * rough))
  vessels *= 1 - raised
  red = _between(random, 0.62, 0.85)
  green = red * _between(random, 0.45, 0.7)
  blue = green * _between(random, 0.7, 1.05)
  planes = []
  for colour, seen in ((red, 0.12), (green, 0.35), (blue, 0.3)):
    tint = 1 + _between(random, -0.15, 0.15) * raised - seen * vessels
    planes.append(colour * light * tint)
  shine = 0.8 * _clip(3 * (slope + 0.6 * rough) - 3)
  image = np.stack(planes) + shine
  image *= 1 + _between(random, 0.01, 0.05) * _noise(random, size, size)
  return _bytes(image), (depth > 0).astype(np.uint8)


def _growths(random, size):
  """One growth or two.

  Returns:
    depth float32 [size, size], positive inside, and raised, 0..1: how far a
    pixel is up their sides.
  """
  _, _, x, y = _around(size, size / 2, size / 2, size)
  edge = 0.25 * _smooth(random, size, 6)
  depth = np.full((size, size), -1, np.float32)
  for _ in range(1 + (random.rand() < 0.25)):
    # Lobes and edge leave at least 0.59 of the radius, and the centre is inside
    # the image: that is more than the area that is promised.
    radius = _between(random, 0.08, 0.26)
    row, column = (size * _between(random, -0.35, 0.35) for _ in range(2))
    u, v = _turned(x - column, y - row, _direction(random))
    stretch = _between(random, 0.8, 1.25) / (radius * size)
    u, v = u * stretch, v / (stretch * radius * radius * size * size)
    r = np.sqrt(u * u + v * v) + 1e-6
    c = u / r
    lobes = 0.12 * c * (4 * c * c - 3) + 0.08 * (2 * c * c - 1)
    depth = np.maximum(depth, radius * (1 + lobes + edge - r))
  raised = _clip(depth * _between(random, 7, 12))
  return depth, raised * (2 - raised)


def _bytes(image):
  """Planes float32 [3, H, W], 0..1, as an image uint8 [H, W, 3]."""
  pixels = (_clip(image) * 255 + 0.5).astype(np.uint8)
  return np.ascontiguousarray(pixels.transpose(1, 2, 0))
