"""Lung: nodules in slices of chest CT, Mendeley dataset 5rr22hgzwr.

Nam, Panina and Pak, "Lung cancer segmentation dataset with Lung-RADS class",
2024. Two pickled pandas tables, one row per slice; the columns `hu_array`
(Hounsfield units) and `mask` count. A pickle is a program: this one is read
with a table of the names that a DataFrame needs, each standing for something
here that only holds what it is given. Neither pandas nor anything else that it
names is imported.
"""

import io
import math
import pickle
import posixpath
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, prepared

SPLITS = ('owners',)
_FILES = {'train': 'lung_cancer_train.pkl', 'test': 'lung_cancer_test.pkl'}


class Lung(builder.SegmentationBuilder):
  """Lung nodules in slices of chest CT, Mendeley dataset 5rr22hgzwr."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('nodule',)
  PALETTE = ((0, 0, 0), (230, 159, 0))
  DOWNLOAD = (
    'get lung_cancer_train.pkl and lung_cancer_test.pkl of "Lung cancer '
    'segmentation dataset with Lung-RADS class" (https://data.mendeley.com/'
    'datasets/5rr22hgzwr, its licence is on that page), and give the folder '
    'or zip that holds both as --raw'
  )


def load(data_dir='data'):
  """Loads the prepared dataset, divided as its owners did.

  Raises:
    FileNotFoundError: when it was not prepared.
  """
  return prepared.load_prepared(Lung, data_dir)


def prepare(raw, data_dir, *, split='owners', skip_bad=False):
  """Turns the two tables into ArrayRecord; see `builder.prepare`.

  The only `split` is the owners': a table each.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  return builder.prepare(Lung, Layout, raw, data_dir, skip_bad=skip_bad)


class Layout:
  """The two tables in one folder, at any depth; row i of one is 'train-i'."""

  def __init__(self, files):
    """Reads both tables; ValueError without them, or with a damaged one."""
    self.top = _folder(files)
    self._cells = {}
    for split, name in _FILES.items():
      hus, masks = _table(files, posixpath.join(self.top, name))
      for i, cells in enumerate(zip(hus, masks, strict=True)):
        self._cells[f'{split}-{i}'] = cells
    self.ids = list(self._cells)
    self._low, self._high = self._range()

  def split(self, ids):
    """Divides the ids by the table they come from."""
    return {x: [i for i in ids if i.startswith(f'{x}-')] for x in _FILES}

  def image(self, id_):
    """The slice of an id in grey, uint8 [H, W, 3].

    As in the original (Q34), the lowest and the highest value of all the
    train slices become 0 and 255, in the test slices too.

    Parity: a test slice may reach beyond those two; what the original makes of
    such a pixel depends on the machine, ours is 0 or 255.
    """
    hu = _usable(id_, self._cells[id_][0])
    low, high = (_real(x) for x in (self._low, self._high))
    grey = np.clip((_real(hu) - low) / (high - low) * 255, 0, 255)
    return np.repeat(grey.astype(np.uint8)[..., None], 3, -1)

  def label(self, id_, size):
    """The mask of an id, uint8 [H, W] in {0, 1}."""
    mask = self._cells[id_][1]
    if not _numbers(mask):
      raise download.BadFileError(f'{id_}: mask is {_form(mask)}, not [H, W]')
    download.same_size(id_, mask, size)
    values = np.unique(mask)
    if not np.isin(values, (0, 1)).all():
      shown = ', '.join(str(x) for x in values[:5])
      raise download.BadFileError(f'{id_}: mask has {shown}, expected 0 and 1')
    return mask.astype(np.uint8)

  def _range(self):
    """The lowest and the highest value of the usable train slices."""
    usable = []
    for id_, (hu, _) in self._cells.items():
      try:
        if id_.startswith('train-'):
          usable.append(_usable(id_, hu))
      except download.BadFileError:
        continue  # reported with all others, by `image`
    low = min((x.min() for x in usable), default=0)
    high = max((x.max() for x in usable), default=1)
    if not low < high:
      raise ValueError(
        f'all train slices are {low} everywhere: is {_FILES["train"]} the '
        f'right file? {Lung.DOWNLOAD}'
      )
    return low, high


