"""Augmentations: each op by hand, all recipes by what must always hold."""

import dataclasses
import functools
import pickle

import hypothesis
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import strategies as st
from PIL import Image

from distillfss_jax.data import augment, transforms

MEAN = augment.MEAN_COLOUR
STILL = ('none', 'stretch', 'fit', 'polyp', 'polyp_soft')  # no chance in these
CHANCE = tuple(name for name in augment.names() if name not in STILL)
# The labels that a recipe may bring in.
FILLS = {
  **dict.fromkeys(augment.names(), ()),
  **dict.fromkeys(
    ('fit', 'bam', 'bam_coco', 'hdmnet', 'hdmnet_coco', 'base'), (255,)
  ),
  'attnfd': (0,),
  'attnfd_void': (255,),
  'attnfd_cityscapes': (255,),
  'polyp_augmented': (0,),
}


class Script:
  """Stands in for a generator and gives what it is told, in order."""

  def __init__(self, *values):
    self.values, self.calls = list(values), 0

  def _next(self, *_):
    self.calls += 1
    return self.values.pop(0)

  random = uniform = integers = permutation = _next


def rng(seed=0):
  return np.random.default_rng(seed)


def noise(rows, columns, seed=0, labels=3):
  generator = rng(seed)
  image = generator.integers(0, 256, (rows, columns, 3)).astype(np.uint8)
  return image, generator.integers(0, labels, (rows, columns)).astype(np.uint8)


def tied(rows, columns, seed=0):
  """An image whose red is its label."""
  image, label = noise(rows, columns, seed, labels=200)
  image[..., 0] = label
  return image, label


def run(op, image, label, *rest, seed=0, **kwargs):
  return op(rng(seed), image, label, *rest, **kwargs)


def equal(made, image, label):
  np.testing.assert_array_equal(made[0], image)
  np.testing.assert_array_equal(made[1], label)


def near(a, b, levels=1):
  assert a.shape == b.shape
  assert np.abs(a.astype(int) - b.astype(int)).max() <= levels


# Ops.


@pytest.mark.parametrize('axis', [0, 1])
def test_flip(axis):
  image, label = noise(4, 7)
  made = run(augment.flip, image, label, p=1, axis=axis)
  where = (slice(None, None, -1), slice(None))[:: 1 - 2 * axis]
  equal(made, image[where], label[where])
  equal(run(augment.flip, *made, p=1, axis=axis), image, label)
  equal(run(augment.flip, image, label, p=0, axis=axis), image, label)


@pytest.mark.parametrize('turns', range(4))
def test_quarter_turns(turns):
  image, label = noise(4, 7)
  made = augment.quarter_turns(Script(0.3, turns), image, label)
  equal(made, np.rot90(image, turns), np.rot90(label, turns))
  equal(augment.quarter_turns(Script(0.7), image, label), image, label)
  assert made[1].shape == ((4, 7), (7, 4))[turns % 2]


def test_tiles_are_dealt_anew():
  label = np.uint8([[1, 1, 2, 2], [3, 3, 4, 4]])
  image = np.repeat(label[..., None], 3, axis=2)
  dealt = Script([3, 0, 1, 2])
  made, moved = augment.shuffle_tiles(dealt, image, label)
  np.testing.assert_array_equal(moved, [[4, 4, 1, 1], [2, 2, 3, 3]])
  np.testing.assert_array_equal(made[..., 2], moved)


@pytest.mark.parametrize('shape', [(6, 8), (7, 8), (7, 9), (1, 5), (1, 1)])
def test_tiles_keep_every_pixel(shape):
  image, label = tied(*shape)
  made = run(augment.shuffle_tiles, image, label, seed=3)
  assert made[1].shape == shape
  np.testing.assert_array_equal(made[0][..., 0], made[1])
  pixels = [np.sort(x.reshape(-1, 3), axis=0) for x in (image, made[0])]
  np.testing.assert_array_equal(*pixels)


