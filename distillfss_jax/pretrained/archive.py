"""Checkpoint files of other frameworks: safetensors, and PyTorch's two formats.

A PyTorch file is a pickle with arrays beside it, and unpickling runs whatever
the file says. No library reads one without PyTorch, so this does: it never
unpickles. `pickletools` splits the pickle into its operations, and a small
machine carries out those that build numbers, texts and containers. Where the
pickle names a function, a table here says what that name stands for; a name
that is not in the table is an error, and nothing is ever imported or called by
its name. Work and memory are bounded by the size of the file: an array is only
ever a view of bytes that are there.

Why not a `pickle.Unpickler` whose `find_class` and `persistent_load` know that
table: these two hooks see what a pickle names, and not what it builds. With
both of them closed (CPython 3.11)

- nine bytes with a memo index of 2**27 take 2 GiB, of 2**31 they take 32;
- a megabyte of nested tuples as the key of a dictionary overflows C's stack
  and ends the process, and 300 bytes of tuples that share their parts take
  hours to hash; integers as keys can be chosen to take quadratic time;
- BUILD sets attributes of whatever lies on the stack: `__defaults__` of a
  function that stands for a name, for every file that is read later;
- an extension code that was loaded before skips `find_class` altogether.

None of this can be overridden there. It can in `pickle._Unpickler`, the one in
Python, but that is private, its operations are allowed unless they are struck
out, and those that would remain as they are build numbers, texts and lists.
"""

import errno
import io
import math
import mmap
import os
import pathlib
import pickletools
import struct
import sys
import warnings
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import safetensors.numpy

from distillfss_jax import files

Tensors = dict[str, np.ndarray]

_DTYPES = {
  'float64': np.float64,
  'float32': np.float32,
  'float16': np.float16,
  'bfloat16': ml_dtypes.bfloat16,
  'float8_e4m3fn': ml_dtypes.float8_e4m3fn,
  'float8_e5m2': ml_dtypes.float8_e5m2,
  'int64': np.int64,
  'int32': np.int32,
  'int16': np.int16,
  'int8': np.int8,
  'uint64': np.uint64,
  'uint32': np.uint32,
  'uint16': np.uint16,
  'uint8': np.uint8,
  'bool': np.bool_,
  'complex64': np.complex64,
  'complex128': np.complex128,
}
_STORAGES = {
  'DoubleStorage': 'float64',
  'FloatStorage': 'float32',
  'HalfStorage': 'float16',
  'BFloat16Storage': 'bfloat16',
  'LongStorage': 'int64',
  'IntStorage': 'int32',
  'ShortStorage': 'int16',
  'CharStorage': 'int8',
  'ByteStorage': 'uint8',
  'BoolStorage': 'bool',
  'ComplexFloatStorage': 'complex64',
  'ComplexDoubleStorage': 'complex128',
  'UntypedStorage': 'uint8',
}
_SAFETENSORS = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'bfloat16',
  'F8_E4M3': 'float8_e4m3fn',
  'F8_E5M2': 'float8_e5m2',
  'I64': 'int64',
  'I32': 'int32',
  'I16': 'int16',
  'I8': 'int8',
  'U64': 'uint64',
  'U32': 'uint32',
  'U16': 'uint16',
  'U8': 'uint8',
  'BOOL': 'bool',
  'C64': 'complex64',
}
_MAGIC = 0x1950A86A20F9469CFC6C  # opens the format before PyTorch 1.6
_PROTOCOL = 1001
_EXPANDED = 2**30  # bytes that a view may have beyond the file's own
_AXES = 32  # NumPy 1's limit; models stay below 6
_NESTED = 8  # how deep the model is looked for in dictionaries
_ARGUMENTS = 16  # of a call; PyTorch's have up to 8
_LINE = 800  # characters of an error
# Where checkpoints keep the model, in this order; of the rest, none is guessed.
_MODEL = ('state_dict', 'model', 'model_state_dict', 'module', 'net', 'params')


class ArchiveError(ValueError):
  """A file is damaged, no checkpoint, or holds more than numbers."""