def _folder(files):
  """The folder that holds both tables; ValueError where there is none."""
  there = set(files.names)
  for name in sorted(there, key=lambda x: (x.count('/'), x)):
    top, last = posixpath.split(name)
    if last == _FILES['train'] and posixpath.join(top, _FILES['test']) in there:
      return top
  raise ValueError(
    f'{files} has no folder with {" and ".join(_FILES.values())} '
    f'({len(there)} files of other names): {Lung.DOWNLOAD}'
  )


def _numbers(cell):
  """Whether a cell is an array [H, W] of numbers."""
  array = isinstance(cell, np.ndarray) and cell.dtype.kind in 'biuf'
  return array and cell.ndim == 2 and cell.size > 0


def _form(cell):
  if isinstance(cell, np.ndarray):
    return f'an array of {cell.dtype} and shape {list(cell.shape)}'
  return 'no array'


def _usable(id_, hu):
  """`hu`, or BadFileError where it is no slice of finite numbers."""
  if not _numbers(hu):
    raise download.BadFileError(f'{id_}: hu_array is {_form(hu)}, not [H, W]')
  if not np.isfinite(hu).all():
    raise download.BadFileError(
      f'{id_}: hu_array has values that are not finite'
    )
  return hu


def _real(x):
  """Whole numbers as float64, so that differences do not overflow."""
  return x if np.issubdtype(np.asarray(x).dtype, np.floating) else x * 1.0


# --- Tables that pandas pickled ---


def _table(files, name):
  """Columns `hu_array` and `mask` of a pickled DataFrame, lists of cells.

  Raises:
    BadFileError: damaged, no DataFrame, without these columns, or with
      anything in it that a table of arrays does not need.
  """
  try:
    table = _Unpickler(io.BytesIO(files.read(name, None))).load()
    if not isinstance(table, _DataFrame):
      raise _RefusedError('it is no DataFrame')
    return [table.column(wanted) for wanted in ('hu_array', 'mask')]
  except download.BadFileError:
    raise
  except _RefusedError as error:
    raise download.BadFileError(f'{name}: {_line(error)}') from error
  except (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
  ) as error:  # whatever a damaged pickle makes of itself
    raise download.BadFileError(
      f'{name}: it is damaged or no pickle '
      f'({type(error).__name__}: {_line(error)})'
    ) from error


def _line(error):
  """An error's text as one line of bounded length."""
  return ' '.join(str(error)[:600].split())


class _RefusedError(ValueError):
  """What is in a pickle but not allowed there; the message names it."""


class _Unpickler(pickle.Unpickler):
  """Gives names their stand-ins and refuses all others; imports nothing."""

  def find_class(self, module, name):
    known = _NAMES.get(f'{module}.{name}')
    if known is None:
      shown = f'{module}.{name}'[:100].encode('unicode_escape').decode()
      raise _RefusedError(
        f'it refers to {shown}, which a table of arrays does not need: it was '
        'not loaded, and nothing was run'
      )
    return known


class _StandIn:
  """What a name stands for. Only its own `__init__` and `__setstate__` run.

  The second is always there: without it, a pickle could set attributes, of the
  stand-in itself too.
  """

  __slots__ = ()

  def __init__(self, *arguments):
    """Holds nothing of a value that is not wanted."""

  def __setstate__(self, state):
    raise _RefusedError(f'it is damaged: a state for {type(self).__name__}')


class _Bytes(_StandIn):
  """_codecs.encode: how protocol 2 writes bytes."""

  __slots__ = ('content',)

  def __init__(self, text, encoding):
    if encoding != 'latin1':
      raise _RefusedError('it is damaged: bytes of no known form')
    self.content = text.encode('latin1')


class _Slice(_StandIn):
  """builtins.slice: where a block's columns lie in the table."""

  __slots__ = ('places',)

  def __init__(self, start, stop, step):
    self.places = range(start, stop, 1 if step is None else step)


class _Type(_StandIn):
  """numpy.dtype: of numbers, or of objects."""

  __slots__ = ('code', 'order')

  def __init__(self, code, *flags):
    if not isinstance(code, str) or not re.fullmatch(r'[biuf]\d\d?|O8?', code):
      raise _RefusedError(f'it has values of type {str(code)[:40]!r}')
    self.code, self.order = code, '='

  def __setstate__(self, state):
    if state[1] not in ('<', '>', '|', '='):
      raise _RefusedError('it is damaged: a byte order of no known form')
    self.order = state[1]


