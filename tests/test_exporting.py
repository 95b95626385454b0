"""Functions as ONNX files: each primitive, whole students, what users meet."""

import functools
import importlib.util
import io
import pathlib
import subprocess
import sys
import zipfile

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax import lax
from PIL import Image

from distillfss_jax import backbones
from distillfss_jax.data import transforms
from distillfss_jax.exporting import graph, onnx, primitives, resizing, torch
from distillfss_jax.models import base as model_base
from distillfss_jax.models import dcama, distilled
from distillfss_jax.ops import polarity, resize
from tests import parity

pytest.importorskip(
  'onnxruntime', reason='needs pip install -r requirements-export.txt'
)

_few = hypothesis.settings(max_examples=15)


def _arrays(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _signature(function, arrays, free):
  """What `onnx.lower` asks; arrays whose index is in `free` have a batch."""
  inputs = {
    f'x{i}': (
      (onnx.BATCH, *x.shape[1:]) if i in free else x.shape,
      x.dtype,
    )
    for i, x in enumerate(arrays)
  }
  results = jax.tree.leaves(jax.eval_shape(function, *arrays))
  return function, inputs, [f'y{i}' for i in range(len(results))]


def _model(function, arrays, free):
  return onnx.lower(*_signature(function, arrays, free))


def _in_onnx(function, arrays, free):
  """The results of a function that onnxruntime runs, for any such arrays."""
  return onnx.Program(_model(function, arrays, free), threads=1)


def _in_torch(function, arrays, free):
  """The same by PyTorch, which takes one operator after the other."""
  module = torch.module(onnx.traced(*_signature(function, arrays, free)))
  tensor = torch.needs().tensor
  return lambda *arrays: [x.numpy() for x in module(*map(tensor, arrays))]


needs_torch = pytest.mark.skipif(
  importlib.util.find_spec('torch') is None, reason='needs pip install torch'
)
both_ways = pytest.mark.parametrize(
  'way', [_in_onnx, pytest.param(_in_torch, marks=needs_torch)]
)


def _check(function, *arrays, free=(), atol=1e-5, way=_in_onnx):
  """Compares a function's results with those of a program made of it."""
  wanted = jax.tree.leaves(jax.jit(function)(*arrays))
  found = way(function, arrays, free)(*arrays)
  for ours, theirs in zip(wanted, found, strict=True):
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(theirs, ours, atol=atol, rtol=1e-5)


def _pool(x):
  return lax.reduce_window(
    x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
    ((0, 0), (1, 1), (1, 0), (0, 0)),
  )  # fmt: skip


def _scan(length, reverse):
  def function(x, rows):
    def step(carry, row):
      top, count = carry
      new = jnp.maximum(top, row @ x)
      return (new, count + 1), (new.sum(), row * 2)

    start = (jnp.full(3, -5.0), jnp.int32(0))
    return lax.scan(step, start, rows, reverse=reverse, length=length)

  return function


def _nested(x):
  def outer(row):
    y, _ = lax.scan(lambda c, v: (c * v + row.sum(), None), row[0], x[0])
    return y

  return lax.map(outer, x)


@jax.custom_vjp
def _own_gradient(x):
  return jnp.exp(x)


_own_gradient.defvjp(lambda x: (jnp.exp(x), None), lambda _, dy: (dy,))

_X, _Y = _arrays((2, 3, 4), (2, 3, 4))
_IMAGE = _arrays((2, 8, 6, 3))[0]
_ROW = np.array([[3, -4, 0, 7], [-7, 5, 2, -1]], np.int32)
_PLACES = np.array([[2, 0], [1, 1], [-1, 4]], np.int32)

_CASES = {
  'arithmetic': (lambda x, y: (x + y) * (x - y) / (2 + y * y) - 3, _X, _Y),
  'signs': (lambda x: (-x, abs(x), jnp.sign(x), jnp.floor(x), jnp.ceil(x)), _X),
  'exponentials': (lambda x: (jnp.exp(x), jnp.log(x * x + 1), jnp.tanh(x)), _X),
  'roots': (lambda x: (jnp.sqrt(abs(x)), lax.rsqrt(abs(x) + 1)), _X),
  'powers': (lambda x: (x**3, jnp.square(x), abs(x) ** 1.5, x**-2), _X),
  'waves': (lambda x: (jnp.sin(x), jnp.cos(x)), _X),
  'errors': (
    lambda x: (lax.erf(x), lax.erfc(x), jax.nn.gelu(x, approximate=False)),
    _X,
  ),
  'sigmoids': (lambda x: (jax.nn.sigmoid(x), jax.nn.silu(x)), _X),
  'relus': (lambda x: (jax.nn.relu(x), jax.nn.relu6(x * 9)), _X),
  'extremes': (lambda x, y: (jnp.maximum(x, y), jnp.minimum(x, 0.5)), _X, _Y),
  'clamp': (lambda x: lax.clamp(-0.5, x, 0.5), _X),
  'comparisons': (
    lambda x, y: (x < y, x <= y, x > y, x >= y, x == y, x != y),
    _ROW,
    _ROW[::-1].copy(),
  ),
  'logic': (lambda x, y: (~(x > 0) & (y > 0) | (x > y), (x > 0) ^ (y > 0)),
            _X, _Y),
  'integers': (lambda x: (x // 3, x % 3, lax.rem(x, 3), lax.div(x, 2)), _ROW),
  'bits': (lambda x, y: (x & y, x | y, x ^ y, ~x), _ROW, _ROW[::-1].copy()),
  'casts': (
    lambda x: (x.astype(np.int32), x > 0, x.astype(bool).astype(np.float32)),
    _X * 9,
  ),
  'where': (lambda x, y: jnp.where(x > y, x, jnp.where(y > 0, 1.0, -1.0)),
            _X, _Y),
  'choose': (
    lambda i, x, y: lax.select_n(jnp.abs(i) % 3, x, y, x + y),
    _ROW,
    *_arrays((2, 4), (2, 4)),
  ),
  'sums': (lambda x: (x.sum(1), x.mean((0, 2)), x.prod(-1), x.var()), _X),
  'bounds': (lambda x: (x.max(1), x.min((0, 2)), x.max(2, keepdims=True)), _X),
  'any and all': (lambda x: ((x > 1).any(1), (x > -1).all((0, 2))), _X),
  'best': (lambda x: (x.argmax(1), x.argmin(-1), (x > 0).argmax(0)), _X),
  'cumsum': (
    lambda x: (x.cumsum(1), lax.cumsum(x, axis=2, reverse=True)), _X,
  ),
  'softmax': (lambda x: (jax.nn.softmax(x), jax.nn.softmax(x, 1)), _X),
  'pool': (_pool, _IMAGE),
  'pool of planes': (lambda x: _pool(x.transpose(0, 2, 3, 1)), _IMAGE),
  'split': (lambda x: jnp.split(x, [1, 3], 2), _X),
  'join': (
    lambda x, y: (jnp.concatenate([x, y[:1]], 0), jnp.stack([x, y], 2)), _X, _Y,
  ),
  'join what repeats': (
    lambda x: jnp.concatenate([jnp.zeros((2, 1, 4)), x, x[:, :1] * 0 + 1], 1),
    _X,
  ),
  'repeat': (lambda x: (jnp.repeat(x, 3, 1), jnp.tile(x, (1, 2, 1))), _X),
  'roll': (lambda x: jnp.roll(x, (-1, 2), (1, 2)), _X),
  'slice': (lambda x: (x[:, 1:, ::2], x[1], x[:, -1:, 1:3]), _X),
  'slice where data says': (
    lambda x, i: lax.dynamic_slice(x, (0, i[0], i[1]), (2, 2, 3)),
    _X,
    np.array([5, 1], np.int32),
  ),
  'rows': (
    lambda x, i: (x[i], jnp.take(x, i, 1)), _X, np.array([1, 0, 1], np.int32),
  ),
  'rows that do not exist': (
    lambda x, i: (jnp.take(x, i, 1, mode='clip'), x.at[i].get(mode='fill')),
    _X,
    np.array([1, 9, -9], np.int32),
  ),
  'along an axis': (
    lambda x: jnp.take_along_axis(x, x.argmax(1, keepdims=True), 1), _X,
  ),
  'each its own rows': (
    lambda x, i: jax.vmap(lambda row, at: row[at])(x, i),
    _arrays((3, 5, 2))[0],
    _PLACES,
  ),
  'pairs of places': (lambda x, i: x[i[0], i[1]], _X.swapaxes(0, 1).copy(),
                      np.array([[2, 0], [1, 1]], np.int32)),
  'attention': (
    lambda q, k: jnp.einsum('bqad,bkad->baqk', q, k),
    *_arrays((2, 5, 3, 4), (2, 6, 3, 4)),
  ),
  'a kernel for each way': (
    jax.vmap(
      functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding='SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      ),
      in_axes=(-2, 0),
      out_axes=-2,
    ),
    *_arrays((2, 5, 6, 3, 4), (3, 3, 3, 4, 2)),
  ),
  'a convolution upwards': (
    lambda x, k: lax.conv_transpose(x, k, (2, 2), 'SAME'),
    *_arrays((2, 4, 5, 3), (3, 3, 3, 2)),
  ),
  'gradients of their own': (_own_gradient, _X),
  'calls': (jax.jit(lambda x: jax.checkpoint(jnp.sin)(x) + 1), _X),
  'nested loops': (_nested, _arrays((6, 7))[0]),
  'counted loop': (
    lambda x: lax.fori_loop(0, 7, lambda i, y: y * 0.5 + i, x), _X,
  ),
  'barrier': (lambda x: lax.optimization_barrier((x, x + 1)), _X),
  'what goes through': (lambda x: (x, 2 * x.T, np.arange(3)), _X),
}  # fmt: skip


@both_ways
def test_polar_images(way):
  rng = np.random.default_rng(0)
  images = rng.uniform(0, 0.4, (2, 24, 40, 3)).astype(np.float32)
  images[0, :10, :12] += 0.5
  images[1, 10:] += 0.4
  _check(polarity.polar, images, free=(0,), way=way)


@pytest.mark.parametrize('name', _CASES)
@both_ways
def test_primitives(way, name):
  if way is _in_torch and name == 'slice where data says':
    # A size of a result would be what only the data say.
    with pytest.raises(ValueError, match="operator 'Slice' has no rule for Py"):
      _check(*_CASES[name], way=way)
    return
  _check(*_CASES[name], way=way)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('length', [1, 3, 7])
@both_ways
def test_loops(way, length, reverse):
  arrays = _arrays((4, 3), (length, 4))
  _check(_scan(length, reverse), *arrays, way=way)


@both_ways
@hypothesis.given(st.data())
@_few
def test_convolutions(way, data):
  def draw(low, high):
    return data.draw(st.integers(low, high))

  groups = draw(1, 2)
  rank = draw(1, 2)
  space = 'HW'[:rank]
  size = [draw(4, 7) for _ in range(rank)]
  kernel = [draw(1, 3) for _ in range(rank)]
  lhs = data.draw(st.sampled_from((f'N{space}C', f'NC{space}', f'C{space}N')))
  out = data.draw(st.sampled_from((f'N{space}C', f'NC{space}')))
  rhs = data.draw(st.sampled_from((f'{space}IO', f'OI{space}')))
  sizes = dict(zip(space, size, strict=True)) | {'N': 2, 'C': 2 * groups}
  window = dict(zip(space, kernel, strict=True)) | {'I': 2, 'O': 3 * groups}
  function = functools.partial(
    lax.conv_general_dilated,
    window_strides=[draw(1, 2) for _ in range(rank)],
    padding=[(draw(-1, 2), draw(0, 2)) for _ in range(rank)],
    lhs_dilation=[draw(1, 2)] * rank,
    rhs_dilation=[draw(1, 2)] * rank,
    dimension_numbers=(lhs, rhs, out),
    feature_group_count=groups,
  )
  arrays = _arrays([sizes[x] for x in lhs], [window[x] for x in rhs])
  hypothesis.assume(min(jax.eval_shape(function, *arrays).shape) > 0)
  _check(function, *arrays, free=(0,) if lhs[0] == 'N' else (), way=way)


@both_ways
@hypothesis.given(st.data())
@_few
def test_products(way, data):
  """Any axes of both, which may lie in any order."""
  letters = {'p': 2, 'q': 3, 'k': 4, 'l': 2, 'm': 5, 'n': 3, 'o': 2}
  shared = data.draw(st.sampled_from(('', '', 'p', 'pq')))
  summed = data.draw(st.sampled_from(('', 'k', 'k', 'kl')))
  lefts = data.draw(st.sampled_from(('', 'm', 'mo')))
  rights = data.draw(st.sampled_from(('', 'n')))
  x = data.draw(st.permutations(shared + summed + lefts))
  y = data.draw(st.permutations(shared + summed + rights))
  given = _arrays([letters[i] for i in x], [letters[i] for i in y])
  turn = data.draw(st.permutations(range(len(x))))
  sides = ([x[i] for i in turn], y)

  def function(x, y):
    dims = [
      [tuple(side.index(i) for i in some) for side in sides]
      for some in (summed, shared)
    ]
    return lax.dot_general(x.transpose(turn), y, dims)

  constant = data.draw(st.booleans())
  if constant:
    _check(lambda x: function(x, given[1]), given[0], way=way)
  else:
    _check(function, *given, way=way)


@both_ways
@hypothesis.given(st.data())
@_few
def test_axes_split_and_merged(way, data):
  """Reshapes between transposes, of arrays that lie in any order."""
  first = data.draw(st.permutations(range(4)))
  second = data.draw(st.permutations(range(3)))
  shape = data.draw(
    st.sampled_from(
      ((4, 3, 10), (2, 6, 10), (12, 2, 5), (1, 60, 2), (8, 1, 15))
    )
  )

  def function(x):
    x = x.transpose(first).reshape(shape).transpose(second)
    return x.reshape(-1, 5) + 1, x[:, None] * x.sum(1)[:, None, None]

  x = _arrays((2, 3, 4, 5))[0].transpose(np.argsort(first))
  x = np.ascontiguousarray(x)
  back = np.argsort(first)
  _check(lambda x: function(x.transpose(first).transpose(back)), x, way=way)


@both_ways
@hypothesis.given(st.data())
@_few
def test_paddings(way, data):
  sides = [
    (
      data.draw(st.integers(-1, 2)),
      data.draw(st.integers(-1, 2)),
      data.draw(st.integers(0, 2)),
    )
    for _ in range(2)
  ]
  turn = data.draw(st.permutations(range(3)))
  x = _arrays((3, 4, 2))[0]

  def function(x):
    x = lax.pad(x.transpose(turn), jnp.float32(7), [*sides, (0, 0, 0)])
    return x + 1

  hypothesis.assume(min(jax.eval_shape(function, x).shape) > 0)
  _check(function, x, way=way)


_SIZE = 24


@functools.cache
def _resizer():
  made = graph.Graph()
  name = made.input('images', np.uint8, [None, None, None, 3])
  name = resizing.resized(made, name, _SIZE)
  made.output(name, 'resized', np.uint8, [None, _SIZE, _SIZE, 3])
  return onnx.Program(graph.finished(made), threads=1)


def _resized(image):
  """Columns first, as every Pillow does it but 13 with some high images."""
  columns = Image.fromarray(image).resize(
    (_SIZE, image.shape[0]), Image.BILINEAR
  )
  return np.asarray(columns.resize((_SIZE, _SIZE), Image.BILINEAR))


@hypothesis.given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 9))
@_few
def test_images_are_resized_to_the_byte(height, width, seed):
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (height, width, 3), np.uint8)
  wanted = _resized(image)
  if height <= width:
    ours = transforms.resize_image(image, _SIZE)
    np.testing.assert_array_equal(ours, wanted)
  found = _resizer()(np.stack([image, image[::-1]]))[0]
  np.testing.assert_array_equal(found[0], wanted)
  np.testing.assert_array_equal(found[1], _resized(image[::-1]))