def read(source: str | os.PathLike, part: str = '') -> Tensors:
  """The tensors of a checkpoint file, by name.

  Of nested dictionaries, that which holds the model is taken: what lies under
  'state_dict', 'model' and the like, or the only one that holds tensors.

  Args:
    source: a PyTorch file of either format, or a safetensors file.
    part: keys joined by '/', to take another dictionary: 'model_ema'.

  Returns:
    {name: array}; arrays are read-only, may share memory and may be views with
    strides, as in the file. bfloat16 and float8 are those of ml_dtypes.

  Raises:
    ArchiveError: damaged, no checkpoint, without tensors, or with anything in
      it that is not a number, a text, a tensor or a container of those.
    OSError: the file cannot be read.
  """
  path = pathlib.Path(source)
  if path.is_dir():
    raise ArchiveError(f'{path} is a folder; give a checkpoint file')
  with path.open('rb') as file:
    head = file.read(9)
  try:
    # Four bytes: two may be the length that opens a safetensors file.
    if head[:4] == b'PK\x03\x04':
      tree = _read_zip(path)
    elif path.suffix == '.safetensors' or head[8:9] == b'{':
      tree = _read_safetensors(path)
    elif head[:1] == b'\x80':
      tree = _read_legacy(path)
    else:
      raise ArchiveError(
        'it is neither a PyTorch file (of either format) nor safetensors'
      )
    return _model(tree, part)
  except ArchiveError as error:
    raise ArchiveError(f'{path}: {_line(error)}') from error
  except (ValueError, EOFError, OverflowError, struct.error) as error:
    raise ArchiveError(f'{path}: it is damaged: {_line(error)}') from error


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes {name: array} as a file that PyTorch or safetensors loads.

  Args:
    path: ends in .pt, .pth or .safetensors.
    tensors: arrays of the types that `read` gives.

  Raises:
    ValueError: another ending, or a type that the format lacks.
    OSError: the file cannot be written; what was there stays.
  """
  path = pathlib.Path(path)
  tensors = {name: np.asarray(x, order='C') for name, x in tensors.items()}
  if path.suffix == '.safetensors':
    try:
      content = safetensors.numpy.save(tensors, {'format': 'pt'})
    except safetensors.SafetensorError as error:
      raise ValueError(f'{path} cannot be written: {error}') from error
  elif path.suffix in ('.pt', '.pth'):
    content = _zip_of(tensors)
  else:
    raise ValueError(f'{path} must end in .pt, .pth or .safetensors')
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_atomically(path, content)


def _line(error):
  """An error's text as one line of bounded length."""
  return ' '.join(str(error)[:_LINE].split())


# --- What a file holds ---


def _model(tree, part):
  """The dictionary of tensors that is the model."""
  for key in filter(None, part.split('/')):
    if not isinstance(tree, dict) or key not in tree:
      keys = ', '.join(map(repr, tree)) if isinstance(tree, dict) else 'none'
      raise ArchiveError(f'there is no {key!r}; there are: {keys[:500]}')
    tree = tree[key]
  # Under these names even beside tensors, which are then scores and the like.
  for _ in range(_NESTED):
    inner = [
      tree[key]
      for key in _MODEL
      if isinstance(tree, dict) and key in tree and _dictionaries(tree[key])
    ]
    if not inner:
      break
    tree = inner[0]
  found = _dictionaries(tree)
  # Where dictionaries of tensors lie in each other, the outermost counts.
  if () in found:
    return found[()]
  if len(found) == 1:
    return next(iter(found.values()))
  if found:
    names = sorted('/'.join(f'{key!s:.60}' for key in place) for place in found)
    raise ArchiveError(
      'several parts hold tensors: '
      f'{", ".join(names)[:500]}; add one of these after a #'
    )
  raise ArchiveError(
    'there are no tensors in it: give a state dict or a training checkpoint'
  )


def _tensors(tree):
  return {
    key: x
    for key, x in tree.items()
    if type(key) is str and isinstance(x, np.ndarray)
  }


def _dictionaries(tree):
  """{keys: tensors} of the dictionaries that hold some, outermost first."""
  found, seen, left = {}, set(), [((), tree)]
  for place, x in left:  # which grows
    if id(x) in seen or not isinstance(x, dict):
      continue
    seen.add(id(x))
    if tensors := _tensors(x):
      found[place] = tensors
    if len(place) < _NESTED:
      left += [((*place, k), v) for k, v in x.items() if isinstance(v, dict)]
  return found


# --- Formats ---