class _Array(_StandIn):
  """numpy.ndarray: a view of the pickle's bytes, or an array of objects."""

  __slots__ = ('array',)

  def __init__(self, *arguments):
    self.array = None

  def __setstate__(self, state):
    _, shape, type_, fortran, content = state
    self.array = _array(content, type_, shape, 'F' if fortran else 'C')


class _Buffered(_Array):
  """numpy.core.numeric._frombuffer: an array in protocol 5."""

  __slots__ = ()

  def __init__(self, content, type_, shape, order):
    self.array = _array(content, type_, shape, order)


def _array(content, type_, shape, order):
  if not isinstance(type_, _Type):
    raise _RefusedError('it is damaged: an array of no known type')
  if type_.code[0] != 'O':
    if isinstance(content, _Bytes):
      content = content.content
    dtype = np.dtype(type_.code).newbyteorder(type_.order)
    return np.frombuffer(content, dtype).reshape(shape, order=order)
  if not isinstance(content, list) or len(content) != math.prod(shape):
    raise _RefusedError('it is damaged: objects of no known number')
  array = np.empty(len(content), object)
  for i, x in enumerate(content):
    array[i] = x  # not all at once: NumPy would look into each
  return array.reshape(shape, order=order)


class _Labels(_StandIn):
  """A pandas Index: of columns it holds their names, of rows nothing."""

  __slots__ = ('names',)

  def __init__(self, kind, values):
    data = values.get('data')
    named = isinstance(data, _Array) and data.array is not None
    self.names = list(data.array.ravel()) if named else []


class _Block(_StandIn):
  """Columns of one type: array [columns, rows], and which columns they are."""

  __slots__ = ('array', 'places')

  def __init__(self, values, places, ndim=2):
    self.array = values.array
    if isinstance(places, _Slice):
      self.places = places.places
    else:
      self.places = places.array.tolist()


class _Blocks(_StandIn):
  """pandas' BlockManager: all the columns."""

  __slots__ = ('axes', 'blocks')

  def __init__(self, blocks, axes):
    self.blocks, self.axes = blocks, axes

  def __setstate__(self, state):
    if state is None:
      return  # what came with the call is all
    state = state[3]['0.14.1']  # as pandas before 1.3 writes it
    self.axes = state['axes']
    self.blocks = [_Block(x['values'], x['mgr_locs']) for x in state['blocks']]


class _DataFrame(_StandIn):
  """pandas.DataFrame."""

  __slots__ = ('manager',)

  def __setstate__(self, state):
    self.manager = state['_mgr'] if '_mgr' in state else state['_data']

  def column(self, name):
    """The cells of a column, arrays where they are arrays."""
    names = self.manager.axes[0].names
    if names.count(name) != 1:
      shown = ', '.join(str(x)[:40] for x in names[:20])
      raise _RefusedError(f'it has columns {shown}; expected one {name!r}')
    place = names.index(name)
    for block in self.manager.blocks:
      if place in block.places:
        cells = block.array[block.places.index(place)]
        return [x.array if isinstance(x, _Array) else x for x in cells]
    raise _RefusedError(f'it is damaged: column {name!r} is in no block')


_NUMPY = {
  'multiarray._reconstruct': _Array,
  'multiarray.scalar': _StandIn,
  'numeric._frombuffer': _Buffered,
}
_NAMES = {
  'builtins.slice': _Slice,
  '__builtin__.slice': _Slice,
  '_codecs.encode': _Bytes,
  'numpy.dtype': _Type,
  'numpy.ndarray': _Array,
  # NumPy 2 renamed the folder, and writes the new name.
  **{f'numpy.core.{name}': x for name, x in _NUMPY.items()},
  **{f'numpy._core.{name}': x for name, x in _NUMPY.items()},
  'pandas._libs.internals._unpickle_block': _Block,
  'pandas.core.frame.DataFrame': _DataFrame,
  'pandas.core.indexes.base.Index': _Labels,
  'pandas.core.indexes.base._new_Index': _Labels,
  'pandas.core.indexes.numeric.Int64Index': _Labels,
  'pandas.core.indexes.range.RangeIndex': _Labels,
  'pandas.core.internals.managers.BlockManager': _Blocks,
}
