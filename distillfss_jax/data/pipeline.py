"""Grain pipelines: the support set, test batches, episodes and their tables.

What leaves them is NumPy of few shapes; pixels stay uint8, the device
normalises and resizes them.
"""
# ruff: noqa: PT028  (test_batches is not a test)

import dataclasses

import grain
import numpy as np
from absl import flags

from distillfss_jax.data import augment, core, transforms
from distillfss_jax.types import VOID

# Images that threads have read before another process would have started.
_WORTH = 256


@dataclasses.dataclass(frozen=True)
class SupportSet:
  """Decoded and resized annotated images.

  images uint8 [m, S, S, 3]; labels uint8 [m, S, S], 0..n and 255 void;
  ids: m of them.
  """

  images: np.ndarray
  labels: np.ndarray
  ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Picked:
  """Source of (position, record) at the given indices; -1 is a missing one."""

  source: object
  indices: tuple[int, ...]

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, i):
    index = self.indices[i]
    return i, None if index < 0 else self.source[index]


def _resized(record, size):
  return {
    'images': transforms.resize_image(record['image'], size),
    'labels': transforms.resize_label(record['label'], size),
  }


def load_images(source, indices, image_size):
  """Reads annotated images into memory, such as a support set.

  Args:
    source: of records, such as the train part of a `core.Dataset`.
    indices: into it, as `support.choose` gives them.
    image_size: S.

  Returns:
    A SupportSet in the order of the indices.
  """
  picked = _Picked(source, tuple(int(i) for i in indices))
  records = grain.MapDataset.source(picked).map(
    lambda item: {**_resized(item[1], image_size), 'id': item[1]['id']}
  )
  records = list(records.to_iter_dataset(_read_options(4)))
  return SupportSet(
    np.stack([record['images'] for record in records]),
    np.stack([record['labels'] for record in records]),
    tuple(record['id'] for record in records),
  )


def canvas(size):
  """Rounds (rows, columns) up to one of few squares.

  256, 512, 768, 1024, 1536, 2048, 3072, ...: powers of two and the sums of two
  neighbours, so that native-size scoring compiles a handful of shapes.
  """
  longest, side = max(size), 256
  while side < longest:
    # 2^k (one bit set) goes to 1.5 * 2^k, that to 2^(k+1); 256 to 512.
    power = side & (side - 1) == 0
    side = (
      side * 2 if side == 256 else side * 3 // 2 if power else side * 4 // 3
    )
  return side, side


@dataclasses.dataclass(frozen=True)
class _Prepare:
  """Makes (position, record) ready to be batched; picklable for workers."""

  indices: tuple[int, ...]
  canvases: tuple[tuple[int, int], ...] | None
  size: int

  def __call__(self, item):
    position, record = item
    valid = record is not None
    if valid:
      made = _resized(record, self.size)
    else:
      made = {
        'images': np.zeros((self.size, self.size, 3), np.uint8),
        'labels': np.full((self.size, self.size), VOID, np.uint8),
      }
    made['valid'] = np.bool_(valid)
    made['index'] = np.int32(self.indices[position])
    if self.canvases is not None:
      label = record['label'] if valid else np.zeros((0, 0), np.uint8)
      native = np.full(self.canvases[position], VOID, np.uint8)
      native[: label.shape[0], : label.shape[1]] = label
      made['native_labels'] = native
      made['sizes'] = np.array(label.shape if valid else (1, 1), np.int32)
    return made


