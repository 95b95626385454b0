"""Tests of the polar form: light, contrast and polarity fall away."""

import jax
import numpy as np
import pytest

from distillfss_jax.ops import polarity, threshold

_polar = jax.jit(polarity.polar)


def _blobs(side=64):
  """A grey image with a lighter object on a fifth of it, and where that is."""
  rng = np.random.default_rng(0)
  inside = np.zeros((side, side), bool)
  inside[8:40, 8:34] = True
  grey = np.where(inside, 0.7, 0.3) + rng.normal(0, 0.03, inside.shape)
  return np.clip(grey, 0, 1).astype(np.float32), inside


def _of(grey):
  return np.asarray(_polar(np.repeat(grey[None, ..., None], 3, -1)))[0]


def test_the_smaller_side_is_light():
  grey, inside = _blobs()
  for image in (grey, 1 - grey):
    polar = _of(image)
    assert polar.shape == (*grey.shape, 3)
    np.testing.assert_array_equal(polar[..., 0], polar[..., 2])
    assert polar[inside].min() > 0.6
    assert polar[~inside].max() < 0.4


@pytest.mark.parametrize(('scale', 'shift'), [(0.3, 0.1), (0.5, 0.5), (1, 0)])
def test_light_and_contrast_fall_away(scale, shift):
  grey, _ = _blobs()
  # Levels are 256th parts: of a third of the contrast they are thrice as wide.
  apart = np.abs(_of(scale * grey + shift) - _of(grey))
  assert apart.max() < 4 / 256 / scale


def test_it_agrees_with_otsus_rule():
  grey, inside = _blobs()
  smaller = threshold.minority(np.rint(255 * (1 - grey)).astype(np.uint8))
  assert (smaller == inside).mean() > 0.999  # a threshold is some level's
  np.testing.assert_array_equal(_of(1 - grey)[..., 0] > 0.5, inside)


def test_a_blank_image_stays_finite():
  for value in (0.0, 0.4, 1.0):
    polar = _of(np.full((32, 32), value, np.float32))
    assert np.isfinite(polar).all()
    assert 0 <= polar.min() <= polar.max() <= 1
