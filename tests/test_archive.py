"""Tests of the reader of PyTorch and safetensors files, hostile ones too."""

import argparse
import builtins
import codecs
import collections
import contextlib
import copy
import importlib
import importlib.util
import io
import itertools
import os
import pickle
import random
import struct
import subprocess
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillfss_jax.pretrained import archive

_GOLDENS = 'goldens/torch_files'
_BOTH = [x for x in archive._DTYPES if x != 'complex128']  # of .safetensors
_MUTATIONS = 400  # of each of five kinds of file

# --- Files, byte by byte ---


def _text(x):
  raw = x.encode('utf-8', 'surrogatepass')
  return b'X' + struct.pack('<I', len(raw)) + raw


def _value(x):
  """The operations that Python's own pickle takes to build x."""
  return pickle.dumps(x, 2)[2:-1]


def _whole(n):
  raw = n.to_bytes(n.bit_length() // 8 + 1, 'little', signed=True)
  return b'\x8b' + struct.pack('<i', len(raw)) + raw


def _tuple(*parts):
  return b'(' + b''.join(parts) + b't'


def _wholes(values):
  return _tuple(*map(_whole, values))


def _dict(items):
  pairs = (_text(k) + v for k, v in items.items())
  return b'}(' + b''.join(pairs) + b'u'


def _name(module, last):
  return f'c{module}\n{last}\n'.encode()


def _call(module, last, *arguments):
  return _name(module, last) + _tuple(*arguments) + b'R'


def _storage(key, kind, count, *more):
  kind = _name('torch', kind)
  parts = (_text('storage'), kind, _text(key), _text('cpu'), _whole(count))
  return _tuple(*parts, *more) + b'Q'


def _tensor(storage, offset, size, stride):
  return _call(
    'torch._utils',
    '_rebuild_tensor_v2',
    storage,
    _whole(offset),
    _wholes(size),
    _wholes(stride),
    b'\x89',
    _value(collections.OrderedDict()),
  )


def _floats(key, count=2):
  return _tensor(_storage(key, 'FloatStorage', count), 0, (count,), (1,))


def _pickle(body):
  return b'\x80\x02' + body + b'.'


def _zip(content, storages=(), compression=zipfile.ZIP_STORED, **more):
  """A PyTorch archive of a whole pickle and {key: array}."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', compression) as file:
    file.writestr('archive/data.pkl', content)
    for name, x in more.items():
      file.writestr(f'archive/{name}', x)
    for key, x in dict(storages).items():
      file.writestr(f'archive/data/{key}', x.tobytes())
  return out.getvalue()


def _legacy(body, storages=(), system=None, counts=None):
  """The same in the format before 1.6."""
  storages = dict(storages)
  system = system or {'protocol_version': 1001, 'little_endian': True}
  out = [pickle.dumps(x, 2) for x in (archive._MAGIC, 1001, system)]
  out += [_pickle(body), pickle.dumps(sorted(storages), 2)]
  for key in sorted(storages):
    x = storages[key]
    count = (counts or {}).get(key, x.size)
    out += [struct.pack('<q', count), x.tobytes()]
  return b''.join(out)


def _file(form, body):
  """A 'zip' or 'legacy' file with those of _TWO that the body refers to."""
  used = {k: x for k, x in _TWO.items() if _text(k) + _text('cpu') in body}
  return _zip(_pickle(body), used) if form == 'zip' else _legacy(body, used)


_W, _B = np.array([1, 2], np.float32), np.array([3, 4], np.float32)
_TWO = {'0': _W, '1': _B}  # what _floats('0') and _floats('1') refer to


def _read(tmp_path, content, part='', name='x.pt'):
  path = tmp_path / name
  path.write_bytes(content)
  return archive.read(path, part)


def _same(a, b):
  """Fails unless equal to the bit, and of one type and shape."""
  assert a.dtype == b.dtype
  assert a.shape == b.shape
  assert a.tobytes() == b.tobytes()


def _check(tensors):
  """That this is what `read` may return; touches every number."""
  assert isinstance(tensors, dict)
  for name, x in tensors.items():
    assert isinstance(name, str)
    assert isinstance(x, np.ndarray)
    assert x.dtype.type in archive._DTYPES.values()
    assert not x.flags.writeable
    if x.nbytes < 2**20:
      x.tobytes()


@contextlib.contextmanager
def _inert():
  """Within it, nothing can be run."""

  def called(*args, **kwargs):
    raise AssertionError('the file ran something')

  places = [
    *[(os, 'system'), (builtins, 'eval'), (builtins, 'exec')],
    *[(subprocess, 'Popen'), (importlib, 'import_module')],
  ]
  for codec in ('raw-unicode-escape', 'cp437'):
    codecs.lookup(codec)  # which Python imports when first used
  before = [getattr(*place) for place in places]
  try:
    for place in places:
      setattr(*place, called)
    yield
  finally:
    for place, function in zip(places, before, strict=True):
      setattr(*place, function)


def _harmless(path):
  """Reads it: tensors, or else one line of error. True if there are some."""
  try:
    with _inert():
      tensors = archive.read(path)
  except archive.ArchiveError as error:
    told = str(error)
  else:
    _check(tensors)
    return True
  assert len(told.splitlines()) == 1
  assert len(told) < 2000
  return False


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """One folder for all examples of a property."""
  return tmp_path_factory.mktemp('archive')


# --- Files that PyTorch wrote ---


@pytest.fixture(scope='module')
def fill(shared):
  """The function that gives the golden models' weights by their names."""
  path = shared('goldens/dcama/fill.py')
  spec = importlib.util.spec_from_file_location('golden_fill', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.fill


@pytest.mark.parametrize('name', ['dtype_zoo.pt', 'dtype_zoo_legacy.pt'])
def test_reads_every_type_and_view(shared, name):
  tensors = archive.read(shared(f'{_GOLDENS}/{name}'))
  _check(tensors)
  with np.load(shared(f'{_GOLDENS}/dtype_zoo_expected.npz')) as expected:
    assert sorted(tensors) == sorted(expected)
    assert tensors['bf16'].dtype == ml_dtypes.bfloat16
    for key, x in tensors.items():
      _same(x.astype(np.float32) if key == 'bf16' else x, expected[key])


@pytest.mark.parametrize(
  ('name', 'before', 'first', 'count', 'dtype'),
  [
    ('distilled_tinyswin.pt', '', 'teacher.', 215, np.float32),
    ('teacher_tinyswin_module_prefix.pt', '', 'module.', 203, np.float16),
    (
      *['backbone_tinyswin_legacy.pth', 'feature_extractor.'],
      *['patch_embed.', 119, np.float32],
    ),
  ],
)
def test_reads_models(shared, fill, name, before, first, count, dtype):
  tensors = archive.read(shared(f'{_GOLDENS}/{name}'))
  assert next(iter(tensors)).startswith(first)
  assert len(tensors) == count
  for key, x in tensors.items():
    _same(x, fill(before + key.removeprefix('module.'), x.shape).astype(dtype))


def test_reads_the_model_of_a_training_checkpoint(shared):
  tensors = archive.read(shared(f'{_GOLDENS}/training_checkpoint.pt'))
  _check(tensors)
  assert {k: x.shape for k, x in tensors.items()} == {
    'head.weight': (6, 8),
    'head.bias': (8,),
  }


def test_reads_safetensors_of_bfloat16(shared):
  tensors = archive.read(shared(f'{_GOLDENS}/bf16.safetensors'))
  _check(tensors)
  with np.load(shared(f'{_GOLDENS}/dtype_zoo_expected.npz')) as expected:
    assert sorted(tensors) == ['bf16', 'f32']
    _same(tensors['f32'], expected['f32'])
    assert tensors['bf16'].dtype == ml_dtypes.bfloat16
    _same(tensors['bf16'].astype(np.float32), expected['bf16'])


@pytest.mark.parametrize(
  ('name', 'told'),
  [
    ('malicious.pt', r"'posix\.system', which is code"),
    ('malicious.pkl', r"'posix\.system', which is code"),
    ('truncated.pt', 'it is a damaged zip archive'),
    ('not_a_checkpoint.pt', 'neither a PyTorch file'),
    ('no_tensors.pt', 'there are no tensors in it'),
  ],
)
def test_refuses_bad_files(shared, tmp_path, monkeypatch, name, told):
  path = shared(f'{_GOLDENS}/{name}')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(archive.ArchiveError, match=told) as caught, _inert():
    archive.read(path)
  assert str(path) in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1
  assert not list(tmp_path.iterdir())
  assert not (path.parent / 'PWNED').exists()


# --- Writing ---


def _cases(dtypes):
  """Arrays of any bits and layout, by names of any kind."""

  @st.composite
  def arrays(draw):
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    seed = draw(st.integers(0, 2**32 - 1))
    size = int(np.prod(shape)) * np.dtype(archive._DTYPES[dtype]).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    raw = raw & 1 if dtype == 'bool' else raw
    x = raw.view(archive._DTYPES[dtype]).reshape(shape)
    layout = draw(st.sampled_from(['', 'reversed', 'turned', 'cut', 'spread']))
    if layout == 'reversed' and x.ndim:
      x = x[::-1][:1]
    elif layout == 'turned':
      x = x.T
    elif layout == 'cut' and x.ndim:
      x = x[..., ::2]
    elif layout == 'spread':
      x = np.broadcast_to(x, (2, *x.shape))
    return x

  names = st.text(st.characters(exclude_categories=['Cs']), max_size=12)
  return st.dictionaries(names, arrays(), min_size=1, max_size=4)


@pytest.mark.parametrize(
  ('suffix', 'dtypes'),
  [('.pt', list(archive._DTYPES)), ('.safetensors', _BOTH)],
)
def test_what_is_written_is_read(folder, suffix, dtypes):
  path = folder / f'round{suffix}'

  @settings(max_examples=150)
  @given(_cases(dtypes))
  def check(tensors):
    archive.write(path, tensors)
    found = archive.read(path)
    _check(found)
    assert set(found) == set(tensors)
    for name, x in tensors.items():
      _same(found[name], x)

  check()


@pytest.mark.parametrize('suffix', ['.pt', '.pth', '.safetensors'])
@pytest.mark.parametrize('dtype', archive._DTYPES)
def test_every_type_is_written(tmp_path, suffix, dtype):
  path = tmp_path / 'new' / f'x{suffix}'
  x = np.arange(24).reshape(2, 3, 4).astype(archive._DTYPES[dtype])
  if suffix == '.safetensors' and dtype not in _BOTH:
    with pytest.raises(ValueError, match='complex128'):
      archive.write(path, {'x': x})
    return
  archive.write(path, {'x': x, '0d': x[1, 1, 1], 'none': x[:0]})
  found = archive.read(path)
  _same(found['x'], x)
  _same(found['0d'], x[1, 1, 1])
  _same(found['none'], x[:0])


@pytest.mark.parametrize('suffix', ['.pt', '.safetensors'])
def test_big_endian_arrays_are_written_in_order(tmp_path, suffix):
  x = np.arange(5, dtype='>f4')
  archive.write(tmp_path / f'x{suffix}', {'x': x})
  _same(archive.read(tmp_path / f'x{suffix}')['x'], x.astype(np.float32))


def test_a_written_file_is_the_same_each_time(tmp_path):
  for name in ('a.pt', 'b.pt'):
    archive.write(tmp_path / name, {'w': _W, 'b': _B})
  a, b = ((tmp_path / name).read_bytes() for name in ('a.pt', 'b.pt'))
  assert a == b


@pytest.mark.parametrize(
  ('name', 'x', 'told'),
  [
    ('x.npz', _W, 'must end in'),
    ('x.pt', np.array(['a']), 'cannot be written'),
    ('x.pt', np.array([None]), 'cannot be written'),
    ('x.safetensors', np.array(['a']), 'cannot be written'),
  ],
)
def test_what_cannot_be_written(tmp_path, name, x, told):
  with pytest.raises(ValueError, match=told):
    archive.write(tmp_path / name, {'x': x})
  assert not list(tmp_path.iterdir())


# --- Which dictionary is the model ---


def _checkpoint(form, tree):
  """A file of nested dictionaries; '0' and '1' are the tensors of _TWO."""

  def operations(x):
    if isinstance(x, dict):
      return _dict({k: operations(v) for k, v in x.items()})
    return _floats(x) if x in ('0', '1') else _value(x)

  return _file(form, operations(tree))


@pytest.mark.parametrize('form', ['zip', 'legacy'])
@pytest.mark.parametrize(
  ('tree', 'part'),
  [
    ({'w': '0'}, ''),
    ({'model': {'w': '0'}}, ''),
    ({'epoch': 3, 'state_dict': {'w': '0'}, 'ema': {'w': '1'}}, ''),
    ({'state_dict': {'w': '0'}, 'model': {'w': '1'}}, ''),
    ({'model': {'state_dict': {'w': '0'}}, 'lr': 0.5, 'name': 'x'}, ''),
    ({'best_acc1': '1', 'state_dict': {'w': '0'}}, ''),  # a score as a tensor
    ({'model': {'lr': 1}, 'weights': {'w': '0'}}, ''),
    ({'model': 'vit', 'teacher': {'w': '0'}}, ''),
    ({'w': '0', 'more': {'w': '1'}}, ''),
    ({'model': {'w': '1'}, 'model_ema': {'w': '0'}}, 'model_ema'),
    ({'model': {'a': {'w': '0'}, 'b': {'w': '1'}}}, 'model/a'),
    ({'x': {'model': {'w': '0'}, 'y': {'w': '1'}}}, 'x'),
  ],
)
def test_finds_the_model(tmp_path, form, tree, part):
  found = _read(tmp_path, _checkpoint(form, tree), part)
  assert list(found) == ['w']
  _same(found['w'], _W)


@pytest.mark.parametrize(
  ('tree', 'part', 'told'),
  [
    ({'a': {'w': '0'}, 'b': {'c': {'w': '1'}}}, '', 'parts .*: a, b/c; add'),
    ({'a': {'w': '0'}}, 'model', "no 'model'; there are: 'a'"),
    ({'a': {'w': '0'}}, 'a/w', 'there are no tensors'),
    ({'a': {'w': '0'}}, 'a/w/x', "no 'x'; there are: none"),
    ({'a': {}, 'b': 1}, '', 'there are no tensors'),
  ],
)
def test_tells_which_parts_there_are(tmp_path, tree, part, told):
  with pytest.raises(archive.ArchiveError, match=told):
    _read(tmp_path, _checkpoint('zip', tree), part)


def test_other_values_of_a_checkpoint_are_passed_over(tmp_path):
  values = [
    *[argparse.Namespace(lr=0.1, sizes=[1, 2]), collections.Counter('ab')],
    *[np.float64(0.5), np.int32(3), {1, 2}, 1 + 2j, b'\xff', 10**30, -1],
    *[(1, (2, [3])), None, True, float('nan'), 'text', bytearray(b'x')],
    collections.OrderedDict(a=1),
  ]
  body = {str(i): _value(x) for i, x in enumerate(values)}
  body |= {
    'size': _call('torch', 'Size', _wholes((1, 2))),
    'device': _call('torch', 'device', _text('cpu')),
    'type': _name('torch', 'float16'),
    'state': _value({0: {'step': 1}}),
    'tuple': _tuple(_floats('1')),
    'model': _dict({'w': _floats('0')}),
  }
  for form in ('zip', 'legacy'):
    found = _read(tmp_path, _file(form, _dict(body)))
    assert list(found) == ['w']
    _same(found['w'], _W)


def test_keys_that_are_numbers(tmp_path):
  """They lead to parts of the file, and name no tensor."""
  tree = {
    b'K\1': _dict({'w': _floats('0')}), _value(2.5): _dict({'w': _floats('1')}),
    b'\x88': _floats('1'), b'N': _value('x'),
  }  # fmt: skip
  body = b'}(' + b''.join(k + x for k, x in tree.items()) + b'u'
  content = _zip(_pickle(body), _TWO)
  with pytest.raises(archive.ArchiveError, match=r'parts .*: 1, 2\.5; add'):
    _read(tmp_path, content)
  _same(_read(tmp_path, content, '1')['w'], _W)
  _same(_read(tmp_path, content, '2.5')['w'], _B)
  with pytest.raises(archive.ArchiveError, match='there are no tensors'):
    _read(tmp_path, content, 'True')


@pytest.mark.parametrize(
  'body',
  [
    b'}K\1Ns',
    b'}(K\1NG' + struct.pack('>d', 2) + b'Nu',
    b'(I1\nNI01\nNNNd',
    _name('collections', 'OrderedDict') + b'](K\1N\x86eq\1\x85R',
    b'}Nq\2r\0\0\1\0p7\n0\x94',
  ],
)
def test_no_number_is_hashed(body):
  """A file can choose numbers that take a dict quadratic time, but no texts."""
  machine = archive._Machine(io.BytesIO(_pickle(body)))
  found = machine.run()
  assert found or machine.memo
  assert all(isinstance(key, str) for key in (*found, *machine.memo))


def test_dictionaries_and_parameters_of_each_kind(tmp_path):
  w = _floats('0')
  pairs = _tuple(b'](' + _text('w') + w + b'l' + b'a')  # as of Python 2
  none = _value(collections.OrderedDict())
  of_type = _name('torch', 'uint16')
  untyped = _tuple(
    *[_text('storage'), _name('torch.storage', 'UntypedStorage')],
    *[_text('0'), _text('cpu'), _whole(8)],
  )
  bodies = {
    'pairs': _name('collections', 'OrderedDict') + pairs + b'R',
    'items': none + b'(' + _text('w') + w + b'u',
    'item': none + _text('w') + w + b's',
    'state': none + _text('w') + w + b's' + _dict({'_metadata': none}) + b'b',
    'marked': b'(' + _text('w') + w + b'd',
    'parameter': _dict(
      {'w': _call('torch._utils', '_rebuild_parameter', w, b'\x88', none)}
    ),
  }
  for kind, body in bodies.items():
    found = _read(tmp_path, _zip(_pickle(body), _TWO))
    assert list(found) == ['w'], kind
    _same(found['w'], _W)
  third = _call(
    *['torch._utils', '_rebuild_tensor_v3', untyped + b'Q', _whole(1)],
    *[_wholes((3,)), _wholes((1,)), b'\x89', none, of_type],
  )
  found = _read(tmp_path, _zip(_pickle(_dict({'w': third})), _TWO))
  _same(found['w'], _W.view(np.uint16)[1:])


# --- The two formats ---


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_tensors_share_their_storage(tmp_path, form):
  x = np.arange(12, dtype=np.int16)
  storage = _storage('7', 'ShortStorage', 12)
  body = _dict(
    {
      'a': _tensor(storage, 0, (3, 4), (4, 1)),
      'b': _tensor(storage, 1, (4, 2), (1, 4)),
      'c': _tensor(storage, 11, (), ()),
    }
  )
  make = {'zip': lambda *x: _zip(_pickle(x[0]), x[1]), 'legacy': _legacy}[form]
  found = _read(tmp_path, make(body, {'7': x}))
  _check(found)
  _same(found['a'], x.reshape(3, 4))
  _same(found['b'], np.stack([x[1:5], x[5:9]], 1))
  _same(found['c'], x[11])
  assert np.shares_memory(found['a'], found['b'])


def test_a_legacy_file_of_several_storages(tmp_path):
  wide = np.array([1e300, np.nan])
  body = {
    'b': _floats('1'),
    'wide': _tensor(_storage('2', 'DoubleStorage', 2), 0, (2,), (1,)),
    'w': _floats('0'),
  }
  content = _legacy(_dict(body), {**_TWO, '2': wide})
  found = _read(tmp_path, content)
  _check(found)
  for name, x in {'b': _B, 'wide': wide, 'w': _W}.items():
    _same(found[name], x)


_BODY = _dict({'w': _floats('0'), 'b': _floats('1')})


@pytest.mark.parametrize(
  ('content', 'told'),
  [
    (_legacy(_BODY, _TWO, {'little_endian': False}), 'big-endian'),
    (_zip(_pickle(_BODY), _TWO, byteorder=b'big'), 'big-endian'),
    (_legacy(_BODY, _TWO, counts={'1': 3}), 'storage 1 is not of 2'),
    (_legacy(_BODY, {'0': _W}), 'storage 1 is missing'),
    (_legacy(_BODY, {**_TWO, 'more': _W}), 'that its pickle lacks'),
    (_legacy(_BODY, {'0': _W, '1': _W[:1]}, counts={'1': 2}), 'cut off'),
    (_legacy(_BODY, _TWO)[:-1], 'cut off'),
    (_zip(_pickle(_BODY), {'0': _W}), "'archive/data/1' is missing"),
    (_zip(_pickle(_BODY), {'0': _W, '1': _W[:1]}), 'cut off'),
    (_zip(_pickle(_BODY)[:-1]), 'pickle'),
    (_zip(_pickle(b'')), 'its pickle is damaged'),
    (_pickle(_dict({'w': _floats('0')})), 'arrays that are not in it'),
    (_zip(b'').replace(b'data.pkl', b'code.pkl'), 'without a data.pkl'),
    (b'', 'neither'),
    (b'PK', 'neither'),
    (b'\x80', 'damaged'),
    (_zip(_pickle(_BODY), _TWO, zipfile.ZIP_DEFLATED), 'compressed'),
    (
      _zip(_pickle(_dict({'w': _floats('0'), 'b': _floats('0', 1)})), _TWO),
      'is two things',
    ),
  ],
)
def test_damage_is_told(tmp_path, content, told):
  with pytest.raises(archive.ArchiveError, match=told):
    _read(tmp_path, content)


@pytest.mark.parametrize(
  'code',
  [
    b'cos\nsystem\n(' + _text('touch PWNED') + b'tR',
    _text('os') + _text('system') + b'\x93' + _tuple(_text('touch PWNED')),
    _call('builtins', 'eval', _text('1')),
    _call('torch', 'load', _text('x')),
    _name('torch._utils', '__builtins__'),
    _name('torch', 'float32.__class__'),
    b"(S'touch PWNED'\nios\nsystem\n",
    b'\x82\x01',
    _name('argparse', 'Namespace') + b')}\x92',
  ],
)
def test_code_is_refused(tmp_path, monkeypatch, code):
  monkeypatch.chdir(tmp_path)
  for content in (_zip(_pickle(code)), _legacy(code), _pickle(code)):
    (tmp_path / 'x.pt').write_bytes(content)
    assert not _harmless(tmp_path / 'x.pt')
  assert [x.name for x in tmp_path.iterdir()] == ['x.pt']


def test_a_folder_and_a_missing_file(tmp_path):
  with pytest.raises(archive.ArchiveError, match='is a folder'):
    archive.read(tmp_path)
  with pytest.raises(FileNotFoundError):
    archive.read(tmp_path / 'none.pt')


@pytest.mark.parametrize('first', [0x80, 0x4B50])
def test_safetensors_that_begin_as_another_format(tmp_path, first):
  """The length of the header, which comes first, may be 'PK' or a PROTO."""
  header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
  content = struct.pack('<Q', first) + header.ljust(first) + _W.tobytes()
  for name in ('x.safetensors', 'x.bin'):
    _same(_read(tmp_path, content, name=name)['w'], _W)


# --- Views ---


@st.composite
def _views(draw):
  axes = st.integers(0, 3)
  size = tuple(draw(st.lists(st.integers(0, 4), max_size=draw(axes))))
  steps = st.one_of(st.integers(0, 8), st.sampled_from([2**62, 2**63 - 1]))
  stride = tuple(draw(steps) for _ in size)
  return draw(st.integers(0, 24)), draw(st.integers(0, 20)), size, stride


def test_views_stay_within_their_storage(folder):
  @settings(max_examples=300)
  @given(_views())
  def check(case):
    count, offset, size, stride = case
    x = np.arange(count, dtype=np.int32)
    tensor = _tensor(_storage('0', 'IntStorage', count), offset, size, stride)
    content = _zip(_pickle(_dict({'x': tensor})), {'0': x})
    indices = [
      offset + sum(i * step for i, step in zip(place, stride, strict=True))
      for place in itertools.product(*map(range, size))
    ]
    if max(indices, default=-1) < count:
      found = _read(folder, content)
      _check(found)
      _same(found['x'], np.array(x[indices], np.int32).reshape(size))
    else:
      with pytest.raises(archive.ArchiveError, match='in a storage of'):
        _read(folder, content)

  check()


@pytest.mark.parametrize(
  ('offset', 'size', 'stride'),
  [(-1, (1,), (1,)), (0, (-1,), (1,)), (1, (2,), (-1,)), (0, (1, 1), (1,))],
)
def test_views_of_no_form(tmp_path, offset, size, stride):
  tensor = _tensor(_storage('0', 'FloatStorage', 2), offset, size, stride)
  with pytest.raises(archive.ArchiveError, match='no known form'):
    _read(tmp_path, _zip(_pickle(_dict({'x': tensor})), _TWO))


# --- Damaged and hostile files ---


def _mutated(rng, data, other):
  """`data` with a few bytes flipped, cut, put in or taken from elsewhere."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 40)))
    kind = rng.randrange(6)
    if kind == 0:
      data[at:end] = [x ^ (1 << rng.randrange(8)) for x in data[at:end]]
    elif kind == 1:
      data[at:end] = rng.randbytes(end - at)
    elif kind == 2:
      del data[at : end if rng.random() < 0.8 else len(data)]
    elif kind == 3:
      data[at:at] = rng.randbytes(end - at)
    elif kind == 4:
      data[at:at] = data[at:end] * rng.choice((1, 2, 50))
    else:
      start = rng.randrange(len(other))
      data[at:end] = other[start : start + rng.choice((1, 8, 40))]
  return bytes(data)


_RICH = _dict(
  {
    'model': _dict(
      {
        'w': _floats('0'),
        'b': _tensor(_storage('1', 'FloatStorage', 2), 1, (1, 1), (1, 1)),
      }
    ),
    'args': _value(argparse.Namespace(lr=0.5, sizes=(1, 2, [3]))),
    'state': _value({0: {'step': 7, 'name': 'a', 'value': 0.5}}),
    'other': _value(np.float32(2)) + b'q\x07' + b'h\x070',
  }
)


def _seeds(folder):
  archive.write(folder / 's.safetensors', {'w': _W, 'b': _B.reshape(1, 2)})
  archive.write(
    folder / 's.pt', {'w': _W, 'b': _B.astype(ml_dtypes.float8_e5m2)}
  )
  protocol4 = pickle.dumps({'a': ['text', 1, 2.5, b'\0', (1, 2, 3)]}, 4)
  plain = _pickle(_RICH)
  return {
    'written': ((folder / 's.pt').read_bytes(), lambda x: x),
    'zip': (_zip(plain, _TWO, byteorder=b'little'), lambda x: x),
    'pickle': (plain, lambda x: _zip(x, _TWO)),
    'legacy': (_legacy(_RICH, _TWO), lambda x: x),
    'safetensors': (
      (folder / 's.safetensors').read_bytes(),
      lambda x: x,
    ),
    'other': (protocol4, lambda x: _zip(x, _TWO)),
  }


@pytest.mark.parametrize(
  'kind', ['written', 'zip', 'pickle', 'legacy', 'safetensors']
)
def test_mutated_files_are_read_or_refused(folder, kind):
  seeds = _seeds(folder)
  seed, wrap = seeds[kind]
  everything = b''.join(x for x, _ in seeds.values())
  path = folder / ('f.safetensors' if kind == 'safetensors' else 'f.pt')
  path.write_bytes(wrap(seed))
  assert _harmless(path)
  rng = random.Random(kind)
  accepted = 0
  for _ in range(_MUTATIONS):
    path.write_bytes(wrap(_mutated(rng, seed, everything)))
    accepted += _harmless(path)
  assert 0 < accepted < _MUTATIONS


def test_generated_pickles_are_read_or_refused(folder):
  """Operations in any order, which reach deeper than flipped bytes do."""
  parts = st.sampled_from(
    [
      *[b'(', b')', b']', b'}', b't', b'l', b'd', b'u', b's', b'a', b'e'],
      *[b'0', b'1', b'R', b'\x81', b'b', b'Q', b'q\0', b'h\0', b'\x85'],
      *[b'\x86', b'\x87', b'N', b'\x88', b'K\1', b'\x94', b'\x93', b'2'],
      *[_text('w'), _text('0'), _floats('0'), _wholes((1, 2)), _RICH],
      *[_storage('0', 'FloatStorage', 2), _name('torch', 'FloatStorage')],
      *[_name('collections', 'OrderedDict'), _name('torch', 'Size')],
      *[_name('torch._utils', '_rebuild_tensor_v2'), b'G' + b'\x7f\xf8' * 4],
      *[_name('torch._utils', '_rebuild_parameter'), _whole(2**64), b'J\xff'],
      *[b"S'\\q'\n", b'Va\n', b'I01\n', b'L5L\n', b'p1\n', b'g1\n', b'P0\n'],
    ]
  )

  @settings(max_examples=300)
  @given(st.lists(parts, max_size=12), st.booleans())
  def check(operations, legacy):
    body = b''.join(operations)
    content = _file('legacy' if legacy else 'zip', body)
    (folder / 'g.pt').write_bytes(content)
    _harmless(folder / 'g.pt')

  check()


@pytest.mark.parametrize('start', [b'', b'PK\x03\x04', b'\x80\x02', b'{' * 9])
def test_any_bytes_are_refused(folder, start):
  @settings(max_examples=40)
  @given(st.binary(max_size=60))
  def check(data):
    (folder / 'r.pt').write_bytes(start + data)
    assert not _harmless(folder / 'r.pt')

  check()


def _deep(open_, close, inner, levels=100_000):
  return open_ * levels + inner + close * levels


def _laughs(levels=60):
  """A list of two of a list of two and so on: 2**60 elements in a few bytes."""
  return b']q\0' + b''.join(b'0](h\0h\0eq\0' for _ in range(levels))


def _model_of(x):
  return _dict({'w': _floats('0'), 'x': x})


def _tensors_with(offset=0, size=(1,), stride=(1,), count=2):
  storage = _storage('0', 'FloatStorage', count)
  return _dict({'w': _tensor(storage, offset, size, stride)})


def _chosen(bits):
  """Integers of which a dict of 2**bits places finds each after a long search.

  CPython looks at i, then at 5 i + 1 + the upper bits of the hash: one half
  lies on one such path, the other begins on it.
  """
  size = 2**bits
  path = [0]
  for _ in range(int(0.45 * size)):
    path.append((5 * path[-1] + 1) % size)
  taken = np.zeros(size, bool)
  taken[path] = True
  upper = np.random.default_rng(0).integers(size, size * 2**10, 2**22)
  place, found = upper % size, taken[upper % size]
  left = upper.copy()
  while left.any():
    left >>= 5
    place = (5 * place + 1 + left) % size
    found &= taken[place]
  return path + np.unique(upper[found])[: int(0.2 * size)].tolist()


_CHOSEN = _chosen(16)  # 43,000; twice as many take four times as long
_HUGE = b'\x8b' + struct.pack('<i', 2**20) + b'\x7f' * 2**20  # 2**23 bits
# {kind: (operations, whether they are read)}; the others must be refused.
_PICKLES = {
  'storage of 1e12': (_tensors_with(count=10**12), False),
  'storage of 2**70': (_tensors_with(count=2**70), False),
  'tensor of 1e12, step 0': (_tensors_with(0, (10**12,), (0,)), False),
  'sizes that overflow': (_tensors_with(0, (2**32,) * 4, (0,) * 4), False),
  'no numbers, huge axes': (_tensors_with(0, (0, 2**62, 9), (1,) * 3), False),
  'offset of 2**63': (_tensors_with(2**63 - 1), False),
  'many axes': (_tensors_with(0, (1,) * 33, (1,) * 33), False),
  'sizes of a million bytes': (
    _HUGE
    + b'q\0'
    + b'0'
    + _dict(
      {
        'w': _call(
          *['torch._utils', '_rebuild_tensor_v2'],
          *[_storage('0', 'FloatStorage', 2), _whole(0)],
          *[_tuple(*[b'h\0'] * 32), _tuple(*[b'h\0'] * 32), b'\x89', b'N'],
        )
      }
    ),
    False,
  ),
  'memo 2**31': (_model_of(b'Nr' + struct.pack('<I', 2**31)), True),
  'text of 2**60': (_model_of(b'\x8d' + struct.pack('<Q', 2**60)), False),
  'bytes of 2**60': (_model_of(b'\x8e' + struct.pack('<Q', 2**60)), False),
  'bytes of 2**63': (_model_of(b'\x8e' + struct.pack('<Q', 2**63)), False),
  'number of 2**31 bytes': (
    _model_of(b'\x8b' + struct.pack('<i', 2**31 - 1)),
    False,
  ),
  'deep tuple as a key': (_deep(b'', b'\x85', b'}N') + b'Ns', False),
  'deep tuple as a key of pairs': (
    _name('collections', 'OrderedDict')
    + _tuple(b'](' + _deep(b'', b'\x85', b'N') + b'Nta')
    + b'R',
    False,
  ),
  'deep lists': (_model_of(_deep(b']', b'a', b'N')), True),
  'deep tuples': (_model_of(_deep(b'', b'\x85', b'N')), True),
  'deep dictionaries': (
    _model_of(_deep(b'}' + _text('k'), b's', b'N', 30_000)),
    True,
  ),
  'deep models': (_deep(b'}' + _text('model'), b's', _BODY, 30_000), False),
  'deep models of long names': (
    _text('k' * 2**19) + b'q\x010' + _deep(b'}h\1', b's', _BODY, 30_000),
    False,
  ),
  'long names of many': (
    _dict({'k' * 2**19: _dict({str(i): b'}' for i in range(20_000)})}),
    False,
  ),
  'laughs': (_model_of(_laughs()), True),
  'laughs as a name': (_laughs() + _text('x') + b'\x93', False),
  'laughs as a storage': (_laughs() + b'Q', False),
  'laughs as a model': (_dict({'model': _laughs()}), False),
  'deep list as a name': (
    _deep(b']', b'a', b'N') + _text('x') + b'\x93',
    False,
  ),
  'list in itself': (_model_of(b']q\0h\0a'), True),
  'dictionary in itself': (b'}q\0' + _text('model') + b'h\0s', False),
  'model in itself': (
    b'}q\0' + _text('model') + b'h\0s' + _text('w') + _floats('0') + b's',
    True,
  ),
  'one list of pairs, many dictionaries': (
    b'(]('
    + b''.join(b'M' + struct.pack('<H', i) + b'N\x86' for i in range(20_000))
    + b'etq\x010'
    + _name('collections', 'OrderedDict')
    + b'q\x020('
    + b'h\2h\1R' * 20_000
    + b'l',
    False,
  ),
  'many calls of many arguments': (
    b'('
    + b'N' * 100_000
    + b'tq\x010'
    + _name('torch', 'Size')
    + b'q\x020('
    + b'h\2h\1R' * 20_000
    + b'l',
    False,
  ),
  'keys of a million bytes': (
    b'}' + _HUGE + b'q\x010' + b'h\1Ns' * 100_000,
    False,
  ),
  'keys of one hash': (
    b'}' + b''.join(_whole(i * (2**61 - 1)) + b'Ns' for i in range(1, 40_000)),
    False,
  ),
  'keys that share their places': (
    _model_of(b'}(' + b''.join(_whole(i) + b'N' for i in _CHOSEN) + b'u'),
    True,
  ),
  'memo of indices that share their places': (
    _model_of(b'N' + b''.join(b'r' + struct.pack('<I', i) for i in _CHOSEN)),
    True,
  ),
  'one tensor, many times': (
    _model_of(_floats('0') + b'q\x010](' + b'h\1' * 50_000 + b'e'),
    True,
  ),
  'many marks': (_model_of(b'(' * 50_000 + b'1' * 50_000 + b'N'), True),
}


def _bounded(path):
  """`_harmless`, within a few seconds and megabytes."""
  tracemalloc.start()
  try:
    start = time.process_time()
    read = _harmless(path)
    took = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 64 * 2**20
  assert took < 5
  return read


@pytest.mark.parametrize('kind', _PICKLES)
def test_bombs_in_pickles(tmp_path, kind):
  body, read = _PICKLES[kind]
  # Both formats have one machine: the large ones are tried in one of them.
  for form in ('zip', 'legacy') if len(body) < 10_000 else ('zip',):
    (tmp_path / 'x.pt').write_bytes(_file(form, body))
    assert _bounded(tmp_path / 'x.pt') is read


def test_one_storage_listed_many_times_in_a_legacy_file(tmp_path):
  keys = pickle.dumps(['0'] * 100_000, 2)
  content = _legacy(_BODY, _TWO).replace(pickle.dumps(['0', '1'], 2), keys)
  (tmp_path / 'x.pt').write_bytes(content)
  assert not _bounded(tmp_path / 'x.pt')
  for other in (_laughs(), _deep(b']', b'a', b'N')):
    keys = _pickle(b']' + other + b'a')
    content = _legacy(_BODY, _TWO).replace(pickle.dumps(['0', '1'], 2), keys)
    (tmp_path / 'x.pt').write_bytes(content)
    assert not _bounded(tmp_path / 'x.pt')


def test_a_compressed_archive_is_refused(tmp_path):
  zeros = np.zeros(2**25, np.float32)
  content = _zip(
    _pickle(_dict({'w': _floats('0', zeros.size)})),
    {'0': zeros},
    zipfile.ZIP_DEFLATED,
  )
  assert len(content) < 2**20
  (tmp_path / 'x.pt').write_bytes(content)
  assert not _bounded(tmp_path / 'x.pt')


def test_entries_of_the_same_bytes_are_refused(tmp_path):
  count = 2**18
  body = {str(i): _floats(str(i), count) for i in range(200)}
  with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as file:
    file.writestr('archive/data.pkl', _pickle(_dict(body)))
    file.writestr('archive/data/0', bytes(4 * count))
    for i in range(1, 200):
      entry = copy.copy(file.filelist[1])
      entry.filename = f'archive/data/{i}'
      file.filelist.append(entry)
  assert not _bounded(tmp_path / 'x.pt')


@pytest.mark.parametrize('offset', [2**31, 2**62, 2**63 - 1, 2**64 - 1])
def test_entries_far_beyond_the_file_are_refused(tmp_path, offset):
  with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as file:
    file.writestr('archive/data.pkl', _pickle(_BODY))
    file.filelist[0].header_offset = offset
  assert not _bounded(tmp_path / 'x.pt')


def _header(text):
  return struct.pack('<Q', len(text)) + text


@pytest.mark.parametrize(
  'content',
  [
    struct.pack('<Q', 2**60) + b'{}' + bytes(100),
    struct.pack('<Q', 2**64 - 1) + b'{}',
    struct.pack('<Q', 10**8) + b'{' * 1000,
    _header(b'[' * 10**6),
    _header(b'{"a":' * 200_000),
    _header(b'{"w":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,8]}}')
    + bytes(8),
    _header(
      b'{"w":{"dtype":"F32","shape":[0,9223372036854775807,9],'
      b'"data_offsets":[0,0]}}'
    ),
  ],
)
def test_bombs_in_safetensors(tmp_path, content):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(content)
  assert not _bounded(path)
