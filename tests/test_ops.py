"""Tests of the operations: goldens of the originals and naive equivalents."""

import functools
import itertools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from hypothesis import strategies as st

from distillfss_jax.models import dcama
from distillfss_jax.ops import (
  attention,
  conv,
  losses,
  metrics,
  platform,
  random,
  resize,
  ways,
)
from distillfss_jax.types import VOID

_few = hypothesis.settings(max_examples=40)


def _golden(shared, name):
  return np.load(shared(f'goldens/dcama/{name}.npz'))


def _channels_last(x):
  return np.moveaxis(x, 1, -1)


# --- resize -----------------------------------------------------------------


@pytest.mark.parametrize('corners', [True, False])
@pytest.mark.parametrize('size', [(14, 18), (12, 12), (4, 5), (7, 9), (1, 1)])
def test_bilinear_is_the_golden_one(shared, size, corners):
  golden = _golden(shared, 'ops')
  x = _channels_last(golden['interp.in'])
  ours = resize.bilinear(jnp.asarray(x), size, align_corners=corners)
  name = f'interp.{size[0]}x{size[1]}.align{int(corners)}'
  parity.assert_close(golden, name, parity.channels_first(ours), 2e-6)


@pytest.mark.parametrize('corners', [True, False])
@pytest.mark.parametrize(('n', 'size'), [(1, 5), (7, 7), (13, 29), (29, 13)])
def test_resizing_weights_are_shares(n, size, corners):
  weights = resize.matrix(n, size, align_corners=corners)
  assert weights.shape == (size, n)
  assert (weights >= 0).all()
  np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
  if n == size:
    np.testing.assert_array_equal(weights, np.eye(n))


def test_corners_stay_where_they_are_aligned():
  x = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)
  y = np.asarray(resize.bilinear(x, (11, 16)))
  for i, j in itertools.product((0, -1), (0, -1)):
    np.testing.assert_allclose(y[:, i, j], x[:, i, j], atol=1e-6)


def test_bilinear_takes_any_leading_axes():
  x = np.random.default_rng(0).normal(size=(2, 3, 5, 7, 4)).astype(np.float32)
  y = np.asarray(resize.bilinear(x, (9, 8)))
  flat = np.asarray(resize.bilinear(x.reshape(6, 5, 7, 4), (9, 8)))
  np.testing.assert_allclose(y.reshape(6, 9, 8, 4), flat, atol=1e-6)


def test_sizes_that_only_the_data_says():
  sizes = [(40, 31), (17, 48), (9, 11), (1, 1), (40, 48), (5, 7)]
  rng = np.random.default_rng(0)
  x = rng.normal(size=(len(sizes), 9, 11, 3)).astype(np.float32)

  @jax.jit
  @jax.vmap
  def stretch(x, size):
    x = resize.lerp(x, resize.taps(9, size[0], 40), 0)
    return resize.lerp(x, resize.taps(11, size[1], 48), 1)

  canvas = stretch(x, jnp.array(sizes, jnp.int32))
  assert canvas.shape == (len(sizes), 40, 48, 3)
  assert np.isfinite(canvas).all()
  for image, whole, (h, w) in zip(x, np.asarray(canvas), sizes, strict=True):
    alone = resize.bilinear(jnp.asarray(image), (h, w), align_corners=False)
    np.testing.assert_allclose(whole[:h, :w], alone, atol=2e-5)


@pytest.mark.parametrize('channels', [64, 512, 1024, 2048])
def test_positions_are_the_golden_ones(shared, channels):
  golden = _golden(shared, 'ops')
  table = dcama.positions(10000, channels)
  assert table.dtype == np.float32
  for row in (0, 1, 100, 2303, 9999):
    # An angle is float32, and so is known to a few last places of itself.
    tolerance = 1e-6 + row * 2.0**-22
    parity.assert_close(golden, f'pe{channels}.row{row}', table[row], tolerance)


def test_positions_by_hand():
  # The numbers of the second set of goldens (Appendix A).
  np.testing.assert_allclose(
    dcama.positions(2, 256)[1, :6],
    [0.8415, 0.5403, 0.8020, 0.5974, 0.7617, 0.6479],
    atol=5e-5,
  )


# --- convolutions -----------------------------------------------------------


def test_conv2d_by_hand():
  x = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
  kernel = np.zeros((3, 3, 1, 1), np.float32)
  kernel[0, 2] = 1  # reads the neighbour above and to the right
  expected = np.zeros((3, 4), np.float32)
  expected[1:, :3] = x[0, :2, 1:, 0]
  np.testing.assert_array_equal(conv.conv2d(x, kernel)[0, ..., 0], expected)
  halved = conv.conv2d(x, kernel, stride=2)[0, ..., 0]
  np.testing.assert_array_equal(halved, expected[::2, ::2])