def _by_colour(images):
  """Logits [b, h, w, 4] that change from pixel to pixel, at half the size."""
  kernel, scale = _arrays((3, 3, 3, 4), (4,))
  x = (images.astype(jnp.float32) / 255 - 0.5) / 0.25
  x = lax.conv_general_dilated(
    x, kernel, (2, 2), ((1, 0), (1, 0)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )  # fmt: skip
  return x * scale


def _answer(function, image, size):
  """What JAX and our own preprocessing say of an image: (labels, logits)."""
  logits = function(transforms.resize_image(image, size)[None])
  logits = resize.bilinear(logits, image.shape[:2], align_corners=False)
  return logits.argmax(-1), jax.nn.softmax(logits)


@pytest.fixture(scope='module')
def segmenter():
  """A small segmenter for images of any size."""
  record = {'classes': ['a', 'b', 'c'], 'palette': [[0, 0, 0], [9, 8, 7]]}
  return onnx.lower_segmenter(_by_colour, 96, record=record)


def _real_images(shared, kinds):
  """An image of the nuclei of each of some sizes."""
  images = {}
  with zipfile.ZipFile(shared('data/stage1_train.zip')) as archive:
    for name in archive.namelist():
      if '/images/' in name and name.endswith('.png'):
        image = Image.open(io.BytesIO(archive.read(name))).convert('RGB')
        images.setdefault(image.size, np.asarray(image))
        if len(images) == kinds:
          return list(images.values())
  raise AssertionError(f'there are only {len(images)} sizes')


def test_real_images_get_the_same_labels(shared, segmenter):
  program = onnx.Segmenter(segmenter)
  for image in _real_images(shared, 5):
    labels, probabilities = program(image[None])
    assert labels.dtype == np.uint8
    assert labels.shape == (1, *image.shape[:2])
    apart = onnx.difference(
      (labels, probabilities), _answer(_by_colour, image, 96)
    )
    assert apart['equal_labels'] >= 0.9999, image.shape
    assert apart['probabilities'] < 1e-4
    assert len(np.unique(labels)) > 2


def test_the_record_comes_back(segmenter, tmp_path):
  path = tmp_path / 'x.onnx'
  assert onnx.save(segmenter, path) == path.stat().st_size
  record = onnx.Segmenter(path).record
  assert record['classes'] == ['a', 'b', 'c']
  assert record['palette'] == [[0, 0, 0], [9, 8, 7]]
  assert record['size'] is None


def test_a_file_of_one_size():
  program = onnx.Segmenter(
    onnx.lower_segmenter(_by_colour, 16, free_size=False)
  )
  image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  labels, probabilities = program(image)
  for i in range(2):
    wanted = _answer(_by_colour, image[i], 16)
    np.testing.assert_array_equal(labels[i], wanted[0][0])
    np.testing.assert_allclose(probabilities[i], wanted[1][0], atol=1e-5)
  with pytest.raises(ValueError, match=r'\(1, 16, 17, 3\).* H and W 16'):
    program(image[:1, :, :1].repeat(17, 2))
  with pytest.raises(ValueError, match='float64'):
    program(image / 255)


@needs_torch
def test_a_file_for_torch(segmenter, tmp_path):
  path, record = tmp_path / 'x.pt2', {'classes': ['a', 'b', 'c']}
  size = torch.save_segmenter(path, _by_colour, 96, record=record)
  assert size == path.stat().st_size
  assert str(pathlib.Path.cwd()).encode() not in path.read_bytes()
  program, other = torch.Segmenter(path), onnx.Segmenter(segmenter)
  assert program.record == {'kind': onnx.KIND, 'size': None} | record
  random = np.random.default_rng(0)
  for shape in ((1, 96, 96), (3, 70, 201), (1, 300, 97), (2, 33, 1)):
    images = random.integers(0, 256, (*shape, 3), np.uint8)
    labels, probabilities = program(images)
    assert (labels.dtype, labels.shape) == (np.uint8, shape)
    apart = onnx.difference((labels, probabilities), other(images))
    assert apart['equal_labels'] >= 0.9999, shape
    assert apart['probabilities'] < 1e-4
  with pytest.raises(ValueError, match=r'float64 .* H and W any'):
    program(images / 255)


_ALONE = """
import json, sys, torch
texts = {'record.json': ''}
program = torch.export.load(sys.argv[1], extra_files=texts).module()
labels, shares = program(torch.zeros(1, 20, 30, 3, dtype=torch.uint8))
assert labels.shape == (1, 20, 30) and shares.shape == (1, 20, 30, 4)
assert json.loads(texts['record.json'])['classes'] == ['a', 'b', 'c']
assert not {'jax', 'distillfss_jax'} & set(sys.modules)
"""


@needs_torch
def test_torch_needs_nothing_of_ours(tmp_path):
  path = tmp_path / 'x.pt2'
  record = {'classes': ['a', 'b', 'c']}
  torch.save_segmenter(path, _by_colour, 16, record=record)
  done = subprocess.run(
    [sys.executable, '-I', '-c', _ALONE, path.name],
    cwd=tmp_path, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


@needs_torch
def test_a_file_for_torch_of_one_size(tmp_path):
  path = tmp_path / 'x.pt2'
  torch.save_segmenter(path, _by_colour, 16, free_size=False)
  program = torch.Segmenter(path)
  image = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  labels, probabilities = program(image)
  for i in range(2):
    wanted = _answer(_by_colour, image[i], 16)
    np.testing.assert_array_equal(labels[i], wanted[0][0])
    np.testing.assert_allclose(probabilities[i], wanted[1][0], atol=1e-5)
  with pytest.raises(ValueError, match=r'\(1, 16, 17, 3\).* H and W 16'):
    program(image[:1, :, :1].repeat(17, 2))


@hypothesis.given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 9))
@needs_torch
@_few
def test_torch_resizes_images_to_the_byte(height, width, seed):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (2, height, width, 3), np.uint8)
  package = torch.needs()
  found = torch.resized(package, package.tensor(images), _SIZE).numpy()
  np.testing.assert_array_equal(found[0], _resized(images[0]))
  np.testing.assert_array_equal(found[1], _resized(images[1]))