def _read_safetensors(path):
  try:
    items = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise ArchiveError(f'it is a damaged safetensors file: {error}') from error
  tensors = {}
  for name, item in items:
    if item['dtype'] not in _SAFETENSORS:
      raise ArchiveError(f'{name!r} is of an unknown type, {item["dtype"]}')
    dtype = _DTYPES[_SAFETENSORS[item['dtype']]]
    array = np.frombuffer(item['data'], dtype).reshape(item['shape'])
    array.flags.writeable = False
    tensors[name] = array
  return tensors


def _read_zip(path):
  size = path.stat().st_size
  try:
    with zipfile.ZipFile(path) as archive:
      entries = {entry.filename: entry for entry in archive.infolist()}
      if sum(entry.file_size for entry in entries.values()) > size or any(
        entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()
      ):
        raise ArchiveError('its parts are compressed, which PyTorch never does')
      [top] = [
        name.removesuffix('data.pkl')
        for name in entries
        if name.count('/') <= 1 and name.endswith('data.pkl')
      ] or ['']
      if f'{top}data.pkl' not in entries:
        raise ArchiveError('it is a zip archive without a data.pkl')
      order = f'{top}byteorder'
      if order in entries and archive.read(order).strip() != b'little':
        raise ArchiveError('its numbers are big-endian')
      held = {}

      def storage(key, dtype, count):
        name = f'{top}data/{key}'
        if name not in entries:
          raise ArchiveError(f'{name!r} is missing')
        if name not in held:
          held[name] = archive.read(name)
        return _array(held[name], 0, dtype, count)

      machine = _Machine(io.BytesIO(archive.read(f'{top}data.pkl')))
      return machine.resolve(machine.run(), storage, size)
  except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
    raise ArchiveError(f'it is a damaged zip archive: {error}') from error
  except OSError as error:
    if error.errno != errno.EINVAL:  # a place that no file has
      raise
    raise ArchiveError('it is a damaged zip archive: a bad offset') from error


def _read_legacy(path):
  with path.open('rb') as file:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  first = _Machine(data).run()
  if first != _MAGIC:
    # An ordinary pickle, perhaps of arrays: it is read too, if it is harmless.
    data.seek(0)
    machine = _Machine(data)
    return machine.resolve(machine.run(), _no_storage, len(data))
  if _Machine(data).run() != _PROTOCOL:
    raise ArchiveError('its protocol is not 1001, the only one there was')
  system = _Machine(data).run()
  if not isinstance(system, dict) or not system.get('little_endian'):
    raise ArchiveError('its numbers are big-endian')
  machine = _Machine(data)
  result = machine.run()
  keys = _Machine(data).run()
  if not isinstance(keys, list):
    raise ArchiveError('it is damaged: no list of storages follows the pickle')
  places, position = {}, data.tell()
  for key in keys:
    if not isinstance(key, str) or key not in machine.storages:
      raise ArchiveError('it is damaged: a storage that its pickle lacks')
    dtype, count = machine.storages[key]
    if data[position : position + 8] != struct.pack('<q', count):
      raise ArchiveError(f'it is damaged: storage {key} is not of {count}')
    places[key] = position + 8
    position += 8 + count * np.dtype(_DTYPES[dtype]).itemsize

  def storage(key, dtype, count):
    if key not in places:
      raise ArchiveError(f'it is damaged: storage {key} is missing')
    return _array(data, places[key], dtype, count)

  return machine.resolve(result, storage, len(data))


def _no_storage(key, dtype, count):
  raise ArchiveError('it refers to arrays that are not in it')


def _array(data, start, dtype, count):
  dtype = np.dtype(_DTYPES[dtype])
  there = (len(data) - start) // dtype.itemsize
  if count > there:
    raise ArchiveError(
      f'it is cut off or damaged: a storage of {count} numbers has {there}'
    )
  array = np.frombuffer(data, dtype, count, start)
  array.flags.writeable = False
  return array


# --- The pickle machine ---


class _Storage:
  """Where numbers lie: resolved when all of the file is known."""

  def __init__(self, key, dtype, count):
    self.key, self.dtype, self.count = key, dtype, count


class _View:
  """A tensor before its storage is there."""

  def __init__(self, storage, offset, size, stride, dtype=None):
    self.storage, self.offset = storage, offset
    self.size, self.stride, self.dtype = size, stride, dtype
    self.array = None


class _Name:
  """A name that the pickle refers to, and what stands for it."""

  def __init__(self, name, build=None, value=None):
    self.name, self.build, self.value = name, build, value


class _Mark:
  """A mark on the stack."""


_MARK = _Mark()
_KEYS = (int, float, bool, type(None))


