"""Tests of the streamed correlations and what HDMNet's losses are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillfss_jax.ops import correlation, losses, random, resize


@pytest.fixture(params=[3, 1024], ids=['blocks', 'one block'])
def blocks(request, monkeypatch):
  monkeypatch.setattr(correlation, '_BLOCK', request.param)


def _cosines(query, support):
  dot = query @ support.T
  norms = jnp.linalg.norm(query, axis=-1)[:, None] * jnp.linalg.norm(
    support, axis=-1
  )
  return dot / (norms + 1e-7)


def _pair(q=7, k=11, c=5):
  rng = np.random.default_rng(0)
  query, support = (rng.normal(size=(n, c)) for n in (q, k))
  return jnp.asarray(query, jnp.float32), jnp.asarray(support, jnp.float32)


def test_best_cosine_is_that_of_the_whole_matrix(blocks):
  query, support = _pair()
  aim = jnp.arange(7.0)
  found, gradients = jax.value_and_grad(
    lambda *x: (correlation.best_cosine(*x) * aim).sum(), (0, 1)
  )(query, support)
  wanted, theirs = jax.value_and_grad(
    lambda *x: (_cosines(*x).max(-1) * aim).sum(), (0, 1)
  )(query, support)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  for a, b in zip(gradients, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_is_masked_has_cosine_zero(blocks):
  query, support = _pair()
  support = -jnp.abs(support)
  query = jnp.abs(query)
  assert (correlation.best_cosine(query, support) < 0).all()
  masked = support.at[4].set(0)
  found, gradient = jax.value_and_grad(
    lambda s: correlation.best_cosine(query, s).sum()
  )(masked)
  assert found == 0
  assert np.isfinite(gradient).all()


def _matched(query, keys, values, mask):
  share = jax.nn.softmax(jnp.einsum('aqd,akd->aqk', query, keys), 1)
  return jnp.einsum('aqk,k,ake->aqe', share, mask, values)


def _match_inputs(q=6, k=11):
  rng = np.random.default_rng(0)
  shapes = ((2, q, 3), (2, k, 3), (2, k, 4))
  arrays = [jnp.asarray(rng.normal(size=x), jnp.float32) for x in shapes]
  return *arrays, jnp.asarray(rng.integers(0, 2, k), jnp.float32)


def test_match_is_that_of_the_whole_matrix(blocks):
  *arrays, mask = _match_inputs()

  def loss(fn):
    return lambda *x: jnp.sin(fn(*x, mask)).sum()

  found = jax.value_and_grad(loss(correlation.match), (0, 1, 2))(*arrays)
  wanted = jax.value_and_grad(loss(_matched), (0, 1, 2))(*arrays)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted
  )


def test_each_foreground_place_gives_one_value_away():
  query, keys, _, mask = _match_inputs()
  ones = jnp.ones((2, 11, 1))
  given = correlation.match(query, keys, ones, mask)
  np.testing.assert_allclose(given.sum(1), mask.sum(), rtol=1e-5)


def _largest(jaxpr):
  """Elements of the largest array in a jaxpr, and in those inside it."""
  sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
  inner = [
    _largest(getattr(x, 'jaxpr', x))
    for e in jaxpr.eqns
    for p in e.params.values()
    for x in (p if isinstance(p, tuple | list) else [p])
    if hasattr(getattr(x, 'jaxpr', x), 'eqns')
  ]
  return max([*sizes, *inner], default=0)


def test_no_matrix_of_query_and_support(monkeypatch):
  monkeypatch.setattr(correlation, '_BLOCK', 8)
  query, support = _pair(64, 512)
  arrays = _match_inputs(64, 512)

  def both(query, support, *arrays):
    given = correlation.match(*arrays)
    return correlation.best_cosine(query, support).sum() + given.sum()

  step = jax.make_jaxpr(jax.grad(both, (0, 1, 2, 3, 4)))
  assert _largest(step(query, support, *arrays).jaxpr) < 64 * 512 / 4
  dense = jax.make_jaxpr(_cosines)(query, support)
  assert _largest(dense.jaxpr) == 64 * 512  # it would be seen


def test_nearest_by_hand():
  x = jnp.arange(5.0).reshape(1, 5, 1)
  np.testing.assert_array_equal(
    resize.nearest(x, (2, 3))[..., 0], [[0, 1, 3]] * 2
  )
  np.testing.assert_array_equal(
    resize.nearest(x, (1, 7))[0, :, 0], [0, 0, 1, 2, 2, 3, 4]
  )


def test_adaptive_mean_by_hand():
  # Of five pixels, three parts: 0-1, 1-3, 3-4.
  x = jnp.arange(5.0) ** 2
  x = jnp.broadcast_to(x[:, None, None], (5, 4, 1))
  found = resize.adaptive_mean(x, 3)[:, 0, 0]
  np.testing.assert_allclose(found, [0.5, 14 / 3, 12.5], rtol=1e-6)


def test_cross_entropy_by_hand():
  logits = jnp.log(jnp.array([[[[1.0, 3], [1, 1], [1, 0.5]]]]))
  total, count = losses.cross_entropy(logits, jnp.array([[[1, 0, 255]]]))
  np.testing.assert_allclose(total, [-np.log(3 / 4) - np.log(1 / 2)], rtol=1e-6)
  np.testing.assert_array_equal(count, [2])


def test_spatial_kl_by_hand():
  p, s = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.3, 0.5])
  teacher, student = (jnp.log(x).reshape(1, 1, 3) + 7 for x in (p, s))
  wanted = (p * np.log(p / s)).sum()
  np.testing.assert_allclose(
    losses.spatial_kl(teacher, student), [wanted], rtol=1e-5
  )


def test_levels_teach_downwards_only():
  rng = np.random.default_rng(0)
  maps = [jnp.asarray(rng.normal(size=(2, n, n)), jnp.float32) for n in (3, 6)]
  labels = jnp.zeros((2, 12, 12), int).at[0, 2:10, 2:10].set(1)
  # The second has no foreground: its teacher knows nothing, and says so.
  value, gradients = jax.value_and_grad(
    lambda maps: losses.hierarchical_kl(maps, labels).sum()
  )(maps)
  assert np.isfinite(value)
  coarse = jax.grad(
    lambda x: losses.hierarchical_kl([x, maps[1]], labels).sum()
  )(maps[0])
  alone = jax.grad(lambda x: losses.hierarchical_kl([x], labels).sum())(maps[0])
  np.testing.assert_allclose(coarse, alone / 2, atol=1e-6)
  assert all(np.abs(g).max() > 1e-3 for g in gradients)


def test_dropout_drops_whole_channels():
  x = jnp.ones((2, 3, 3, 400))
  seed = jnp.array([1, 2], jnp.uint32)
  y = np.asarray(random.drop_channels(x, seed, 0.25))
  np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
  assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
  assert abs(y.mean() - 1) < 0.1
  assert (y[0] != y[1]).any()