def test_tiles_reach_all_24_orders():
  label = np.uint8([[0, 1], [2, 3]])
  image = np.zeros((2, 2, 3), np.uint8)
  generator = rng()
  orders = {
    tuple(augment.shuffle_tiles(generator, image, label)[1].ravel().tolist())
    for _ in range(300)
  }
  assert len(orders) == 24


def test_scale_by_one_changes_nothing():
  image, label = noise(9, 6)
  equal(run(augment.scale, image, label, (1, 1)), image, label)


@hypothesis.given(
  st.integers(1, 30), st.integers(1, 30), st.floats(0.3, 2.5), st.integers(0, 9)
)
@hypothesis.settings(max_examples=50)
def test_scale_of_a_constant_is_constant(rows, columns, factor, seed):
  colour = rng(seed).integers(0, 256, 3)
  image = np.broadcast_to(colour.astype(np.uint8), (rows, columns, 3))
  label = np.full((rows, columns), 7, np.uint8)
  made = run(augment.scale, image, label, (factor, factor))
  shape = max(round(rows * factor), 1), max(round(columns * factor), 1)
  assert made[1].shape == shape
  assert (made[0] == colour).all()
  assert (made[1] == 7).all()


def test_scale_by_two_by_hand():
  image = np.repeat(np.uint8([[[0], [100]]]), 3, axis=2)
  made, label = run(augment.scale, image, np.uint8([[1, 2]]), (2, 2))
  np.testing.assert_array_equal(made[..., 1], [[0, 25, 75, 100]] * 2)
  np.testing.assert_array_equal(label, [[1, 1, 2, 2]] * 2)


def test_scale_samples_at_steps_of_the_factor():
  """Not of the ratio of the rounded sides: 10 * 0.96 is 10 pixels."""
  image, label = noise(10, 10)
  made = run(augment.scale, image, label, (0.96, 0.96))
  at = np.clip((np.arange(10) + 0.5) / 0.96 - 0.5, 0, 9)
  near(made[0], bilinear(image, at, at))
  at = np.minimum(np.arange(10) / 0.96, 9).astype(int)
  np.testing.assert_array_equal(made[1], label[at[:, None], at])


@pytest.mark.parametrize('shape', [(6, 6), (7, 7), (5, 9)])
def test_rotate_by_nothing_or_a_half_turn(shape):
  image, label = noise(*shape)
  for op in (functools.partial(augment.rotate, p=1), augment.rotate_nearest):
    equal(run(op, image, label, (0, 0)), image, label)
    made = run(op, image, label, (180, 180))
    equal(made, image[::-1, ::-1], label[::-1, ::-1])


@pytest.mark.parametrize('side', [1, 2, 7, 8])
@pytest.mark.parametrize('turns', [-1, 1])
def test_rotate_by_a_right_angle_is_exact_on_squares(side, turns):
  image, label = noise(side, side)
  degrees = (90 * turns, 90 * turns)
  for op in (functools.partial(augment.rotate, p=1), augment.rotate_nearest):
    made = run(op, image, label, degrees)
    equal(made, np.rot90(image, turns), np.rot90(label, turns))