def _whole(x):
  return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63


class _NumberKey(str):
  """A key of a dictionary that is a number or None in the file, as text."""


def _key(x):
  """The key that stands for x: of texts and numbers, where hashing is safe.

  A deep tuple takes any time to hash. Integers can be chosen so that each is
  looked for in all places that others have, which is quadratic. The hash of a
  text is salted, so no file can be made against it.
  """
  if isinstance(x, str | bytes):
    return x
  if isinstance(x, _KEYS) and not (isinstance(x, int) and abs(x) >= 2**63):
    return _NumberKey(x)
  raise ArchiveError('its pickle is damaged: a key that is no text')


def _view(storage, offset, size, stride, *rest):
  sizes = isinstance(size, tuple) and isinstance(stride, tuple)
  if not (
    isinstance(storage, _Storage)
    and sizes
    and len(size) == len(stride) <= _AXES
    and all(map(_whole, (offset, *size, *stride)))
  ):
    raise ArchiveError('it is damaged: a tensor of no known form')
  return _View(storage, offset, size, stride)


def _view_of_type(storage, offset, size, stride, grad, hooks, dtype, *rest):
  view = _view(storage, offset, size, stride)
  if not isinstance(dtype, _Name) or dtype.value not in _DTYPES:
    raise ArchiveError('it is damaged: a tensor of no known type')
  view.dtype = dtype.value
  return view


def _first(first, *rest):
  return first


def _mapping(pairs=()):
  if pairs == ():
    return {}
  if not isinstance(pairs, list) or not all(
    isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
  ):
    raise ArchiveError('it is damaged: a dictionary made from something else')
  made = {_key(key): value for key, value in pairs}
  pairs.clear()  # used once, so that all dictionaries together are bounded
  return made


def _nothing(*rest):
  return None


# What names stand for. Other values of a training checkpoint (arguments, NumPy
# numbers) are not wanted, and stand for nothing.
_FUNCTIONS = {
  'collections OrderedDict': _mapping,
  'collections Counter': _nothing,
  '__builtin__ set': _nothing,
  '__builtin__ complex': _nothing,
  '__builtin__ bytearray': _nothing,
  'builtins set': _nothing,
  'builtins complex': _nothing,
  'builtins bytearray': _nothing,
  'torch._utils _rebuild_tensor': _view,
  'torch._utils _rebuild_tensor_v2': _view,
  'torch._utils _rebuild_tensor_v3': _view_of_type,
  'torch._utils _rebuild_parameter': _first,
  'torch._utils _rebuild_parameter_with_state': _first,
  'torch.serialization _get_layout': _nothing,
  'torch Size': _first,
  'torch device': _nothing,
  'argparse Namespace': _nothing,
  'pathlib PosixPath': _nothing,
  'pathlib WindowsPath': _nothing,
  '_codecs encode': _nothing,
  'numpy dtype': _nothing,
  'numpy.core.multiarray scalar': _nothing,
  'numpy._core.multiarray scalar': _nothing,
}


def _named(name):
  """What stands for 'module name'."""
  module, _, last = name.rpartition(' ')
  if name in _FUNCTIONS:
    return _Name(name, _FUNCTIONS[name])
  if module in ('torch', 'torch.storage', 'torch.cuda') and last in _STORAGES:
    return _Name(name, value=_STORAGES[last])
  if module == 'torch' and last in _DTYPES:
    return _Name(name, value=last)
  raise ArchiveError(
    f'it refers to {name.replace(" ", ".")!r}, which is code, not numbers: it '
    'was not loaded, and nothing was run. If you trust it, load it with '
    'PyTorch and save its state dict alone'
  )


