"""Tests of the shared layers: numbers by hand, gradients, several devices."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillfss_jax import layers, parallel, params
from distillfss_jax.ops import conv

_TESTS = pathlib.Path(__file__).resolve().parent


@pytest.mark.parametrize(
  ('initialise', 'deviation'),
  [
    (layers.uniform, 1 / np.sqrt(3 * 64)),
    (layers.xavier, np.sqrt(2 / (64 + 32))),
    (layers.he_fan_in, np.sqrt(2 / 64)),
    (layers.he_fan_out, np.sqrt(2 / 32)),
    (layers.normal, 0.02),
  ],
)
def test_initialisers_are_drawn_from_the_seed(initialise, deviation):
  a, b, c = (
    np.asarray(initialise(nnx.Rngs(seed), (64, 32), 64, 32))
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(a, b)
  assert (a != c).all()
  assert a.std() == pytest.approx(deviation, rel=0.1)
  assert abs(a.mean()) < deviation / 5


@pytest.mark.parametrize('groups', [1, 4, 8])
def test_fans_of_a_convolution_are_those_of_its_group(groups):
  layer = layers.Conv(
    8, 64, 3, groups=groups, kernel=layers.he_fan_in, rngs=nnx.Rngs(0)
  )
  fan_in = 9 * 8 // groups
  assert layer.kernel.shape == (3, 3, 8 // groups, 64)
  deviation = float(layer.kernel[...].std())
  assert deviation == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
  assert np.abs(layer.bias[...]).max() <= fan_in**-0.5


def test_groups_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match=r'3 groups do not divide 8 channels'):
    layers.Conv(8, 9, 3, groups=3, rngs=nnx.Rngs(0))


# size, stride, padding, dilation, groups, outputs; 6 inputs
_FORMS = (
  (3, 1, None, 1, 1, 4),
  (3, 1, None, 2, 1, 4),
  (3, 1, None, 2, 1, 8),
  (3, 2, 4, 4, 1, 4),
  (3, 2, 1, 1, 2, 4),
  (3, 2, 'SAME', 1, 6, 6),
  (5, 2, 'SAME', 1, 6, 12),
  (5, 1, 'SAME', 2, 3, 3),
  (4, 1, 0, 1, 1, 4),
  (1, 2, None, 1, 1, 4),
  (1, 1, None, 1, 2, 4),
  (2, 2, 0, 1, 1, 4),
)


@pytest.mark.parametrize('form', _FORMS, ids=str)
def test_convolution_and_gradients_are_those_of_lax(form):
  size, stride, padding, dilation, groups, outputs = form
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 11, 8, 6)), jnp.float32)
  shape = (size, size, 6 // groups, outputs)
  kernel = jnp.asarray(rng.normal(size=shape), jnp.float32)
  reach = dilation * (size - 1)
  pads = padding
  if padding != 'SAME':
    pads = ((reach // 2 if padding is None else padding,) * 2,) * 2

  def theirs(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      pads,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
      precision='highest',
    )

  def ours(x, kernel):
    return conv.conv2d(
      x,
      kernel,
      stride=stride,
      padding=padding,
      dilation=dilation,
      groups=groups,
    )

  expected, back = jax.vjp(theirs, x, kernel)
  found, our_back = jax.vjp(ours, x, kernel)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  dy = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
  for a, b in zip(our_back(dy), back(dy), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_layer_norm_by_hand():
  layer = layers.LayerNorm(2, epsilon=3.0)
  layer.scale[...], layer.bias[...] = jnp.array([2.0, 1]), jnp.array([0, 5.0])
  # Mean 2, variance 1: each is 1 away, over sqrt(1 + 3).
  np.testing.assert_allclose(layer(jnp.array([1.0, 3])), [-1, 5.5], atol=1e-6)


def _norm(**fields):
  norm = layers.BatchNorm(1, **fields)
  params.set_params(norm, {'scale': np.array([2.0]), 'bias': np.array([1.0])})
  return norm


def test_batch_norm_by_hand():
  norm = _norm(epsilon=1.0, momentum=0.5)
  # Mean 3, biased variance 8 / 4 = 2... of 1, 3, 3, 5; unbiased 8 / 3.
  x = jnp.array([1.0, 3, 3, 5]).reshape(2, 2, 1, 1)
  y = norm.train(x)
  root = 3**0.5
  np.testing.assert_allclose(
    y.ravel(), [1 - 4 / root, 1, 1, 1 + 4 / root], rtol=1e-6
  )
  np.testing.assert_allclose(norm.mean[...], 0.5 * 0 + 0.5 * 3)
  np.testing.assert_allclose(norm.var[...], 0.5 * 1 + 0.5 * 8 / 3, rtol=1e-6)
  # By running statistics, which that has moved.
  expected = 2 * (x - 1.5) / np.sqrt(0.5 + 4 / 3 + 1) + 1
  np.testing.assert_allclose(norm(x), expected, rtol=1e-6)


def test_padding_does_not_count():
  x = jnp.array([1.0, 3, 3, 5]).reshape(2, 2, 1, 1)
  padded = jnp.concatenate([x[:1], 100 * jnp.ones((1, 2, 1, 1)), x[1:]])
  norm, other = _norm(), _norm()
  y = norm.train(padded, jnp.array([True, False, True]))
  expected = other.train(x)
  np.testing.assert_allclose(y[::2], expected, rtol=1e-6)
  np.testing.assert_allclose(norm.var[...], other.var[...], rtol=1e-6)
  assert np.isfinite(y[1]).all()


def test_statistics_of_large_means_are_sound():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 8, 8, 1)).astype(np.float32) + 1000
  norm = _norm(momentum=1.0)
  norm.train(jnp.asarray(x))
  np.testing.assert_allclose(
    norm.var[...], x.astype(np.float64).var(ddof=1), rtol=1e-3
  )


def test_too_few_values():
  one = jnp.ones((1, 1, 1, 1))
  with pytest.raises(ValueError, match='one value per channel'):
    _norm().train(one)
  two = jnp.ones((2, 1, 1, 1))
  norm = _norm()
  assert np.isnan(norm.train(two, jnp.array([True, False]))).all()
  assert np.isfinite(norm.train(two, jnp.zeros(2, bool))).all()
  assert norm.mean[...] == 0
  assert norm.var[...] == 1


def test_half_precision_keeps_statistics_whole():
  norm = _norm()
  y = norm.train(jnp.ones((2, 2, 2, 1), jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  assert norm.mean[...].dtype == jnp.float32


def work(out):
  """A padded batch through a norm over all devices there are; the numbers."""
  over = parallel.mesh()
  devices = over.devices.size
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 3, 3, 5)).astype(np.float32) + 3
  valid = np.array([1, 1, 0, 1, 1, 1, 0, 0], bool)
  aim = rng.normal(size=x.shape).astype(np.float32)
  graph, state = nnx.split(layers.BatchNorm(5))

  def step(state, x, valid, aim):
    index = jax.lax.axis_index(parallel.AXIS)
    x, valid, aim = (
      jax.lax.dynamic_slice_in_dim(a, index * (8 // devices), 8 // devices)
      for a in (x, valid, aim)
    )

    def loss(arrays, x):
      norm = nnx.merge(graph, arrays)
      y = norm.train(x, valid, parallel.AXIS)
      off = jnp.where(valid[:, None, None, None], jnp.sin(y) * aim, 0)
      return off.sum(), (y, nnx.state(norm))

    (value, (y, moved)), (dp, dx) = jax.value_and_grad(
      loss, (0, 1), has_aux=True
    )(state, x)
    gathered = [
      jax.lax.all_gather(a, parallel.AXIS, tiled=True) for a in (y, dx)
    ]
    summed = jax.lax.psum((value, dp.scale, dp.bias), parallel.AXIS)
    return (*gathered, *summed, moved.mean, moved.var)

  found = parallel.mapped(step, over)(state, x, valid, aim)
  names = ('y', 'dx', 'loss', 'scale', 'bias', 'mean', 'var')
  arrays = (np.asarray(jax.tree.leaves(a)[0]) for a in found)
  np.savez(out, **dict(zip(names, arrays, strict=True)))


@functools.cache
def _numbers(folder, devices):
  out = folder / f'{devices}.npz'
  env = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} '
    '--xla_backend_optimization_level=0',  # compiles faster
    PYTHONPATH=os.pathsep.join([str(_TESTS), str(_TESTS.parent)]),
  )
  code = f'import test_layers; test_layers.work({str(out)!r})'
  subprocess.run([sys.executable, '-c', code], env=env, check=True)
  return np.load(out)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('devices')


@pytest.mark.parametrize('devices', [2, 4])
def test_devices_share_one_batch(folder, devices):
  one, many = _numbers(folder, 1), _numbers(folder, devices)
  for name in one:
    np.testing.assert_allclose(
      many[name], one[name], atol=2e-6, rtol=2e-6, err_msg=name
    )
  assert np.abs(one['dx']).max() > 0.01


@pytest.mark.parametrize('shape', [(), (5,), (3, 3, 7, 11), (2, 700)])
def test_numbers_are_those_of_their_key_and_shape(shape):
  """Whatever length of a row they are drawn with."""
  key = nnx.Rngs(3).params()
  for made, wanted in (
    (
      layers.uniform(nnx.Rngs(3), shape, 4),
      jax.random.uniform(key, shape, minval=-0.5, maxval=0.5),
    ),
    (
      layers.he_fan_in(nnx.Rngs(3), shape, 8),
      jax.random.normal(key, shape) / 2,
    ),
  ):
    np.testing.assert_allclose(made, wanted, rtol=1e-6)