def test_quantised_files_are_smaller_and_say_nearly_the_same(tmp_path):
  kernels = [x / 6 for x in _arrays(*[(3, 3, 32, 32)] * 2, (64, 32), seed=2)]
  head = _arrays((3, 3, 3, 32))[0] / 5

  def function(images):
    x = images.astype(jnp.float32) / 127.5 - 1
    for kernel in (head, *kernels[:2]):
      x = jax.nn.relu(
        lax.conv_general_dilated(
          x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
      )
    return jnp.einsum('bhwc,kc->bhwk', x, kernels[2])[..., :3]

  paths = tmp_path / 'float.onnx', tmp_path / 'int8.onnx'
  model = onnx.lower_segmenter(function, 16, record={'classes': ['x']})
  before = onnx.save(model, paths[0])
  after = onnx.quantise(*paths)
  assert after == paths[1].stat().st_size
  assert after < before / 2
  image = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8)
  first, second = (onnx.Segmenter(path) for path in paths)
  assert second.record == first.record
  apart = onnx.difference(first(image), second(image))
  assert 0.9 < apart['equal_labels'] <= 1
  assert 0 < apart['probabilities'] < 0.2


def test_channels_move_twice():
  """Once to the front and once back, whatever lies in between."""
  kernels = _arrays((3, 3, 3, 8), (3, 3, 8, 8), (8, 4))

  def function(x):
    for kernel in kernels[:2]:
      x = lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )
      x = jax.nn.relu(x * kernel[0, 0, 0] + x.mean((1, 2), keepdims=True))
    x = jnp.stack([x, x + 1], 1).reshape(-1, *x.shape[1:])
    x = x @ kernels[2]
    return resize.bilinear(x, (9, 11))

  x = _arrays((2, 5, 6, 3))[0]
  ops = [node.op_type for node in _model(function, [x], (0,)).graph.node]
  assert ops.count('Transpose') == 2
  assert ops.count('Conv') == 3
  assert not {'Expand', 'Gather', 'GatherND', 'Einsum'} & set(ops)
  _check(function, x, free=(0,), atol=1e-4)