class _Machine:
  """Carries out one pickle's operations; `storages` are those it refers to."""

  def __init__(self, file):
    self.file, self.stack, self.storages = file, [], {}
    self.memo = {}  # by the index as text, for the reason that `_key` gives

  def run(self):
    """The value of the pickle that begins where the file stands."""
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of texts with odd escapes
        for operation, argument, _ in pickletools.genops(self.file):
          if operation.name == 'STOP':
            return self._pop()
          self._step(operation.name, argument)
    except ArchiveError:
      raise
    except (
      ValueError,
      TypeError,
      KeyError,
      IndexError,
      struct.error,
      OverflowError,
      AttributeError,
    ) as error:
      raise ArchiveError(f'its pickle is damaged: {error}') from error
    raise ArchiveError('its pickle has no end')

  def resolve(self, value, storage, size):
    """`value` with views made arrays; cyclic or shared containers stay so."""
    done, arrays = {}, {}

    def array(view):
      if view.storage.key not in arrays:
        arrays[view.storage.key] = storage(
          view.storage.key, view.storage.dtype, view.storage.count
        )
      if view.array is None:
        view.array = _strided(arrays[view.storage.key], view, size)
      return view.array

    def replaced(x):
      if isinstance(x, _View):
        return array(x)
      if isinstance(x, _Name):
        return x.name
      if isinstance(x, dict | list) and id(x) not in done:
        done[id(x)] = x
        left.append(x)
      return x

    left = []
    value = replaced(value)
    while left:
      x = left.pop()
      for key in list(x) if isinstance(x, dict) else range(len(x)):
        x[key] = replaced(x[key])
    return value

  def _pop(self):
    value = self.stack.pop()
    if value is _MARK:
      raise ArchiveError('its pickle is damaged: a mark where a value was due')
    return value

  def _pop_to_mark(self):
    values = []
    while (value := self.stack.pop()) is not _MARK:
      values.append(value)
    return values[::-1]

  def _set(self, pairs):
    container = self.stack[-1]
    if len(pairs) % 2 or not isinstance(container, dict | type(None)):
      raise ArchiveError('its pickle is damaged: items of no dictionary')
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
      key = _key(key)
      if container is not None:
        container[key] = value

  def _extend(self, values):
    if not isinstance(self.stack[-1], list):
      raise ArchiveError('its pickle is damaged: elements of no list')
    self.stack[-1].extend(values)

  def _call(self, arguments):
    function = self._pop()
    if not isinstance(function, _Name) or function.build is None:
      raise ArchiveError('its pickle is damaged: a call of no function')
    if not isinstance(arguments, tuple) or len(arguments) > _ARGUMENTS:
      raise ArchiveError('its pickle is damaged: a call without arguments')
    self.stack.append(function.build(*arguments))

  def _step(self, name, argument):
    stack = self.stack
    if name in ('PROTO', 'FRAME'):
      pass
    elif name in _VALUES:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name == 'EMPTY_DICT':
      stack.append({})
    elif name == 'EMPTY_LIST':
      stack.append([])
    elif name == 'MARK':
      stack.append(_MARK)
    elif name == 'POP':
      stack.pop()
    elif name == 'POP_MARK':
      self._pop_to_mark()
    elif name == 'TUPLE':
      stack.append(tuple(self._pop_to_mark()))
    elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
      stack.append(tuple([self._pop() for _ in range(int(name[-1]))][::-1]))
    elif name == 'LIST':
      stack.append(self._pop_to_mark())
    elif name == 'DICT':
      pairs = self._pop_to_mark()
      stack.append({})
      self._set(pairs)
    elif name == 'SETITEM':
      value, key = self._pop(), self._pop()
      self._set([key, value])
    elif name == 'SETITEMS':
      self._set(self._pop_to_mark())
    elif name == 'APPEND':
      self._extend([self._pop()])
    elif name == 'APPENDS':
      self._extend(self._pop_to_mark())
    elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
      self.memo[str(argument)] = stack[-1]
    elif name == 'MEMOIZE':
      self.memo[str(len(self.memo))] = stack[-1]
    elif name in ('GET', 'BINGET', 'LONG_BINGET'):
      stack.append(self.memo[str(argument)])
    elif name == 'GLOBAL':
      stack.append(_named(argument))
    elif name == 'STACK_GLOBAL':
      last, module = self._pop(), self._pop()
      if not isinstance(last, str) or not isinstance(module, str):
        raise ArchiveError('its pickle is damaged: a name that is no text')
      stack.append(_named(f'{module} {last}'))
    elif name in ('REDUCE', 'NEWOBJ'):
      self._call(self._pop())
    elif name == 'BUILD':
      self._pop()  # attributes of a container or of nothing: not wanted
    elif name == 'BINPERSID':
      stack.append(self._storage(self._pop()))
    else:
      raise ArchiveError(f'its pickle uses {name}, which no checkpoint needs')

  def _storage(self, reference):
    try:
      kind, type_, key, _, count = reference[:5]
    except (TypeError, ValueError) as error:
      raise ArchiveError('its pickle is damaged: no storage') from error
    if (
      kind != 'storage'
      or not isinstance(type_, _Name)
      or type_.value not in _DTYPES
      or not isinstance(key, str)
      or not _whole(count)
    ):
      raise ArchiveError('its pickle is damaged: no storage')
    if reference[5:6] not in ((), (None,)):
      raise ArchiveError('its storages are parts of others: save it anew')
    known = self.storages.setdefault(key, (type_.value, count))
    if known != (type_.value, count):
      raise ArchiveError(f'its pickle is damaged: storage {key} is two things')
    return _Storage(key, type_.value, count)


