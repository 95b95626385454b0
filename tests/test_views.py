"""Tests of views: geometry by hand, colours by their rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillfss_jax.ops import views
from distillfss_jax.types import VOID

_SIDE = 16
_PLAIN = views.Geometry((16.0, 16.0), turned=0.0, mirrored=0.0, aspect=0.0)
_STILL = views.Appearance(
  gamma_share=0.0, recoloured=0.0, inverted=0.0, gain_share=0.0,
  tone_share=0.0, permuted=0.0, noise=0.0, blurred=0.0,
)  # fmt: skip


def _images(count=2, side=_SIDE):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def _frame(scale=1.0, shift=(0.0, 0.0), turn=((1, 0), (0, 1)), side=_SIDE):
  """[1, 2, 3]: the view's middle lies `shift` from the image's."""
  matrix = np.concatenate(
    [scale * np.array(turn, float), np.array(shift)[:, None] + side / 2], 1
  )
  return jnp.asarray(matrix, jnp.float32)[None]


@functools.partial(jax.jit, static_argnums=4)
def _through(images, labels, which, frames, size):
  return views.look(views.atlas(images), labels, which, frames, size)


def _look(images, labels, frames, size, which=(0,)):
  seen, known = _through(images, labels, np.asarray(which), frames, size)
  return np.asarray(seen[0]) * 255, np.asarray(known[0])


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _draw(
  seed,
  images,
  labels,
  which,
  size,
  geometry=None,
  appearance=None,
):
  geometry = geometry or views.Geometry()
  appearance = appearance or views.Appearance()
  key = jax.random.key(seed)
  atlas = views.atlas(images)
  return views.draw(key, atlas, labels, which, size, geometry, appearance)


def test_the_whole_image_is_itself():
  images = _images()
  labels = images[..., 0].astype(np.int32)
  seen, known = _look(images, labels, _frame(), _SIDE, (1,))
  np.testing.assert_allclose(seen, images[1], atol=1e-3)
  np.testing.assert_array_equal(known, labels[1])


@pytest.mark.parametrize(
  ('turn', 'numpy'),
  [
    (((1, 0), (0, -1)), lambda x: x[:, ::-1]),
    (((-1, 0), (0, 1)), lambda x: x[::-1]),
    (((0, 1), (-1, 0)), lambda x: np.rot90(x, 1)),
    (((0, 1), (1, 0)), lambda x: x.swapaxes(0, 1)),
  ],
)
def test_turns_and_mirrors_are_exact(turn, numpy):
  images = _images(1)
  labels = images[..., 1].astype(np.int32)
  seen, known = _look(images, labels, _frame(turn=turn), _SIDE)
  np.testing.assert_allclose(seen, numpy(images[0]), atol=1e-3)
  np.testing.assert_array_equal(known, numpy(labels[0]))


def test_a_crop_is_a_crop():
  images = _images(1)
  labels = images[..., 2].astype(np.int32)
  seen, known = _look(images, labels, _frame(shift=(-4, 2)), 8)
  np.testing.assert_allclose(seen, images[0, :8, 6:14], atol=1e-3)
  np.testing.assert_array_equal(known, labels[0, :8, 6:14])


def test_beyond_its_border_an_image_goes_on_mirrored():
  images = _images(1)
  labels = images[..., 0].astype(np.int32)
  seen, known = _look(images, labels, _frame(), 48)
  pads = ((16, 16), (16, 16))
  np.testing.assert_array_equal(known, np.pad(labels[0], pads, 'symmetric'))
  wanted = np.pad(images[0], (*pads, (0, 0)), 'symmetric')
  np.testing.assert_allclose(seen, wanted, atol=1e-3)


def test_half_the_size_is_the_average_of_four():
  images = _images(1)
  labels = images[..., 0].astype(np.int32)
  seen, known = _look(images, labels, _frame(2.0), 8)
  wanted = images[0].reshape(8, 2, 8, 2, 3).mean((1, 3))
  np.testing.assert_allclose(seen, wanted, atol=0.51)  # averages are rounded
  np.testing.assert_array_equal(known, labels[0, 1::2, 1::2])


def test_twice_the_size_is_bilinear():
  images = np.zeros((1, 4, 4, 3), np.uint8)
  images[0, :, 2:] = 200
  labels = (images[..., 0] > 0).astype(np.int32)
  seen, known = _look(images, labels, _frame(0.5, side=4), 8)
  row = [0, 0, 0, 50, 150, 200, 200, 200]
  np.testing.assert_allclose(seen[3, :, 0], row, atol=1e-3)
  assert known[3].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_labels_keep_their_values_and_void():
  labels = np.random.default_rng(1).choice([0, 3, VOID], (2, _SIDE, _SIDE))
  images = np.repeat(labels[..., None], 3, -1).astype(np.uint8)
  geometry = views.Geometry((8.0, 40.0))
  seen, known = _draw(0, images, labels, np.arange(12) % 2, 12, geometry, None)
  assert set(np.unique(known)) == {0, 3, VOID}
  assert seen.shape == (12, 12, 12, 3)
  assert 0 <= float(seen.min()) <= float(seen.max()) <= 1


def test_views_follow_from_the_key_alone():
  images, which = _images(), np.arange(4) % 2
  labels = np.zeros((2, _SIDE, _SIDE), np.int32)
  first, again, other = (
    _draw(seed, images, labels, which, 8)[0] for seed in (3, 3, 4)
  )
  np.testing.assert_array_equal(first, again)
  assert (np.abs(first - other).max((1, 2, 3)) > 1e-3).all()
  alike = first[::2]  # views of one image differ, too
  assert np.abs(alike[0] - alike[1]).max() > 1e-3


def test_frames_lie_where_they_may():
  geometry = views.Geometry((8.0, 32.0), aspect=0.0)
  keys = jax.random.split(jax.random.key(0), 2000)
  frames = jax.jit(jax.vmap(lambda k: views.frame(k, 16, 12, geometry)))(keys)
  frames = np.asarray(frames)
  sides = 16 / np.sqrt(np.abs(np.linalg.det(frames[:, :, :2])))
  assert 8 <= sides.min() < 8.1
  assert 31.5 < sides.max() <= 32.001
  # Log-uniform: as many below the geometric mean as above it.
  assert abs((sides < 16).mean() - 0.5) < 0.04
  assert abs((np.linalg.det(frames[:, :, :2]) < 0).mean() - 0.5) < 0.04
  steep = np.abs(frames[:, 0, 0] * frames[:, 0, 1]) > 1e-3
  assert abs(steep.mean() - 0.5) < 0.04
  # The middle leaves no border inside where the image is larger than the view.
  large = sides > 12
  away = np.abs(frames[large, :, 2] - 8).max(1)
  assert (away <= 8 - 6 * 16 / sides[large] + 1e-3).all()


def test_without_chances_a_view_is_what_lies_there():
  images = _images(1)
  labels, which = np.zeros((1, _SIDE, _SIDE), np.int32), np.zeros(3, int)
  seen, known = _draw(0, images, labels, which, _SIDE, _PLAIN, _STILL)
  turned = [np.rot90(images[0], i) for i in range(4)]
  for x in np.asarray(seen) * 255:
    assert min(np.abs(x - y).max() for y in turned) < 0.01
  assert not known.any()


def _recolour(image, **fields):
  settings = dataclasses.replace(_STILL, **fields)
  recolour = jax.jit(
    jax.vmap(lambda k, x: views.recolour(k, x, settings), (0, None))
  )
  return np.asarray(recolour(jax.random.split(jax.random.key(0), 20), image))


def _picture(side=32):
  x = np.random.default_rng(0).uniform(0.2, 0.8, (side, side, 3))
  return x.astype(np.float32)


def test_a_negative_is_a_negative():
  for x in _recolour(_picture(), inverted=1.0):
    np.testing.assert_allclose(x, 1 - _picture(), atol=1e-6)


def test_permuted_channels_are_the_same_channels():
  orders = set()
  for x in _recolour(_picture(), permuted=1.0):
    order = [
      int(np.abs(_picture() - x[..., i : i + 1]).max((0, 1)).argmin())
      for i in range(3)
    ]
    np.testing.assert_allclose(x, _picture()[..., order], atol=1e-6)
    orders.add(tuple(order))
  assert len(orders) == 6


def test_a_ramp_keeps_or_turns_the_order_of_luminance():
  grey = np.linspace(0, 1, 32, dtype=np.float32)
  image = np.repeat(np.repeat(grey[:, None, None], 32, 1), 3, 2)
  for light, sign in ((0.0, 1), (1.0, -1)):
    for x in _recolour(image, recoloured=1.0, light=light):
      rows = x[:, 0]
      assert (np.diff(rows, axis=0) * sign >= -1e-6).all()
      # One ramp: all three channels are the same function of luminance.
      parts = (rows - rows[0]) / (rows[-1] - rows[0])
      np.testing.assert_allclose(parts, parts[:, :1].repeat(3, 1), atol=1e-4)
      ends = rows[[0, -1]][::sign]
      assert (ends[0] <= 0.5).all()
      assert (ends[1] >= 0.5).all()


def test_gains_scale_single_channels():
  for x in _recolour(0.5 * _picture(), gain_share=1.0, gain=0.2):
    factor = x / (0.5 * _picture())
    spread = factor.max((0, 1)) - factor.min((0, 1))
    assert (spread < 1e-4).all()
    assert (np.abs(np.log(factor.mean((0, 1)))) <= 0.2 + 1e-4).all()


def test_gamma_is_one_exponent():
  for x in _recolour(_picture(), gamma_share=1.0, gamma=0.3):
    exponent = np.log(x) / np.log(_picture())
    assert exponent.max() - exponent.min() < 1e-3
    assert abs(np.log(exponent.mean())) <= 0.3 + 1e-4


def test_a_blur_keeps_flat_parts_and_the_middle_of_a_point():
  image = np.zeros((9, 9, 3), np.float32)
  image[4, 4] = 1
  for x in _recolour(image, blurred=1.0):
    wanted = np.outer((1, 2, 1), (1, 2, 1)) / 16
    np.testing.assert_allclose(x[3:6, 3:6, 0], wanted, atol=1e-6)
    assert x.sum() == pytest.approx(3, abs=1e-4)


def test_noise_has_its_deviation():
  image = np.full((64, 64, 3), 0.5, np.float32)
  noise = _recolour(image, noise=0.1) - image
  assert 0.07 < noise.std((1, 2, 3)).max() <= 0.105
  assert np.abs(noise.mean((1, 2, 3))).max() < 0.01


def test_some_views_keep_their_colours():
  image = _picture()
  changed = _recolour(image, inverted=1.0, noise=0.1)
  found = _recolour(image, inverted=1.0, noise=0.1, kept=0.5)
  kept = (found == image).all((1, 2, 3))
  assert 4 <= kept.sum() <= 16  # of twenty
  # What else is drawn does not change.
  np.testing.assert_array_equal(found[~kept], changed[~kept])


def test_values_are_stretched_between_percentiles():
  values = jnp.linspace(3.0, 5.0, 64 * 64).reshape(64, 64)
  x = np.asarray(views.stretched(values))
  assert x.min() == 0
  assert x.max() == 1
  middle = x[20:40]
  np.testing.assert_allclose(np.diff(middle[:, 0]), middle[1, 0] - middle[0, 0],
                             rtol=1e-2)  # fmt: skip
  assert (np.asarray(views.stretched(jnp.ones((8, 8)))) == 0).all()


@pytest.mark.parametrize('shape', [(1, 18, 18, 3), (1, 16, 20, 3)])
def test_views_need_squares_of_fours(shape):
  with pytest.raises(ValueError, match='a multiple of 4: resize them'):
    views.atlas(jnp.zeros(shape, jnp.uint8))


def test_places_are_of_each_class_as_often():
  labels = np.zeros((3, 8, 8), np.uint8)
  labels[0, 2:6, 2:6] = 1  # 16 pixels
  labels[0, 7, 7] = 2  # and one
  labels[1, 0, 3] = 2
  labels[1, 5, 5] = VOID
  found = jax.jit(views.places_of, static_argnums=(2, 3))(
    jax.random.key(0), labels, 2, 400
  )
  assert found.shape == (3, 400, 2)
  rows, columns = np.moveaxis(np.asarray(found - 0.5, int), -1, 0)
  assert (labels[0][rows[0], columns[0]] > 0).all()
  share = (labels[0][rows[0], columns[0]] == 2).mean()
  assert share == pytest.approx(0.5, abs=0.1)
  pixels = {*zip(rows[0].tolist(), columns[0].tolist(), strict=True)}
  assert len(pixels) == 17
  # One class alone; and an image without any object has places all over.
  assert {*zip(rows[1].tolist(), columns[1].tolist(), strict=True)} == {(0, 3)}
  assert len({*zip(rows[2].tolist(), columns[2].tolist(), strict=True)}) > 50


@pytest.mark.parametrize('place', [(3.5, 60.5), (40.0, 31.0)])
def test_an_aimed_view_shows_its_place(place):
  side, size, place = 64, 16, np.array(place)
  geometry = views.Geometry((64.0, 128.0), aimed=1.0)
  keys = jax.random.split(jax.random.key(1), 200)
  frames = np.asarray(
    jax.vmap(lambda k: views.frame(k, side, size, geometry, place))(keys)
  )
  inverse = np.linalg.inv(frames[:, :, :2])
  at = np.einsum('vij,vj->vi', inverse, place - frames[:, :, 2])
  assert (np.abs(at) <= size / 2).all()
  # Where it is not at the border, it is not always in the middle either.
  assert at.std() > 1
  never = views.Geometry((64.0, 128.0), aimed=0.0)
  for key in keys[:5]:
    np.testing.assert_array_equal(
      views.frame(key, side, size, never, place),
      views.frame(key, side, size, never),
    )
