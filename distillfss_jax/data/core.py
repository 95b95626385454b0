"""What a dataset is to a run: named classes and two sources of records."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Named classes and two random-access sources of records.

  A source has `len`, `ids` (tuple of str), `sizes` (int32 [N, 2], rows and
  columns), `present` (bool [N, n], which class occurs) and `[i]`, a record:
  'image' uint8 [H, W, 3], 'label' uint8 [H, W] (0 background, 1..n, 255 void)
  and 'id' str. Sources can be pickled. One whose records lie on disk also has
  `digests`, of what is stored.

  Where the owners keep images apart to choose by, these are `validation`. Where
  the test part is of several sets that are reported one by one, `sets` has the
  indices of each into it, by name.
  """

  name: str
  classes: tuple[str, ...]  # of labels 1..n
  palette: tuple[tuple[int, int, int], ...]  # of labels 0..n
  train: Sequence
  test: Sequence
  validation: Sequence | None = None
  sets: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)


class Chosen(Sequence):
  """A source with some of its labels, numbered anew; others are background."""

  def __init__(self, source, labels, *, void=True):
    """Takes a source, the labels to be 1, 2, ..., and whether void stays."""
    self._source = source
    self._table = np.zeros(256, np.uint8)
    self._table[255] = 255 if void else 0
    self._table[list(labels)] = np.arange(1, len(labels) + 1)
    self.ids, self.sizes = source.ids, source.sizes
    self.digests = getattr(source, 'digests', None)
    self.present = source.present[:, np.array(labels) - 1]

  def __len__(self):
    return len(self._source)

  def __getitem__(self, i):
    record = self._source[i]
    return {**record, 'label': self._table[record['label']]}


class Part(Sequence):
  """Some records of a source, by their indices."""

  def __init__(self, source, indices):
    """Takes a source and an int array."""
    self._source = source
    self._indices = np.asarray(indices, int)
    self.ids = tuple(source.ids[i] for i in self._indices)
    self.sizes = np.asarray(source.sizes)[self._indices]
    self.present = np.asarray(source.present)[self._indices]
    digests = getattr(source, 'digests', None)
    self.digests = digests and tuple(digests[i] for i in self._indices)

  def __len__(self):
    return len(self._indices)

  def __getitem__(self, i):
    return self._source[int(self._indices[i])]


class Joined(Sequence):
  """The records of several sources of the same classes, one after the other."""

  def __init__(self, *sources):
    """Takes the sources."""
    self._sources = sources
    self.ids = tuple(i for x in sources for i in x.ids)
    self.sizes = np.concatenate([x.sizes for x in sources])
    self.present = np.concatenate([x.present for x in sources])
    self.areas = np.concatenate([_areas(x) for x in sources])
    self.contents = tuple(i for x in sources for i in contents(x))

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, i):
    i = range(len(self))[i]
    for source in self._sources:
      if i < len(source):
        return source[i]
      i -= len(source)
    raise IndexError(i)


def _areas(source):
  """Pixels of each class, or 1 where nobody has counted."""
  return np.asarray(getattr(source, 'areas', source.present), np.int64)


def contents(source):
  """What tells each image by its pixels; its id where nobody has looked."""
  known = getattr(source, 'contents', source.ids)
  return tuple(x or i for x, i in zip(known, source.ids, strict=True))


def with_classes(dataset, labels):
  """A Dataset with some of the classes as labels 1, 2, ...; all its records.

  Args:
    dataset: a Dataset.
    labels: of the classes to keep, 1..n.
  """
  return dataclasses.replace(
    _chosen(dataset, labels),
    classes=tuple(dataset.classes[i - 1] for i in labels),
    palette=(dataset.palette[0], *(dataset.palette[i] for i in labels)),
  )


def without_void(dataset):
  """The same Dataset with background where it is void."""
  labels = range(1, len(dataset.classes) + 1)
  return _chosen(dataset, labels, void=False)


def _chosen(dataset, labels, **how):
  """The same Dataset with its sources as `Chosen` has them."""
  return dataclasses.replace(
    dataset,
    **{
      name: Chosen(source, labels, **how)
      for name in ('train', 'validation', 'test')
      if (source := getattr(dataset, name)) is not None
    },
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


def without(pool, images):
  """A pool without some images and what has the same pixels.

  Args:
    pool: a `Pool`.
    images: set of what tells these, see `contents`.
  """
  told = contents(pool.source)
  kept = [told[i] not in images for i in pool.pairs[:, 0]]
  return dataclasses.replace(pool, pairs=pool.pairs[np.array(kept, bool)])


PARTS = ('train', 'test', 'all')


def pool_of(dataset, part):
  """A pool of all classes of a Dataset that has none of its own.

  Args:
    dataset: a Dataset.
    part: of `PARTS`.

  Raises:
    ValueError: there is no such part, or a class has no image there.
  """
  if part not in PARTS:
    raise ValueError(f'part {part!r} is not one of {PARTS}')
  names = ('train', 'test') if part == 'all' else (part,)
  source = Joined(*(getattr(dataset, name) for name in names))
  return pool(source, dataset.classes, range(1, 1 + len(dataset.classes)))


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
