"""Tests of parameter paths, their selection, strict merge and torch names."""

import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from distillfss_jax import params

_WORD = st.text(string.ascii_lowercase + string.digits + '_', min_size=1)
_PATH = st.lists(_WORD, min_size=1, max_size=4).map('/'.join)
_SHAPE = st.tuples(*[st.integers(1, 3)] * 2)
_SHAPES = st.dictionaries(_PATH, _SHAPE, min_size=1, max_size=8)


class _Layer(nnx.Module):
  def __init__(self):
    self.kernel = nnx.Param(jnp.ones((2, 3)))
    self.mean = nnx.BatchStat(jnp.zeros(3))


class _Net(nnx.Module):
  def __init__(self):
    self.head = _Layer()
    self.layers = nnx.List([_Layer(), _Layer()])


def _arrays(shapes, start=0.0):
  return {
    path: np.full(shape, start + i, np.float32)
    for i, (path, shape) in enumerate(shapes.items())
  }


def test_flatten_names_a_module_its_state_and_dicts_alike():
  net = _Net()
  flat = params.flatten(net)
  assert set(flat) == {
    f'{layer}/{leaf}'
    for layer in ('head', 'layers/0', 'layers/1')
    for leaf in ('kernel', 'mean')
  }
  assert params.flatten(nnx.state(net)).keys() == flat.keys()
  assert params.flatten(nnx.to_pure_dict(nnx.state(net))).keys() == flat.keys()
  assert set(params.flatten({'a': [1, {'b': 2}]})) == {'a/0', 'a/1/b'}


def test_count_and_shapes_of_an_abstract_module():
  net = nnx.eval_shape(_Net)
  assert params.count(net) == 3 * (6 + 3)
  assert params.shapes(net)['head/kernel'] == (2, 3)
  assert params.count(nnx.state(net, nnx.Param)) == 18


def test_set_params_writes_what_is_given_and_nothing_else():
  net = _Net()
  params.set_params(net, {'layers/1/mean': np.arange(3)})
  assert net.layers[1].mean[...].tolist() == [0, 1, 2]
  assert net.layers[1].mean[...].dtype == jnp.float32
  assert isinstance(net.layers[1].mean, nnx.BatchStat)
  assert net.layers[0].mean[...].tolist() == [0, 0, 0]


def test_set_params_fills_an_abstract_module():
  net = nnx.eval_shape(_Net)
  params.set_params(net, params.flatten(_Net()))
  assert sum(float(leaf.sum()) for leaf in params.flatten(net).values()) == 18


def test_replace_leaves_the_state_it_was_given():
  state = nnx.state(_Net())
  new = params.replace(state, {'head/mean': np.ones(3)})
  assert float(params.flatten(state)['head/mean'].sum()) == 0
  assert float(params.flatten(new)['head/mean'].sum()) == 3
  assert jax.tree.structure(new) == jax.tree.structure(state)


def test_set_params_names_what_does_not_exist_and_what_is_near():
  with pytest.raises(ValueError, match=r'left over: head/kernels.*head/kernel'):
    params.set_params(_Net(), {'head/kernels': np.ones((2, 3))})
  with pytest.raises(ValueError, match=r'head/mean is \(2,\), must be \(3,\)'):
    params.set_params(_Net(), {'head/mean': np.ones(2)})


@given(st.lists(_PATH, min_size=1, unique=True), st.data())
def test_a_path_selects_itself_alone(paths, data):
  chosen = data.draw(st.lists(st.sampled_from(paths), unique=True))
  assert params.matching([re.escape(p) for p in chosen], paths) == set(chosen)


@given(st.lists(_PATH, min_size=1, unique=True))
def test_a_pattern_must_match_a_whole_path(paths):
  assert params.matching(('.*',), paths) == set(paths)
  assert params.matching((), paths) == set()
  with pytest.raises(ValueError, match='matches none of'):
    params.matching([re.escape(max(paths, key=len)) + '/x'], paths)


def test_select_lists_what_is_near():
  paths = ['backbone/conv1/kernel', 'decoder/conv1/kernel', 'decoder/bias']
  with pytest.raises(ValueError, match='nearest: decoder/conv1/kernel'):
    params.matching([r'decoder/conv\d/kernels'], paths)
  with pytest.raises(ValueError, match='there are none'):
    params.matching(['x'], [])


def test_select_refuses_a_bare_string_and_a_broken_pattern():
  with pytest.raises(TypeError, match='give a list or tuple'):
    params.matching('decoder/.*', ['decoder/bias'])
  with pytest.raises(ValueError, match='not a regular expression'):
    params.matching(['decoder/('], ['decoder/bias'])


@given(_SHAPES, st.data())
def test_merge_takes_all_but_what_is_kept(shapes, data):
  current, loaded = _arrays(shapes), _arrays(shapes, 100.0)
  kept = data.draw(st.sets(st.sampled_from(sorted(shapes))))
  for path in data.draw(st.sets(st.sampled_from(sorted(kept)))) if kept else ():
    del loaded[path]
  merged = params.merge(current, loaded, keep=[re.escape(p) for p in kept])
  assert list(merged) == list(current)
  for path, array in merged.items():
    source = current if path in kept else loaded
    np.testing.assert_array_equal(array, source[path])