def test_weights_are_stored_once():
  (kernel,) = _arrays((64, 64))
  copy = kernel.copy()

  def function(x):
    return (x @ kernel) @ copy

  model = _model(function, _arrays((2, 64)), (0,))
  assert 1 <= model.ByteSize() / kernel.nbytes < 1.2


def test_what_no_step_changes_is_computed_before_the_loop():
  def function(x, rows):
    return lax.map(lambda row: row * jnp.exp(x).sum(), rows)

  arrays = _arrays((4,), (7, 3))
  model = _model(function, arrays, ())
  ops = [node.op_type for node in model.graph.node]
  assert 'Exp' in ops
  assert 'Scan' in ops
  _check(function, *arrays)


def test_any_batch_is_taken():
  def function(x):
    y = x.reshape(-1, 4) @ _Y[0].T
    y = y.reshape(x.shape[0], -1)[:, :2] + jnp.zeros((x.shape[0], 2))
    return y - y.mean(0)

  x = _arrays((5, 3, 4))[0]
  program = onnx.Program(_model(function, [x], (0,)))
  for batch in (1, 2, 5):
    np.testing.assert_allclose(
      program(x[:batch])[0], function(x[:batch]), rtol=1e-5, atol=1e-6
    )


def _sort(x):
  return jnp.sort(x, 1)