def test_a_small_kernel_is_a_matrix_product():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 5, 4, 6)).astype(np.float32)
  kernel = rng.normal(size=(1, 1, 6, 2)).astype(np.float32)
  expected = np.einsum('...c,cd->...d', x, kernel[0, 0])
  np.testing.assert_allclose(conv.conv2d(x, kernel), expected, atol=1e-5)
  padded = conv.conv2d(x, kernel, padding=1)
  assert padded.shape == (2, 3, 7, 6, 2)
  np.testing.assert_allclose(padded[:, :, 1:-1, 1:-1], expected, atol=1e-5)


@pytest.mark.parametrize(
  'sizes',
  [[(10, 14)], [(10, 14), (24, 24)], [(10, 14), (6, 9)], [(5, 7)]],
  ids=['one', 'two', 'down', 'none'],
)
def test_a_convolution_commutes_with_upsampling(sizes):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 7, 6)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 6, 4)).astype(np.float32)
  pull = rng.normal(size=(2, *sizes[-1], 4)).astype(np.float32)

  def plain(x, kernel):
    for size in sizes:
      x = resize.bilinear(x, size)
    return conv.conv2d(x, kernel)

  def commuted(x, kernel):
    return conv.conv_of_upsampled(x, kernel, sizes)

  for f in (lambda f: f, lambda f: jax.grad(_scalar(f, pull), (0, 1))):
    for a, b in zip(
      jax.tree.leaves(jax.jit(f(commuted))(x, kernel)),
      jax.tree.leaves(jax.jit(f(plain))(x, kernel)),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, atol=1e-5 * max(1, abs(b).max()))


@pytest.mark.parametrize(
  ('shape', 'outputs', 'fewer'),
  [
    ((2, 16, 16, 128), 128, True),
    ((3, 15, 13, 130), 140, True),  # a half tile at the borders
    ((3, 15, 13, 127), 140, False),  # few channels,
    ((3, 15, 13, 130), 127, False),
    ((1, 15, 13, 130), 140, False),  # or places: the plain form is faster
  ],
  ids=str,
)
def test_winograds_products_are_the_convolution(shape, outputs, fewer):
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape).astype(np.float32)
  kernel = rng.normal(size=(3, 3, shape[-1], outputs)).astype(np.float32) / 34
  pull = rng.normal(size=(*shape[:-1], outputs)).astype(np.float32)
  plain = functools.partial(conv._conv, form=(1, ((1, 1), (1, 1)), 1, 1))
  for f in (lambda f: f, lambda f: jax.grad(_scalar(f, pull), (0, 1))):
    for a, b in zip(
      jax.tree.leaves(jax.jit(f(conv.conv2d))(x, kernel)),
      jax.tree.leaves(jax.jit(f(plain))(x, kernel)),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, atol=1e-5 * abs(b).max())
  program = str(jax.make_jaxpr(conv.conv2d)(x, kernel))
  assert ('conv_general_dilated' not in program) == fewer
  # An accelerator's library chooses for itself, and half precision is too
  # coarse for sums of taps.
  half = (array.astype('bfloat16') for array in (x, kernel))
  half = str(jax.make_jaxpr(conv.conv2d)(*half))
  with platform.made_for('cuda'):
    elsewhere = str(jax.make_jaxpr(lambda *args: conv.conv2d(*args))(x, kernel))
  for program in (half, elsewhere):
    assert 'conv_general_dilated' in program


def _scalar(f, pull):
  return lambda *args: (f(*args) * pull).sum()


# --- attention --------------------------------------------------------------


def _naive(q, k, values, present, seed, rate):
  """`attention.attend`, with the whole [q, k] matrix of every selection."""
  b, l, a, tokens, d = q.shape
  s, t = k.shape[3:5]
  k = k.reshape(b, l, a, s * t, d)
  values = values.reshape(b, s * t, -1)
  scores = jnp.einsum('blaqd,blakd->blaqk', q, k)
  factors = jnp.ones(scores.shape)
  if rate:
    place = jnp.arange(tokens * s * t, dtype=jnp.uint32).reshape(tokens, -1)
    head = jnp.arange(l * a).reshape(l, a)
    seeds = random.fold(seed[:, None, None], head)[..., None, None]
    factors = random.keep(seeds, place, rate)
  shares = []
  for j in range(values.shape[-1]):
    here = jnp.repeat(present[:, :, j], t, 1)[:, None, None, None]
    some = here.any(-1, keepdims=True)
    p = jax.nn.softmax(jnp.where(here | ~some, scores, -jnp.inf), -1)
    p = jnp.where(here, p, 0) * factors
    shares.append(jnp.einsum('blaqk,bk->blaq', p, values[..., j]).mean(2))
  return jnp.stack(shares, -1)


_attend = jax.jit(attention.attend, static_argnums=5)
_attend_memory = jax.jit(attention.attend_memory)


def _attention_case(t, s=3, j=4, b=2, l=2, a=3, tokens=10, d=4, seed=0):
  """Random operands; selections of all, some, other and no shots."""
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(b, l, a, tokens, d)).astype(np.float32)
  k = rng.normal(size=(b, l, a, s, t, d)).astype(np.float32)
  values = rng.uniform(size=(b, s, t, j)).astype(np.float32)
  present = rng.uniform(size=(b, s, j)) < 0.6
  present[:, :, 0] = True
  present[:, 0, 1] = True  # so that both a part and ...
  present[:, 1, 1] = False
  present[:, :, -1] = False  # ... nothing are there
  seeds = jnp.array(rng.integers(0, 2**32, b, np.uint32))
  return tuple(map(jnp.asarray, (q, k, values, present))) + (seeds,)