def test_rotate_fills_the_corners():
  image, label = np.full((20, 20, 3), 9, np.uint8), np.ones((20, 20), np.uint8)
  made = run(augment.rotate, image, label, (45, 45), p=1)
  assert [tuple(made[0][y, x]) for y in (0, -1) for x in (0, -1)] == [MEAN] * 4
  assert (made[1][[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
  assert (made[0][5:15, 5:15] == 9).all()
  assert (made[1][5:15, 5:15] == 1).all()
  made = run(augment.rotate_nearest, image, label, (45, 45))
  assert (made[0][0, 0] == 0).all()
  assert made[1][0, 0] == 0
  equal(run(augment.rotate, image, label, (45, 45), p=0), image, label)


def test_rotate_is_bilinear_about_the_middle():
  image, label = noise(12, 15)
  made = run(augment.rotate, image, label, (8, 8), p=1)[0]
  angle = np.deg2rad(8)
  y, x = np.mgrid[:12, :15] - np.float64([5.5, 7.0])[:, None, None]
  at = (
    5.5 + np.cos(angle) * y + np.sin(angle) * x,
    7.0 - np.sin(angle) * y + np.cos(angle) * x,
  )
  wanted = [
    scipy.ndimage.map_coordinates(
      image[..., i].astype(float), at, order=1, mode='grid-constant',
      cval=MEAN[i],
    )
    for i in range(3)
  ]  # fmt: skip
  near(made, np.rint(np.stack(wanted, axis=-1)))


def test_rotate_blends_the_border_with_the_colour():
  """White turned into white stays white at the edge; black does not."""
  label = np.zeros((9, 9), np.uint8)
  white = np.full((9, 9, 3), 255, np.uint8)
  made = run(augment.rotate, white, label, (5, 5), p=1, colour=(255,) * 3)
  assert (made[0] == 255).all()
  made = run(augment.rotate, white, label, (5, 5), p=1, colour=augment.BLACK)
  assert set(np.unique(made[0])) - {0, 255}


def test_blur_by_hand():
  taps = np.array([1, 4, 6, 4, 1]) / 16
  kernel = np.outer(taps, taps)
  assert kernel.sum() == 1
  image, label = noise(9, 12)
  wide = np.pad(image.astype(float), ((2, 2), (2, 2), (0, 0)), mode='reflect')
  wanted = np.zeros(image.shape)
  for y in range(5):
    for x in range(5):
      wanted += kernel[y, x] * wide[y : y + 9, x : x + 12]
  equal(
    run(augment.blur, image, label, p=1), np.floor(wanted + 0.5), label
  )  # fmt: skip
  dot = np.zeros((7, 7, 3), np.uint8)
  dot[3, 3] = 255
  made = run(augment.blur, dot, label, p=1)[0]
  np.testing.assert_array_equal(made[1:6, 1:6, 0], np.floor(kernel * 255 + 0.5))
  equal(run(augment.blur, image, label, p=0), image, label)


@pytest.mark.parametrize('shape', [(1, 1), (1, 6), (2, 3), (5, 1)])
def test_blur_of_a_constant_is_constant(shape):
  image = np.full((*shape, 3), 255, np.uint8)
  label = np.zeros(shape, np.uint8)
  equal(run(augment.blur, image, label, p=1), image, label)


def test_soft_blur():
  image, label = noise(9, 9)
  equal(augment.soft_blur(Script(0.4, 0.0), image, label), image, label)
  equal(augment.soft_blur(Script(0.6), image, label), image, label)
  made, same = augment.soft_blur(Script(0.4, 0.9), image, label)
  np.testing.assert_array_equal(same, label)
  assert made.std() < image.std()


def test_brightness_contrast_by_hand():
  image = np.uint8([[[0, 100, 255], [20, 22, 200]]])
  label = np.zeros((1, 2), np.uint8)
  script = Script(0.4, (0.2, -0.1))
  made = augment.brightness_contrast(script, image, label)[0]
  # 1.2 x - 25.5, cut off
  np.testing.assert_array_equal(made, [[[0, 94, 255], [0, 0, 214]]])
  script = Script(0.4, (-0.2, 0.1))
  made = augment.brightness_contrast(script, image, label)[0]
  np.testing.assert_array_equal(made, [[[25, 105, 229], [41, 43, 185]]])
  equal(augment.brightness_contrast(Script(0.6), image, label), image, label)


HSV = [
  ((255, 0, 0), (0, 255, 255)),
  ((255, 255, 0), (30, 255, 255)),
  ((0, 255, 0), (60, 255, 255)),
  ((0, 0, 255), (120, 255, 255)),
  ((255, 0, 255), (150, 255, 255)),
  ((200, 100, 100), (0, 127, 200)),  # 127.5, by OpenCV's table
  ((255, 128, 0), (15, 255, 255)),  # 30 * 128 / 255 = 15.06
  ((255, 0, 8), (179, 255, 255)),  # 180 - 30 * 8 / 255 = 179.06
  ((77, 77, 77), (0, 0, 77)),
  ((0, 0, 0), (0, 0, 0)),
]


@pytest.mark.parametrize(('colour', 'hsv'), HSV)
def test_hsv_by_hand(colour, hsv):
  made = augment.to_hsv(np.uint8([[colour]]))
  assert tuple(int(x[0, 0]) for x in made) == hsv
  back = augment.from_hsv(*(np.uint8([[x]]) for x in hsv))
  near(back, np.uint8([[colour]]), 1)


def test_hsv_and_back():
  """A hue has 180 levels: half of one is 4 of a colour's 255."""
  image = noise(40, 50)[0]
  near(augment.from_hsv(*augment.to_hsv(image)), image, 5)


def test_hue_saturation_value_by_hand():
  red = np.uint8([[[255, 0, 0]]])
  label = np.uint8([[1]])

  def shift(image, *shifts):
    script = Script(np.array(shifts) / (20, 30, 20))
    made, same = augment.hue_saturation_value(script, image, label)
    assert same is label
    return made[0, 0].tolist()

  assert shift(red, 0, 0, 0) == [255, 0, 0]
  assert shift(red, 20, 0, 0) == [255, 170, 0]
  assert shift(red, -20, 0, 0) == [255, 0, 170]
  assert shift(red, 0, -30, 0) == [255, 30, 30]
  assert shift(red, 0, 30, 20) == [255, 0, 0]
  assert shift(red, 0, 0, -20) == [235, 0, 0]
  assert shift(red, 0, 0, -1.5) == [253, 0, 0]  # cut off
  grey = np.full((1, 1, 3), 100, np.uint8)
  assert shift(grey, 7, -30, 15) == [115, 115, 115]


def test_photometric_shifts_stay_within_their_limits():
  generator = rng()
  image = np.repeat(np.uint8([[[100], [150]]]), 3, axis=2)
  label = np.zeros((1, 2), np.uint8)
  contrasts, brightnesses, shifts = [], [], []
  for _ in range(300):
    made = augment.brightness_contrast(generator, image, label, p=1)[0]
    low, high = made[0, :, 0].astype(float)
    contrasts.append((high - low) / 50 - 1)
    brightnesses.append((low - 100 * (1 + contrasts[-1])) / 255)
    made = augment.hue_saturation_value(generator, image, label)[0]
    shifts.append(int(made.max(axis=2)[0, 0]) - 100)
  for drawn, limit, slack in (
    (contrasts, 0.2, 0.03), (brightnesses, 0.2, 0.03), (shifts, 20, 1),
  ):  # fmt: skip
    assert max(np.abs(drawn)) <= limit + slack
    assert min(drawn) < -0.85 * limit
    assert max(drawn) > 0.85 * limit


# Crops and canvases.


def test_crop_pads_on_all_sides():
  image, label = noise(3, 5)
  made = run(augment.crop, image, label, 8)
  inside = slice(2, 5), slice(1, 6)
  equal((made[0][inside], made[1][inside]), image, label)
  rest = np.ones((8, 8), bool)
  rest[inside] = False
  assert (made[0][rest] == MEAN).all()
  assert (made[1][rest] == 255).all()


def test_crop_is_a_window():
  image, label = tied(20, 5)
  made = run(augment.crop, image, label, 8)
  column = slice(1, 6)
  np.testing.assert_array_equal(made[0][:, column, 0], made[1][:, column])
  assert any(
    np.array_equal(made[1][:, column], label[y : y + 8]) for y in range(13)
  )


def test_crop_tries_again_until_enough_is_kept():
  image, label = noise(20, 40, labels=1)
  label[:, :10] = 1
  # Of the ten columns of label 1, one may get lost.
  bad, good = (0, 2), (0, 1)
  script = Script(*bad, *bad, *good, *bad)
  equal(augment.crop(script, image, label, 20), image[:, 1:21], label[:, 1:21])
  assert script.calls == 6
  script = Script(*bad * 31, 0, 20, *good)
  equal(augment.crop(script, image, label, 20), image[:, 20:], label[:, 20:])
  assert script.calls == 64
  label[label == 1] = 2  # other labels do not count
  script = Script(*bad, *good)
  augment.crop(script, image, label, 20)
  assert script.calls == 2


def test_crop_reaches_every_place():
  label = np.arange(30, dtype=np.uint8).reshape(5, 6) + 2
  image = np.zeros((5, 6, 3), np.uint8)
  generator = rng()
  corners = [
    int(augment.crop(generator, image, label, 3)[1][0, 0]) for _ in range(300)
  ]
  count = np.bincount(np.array(corners) - 2, minlength=30).reshape(5, 6)
  assert (count[:3, :4] > 8).all()
  assert count.sum() == count[:3, :4].sum()


@pytest.mark.parametrize(
  ('shape', 'size', 'inside'),
  [
    ((375, 500), 473, (352, 472)),
    ((10, 20), 17, (8, 16)),
    ((20, 10), 17, (16, 8)),
    ((1, 30), 17, (8, 16)),
    ((4, 4), 33, (32, 32)),
    ((9, 4), 5, (5, 5)),
  ],
)
def test_fit(shape, size, inside):
  image = np.full((*shape, 3), 7, np.uint8)
  label = np.ones(shape, np.uint8)
  made = augment.fit(None, image, label, size)
  wanted = np.full((size, size), 255, np.uint8)
  wanted[: inside[0], : inside[1]] = 1
  np.testing.assert_array_equal(made[1], wanted)
  np.testing.assert_array_equal(made[0][..., 1], np.where(wanted == 1, 7, 0))


def test_stretch_and_plain_differ_in_the_antialias():
  image, label = noise(40, 60)
  stretched = augment.stretch(None, image, label, 20)
  resized = augment.plain(None, image, label, 20)
  np.testing.assert_array_equal(stretched[1], resized[1])
  assert stretched[0].std() > resized[0].std() + 5
  np.testing.assert_array_equal(resized[0], transforms.resize_image(image, 20))


def test_short_side():
  image, label = noise(20, 41)
  made = augment.short_side(image, label, 10)
  pillow = [
    np.asarray(Image.fromarray(x).resize((20, 10), how))
    for x, how in ((image, Image.BILINEAR), (label, Image.NEAREST))
  ]
  equal(made, *pillow)
  assert augment.short_side(image[:, :1], label[:, :1], 3)[1].shape == (60, 3)


@pytest.mark.parametrize('short', [16, 20, 31])
def test_attnfd_crops_what_pillow_resized(short):
  image, label = noise(18, 23)
  script = Script(0.9, short, 1, 2, 0.9)
  made = augment.get('attnfd')(script, image, label, 12)
  size = short * 23 // 18, short
  wanted = [
    np.asarray(Image.fromarray(x).resize(size, how))[1:13, 2:14]
    for x, how in ((image, Image.BILINEAR), (label, Image.NEAREST))
  ]
  near(made[0], wanted[0])
  np.testing.assert_array_equal(made[1], wanted[1])


def test_attnfd_pads_right_and_below():
  image = np.full((10, 20, 3), 200, np.uint8)
  label = np.full((10, 20), 3, np.uint8)
  for recipe, fill in (
    (augment.get('attnfd'), 0),
    (augment.get('attnfd', fill=255), 255),
    (augment.get('attnfd_cityscapes'), 255),
  ):
    script = Script(0.9, 5, 0, 0, 0.9)
    made = recipe(script, image, label, 12)
    wanted = np.full((12, 12), fill, np.uint8)
    wanted[:5, :10] = 3
    np.testing.assert_array_equal(made[1], wanted)
    np.testing.assert_array_equal(
      made[0][..., 2], np.where(wanted == 3, 200, 0)
    )


def test_polyp_masks_end_where_theirs_is_a_half():
  label = noise(30, 44, labels=2)[1]
  image = np.zeros((30, 44, 3), np.uint8)
  mask = Image.fromarray(label * 255).resize((16, 16), Image.BILINEAR)
  made = augment.polyp(None, image, label, 16)[1]
  np.testing.assert_array_equal(made, np.asarray(mask) >= 128)


# What the resizes give.


def bilinear(image, y, x):
  at = np.meshgrid(y, x, indexing='ij')
  made = [
    scipy.ndimage.map_coordinates(
      image[..., i].astype(float), at, order=1, mode='nearest'
    )
    for i in range(3)
  ]
  return np.rint(np.stack(made, axis=-1))


@hypothesis.given(*[st.integers(1, 30)] * 4)
@hypothesis.settings(max_examples=50)
def test_sampling_is_bilinear_between_the_middles(rows, columns, tall, wide):
  image = noise(rows, columns)[0]
  made = transforms.sample_image(image, (tall, wide))
  y, x = (
    np.clip((np.arange(a) + 0.5) * b / a - 0.5, 0, b - 1)
    for a, b in ((tall, rows), (wide, columns))
  )
  near(made, bilinear(image, y, x))


def test_sampling_down_has_no_antialias():
  image = np.repeat(np.uint8([[[0], [10], [20], [30], [99], [7]]]), 3, axis=2)
  made = transforms.sample_image(image, (1, 2))
  np.testing.assert_array_equal(made[..., 0], [[10, 99]])
  made = transforms.sample_image(image, (1, 3))
  np.testing.assert_array_equal(made[..., 0], [[5, 25, 53]])


def test_sampling_labels_of_any_shape():
  label = noise(9, 14, labels=200)[1]
  for size in (5, 20):
    np.testing.assert_array_equal(
      transforms.sample_label(label, (size, size)),
      transforms.resize_label(label, size),
    )
  made = transforms.sample_label(label, (3, 28))
  np.testing.assert_array_equal(made, np.repeat(label[::3], 2, axis=1))


def test_bilinear_labels_go_to_the_heaviest():
  label = np.uint8([[0, 0, 0, 5, 5, 9, 9, 9]] * 2)
  made = transforms.resize_label_bilinear(label, 2)
  np.testing.assert_array_equal(made, [[0, 9]] * 2)
  np.testing.assert_array_equal(
    transforms.resize_label_bilinear(label[:, :2], 3), np.zeros((3, 3))
  )


# Recipes.


@hypothesis.given(
  st.sampled_from(augment.names()),
  st.integers(1, 24),
  st.integers(1, 24),
  st.integers(1, 24),
  st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=300)
def test_recipes_make_no_new_labels(name, rows, columns, size, seed):
  image = rng(seed).integers(0, 256, (rows, columns, 3)).astype(np.uint8)
  labels = np.uint8([1, 2, 7, 255, 0])[: 1 + seed % 5]
  label = rng(seed).choice(labels, (rows, columns))
  image.setflags(write=False)
  label.setflags(write=False)
  made = run(augment.get(name), image, label, size, seed=seed)
  assert made[0].shape == (size, size, 3)
  assert made[1].shape == (size, size)
  assert made[0].dtype == made[1].dtype == np.uint8
  if augment.is_soft(name):  # shares, and void where there was some
    assert (255 in made[1]) <= (255 in label)
    assert made[1].any() <= np.isin(label, (1, 255)).any()
  else:
    assert set(np.unique(made[1])) <= {*np.unique(label), *FILLS[name]}
  assert all(x.flags.c_contiguous for x in made)


@pytest.mark.parametrize('name', augment.names())
def test_long_and_thin_images(name):
  for shape in ((300, 1), (1, 300)):
    for seed in range(3):
      made = run(augment.get(name), *noise(*shape), 24, seed=seed)
      assert made[1].shape == (24, 24)


@pytest.mark.parametrize('name', augment.names())
def test_image_and_label_move_together(name):
  """White where the label is 1: still so, but for the rim of the shapes."""
  label = np.zeros((140, 180), np.uint8)
  label[20:80, 10:80] = label[70:132, 110:160] = 1
  image = np.repeat(label[..., None] * 255, 3, axis=2)
  for seed in range(8):
    made = run(augment.get(name), image, label, 128, seed=seed)
    if augment.is_soft(name):
      made = made[0], np.where(made[1] == 255, 255, made[1] > 127)
    known = made[1] != 255
    # Colours shift by 71 of 255 at most.
    agree = (made[0][..., 0] > 102) == (made[1] == 1)
    assert agree[known].mean() > 0.95
    assert known.mean() > 0.2
    assert (made[1] == 1).any()


@pytest.mark.parametrize('name', augment.names())
def test_recipes_are_functions_of_the_seed(name):
  image, label = noise(30, 44)
  recipe = augment.get(name)
  copy = pickle.loads(pickle.dumps(recipe))
  assert copy == recipe
  made = [run(recipe, image, label, 24, seed=seed) for seed in range(6)]
  again = [run(copy, image, label, 24, seed=seed) for seed in range(6)]
  for one, other in zip(made, again, strict=True):
    equal(one, *other)
  different = {(x.tobytes(), y.tobytes()) for x, y in made}
  assert len(different) == (1 if name in STILL else 6)
  equal((image, label), *noise(30, 44))  # left as they were


def test_what_is_made_is_not_what_was_given():
  for name in augment.names():
    image, label = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    for seed in range(4):
      made = run(augment.get(name), image, label, 8, seed=seed)
      assert not np.shares_memory(made[0], image), name
      assert not np.shares_memory(made[1], label), name


def test_chances():
  label = np.arange(6, dtype=np.uint8).reshape(2, 3)
  image = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
  ops = {
    augment.flip: 0.5,
    functools.partial(augment.flip, p=0.8, axis=0): 0.8,
    augment.quarter_turns: 0.5 * 3 / 4,
    functools.partial(augment.rotate, degrees=(90, 90)): 0.5,
    augment.blur: 0.5,
    augment.soft_blur: 0.5,
    augment.brightness_contrast: 0.5,
    augment.hue_saturation_value: 1,
  }
  generator = rng()
  for op, chance in ops.items():
    changed = 0
    for _ in range(300):
      made = op(generator, image, label)
      same = np.array_equal(made[0], image) and np.array_equal(made[1], label)
      changed += not same
    # Four standard deviations; a blur or shift too small to see is no change.
    assert abs(changed / 300 - chance) < 0.12 + 0.001, (op, changed)


def keep(rng, image, label, size):
  return image, label


@pytest.mark.parametrize(
  ('name', 'low', 'high'),
  [
    ('bam', 0.9, 1.1),
    ('bam_coco', 0.8, 1.25),
    ('hdmnet', 0.9, 1.1),
    ('hdmnet_coco', 0.8, 1.25),
    ('base', 0.5, 2.0),
  ],
)
def test_ranges_of_scale_and_angle(name, low, high):
  recipe = augment.get(name)
  last = augment.stretch if name.startswith('hdmnet') else augment.crop
  assert recipe.last is last
  recipe = dataclasses.replace(recipe, last=keep)
  image = np.zeros((120, 120, 3), np.uint8)
  label = np.zeros((120, 120), np.uint8)
  label[54:66, 96:108] = 1  # 42 pixels right of the middle
  generator = rng()
  factors, angles, flipped = [], [], 0
  for _ in range(300):
    made = recipe(generator, image, label, None)[1]
    factors.append(len(made) / 120)
    y, x = (np.mean(at) - (len(made) - 1) / 2 for at in np.nonzero(made == 1))
    flipped += x < 0
    angles.append(np.rad2deg(np.arctan2(y, abs(x))))
  span = high - low
  assert low - 0.01 <= min(factors) < low + 0.05 * span
  assert high + 0.01 >= max(factors) > high - 0.05 * span
  assert abs(np.mean(factors) - (low + high) / 2) < 0.08 * span
  angles = np.abs(angles)
  assert 9 < max(angles) < 12.5
  assert 95 < sum(angles > 1.5) < 165  # half of them, less those of few degrees
  assert 115 < flipped < 185


def test_range_of_attnfd_scales(monkeypatch):
  shapes, window = [], augment._window

  def spy(image, label, shape, corner, inside):
    shapes.append(shape)
    return window(image, label, shape, corner, inside)

  monkeypatch.setattr(augment, '_window', spy)
  generator = rng()
  for _ in range(300):
    augment.get('attnfd')(generator, *noise(20, 10), 5)
  assert {shape[1] for shape in shapes} == set(range(2, 11))
  assert all(shape[0] == 2 * shape[1] for shape in shapes)


def test_polyp_angles():
  image, label = np.zeros((61, 61, 3), np.uint8), np.zeros((61, 61), np.uint8)
  label[28:33, 48:53] = 1
  generator = rng()
  angles = []
  for _ in range(300):
    made = augment.rotate_nearest(generator, image, label, (-90, 90))[1]
    y, x = (np.mean(at) - 30 for at in np.nonzero(made))
    angles.append(np.rad2deg(np.arctan2(y, x)))
  assert -92 < min(angles) < -85
  assert 85 < max(angles) < 92
  assert abs(np.mean(angles)) < 12


def test_the_table():
  assert augment.names() == (*augment.RECIPES,)
  assert augment.get('ifa') == augment.Turned(0.5, False)
  assert augment.get('ifa_deepglobe') == augment.Turned(0.8, True)
  assert augment.get('attnfd').fill == 0
  for name in ('attnfd_void', 'attnfd_cityscapes'):
    assert augment.get(name) == augment.get('attnfd', fill=255)
  assert augment.get('base', factors=(1, 1)).factors == (1, 1)
  with pytest.raises(
    ValueError, match="no augmentation 'bma'; there are: none"
  ):
    augment.get('bma')
  with pytest.raises(
    ValueError, match="'bam' has no fill; it has: factors, la"
  ):
    augment.get('bam', fill=3)
  with pytest.raises(ValueError, match="'none' has no fill; it has: no fields"):
    augment.get('none', fill=3)


def test_soft_labels_are_shares_of_label_one():
  """A border between two pixels; half of one, at a third of the size."""
  label = np.zeros((6, 6), np.uint8)
  label[:, :3] = 1
  image = np.zeros((6, 6, 3), np.uint8)
  _, same = run(augment.get('polyp_soft'), image, label, 6)
  np.testing.assert_array_equal(same, np.where(label == 1, augment.SOFT, 0))
  _, small = run(augment.get('polyp_soft'), image, label, 3)
  assert (small[:, 0] > small[:, 1]).all()
  assert abs(int(small[1, 1]) - augment.SOFT // 2) <= 1
  label[:, 5] = 255
  _, void = run(augment.get('polyp_soft'), image, label, 6)
  assert (void[:, 5] == 255).all()


@pytest.mark.parametrize('name', augment.names())
def test_fixed_recipes_have_no_chance(name):
  """Of an image, ten times: the same iff the recipe is said to be fixed."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (40, 50, 3), np.uint8)
  label = rng.integers(0, 2, (40, 50), np.uint8)
  made = {
    augment.get(name)(np.random.default_rng(seed), image, label, 32)[
      0
    ].tobytes()
    for seed in range(10)
  }
  assert (len(made) == 1) == augment.is_fixed(name)