@pytest.mark.parametrize(
  ('function', 'says'),
  [
    (_sort, r"primitive 'sort' has no rule .*test_exporting\.py:\d+ \(_sort\)"),
    (lambda x: x.astype(jnp.bfloat16) + 1, 'no bfloat16: .* float32'),
    (lambda x: jnp.concatenate([x, _Y]), r'a size is batch \+ 2'),
    (lambda x: x if len(x) > 4 else -x, 'cannot be traced for a batch of any'),
    (lambda x: x[:1], 'the batch is cut'),
  ],
)
def test_what_has_no_rule_is_named(function, says):
  with pytest.raises(ValueError, match=says):
    _model(function, [_X], (0,))


def test_weights_that_one_file_cannot_hold(monkeypatch):
  monkeypatch.setattr(graph, 'LARGEST', 100)
  with pytest.raises(ValueError, match='one ONNX file holds 2'):
    _model(lambda x: x @ _arrays((4, 9))[0], [_X], (0,))


def test_packages_that_are_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnx', None)
  says = 'ONNX needs the package onnx: pip install -r requirements-export.txt'
  with pytest.raises(ValueError, match=f'^{says}$'):
    _model(jnp.sin, [_X], ())
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  with pytest.raises(ValueError, match='needs the package onnxruntime:'):
    onnx.Program('x.onnx')
  monkeypatch.setitem(sys.modules, 'torch', None)
  says = "PyTorch's files need the package torch: pip install torch"
  with pytest.raises(ValueError, match=f'^{says}$'):
    torch.save_segmenter('x.pt2', _by_colour, 96)