def _assert_attends(case, rate, tolerance=2e-5):
  """Values and gradients are the naive ones."""
  q, k, values, present, seeds = case
  shape = (*q.shape[:2], q.shape[3], values.shape[-1])
  pull = np.random.default_rng(1).normal(size=shape).astype(np.float32)

  def run(f):
    def scalar(q, k):
      out = f(q, k, values, present, seeds, rate)
      return (out * pull).sum(), out

    both = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
    (_, out), grads = both(q, k)
    return out, *grads

  for name, ours, theirs in zip(
    ('shares', 'dq', 'dk'), run(attention.attend), run(_naive), strict=True
  ):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    scale = max(1, float(abs(theirs).max()))
    np.testing.assert_allclose(
      ours, theirs, atol=tolerance * scale, err_msg=name
    )


@pytest.mark.parametrize(
  ('t', 'rate'),
  [(33, 0.0), (33, 0.5), (300, 0.5), (257, 0.0), (512, 0.0), (512, 0.5)],
)  # less than a block, some blocks, a prime, and whole ones
def test_attention_is_a_softmax(t, rate):
  _assert_attends(_attention_case(t), rate)


@pytest.mark.parametrize(('rows', 'rate'), [(4, 0.0), (5, 0.1), (100, 0.0)])
def test_attention_does_not_depend_on_its_tiles(monkeypatch, rows, rate):
  # 12 heads in all: 4 divides them, 5 does not, 100 is all at once; the
  # accelerator's tiles, which a CPU never picks, are of this kind.
  monkeypatch.setattr(attention, '_tiles', lambda tokens: (rows, tokens // 3))
  _assert_attends(_attention_case(12), rate)


def test_tiles_divide_the_tokens():
  for tokens in (1, 9, 33, 144, 257, 300, 576, 2304, 9216):
    rows, block = attention._tiles(tokens)
    assert rows >= 1
    assert tokens % block == 0


def test_selections_do_not_see_each_other():
  q, k, values, present, seeds = _attention_case(20)
  together = _attend(q, k, values, present, seeds, 0.5)
  for j in range(values.shape[-1]):
    alone = _attend(
      q, k, values[..., j : j + 1], present[..., j : j + 1], seeds, 0.5
    )
    np.testing.assert_allclose(together[..., j : j + 1], alone, atol=1e-6)


def test_a_way_without_a_shot_gets_nothing_and_gives_nothing():
  q, k, values, present, seeds = _attention_case(20)
  nobody = jnp.zeros_like(present)

  def total(q, k):
    return _attend(q, k, values, nobody, seeds, 0.0)

  np.testing.assert_array_equal(total(q, k), 0)
  for grad in jax.jit(jax.grad(lambda *x: total(*x).sum(), (0, 1)))(q, k):
    np.testing.assert_array_equal(grad, 0)


def test_an_absent_shot_has_no_influence_on_attention():
  q, k, values, present, seeds = _attention_case(20)
  present = present.at[:, 2].set(False)
  # Scores that would swamp a softmax, or make it a NaN if merely weighted 0.
  loud = k.at[:, :, :, 2].set(1e3), values.at[:, 2].set(7)
  for rate in (0.0, 0.5):

    @jax.jit
    def run(k, values, rate=rate):
      def total(q, k):
        out = attention.attend(q, k, values, present, seeds, rate)
        return out.sum(), out

      (_, out), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(q, k)
      return out, *grads

    for a, b in zip(run(k, values), run(*loud), strict=True):
      assert np.isfinite(b).all()
      np.testing.assert_array_equal(a, b)


def test_attention_survives_large_scores():
  q, k, values, present, seeds = _attention_case(20)
  _assert_attends((60 * q, 60 * k, values, present, seeds), 0.0, 2e-4)


def test_one_sharp_token_takes_all():
  q = jnp.zeros((1, 1, 1, 1, 2)).at[..., 0].set(50.0)
  k = jnp.zeros((1, 1, 1, 2, 3, 2)).at[0, 0, 0, 1, 2, 0].set(1.0)
  values = jnp.zeros((1, 2, 3, 1)).at[0, 1, 2, 0].set(0.25)
  present = jnp.ones((1, 2, 1), bool)
  seeds = jnp.zeros(1, jnp.uint32)
  out = _attend(q, k, values, present, seeds, 0.0)
  np.testing.assert_allclose(out, 0.25, rtol=1e-6)
  # Equal scores: the mean of the values of the shots that are there.
  out = _attend(0 * q, k, values, present, seeds, 0.0)
  np.testing.assert_allclose(out, 0.25 / 6, rtol=1e-6)
  only = present.at[0, 0].set(False)
  out = _attend(0 * q, k, values, only, seeds, 0.0)
  np.testing.assert_allclose(out, 0.25 / 3, rtol=1e-6)


def test_attention_dropout_goes_by_episode():
  case = _attention_case(20)
  q, k, values, present, _ = case
  one = jnp.array([3, 5], jnp.uint32)
  other = jnp.array([3, 6], jnp.uint32)
  a, again, b = (
    np.asarray(_attend(q, k, values, present, seeds, 0.5))
    for seeds in (one, one, other)
  )
  np.testing.assert_array_equal(a, again)
  np.testing.assert_array_equal(a[0], b[0])
  assert (a[1, ..., 0] != b[1, ..., 0]).mean() > 0.9


def test_attention_dropout_keeps_the_mean():
  case = [np.repeat(x[:1], 64, 0) for x in _attention_case(20)[:4]]
  seeds = random.seed_of(jax.random.split(jax.random.key(0), 64))
  drawn = np.asarray(_attend(*case, seeds, 0.5))[..., :-1]
  still = np.asarray(_attend(*[x[:1] for x in case], seeds[:1], 0.0))[..., :-1]
  # In units of the error that a mean of 64 has, where it is not all zeros.
  error = drawn.std(0) / 8
  off = ((drawn.mean(0) - still[0]) / np.maximum(error, 1e-9))[error > 0]
  assert len(off) > 20
  assert np.abs(off).max() < 6
  assert abs(off.mean()) < 0.5


def test_a_batch_of_queries_shares_one_memory():
  q, k, values, present, _ = _attention_case(20)
  q = jnp.concatenate([q, 2 * q])
  memory = k[:1], values[:1], present[:1]
  together = _attend_memory(q, *memory)
  assert together.shape == (4, 2, 10, 4)
  for i in range(4):
    alone = _attend_memory(q[i : i + 1], *memory)
    np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-6)
  own = _attend_memory(q[:2], k, values, present)
  alone = _attend_memory(q[1:2], k[1:], values[1:], present[1:])
  np.testing.assert_allclose(own[1:], alone, atol=1e-6)


def test_attention_is_the_golden_one(shared):
  golden = _golden(shared, 'ops')
  weights = parity.torch_weights(
    shared, 'tinyswin', 'teacher.model.DCAMA_blocks.0.linears.'
  )

  def heads(x, i):
    y = x @ weights[f'{i}.weight'].T + weights[f'{i}.bias']
    return y.reshape(2, -1, 8, 8).swapaxes(1, 2)

  q = heads(golden['mha.q'], 0)[:, None] / np.sqrt(np.float32(8))
  k = heads(golden['mha.k'], 1)[:, None]
  scores = np.einsum('blaqd,blakd->blaqk', q, k)
  parity.assert_close(golden, 'mha.scores', scores[:, 0], 1e-5)
  # Three shots of 11 tokens are one softmax of 33, as one shot of 33 is.
  for s in (1, 3):
    out = _attend(
      jnp.asarray(q),
      jnp.asarray(k.reshape(2, 1, 8, s, 33 // s, 8)),
      jnp.asarray(golden['mha.v'].reshape(2, s, 33 // s, 1)),
      jnp.ones((2, s, 1), bool),
      jnp.zeros(2, jnp.uint32),
      0.0,
    )
    parity.assert_close(golden, 'mha.out', out[:, 0], 1e-6)


# --- random -----------------------------------------------------------------


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_keeps_the_mean(rate):
  n = 1 << 20
  factors = np.asarray(
    random.keep(jnp.uint32(7), jnp.arange(n, dtype=jnp.uint32), rate)
  ).astype(np.float64)
  values = np.unique(factors)
  np.testing.assert_allclose(values, [0, 1 / (1 - rate)], rtol=1e-6)
  variance = rate / (1 - rate)
  assert abs(factors.mean() - 1) < 5 * np.sqrt(variance / n)
  np.testing.assert_allclose(factors.var(), variance, rtol=0.02)


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_is_independent_between_rows_columns_and_seeds(rate):
  rows, columns = 1 << 9, 1 << 10
  n = rows * columns
  counter = jnp.arange(n, dtype=jnp.uint32).reshape(rows, columns)
  seeds = [0, 1, 2, 1 << 31, int(random.fold(jnp.uint32(0), 0))]
  seeds += [int(random.fold(jnp.uint32(0), 1))]
  draws = [
    (np.asarray(random.keep(jnp.uint32(s), counter, rate)) - 1)
    / np.sqrt(rate / (1 - rate))
    for s in seeds
  ]
  bound = 5 / np.sqrt(n)
  for a, b in itertools.combinations(draws, 2):
    assert abs((a * b).mean()) < 1.5 * bound
  for x in draws:
    for step in (1, 2, 3, 64, 256):
      assert abs((x[step:] * x[:-step]).mean()) < 1.5 * bound
      assert abs((x[:, step:] * x[:, :-step]).mean()) < 1.5 * bound
    # Sums of a row (a column) vary as sums of independent draws do.
    for axis, long in ((1, columns), (0, rows)):
      spread = (x.sum(axis) / np.sqrt(long)).var()
      others = n // long
      assert abs(spread - 1) < 5 * np.sqrt(2 / others)


def test_dropout_is_a_function_of_its_seed():
  x = jnp.ones((2, 30, 40))
  draw = jax.jit(random.dropout, static_argnums=2)
  a = draw(x, jnp.array([1, 2], jnp.uint32), 0.5)
  np.testing.assert_array_equal(
    a, random.dropout(x, jnp.array([1, 2], jnp.uint32), 0.5)
  )
  b = draw(x, jnp.array([1, 3], jnp.uint32), 0.5)
  np.testing.assert_array_equal(a[0], b[0])
  assert 0.4 < (a[1] != b[1]).mean() < 0.6
  assert 0.4 < (a[0] != a[1]).mean() < 0.6
  assert random.dropout(x, jnp.array([1, 2], jnp.uint32), 0.0) is x


def test_seeds_come_from_keys_and_differ():
  keys = jax.random.split(jax.random.key(0), 500)
  seeds = np.asarray(random.seed_of(keys))
  assert seeds.shape == (500,)
  assert seeds.dtype == np.uint32
  assert len(np.unique(seeds)) == 500
  assert random.seed_of(keys[3]) == seeds[3]
  folded = np.stack([random.fold(jnp.asarray(seeds), i) for i in range(9)])
  assert len(np.unique(folded)) == folded.size
  # Small seeds and small uses must not meet either.
  small = [
    int(random.fold(jnp.uint32(s), i)) for s in range(30) for i in range(30)
  ]
  assert len(set(small)) == 900


def test_mixing_moves_every_bit():
  x = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
  mixed = np.asarray(random.mix(jnp.asarray(x)))
  for bit in range(32):
    moved = mixed ^ np.asarray(random.mix(jnp.asarray(x ^ np.uint32(1 << bit))))
    flips = np.unpackbits(moved.view(np.uint8)).mean()
    assert abs(flips - 0.5) < 0.02
  assert len(np.unique(mixed)) == len(np.unique(x))


# --- ways -------------------------------------------------------------------


def test_shots_are_dealt_to_votes_in_order():
  # 5 shots; way 0 has all of them, way 1 has shots 1 and 3, way 2 none.
  present = np.zeros((1, 5, 3), bool)
  present[0, :, 0] = True
  present[0, [1, 3], 1] = True
  present = jnp.asarray(present)
  for voting in (None, 5, 9):
    np.testing.assert_array_equal(
      ways.selections(present, voting), present[..., None]
    )
  dealt = np.asarray(ways.selections(present, 2))
  assert dealt.shape == (1, 5, 3, 3)
  chunks = [
    [np.flatnonzero(dealt[0, :, n, v]).tolist() for v in range(3)]
    for n in range(3)
  ]
  assert chunks == [
    [[0, 1], [2, 3], [4]],
    [[1, 3], [], []],
    [[], [], []],
  ]


@_few
@hypothesis.given(
  st.lists(st.booleans(), min_size=7, max_size=7),
  st.sampled_from([1, 2, 3, 7, 9]),
)
def test_every_shot_votes_once(flags, voting):
  present = jnp.array(flags)[None, :, None]
  dealt = np.asarray(ways.selections(present, voting))[0, :, 0]
  np.testing.assert_array_equal(dealt.sum(1), flags)
  sizes = dealt.sum(0)
  full, rest = divmod(sum(flags), voting)
  expected = [voting] * full + ([rest] if rest else [])
  assert sizes[sizes > 0].tolist() == expected


def _pixels(*pairs):
  """Logits of answers to one image of one row: [1, ..., 1, W, 2]."""
  return jnp.array(pairs, jnp.float32)[None, ..., None, :, :]


def test_the_surest_vote_gives_both_logits():
  # One way, three votes, three pixels of (background, foreground).
  votes = _pixels(
    [
      [[9, 1], [0, 5], [3, -7]],
      [[4, 2], [8, 4], [2, -6]],
      [[1, 99], [1, 99], [1, 99]],
    ]
  )
  some = jnp.array([[[True, True, False]]])
  chosen = ways.vote(votes, some)
  assert chosen.shape == (1, 1, 1, 3, 2)
  np.testing.assert_array_equal(chosen[0, 0, 0], [[4, 2], [0, 5], [2, -6]])
  alone = ways.vote(votes[:, :, :1], some[..., :1])
  np.testing.assert_array_equal(alone, votes[:, :, 0])


def test_each_pixel_takes_the_background_of_its_best_way():
  # Three ways, four pixels of (background, foreground).
  logits = _pixels(
    [[1, 2], [5, 4], [0, -3], [7, 0]],
    [[3, 1], [2, 6], [1, -2], [8, 1]],
    [[9, 9], [9, 9], [9, 9], [9, 9]],
  )
  some = jnp.array([[True, True, False]])
  merged = np.asarray(ways.merge(logits, some))
  assert merged.shape == (1, 1, 4, 4)
  no = ways.ABSENT
  np.testing.assert_array_equal(
    merged[0, 0],
    np.array(
      [[1, 2, 1, no], [2, 4, 6, no], [1, -3, -2, no], [8, 0, 1, no]], np.float32
    ),
  )
  assert merged.argmax(-1).tolist() == [[[1, 2, 0, 0]]]


def test_without_any_shot_all_is_background():
  logits = jnp.ones((2, 3, 2, 5, 4, 2)) * 4
  some = jnp.zeros((2, 3, 2), bool)
  merged = ways.merge(ways.vote(logits, some), some.any(-1))
  assert np.isfinite(merged).all()
  assert (np.asarray(merged).argmax(-1) == 0).all()


@_few
@hypothesis.given(
  st.integers(0, 2**32 - 1), st.lists(st.booleans(), min_size=3, max_size=3)
)
def test_merging_is_the_rule_pixel_by_pixel(seed, flags):
  n, some = len(flags), np.array(flags)
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(1, n, 3, 2, 2)).astype(np.float32)
  merged = np.asarray(ways.merge(jnp.asarray(logits), some[None]))
  assert np.isfinite(merged).all()
  for y, x in itertools.product(range(3), range(2)):
    here = [i for i in range(n) if some[i]]
    best = max(here, key=lambda i: logits[0, i, y, x, 1], default=None)
    wins = best is not None and (
      logits[0, best, y, x, 1] > logits[0, best, y, x, 0]
    )
    assert merged[0, y, x].argmax() == (best + 1 if wins else 0)


def test_an_absent_way_gives_finite_gradients():
  logits = jnp.ones((1, 3, 2, 4, 4, 2))
  some = jnp.array([[[True, False], [False, False], [True, True]]])

  def loss(logits):
    merged = ways.merge(ways.vote(logits, some), some.any(-1))
    return losses.focal(merged, jnp.ones((1, 4, 4), jnp.int32)).sum()

  grads = jax.jit(jax.grad(loss))(logits)
  assert np.isfinite(grads).all()
  np.testing.assert_array_equal(grads[:, 1], 0)
  np.testing.assert_array_equal(grads[:, 0, 1], 0)


# --- losses -----------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def _mean_focal(logits, labels, gamma=2.0):
  """Over a batch, as the golden has it."""
  return losses.focal(logits, labels, gamma).mean()


_focal = jax.jit(losses.focal)
_focal_and_grad = jax.jit(jax.value_and_grad(_mean_focal))


@pytest.mark.parametrize('void', [False, True])
@pytest.mark.parametrize('case', ['c2', 'c4'])
def test_focal_is_the_golden_one(shared, case, void):
  golden = _golden(shared, 'losses')
  name = f'{case}.ign' if void else case
  labels = golden[f'{name}.target']
  assert void == (labels == -100).any()  # the original's void
  labels = np.where(labels == -100, VOID, labels)
  logits = jnp.asarray(_channels_last(golden[f'{case}.logits']))
  loss, grad = _focal_and_grad(logits, labels)
  np.testing.assert_allclose(loss, golden[f'{name}.focal_loss64'], rtol=1e-5)
  parity.assert_close(
    golden, f'{name}.focal_grad', parity.channels_first(grad), 1e-7
  )
  if not void:
    plain = _mean_focal(logits, labels, 0.0)
    np.testing.assert_allclose(
      plain, golden[f'{case}.gamma0.focal_loss64'], rtol=1e-5
    )


def test_focal_of_an_absent_way_is_the_golden_one(shared):
  golden = _golden(shared, 'losses')
  logits = golden['inf.logits']
  logits = np.where(np.isinf(logits), np.float32(ways.ABSENT), logits)
  loss, grad = _focal_and_grad(
    jnp.asarray(_channels_last(logits)), golden['inf.target']
  )
  np.testing.assert_allclose(loss, golden['inf.focal_loss64'], rtol=1e-5)
  parity.assert_close(
    golden, 'inf.focal_grad', parity.channels_first(grad), 1e-7
  )


def test_focal_of_sure_pixels_is_zero_with_its_gradient(shared):
  golden = _golden(shared, 'losses')
  logits = jnp.asarray(_channels_last(golden['sat.logits']))
  labels = jnp.zeros((1, 1, 2), jnp.int32)
  loss, grad = _focal_and_grad(logits, labels)
  assert loss == golden['sat.focal_loss64'] == 0
  parity.assert_close(golden, 'sat.focal_grad', parity.channels_first(grad), 0)
  # And sure of the wrong class: cross-entropy.
  loss, grad = _focal_and_grad(logits, labels + 1)
  np.testing.assert_allclose(loss, (60 + 125) / 2, rtol=1e-6)
  assert np.isfinite(grad).all()


def test_void_pixels_add_nothing_but_count():
  logits = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
  labels = jnp.ones((2, 4, 6), jnp.int32)
  whole = _focal(logits, labels)
  assert whole.shape == (2,)
  half = _focal(logits, labels.at[1, :, 3:].set(VOID))
  np.testing.assert_array_equal(half[0], whole[0])
  kept = _focal(logits[1:, :, :3], labels[1:, :, :3])
  np.testing.assert_allclose(half[1], kept[0] / 2, rtol=1e-6)
  nothing = jax.grad(lambda x: _focal(x, labels * 0 + VOID).sum())
  np.testing.assert_array_equal(nothing(logits), 0)


# The golden also has `rd.distill64`, the original's older DistillationLoss. No
# config uses it and its training script cannot call it: it is not ported.
def test_the_distillation_loss_is_the_golden_one(shared):
  golden = _golden(shared, 'losses')
  labels = golden['rd.target']
  teacher, student = (
    float(_mean_focal(jnp.asarray(_channels_last(golden[name])), labels))
    for name in ('rd.logits', 'rd.distilled_logits')
  )
  taught, learnt = (
    [
      # Way 1 as stored; way 2, where it takes part, is (2 c, d + 1).
      np.stack([x := _channels_last(golden[f'rd.{name}{i}']), y(x)], 1)
      for i in (1, 2, 3)
    ]
    for name, y in (
      ('coarse', lambda x: 2 * x),
      ('distilled_coarse', lambda x: x + 1),
    )
  )

  def coarse(*some):
    return float(
      losses.coarse_mse(tuple(taught), tuple(learnt), jnp.array([some]))[0]
    )

  one, both = coarse(True, False), coarse(True, True)
  for name, loss in (
    ('refine_distill_class2_absent64', (teacher + student + one) / 3),
    (
      'refine_distill_alpha1_beta2_gamma3_64',
      (teacher + 2 * student + 3 * one) / 6,
    ),
    (
      'refine_distill_two_classes_second_is_2c_and_dplus1_64',
      (teacher + student + both) / 3,
    ),
  ):
    np.testing.assert_allclose(
      loss, golden[f'rd.{name}'], rtol=1e-5, err_msg=name
    )


def test_coarse_distance_by_hand():
  # Two episodes, two ways, two levels of other sizes.
  teacher = jnp.zeros((2, 2, 2, 2, 3)), jnp.zeros((2, 2, 4, 4, 1))
  student = (
    jnp.zeros((2, 2, 2, 2, 3)).at[:, 0].set(1.0).at[:, 1].set(3.0),
    jnp.zeros((2, 2, 4, 4, 1)).at[:, 0].set(2.0),
  )
  # Way 0: (1 + 4) / 2; way 1: (9 + 0) / 2.
  for some, expected in (
    ([[True, True], [True, False]], [3.5, 2.5]),
    ([[False, True], [False, False]], [4.5, 0]),
  ):
    np.testing.assert_allclose(
      losses.coarse_mse(teacher, student, jnp.array(some)), expected, rtol=1e-6
    )


# --- metrics ----------------------------------------------------------------


def _torchmetrics(confusion):
  """Our scores under the names of the originals' collection."""
  return {
    'MulticlassF1Score': confusion.f1,
    'MulticlassPrecision': confusion.precision,
    'MulticlassRecall': confusion.recall,
    'MulticlassJaccardIndex': confusion.iou,
  }


@pytest.mark.parametrize(('case', 'classes'), [('c2', 2), ('c4', 4)])
def test_scores_are_the_golden_ones(shared, case, classes):
  golden = _golden(shared, 'metrics')
  linearized = json.loads(shared('goldens/dcama/metrics.json').read_text())
  confusion = metrics.Confusion.empty(classes)
  for labels, predicted in zip(
    golden[f'{case}.gt'], golden[f'{case}.pred'], strict=True
  ):
    confusion.add(
      metrics.count(jnp.asarray(labels), jnp.asarray(predicted), classes)
    )
  np.testing.assert_array_equal(
    confusion.counts, golden[f'{case}.confusion_gt_rows_pred_cols']
  )
  ours = {}
  for name, values in _torchmetrics(confusion).items():
    np.testing.assert_allclose(values, golden[f'{case}.{name}'], rtol=1e-6)
    ours |= {f'{name}_class{i}': v for i, v in enumerate(values)}
    ours |= {name: values.mean(), f'{name}_fg': values[1:].mean()}
  theirs = linearized[f'{case}.linearized']
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert ours[name] == pytest.approx(value, rel=1e-6), name
  scores = confusion.scores(tuple(f'way {i}' for i in range(1, classes)))
  for ours, name in (
    ('miou', 'JaccardIndex'),
    ('f1', 'F1Score'),
    ('precision', 'Precision'),
    ('recall', 'Recall'),
  ):
    fg = theirs[f'Multiclass{name}_fg']
    assert scores[ours] == pytest.approx(fg, rel=1e-6)


def test_a_class_that_never_occurs_scores_zero(shared):
  golden = json.loads(shared('goldens/dcama/metrics.json').read_text())
  # The pixels behind the golden's shares: 4 / 6, 4 / 5, 1 / 2 and 1 / 3.
  confusion = metrics.Confusion(np.array([[4, 2, 0], [1, 1, 0], [0, 0, 0]]))
  absent = golden['class_absent_everywhere(3 classes, class 2 never)']
  for name, values in _torchmetrics(confusion).items():
    np.testing.assert_allclose(values, absent[name], rtol=1e-6)
  two = metrics.Confusion(confusion.counts[:2, :2])
  for case in ('int_target_same_data', 'float_target'):
    for name, values in _torchmetrics(two).items():
      np.testing.assert_allclose(values, golden[case][name], rtol=1e-6)


def test_scores_by_hand():
  labels = jnp.array([[0, 0, 0, 1], [1, 2, 2, VOID], [VOID, 2, 1, 0]])
  predicted = jnp.array([[0, 0, 1, 1], [2, 2, 2, 0], [2, 0, 1, 0]])
  counts = metrics.count(labels, predicted, 3)
  assert counts.dtype == jnp.int32
  assert counts.tolist() == [[3, 1, 0], [0, 2, 1], [1, 0, 2]]
  confusion = metrics.Confusion.empty(3)
  confusion.add(counts)
  assert confusion.counts.dtype == np.int64
  np.testing.assert_allclose(confusion.iou, [3 / 5, 2 / 4, 2 / 4])
  np.testing.assert_allclose(confusion.f1, [6 / 8, 4 / 6, 4 / 6])
  np.testing.assert_allclose(confusion.precision, [3 / 4, 2 / 3, 2 / 3])
  np.testing.assert_allclose(confusion.recall, [3 / 4, 2 / 3, 2 / 3])
  assert confusion.miou == pytest.approx(0.5)
  assert confusion.accuracy == pytest.approx(7 / 10)
  # Foreground as one class: 5 right, 1 missed, 1 too many.
  assert confusion.fb_iou == pytest.approx((3 / 5 + 5 / 7) / 2)
  scores = confusion.scores(('cell', 'wall'))
  assert scores['iou'] == {'cell': 0.5, 'wall': 0.5}
  assert scores['f1'] == pytest.approx(2 / 3)
  assert json.loads(json.dumps(scores)) == scores


def test_where_nothing_is_scored_there_is_no_number():
  void = jnp.full((3, 4), VOID)
  for counts in (
    metrics.Confusion.empty(3).counts,
    metrics.count(void, jnp.ones((3, 4), jnp.int32), 3),
  ):
    np.testing.assert_array_equal(counts, 0)
    confusion = metrics.Confusion(np.asarray(counts))
    scores = confusion.scores(('a', 'b'))
    assert scores['miou'] is scores['fb_iou'] is scores['accuracy'] is None
    assert scores['iou'] == {'a': None, 'b': None}
    np.testing.assert_array_equal(confusion.iou, 0)  # torchmetrics' way


def test_a_class_that_is_not_there_is_no_part_of_the_mean():
  counts = np.array([[5, 1, 0], [1, 3, 0], [0, 0, 0]])
  scores = metrics.Confusion(counts).scores(('a', 'b'))
  assert scores['iou'] == {'a': pytest.approx(3 / 5), 'b': None}
  assert scores['miou'] == pytest.approx(3 / 5)
  # Predicted but never there: that is a fault, and counts.
  counts[0, 2] = 1
  scores = metrics.Confusion(counts).scores(('a', 'b'))
  assert scores['miou'] == pytest.approx((3 / 5 + 0) / 2)


def test_labels_as_they_are_stored_count_as_well():
  labels = np.array([[0, 1, 2, 255]], np.uint8)
  predicted = jnp.array([[0, 1, 1, 1]])
  counts = metrics.count(jnp.asarray(labels), predicted, 3)
  assert counts.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
  # With 20 ways and background, 20 * 21 + 20 is more than a byte holds.
  labels = jnp.array([[20, 20, 13, 255]], jnp.uint8)
  predicted = jnp.array([[20, 3, 13, 0]], jnp.uint8)
  counts = np.asarray(metrics.count(labels, predicted, 21))
  expected = np.zeros((21, 21))
  expected[20, 20] = expected[20, 3] = expected[13, 13] = 1
  np.testing.assert_array_equal(counts, expected)


@_few
@hypothesis.given(
  st.lists(
    st.tuples(st.sampled_from([0, 1, 2, VOID]), st.integers(0, 2)),
    min_size=12,
    max_size=12,
  )
)
def test_two_halves_merge_to_the_whole(pairs):
  labels, predicted = np.array(pairs, np.int32).T.reshape(2, 2, 6)
  whole, merged = metrics.Confusion.empty(3), metrics.Confusion.empty(3)
  whole.add(metrics.count(labels, predicted, 3))
  for half in (0, 1):
    merged.add(metrics.count(labels[half], predicted[half], 3))
  np.testing.assert_array_equal(whole.counts, merged.counts)
  expected = np.zeros((3, 3), int)
  for label, guess in pairs:
    if label != VOID:
      expected[label, guess] += 1
  np.testing.assert_array_equal(whole.counts, expected)
  for values in _torchmetrics(whole).values():
    assert ((values >= 0) & (values <= 1)).all()
  harmonic = 2 * whole.precision * whole.recall
  np.testing.assert_allclose(
    whole.f1 * (whole.precision + whole.recall), harmonic, atol=1e-12
  )
  np.testing.assert_allclose(whole.f1, 2 * whole.iou / (1 + whole.iou))