_VALUES = frozenset(
  (
    *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4'),
    *('FLOAT', 'BINFLOAT', 'STRING', 'BINSTRING', 'SHORT_BINSTRING'),
    *('UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
    *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
  )
)
_CONSTANTS = {
  'NONE': None,
  'NEWTRUE': True,
  'NEWFALSE': False,
  'EMPTY_TUPLE': (),
}


def _strided(array, view, file_size):
  """A tensor as a view of its storage; never reaches out of it."""
  if view.dtype:
    array = array.view(_DTYPES[view.dtype])
  count = math.prod(view.size)
  if count:
    last = view.offset + sum(
      (n - 1) * step for n, step in zip(view.size, view.stride, strict=True)
    )
    if last >= array.size:
      raise ArchiveError(
        f'it is damaged: a tensor of {view.size} in a storage of {array.size}'
      )
  if count * array.itemsize > file_size + _EXPANDED:
    raise ArchiveError(
      f'a tensor of {view.size} has more numbers than the file'
    )
  if not count:
    result = np.zeros(view.size, array.dtype)
    result.flags.writeable = False
    return result
  # Of bytes, since NumPy makes no buffer of bfloat16. An axis of one may have
  # any step in the file.
  return np.ndarray(
    view.size,
    array.dtype,
    array.view(np.uint8),
    view.offset * array.itemsize,
    [
      step * array.itemsize if n > 1 else 0
      for n, step in zip(view.size, view.stride, strict=True)
    ],
  )


# --- Writing ---


def _zip_of(tensors):
  """A PyTorch archive of a state dict."""
  if sys.byteorder != 'little':
    raise ValueError('this machine is big-endian')
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', zipfile.ZIP_STORED) as archive:

    def add(name, content):
      archive.writestr(zipfile.ZipInfo(f'archive/{name}'), content)

    add('data.pkl', _pickle_of(tensors))
    add('byteorder', b'little')
    for i, x in enumerate(tensors.values()):
      add(
        f'data/{i}', x.astype(x.dtype.newbyteorder('='), copy=False).tobytes()
      )
    add('version', b'3\n')
  return out.getvalue()


def _pickle_of(tensors):
  """The operations that rebuild {name: tensor}, as PyTorch expects them."""
  types = {type_: name for name, type_ in _DTYPES.items()}
  names = {dtype: name for name, dtype in reversed(_STORAGES.items())}

  def text(x):
    raw = x.encode()
    return b'X' + struct.pack('<I', len(raw)) + raw

  def whole(n):
    if n < 2**31:
      return b'J' + struct.pack('<i', n)
    raw = n.to_bytes(9, 'little')
    return b'\x8a' + bytes([len(raw)]) + raw

  def wholes(values):
    return b'(' + b''.join(map(whole, values)) + b't'

  def name(module, last):
    return f'c{module}\n{last}\n'.encode()

  ordered = name('collections', 'OrderedDict') + b')R'
  out = [b'\x80\x02', ordered, b'(']
  for i, (key, x) in enumerate(tensors.items()):
    if x.dtype.type not in types:
      raise ValueError(f'{key}: arrays of {x.dtype} cannot be written')
    dtype = types[x.dtype.type]
    old = dtype in names  # later types have no storage of their own
    strides = [math.prod(x.shape[j + 1 :]) for j in range(x.ndim)]
    out += [
      text(key),
      name('torch._utils', f'_rebuild_tensor_v{2 if old else 3}'),
      b'((',
      text('storage'),
      name('torch', names[dtype])
      if old
      else name('torch.storage', 'UntypedStorage'),
      text(str(i)),
      text('cpu'),
      whole(x.size if old else x.nbytes),
      b'tQ',
      whole(0),
      wholes(x.shape),
      wholes(strides),
      b'\x89',
      ordered,
      b'' if old else name('torch', dtype),
      b'tR',
    ]
  return b''.join([*out, b'u.'])