@given(_SHAPES, st.data())
def test_merge_names_every_difference(shapes, data):
  current, loaded = _arrays(shapes), _arrays(shapes)
  path = data.draw(st.sampled_from(sorted(shapes)))
  fault = data.draw(st.sampled_from(['missing', 'left over', 'mis-shaped']))
  if fault == 'missing':
    del loaded[path]
  elif fault == 'left over':
    del current[path]
  else:
    loaded[path] = np.zeros((9, 9), np.float32)
  with pytest.raises(ValueError, match=f'{fault}: {re.escape(path)} '):
    params.merge(current, loaded)


def test_merge_sorts_its_difference_and_keeps_it_readable():
  wanted = {f'layer/{i:02d}/kernel': np.zeros(1) for i in range(30)}
  with pytest.raises(ValueError, match='10 more') as raised:
    params.merge(wanted, {'layer/05/kernal': np.zeros(1)})
  lines = str(raised.value).splitlines()[1:21]
  assert lines == sorted(lines)
  assert 'missing: layer/05/kernel (1,); nearest: layer/05/kernal' in str(
    raised.value
  )


def test_merge_keeps_the_dtype_of_the_model():
  merged = params.merge(
    {'a': jax.ShapeDtypeStruct((2,), jnp.float32)}, {'a': np.arange(2)}
  )
  assert merged['a'].dtype == np.float32


_RULES = (
  (r'conv\.weight', 'conv/kernel', 'conv'),
  (r'fc(\d)\.weight', r'layers/\1/kernel', 'linear'),
  (r'fc(\d)\.bias', r'layers/\1/bias', 'copy'),
  (r'student\.(\d+)\.weight', r'students/kernel@\1', 'linear'),
  (r'.*\.num_batches_tracked', '', 'drop'),
)


@given(
  st.integers(1, 12), st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)
)
def test_from_torch_transposes_stacks_and_drops(ways, layers, rows, columns):
  rng = np.random.default_rng(0)
  tensors = {
    'conv.weight': rng.normal(size=(rows, columns, 3, 2)),
    'bn.num_batches_tracked': np.array(7),
  }
  shapes = {
    'conv/kernel': (3, 2, columns, rows),
    'students/kernel': (ways, columns, rows),
  }
  for i in range(layers):
    tensors[f'fc{i}.weight'] = rng.normal(size=(rows, columns))
    tensors[f'fc{i}.bias'] = rng.normal(size=rows)
    shapes[f'layers/{i}/kernel'] = (columns, rows)
    shapes[f'layers/{i}/bias'] = (rows,)
  for i in range(ways):
    tensors[f'student.{i}.weight'] = np.full((rows, columns), i)
  ours = params.from_torch(tensors, _RULES, shapes)
  assert {path: array.shape for path, array in ours.items()} == shapes
  assert ours['students/kernel'][:, 0, 0].tolist() == list(range(ways))
  assert ours['conv/kernel'][2, 1, 0, 0] == tensors['conv.weight'][0, 0, 2, 1]
  for i in range(layers):
    np.testing.assert_array_equal(
      ours[f'layers/{i}/kernel'], tensors[f'fc{i}.weight'].T
    )


@pytest.mark.parametrize(
  ('tensors', 'message'),
  [
    ({'fc0.weights': (2, 3)}, r'tensor fc0\.weights \(2, 3\)'),
    ({'fc0.bias': (2,)}, r'missing: layers/0/kernel \(3, 2\)'),
    ({'fc0.weight': (3, 2)}, r'mis-shaped: layers/0/kernel is \(2, 3\)'),
    ({'fc1.weight': (2, 3)}, r'left over: layers/1/kernel .*layers/0/kernel'),
    ({'fc0.weight': (3,)}, r'fc0\.weight: layout .linear. needs 2 axes'),
    ({'student.1.weight': (2, 3)}, r'students/kernel: indices \[1\]'),
    (
      {'student.0.weight': (2, 3), 'student.1.weight': (3, 3)},
      'students/kernel: its parts differ in shape',
    ),
  ],
)
def test_from_torch_names_what_does_not_fit(tensors, message):
  arrays = {name: np.zeros(shape) for name, shape in tensors.items()}
  with pytest.raises(ValueError, match=message):
    params.from_torch(arrays, _RULES, {'layers/0/kernel': (3, 2)})


def test_from_torch_refuses_an_ambiguous_table():
  tensors = {'a.weight': np.zeros(2), 'b.weight': np.zeros(2)}
  shapes = {'scale': (2,)}
  with pytest.raises(ValueError, match=r'filled by a\.weight and by b\.weight'):
    params.from_torch(tensors, ((r'.\.weight', 'scale', 'copy'),), shapes)
  twice = ((r'a\..*', 'scale', 'copy'), (r'.*', '', 'drop'))
  with pytest.raises(ValueError, match=r'a\.weight: claimed by'):
    params.from_torch(tensors, twice, shapes)
  with pytest.raises(ValueError, match="layout 'transpose' is unknown"):
    params.from_torch(tensors, ((r'.*', 'scale', 'transpose'),), shapes)