def test_batches(
  source, *, image_size, batch_size, native, workers=0, shard=(0, 1)
):
  """Batches the test images, each once, ordered by size.

  Args:
    source: of records, such as the test part of a `core.Dataset`.
    image_size: S, side of what the model sees.
    batch_size: B, per process.
    native: also give the labels at the size they were published in.
    workers: processes that decode, at most: few images are sooner decoded in
      threads of this one, and 0 decodes all so.
    shard: (index, count) of this process; all have equally many batches, and
      batches of the same place have the same shapes in all of them.

  Returns:
    grain IterDataset of dicts: images uint8 [B, S, S, 3], labels uint8
    [B, S, S], valid bool [B] (False pads the last batches; such records are
    void), index int32 [B] into the source, -1 where not valid. With native
    also native_labels uint8 [B, Hc, Wc], padded with 255 to one of few sizes
    (`canvas`), and sizes int32 [B, 2], rows and columns before padding.
  """
  part, parts = _checked_shard(batch_size, shard)
  if not len(source):
    raise ValueError('there are no images to test on')
  sizes = np.asarray(source.sizes)
  order = np.lexsort(
    (np.arange(len(sizes)), sizes[:, 1], sizes[:, 0], sizes.max(axis=1))
  )
  together = batch_size * parts
  order = np.append(order, np.full(-len(order) % together, -1))
  groups = order.reshape(-1, together)
  mine = groups[:, part * batch_size : (part + 1) * batch_size].ravel()
  canvases = None
  if native:
    largest = (canvas(sizes[group[group >= 0]].max(axis=0)) for group in groups)
    canvases = tuple(c for c in largest for _ in range(batch_size))
  indices = tuple(mine.tolist())
  batches = (
    grain.MapDataset.source(_Picked(source, indices))
    .map(_Prepare(indices, canvases, image_size))
    .batch(batch_size)
    .to_iter_dataset(_read_options(4))
  )
  return _in_processes(batches, workers, len(indices))


test_batches.__test__ = False  # for pytest: not a test


@dataclasses.dataclass(frozen=True)
class _ShortSide:
  """Source of whole batches of images of one shape."""

  source: object
  batches: tuple[tuple[int, ...], ...]  # of indices; -1 is a missing one
  shapes: tuple[tuple[int, int], ...]  # of the images of each batch
  size: int

  def __len__(self):
    return len(self.batches)

  def __getitem__(self, i):
    indices, shape = self.batches[i], self.shapes[i]
    images = np.zeros((len(indices), *shape, 3), np.uint8)
    labels = np.full((len(indices), *shape), VOID, np.uint8)
    for row, index in enumerate(indices):
      if index >= 0:
        record = self.source[index]
        images[row], labels[row] = augment.short_side(
          record['image'], record['label'], self.size
        )
    index = np.array(indices, np.int32)
    return {
      'images': images,
      'labels': labels,
      'valid': index >= 0,
      'index': index,
    }