def test_files_that_are_not_ours(tmp_path):
  path = tmp_path / 'x.onnx'
  path.write_bytes(b'no model')
  with pytest.raises(ValueError, match=r'x\.onnx is no ONNX model'):
    onnx.Program(path)
  onnx.save(_model(jnp.sin, [_X], ()), path)
  with pytest.raises(ValueError, match=r'x\.onnx is an ONNX model, but not'):
    onnx.Segmenter(path)
  with pytest.raises(FileNotFoundError):
    onnx.Segmenter(tmp_path / 'y.onnx')
  with pytest.raises(ValueError, match=r'x\.onnx is no file for PyTorch'):
    torch.Segmenter(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('x/extra/record.json', '{}')
  assert torch.wrote(path)


@needs_torch
def test_what_torch_cannot_export(tmp_path):
  def function(images):
    place = images[0, 0, 0, 0].astype(jnp.int32)
    return lax.dynamic_slice_in_dim(_by_colour(images), place, 2, 3)

  with pytest.raises(ValueError, match=r"^the operator 'Slice' has no rule"):
    torch.save_segmenter(tmp_path / 'x', function, 16)
  assert not list(tmp_path.iterdir())


@needs_torch
def test_damaged_files_for_torch(tmp_path):
  path = tmp_path / 'x.pt2'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('x/extra/record.json', '{}')
  with pytest.raises(ValueError, match=r'^PyTorch 2.* cannot load .*x\.pt2'):
    torch.Segmenter(path)


_SIZES = {'resnet_tiny': 64, 'swin_tiny_test': 128, 'dino_tiny_test': 64}
_PRODUCTS = [
  (backbone, kind)
  for backbone in _SIZES
  for kind in (*distilled.variants, 'teacher')
]


@functools.cache
def _product(backbone, kind):
  """Images to logits, of a student or of a teacher with its memory."""
  size = _SIZES[backbone]

  def build():
    rngs = nnx.Rngs(0)
    encoder = backbones.build(backbone, image_size=size, rngs=rngs)
    teacher = dcama.DCAMA(encoder, voting=2, rngs=rngs)
    if kind == 'teacher':
      return teacher
    slots = tuple(
      model_base.Slot('maps', 1, stage, channels, per_block=True)
      for stage, channels in enumerate(encoder.channels)
      if stage
    )
    student = distilled.variants[kind](2, slots, rngs=rngs)
    return distilled.DistilledSegmenter(teacher, student)

  model = parity.fill_randomly(nnx.eval_shape(build))
  if kind != 'teacher':
    return lambda x: model.segment(model.teacher.encode(x), (size, size)).logits
  rng = np.random.default_rng(5)
  images = rng.integers(0, 256, (1, 5, size, size, 3), np.uint8)
  masks = rng.integers(0, 2, (1, 5, size, size, 2)).astype(np.float32)
  memory = jax.jit(model.memorize)(
    model.encode(images), masks, np.ones((1, 5, 2), bool)
  )
  return lambda x: model.segment(model.encode(x), memory, (size, size)).logits


def _used(jaxpr, found):
  for eqn in jaxpr.eqns:
    found.add(eqn.primitive.name)
    for value in eqn.params.values():
      if hasattr(getattr(value, 'jaxpr', value), 'eqns'):
        _used(getattr(value, 'jaxpr', value), found)
  return found


# Of constants alone, and thus computed when the file is made.
_NOT_IN_FILES = {'iota', 'scatter'}


@pytest.mark.parametrize('backbone', _SIZES)
def test_every_primitive_of_our_models_has_a_rule(backbone):
  known = {*primitives.RULES, *primitives.CALLS, *_NOT_IN_FILES}
  images = jax.ShapeDtypeStruct((2, *[_SIZES[backbone]] * 2, 3), np.uint8)
  for kind in distilled.variants:
    function = _product(backbone, kind)
    jaxpr = jax.make_jaxpr(function)(images).jaxpr
    assert _used(jaxpr, set()) - known == set(), kind


def _check_product(backbone, kind, way=_in_onnx):
  size = _SIZES[backbone]
  function = _product(backbone, kind)
  images = np.random.default_rng(1).integers(
    0, 256, (3, size, size, 3), np.uint8
  )
  program = way(function, [images], (0,))
  found = program(images)[0]
  wanted = np.asarray(jax.jit(function)(images))
  assert np.mean(found.argmax(-1) == wanted.argmax(-1)) >= 0.9999
  # Where two ways are equally sure, either's background counts.
  assert np.abs(found - wanted)[..., 1:].max() < 1e-4
  assert np.mean(np.abs(found - wanted) < 1e-4) > 0.999
  alone = program(images[:1])[0]
  np.testing.assert_allclose(alone[..., 1:], found[:1, ..., 1:], atol=1e-5)


@both_ways
def test_a_student(way):
  _check_product('resnet_tiny', 'light', way)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('backbone', 'kind'), [x for x in _PRODUCTS if x != ('resnet_tiny', 'light')]
)
@both_ways
def test_students_and_teachers(way, backbone, kind):
  _check_product(backbone, kind, way)