def short_side_batches(
  source, *, image_size, batch_size, workers=0, shard=(0, 1), devices=1
):
  """Batches the test images, each once, by the shape they are resized to.

  Args:
    source: of records, such as the test part of a `core.Dataset`.
    image_size: S, the shorter side of what the model sees.
    batch_size: B, per process. Of a shape that fewer images have, a batch is
      smaller: the images of a shape are never of two batch sizes.
    workers: processes that decode, at most: few images are sooner decoded in
      threads of this one, and 0 decodes all so.
    shard: (index, count) of this process, which has at least one batch.
    devices: the size of a batch is a multiple of it.

  Returns:
    grain IterDataset of dicts: images uint8 [B, h, w, 3], the shorter of h and
    w being S; labels uint8 [B, h, w]; valid bool [B] and index int32 [B], as
    of `test_batches`.
  """
  part, parts = _checked_shard(batch_size, shard)
  if not len(source):
    raise ValueError('there are no images to test on')
  alike = {}
  for i, size in enumerate(np.asarray(source.sizes).tolist()):
    alike.setdefault(augment.short_side_shape(size, image_size), []).append(i)
  batches, shapes = [], []
  for shape, indices in sorted(alike.items()):
    count = min(batch_size, -(-len(indices) // devices) * devices)
    indices += [-1] * (-len(indices) % count)
    for first in range(0, len(indices), count):
      batches.append(tuple(indices[first : first + count]))
      shapes.append(shape)
  # So that each process has something to count, even if it is nothing.
  while len(batches) < parts:
    batches.append((-1,) * len(batches[0]))
    shapes.append(shapes[0])
  made = _ShortSide(
    source, tuple(batches[part::parts]), tuple(shapes[part::parts]), image_size
  )
  batches = grain.MapDataset.source(made).to_iter_dataset(_read_options(2))
  return _in_processes(batches, workers, len(source) // parts)


def _checked_shard(batch_size, shard):
  part, parts = shard
  if batch_size < 1 or not 0 <= part < parts:
    raise ValueError(
      f'need batch_size >= 1 and 0 <= index < count, got {batch_size} and '
      f'shard {shard}'
    )
  return part, parts


def _in_processes(batches, workers, images=None):
  """Has the batches made in processes of their own, where there are some.

  Args:
    batches: a grain IterDataset.
    workers: how many processes at most.
    images: how many there are to read; None for no end.
  """
  if images is not None:
    workers = min(workers, images // _WORTH)
  if not workers:
    return batches
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # outside app.run grain's flags would fail
  options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
  return batches.mp_prefetch(options)


def _read_options(ahead):
  """Reads few elements ahead: grain's own 500 would be the whole test set."""
  return grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)


@dataclasses.dataclass(frozen=True)
class _Steps:
  """Source of the tables of each step."""

  tables: object
  steps: int

  def __len__(self):
    return self.steps

  def __getitem__(self, i):
    table, valid = self.tables(i)
    return {'table': table, 'valid': valid}


def step_tables(tables, *, steps):
  """Gives the episodes of every step; the iterator can be checkpointed.

  Args:
    tables: step -> (int32 [e, 1+s], bool [e]), from `support.episode_tables`.
    steps: how many there are.

  Returns:
    grain IterDataset of dicts: table int32 [e, 1+s], valid bool [e].
  """
  if steps < 1:
    raise ValueError(f'need steps >= 1, got {steps}')
  source = _Steps(tables, steps)
  return grain.MapDataset.source(source).to_iter_dataset(_read_options(2))


@dataclasses.dataclass(frozen=True)
class _Read:
  """Reads the images of an episode and makes them one size; picklable."""

  pool: core.Pool
  episodes: object
  recipe: object
  support_recipe: object
  size: int
  canvas: tuple[int, int] | None = None  # for labels of the queries' own sizes

  def __call__(self, i, generator):
    """An episode, by its number; a negative one is padding, all void."""
    if i < 0:
      row = np.zeros(self.episodes.shape[1], np.int32)
    elif isinstance(self.episodes, np.ndarray):
      row = self.episodes[i]
    else:
      row = self.episodes(i, generator)
    class_, query, *shots = row
    value = self.pool.values[class_]
    record = self.pool.source[int(query)]
    image, label = self._one(generator, self.recipe, record, value)
    if i < 0:
      label = np.full_like(label, VOID)
    support = [
      self._one(
        generator, self.support_recipe, self.pool.source[int(shot)], value
      )
      for shot in shots
    ]
    return {
      **(self._native(record['label'], i < 0) if self.canvas else {}),
      'images': image,
      'labels': _of_class(label),
      'all_labels': _swapped(label, value),
      'support_images': np.stack([image for image, _ in support]),
      'support_labels': np.stack([_of_class(label) for _, label in support]),
      'class': np.int32(class_),
      'episode': np.asarray(row, np.int32),
      'valid': np.bool_(i >= 0),
    }

  def _native(self, label, padding):
    """The labels of a query as they are, on the canvas."""
    canvas = np.full(self.canvas, VOID, np.uint8)
    if not padding:
      canvas[: label.shape[0], : label.shape[1]] = label
    size = np.array((1, 1) if padding else label.shape, np.int32)
    return {'native_labels': canvas, 'sizes': size}

  def _one(self, generator, recipe, record, value):
    """An image and its labels, 1 and the label of the class swapped."""
    # One map carries both the mask and all classes through the recipe, which
    # may ask where the class of the episode is. Void stays: BAM and HDMNet
    # train without it. Parity: for DCAMA and IFA it is background, which is for
    # the system to say.
    label = _swapped(record['label'], value)
    return recipe(generator, record['image'], label, self.size)


@dataclasses.dataclass(frozen=True)
class _Augmented:
  """Makes a record of a training set one size; picklable."""

  source: object
  recipe: object
  size: int

  def __call__(self, i, generator):
    """A record by its number."""
    record = self.source[i]
    image, label = self.recipe(
      generator, record['image'], record['label'], self.size
    )
    return {
      'images': image,
      'labels': label,
      'valid': np.bool_(True),
      'index': np.int64(i),
    }


def training_images(
  source, recipe, *, image_size, batch_size, seed, workers=0, shard=(0, 1)
):
  """Batches labelled images without end; the iterator can be checkpointed.

  An epoch is every image once, in an order of its own; the last batch of one
  holds the first images of the next. Image i of an epoch depends on the seed,
  the epoch and i alone.

  Args:
    source: of records, such as the train part of a `core.Dataset`.
    recipe: (generator, image, label, size) -> image uint8 [S, S, 3] and label
      uint8 [S, S]; see `augment.py`.
    (others): as of `training_episodes`.

  Returns:
    grain IterDataset of dicts: images uint8 [B, S, S, 3], labels uint8
    [B, S, S], valid bool [B], True, index int64 [B] into the source.
  """
  part, parts = _checked_shard(batch_size, shard)
  batches = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    .random_map(_Augmented(source, recipe, image_size))
    .repeat()[part::parts]
    .batch(batch_size, drop_remainder=True)  # the endless has none
    .to_iter_dataset(_read_options(2 * batch_size))
  )
  return _in_processes(batches, workers)


def _of_class(label):
  """0, 1 and void of the labels that a recipe gives."""
  return np.where((label == 1) | (label == VOID), label, 0).astype(np.uint8)


def _swapped(label, value):
  """Labels in which 1 and `value` have changed places, there and back."""
  table = np.arange(256, dtype=np.uint8)
  table[[1, value]] = value, 1
  return table[label]


def training_episodes(
  pool,
  draw,
  recipe,
  support_recipe,
  *,
  image_size,
  batch_size,
  seed,
  workers=0,
  shard=(0, 1),
):
  """Batches random episodes without end; the iterator can be checkpointed.

  Episode i of an epoch depends on the seed, the epoch and i alone, so that a
  global batch is the same however many processes share it.

  Args:
    pool: a `core.Pool`.
    draw: (i, generator) -> row of an episode, with a length: `episodes.Random`.
    recipe: (generator, image, label, size) -> image uint8 [S, S, 3] and label
      uint8 [S, S], of the query; see `augment.py`.
    support_recipe: of the shots, each on its own.
    image_size: S.
    batch_size: B, per process.
    seed: of the order, the draws and the augmentation, 0 .. 2**32 - 1.
    workers: processes that read; 0 reads in threads of this one.
    shard: (index, count) of this process.

  Returns:
    grain IterDataset of dicts: images uint8 [B, S, S, 3]; labels uint8
    [B, S, S], 1 for the class, 0, or 255; all_labels uint8 [B, S, S], those of
    the records; support_images uint8 [B, s, S, S, 3]; support_labels uint8
    [B, s, S, S]; class int32 [B]; episode int32 [B, 2+s], the row; valid bool
    [B], True.
  """
  part, parts = _checked_shard(batch_size, shard)
  read = _Read(pool, draw, recipe, support_recipe, image_size)
  batches = (
    grain.MapDataset.range(len(draw))
    .seed(seed)
    .shuffle()
    .random_map(read)
    .repeat()[part::parts]
    .batch(batch_size, drop_remainder=True)  # the endless has none
    .to_iter_dataset(_read_options(2 * batch_size))
  )
  return _in_processes(batches, workers)


def listed_episodes(
  pool,
  table,
  recipe,
  support_recipe,
  *,
  image_size,
  batch_size,
  native=False,
  seed=0,
  workers=0,
  shard=(0, 1),
):
  """Batches a list of episodes, each once, in its order.

  Args:
    pool: a `core.Pool`.
    table: int32 [e, 2+s], from `episodes.listed`.
    native: also give the labels of the queries at their own sizes.
    (others): as of `training_episodes`; the seed is of recipes that draw.

  Returns:
    grain IterDataset of dicts as of `training_episodes`, equally many in all
    processes; valid is False, and labels are void, where the list has ended.
    With native also native_labels uint8 [B, Hc, Wc], all labels of the records
    on one canvas for the whole list, void beyond an image; and sizes int32
    [B, 2], its rows and columns.
  """
  part, parts = _checked_shard(batch_size, shard)
  table = np.asarray(table, np.int32)
  largest = None
  if native:
    largest = canvas(np.asarray(pool.source.sizes)[table[:, 1]].max(0))
  order = np.arange(len(table))
  order = np.append(order, np.full(-len(order) % (batch_size * parts), -1))
  read = _Read(pool, table, recipe, support_recipe, image_size, largest)
  batches = (
    grain.MapDataset.source(order.tolist())
    .seed(seed)
    .random_map(read)[part::parts]
    .batch(batch_size)
    .to_iter_dataset(_read_options(2 * batch_size))
  )
  return _in_processes(batches, workers, table[:, 1:].size // parts)
