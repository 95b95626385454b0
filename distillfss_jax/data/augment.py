"""What the sources' loaders do to a record before a model sees it.

A *recipe* is `recipe(rng, image, label, size)`: it takes a record's image uint8
[H, W, 3] and label uint8 [H, W] (0 background, 1..n, 255 void) and gives them
as [size, size, 3] and [size, size]. `get` finds one by its name. Recipes are
made of small functions `op(rng, image, label, ...) -> (image, label)`, which
leave what they are given untouched and take all their chance from `rng`, a
`numpy.random.Generator`. All can be pickled, so that grain's workers run them.

Parity: pixels are rounded to 8 bits after every op. BAM, HDMNet and the base
learner keep floats from the file to the model: up to half a level per op.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from distillfss_jax.data import transforms
from distillfss_jax.types import SOFT, VOID

MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean in 8 bits
BLACK = (0, 0, 0)


def flip(rng, image, label, p=0.5, axis=1):
  """Mirrors left and right (axis 1) or up and down (axis 0)."""
  if rng.random() < p:
    image, label = np.flip(image, axis), np.flip(label, axis)
  return image, label


def quarter_turns(rng, image, label, p=0.5):
  """Turns by 0, 90, 180 or 270 degrees."""
  if rng.random() < p:
    turns = rng.integers(4)
    image, label = np.rot90(image, turns), np.rot90(label, turns)
  return image, label


def shuffle_tiles(rng, image, label):
  """Cuts into 2 x 2 tiles and deals these anew.

  Tiles of odd sizes differ in shape; they change places with their like only.
  """
  rows, columns = label.shape
  tiles = {}
  for y in (slice(0, rows // 2), slice(rows // 2, rows)):
    for x in (slice(0, columns // 2), slice(columns // 2, columns)):
      tiles.setdefault(label[y, x].shape, []).append((y, x))
  made_image, made_label = np.empty_like(image), np.empty_like(label)
  for alike in tiles.values():
    for place, i in zip(alike, rng.permutation(len(alike)), strict=True):
      made_image[place], made_label[place] = image[alike[i]], label[alike[i]]
  return made_image, made_label


def scale(rng, image, label, factors):
  """Scales both sides by one factor; bilinear without antialias, nearest."""
  factor = rng.uniform(*factors)
  shape = tuple(max(round(side * factor), 1) for side in label.shape)
  steps = (1 / factor, 1 / factor)
  return (
    transforms.sample_image(image, shape, steps),
    transforms.sample_label(label, shape, steps),
  )


def rotate(rng, image, label, degrees, p=0.5, colour=MEAN_COLOUR, void=VOID):
  """Rotates about the middle, same size; bilinear, labels nearest.

  What comes in from outside is `colour`, and `void` in the label.

  Parity: OpenCV, which the originals use, rounds positions to 1/32 pixel.
  """
  if rng.random() >= p:
    return image, label
  angle = rng.uniform(*degrees)
  rows, columns = label.shape
  # A frame of one pixel: the outermost pixels fade into the colour.
  framed = _place(image, (1, 1), (rows + 2, columns + 2), colour)
  inverse = _rotation(label.shape, angle, frame=1)

  def one(plane):
    made = Image.fromarray(plane).transform(
      (columns, rows),
      Image.AFFINE,
      inverse,
      Image.BILINEAR,
      fillcolor=float(plane[0, 0]),  # the frame's
    )
    return np.asarray(made)

  turned = transforms.by_plane(one, framed, label.shape)
  return turned, _rotate_nearest(label, angle, void)


def rotate_nearest(rng, image, label, degrees, colour=BLACK, void=0):
  """Rotates about the middle, same size; image and label nearest."""
  angle = rng.uniform(*degrees)
  return (
    _rotate_nearest(image, angle, colour),
    _rotate_nearest(label, angle, void),
  )


def blur(rng, image, label, p=0.5):
  """Blurs with OpenCV's 5 x 5 Gaussian; mirrored at the border.

  Parity: sigma 0 stands for 1.1, but for five taps OpenCV takes binomial ones,
  (1, 4, 6, 4, 1) / 16.
  """
  if rng.random() >= p:
    return image, label
  x = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode='reflect').astype(np.uint16)
  x = x[:-4] + x[4:] + 4 * (x[1:-3] + x[3:-1]) + 6 * x[2:-2]
  x = x[:, :-4] + x[:, 4:] + 4 * (x[:, 1:-3] + x[:, 3:-1]) + 6 * x[:, 2:-2]
  # 256 times the mean is at most 65280: 16 bits are enough to round, too.
  return ((x + 128) >> 8).astype(np.uint8), label


def soft_blur(rng, image, label, p=0.5, radii=(0, 1)):
  """Blurs with Pillow's Gaussian of a random radius."""
  if rng.random() < p:
    kernel = ImageFilter.GaussianBlur(rng.uniform(*radii))
    image = np.asarray(Image.fromarray(image).filter(kernel))
  return image, label


def brightness_contrast(rng, image, label, p=0.5, limit=0.2):
  """Makes x to x * (1 + contrast) + 255 * brightness, each within the limit."""
  if rng.random() >= p:
    return image, label
  contrast, brightness = rng.uniform(-limit, limit, 2)
  levels = np.arange(256) * (1 + contrast) + 255 * brightness
  # Parity: cut off, not rounded, as albumentations' tables are.
  return np.clip(levels, 0, 255).astype(np.uint8)[image], label


def hue_saturation_value(rng, image, label, hue=20, saturation=30, value=20):
  """Shifts all three in 8-bit HSV, each by up to so much; hues are 0..179.

  Parity: fractions of the shifted levels are cut off, as albumentations' tables
  cut them.
  """
  shifts = rng.uniform(-1, 1, 3) * (hue, saturation, value)
  levels = np.arange(256)
  hues = np.mod(levels + shifts[0], 180).astype(np.uint8)
  saturations = np.clip(levels + shifts[1], 0, 255).astype(np.uint8)
  values = np.clip(levels + shifts[2], 0, 255).astype(np.uint8)
  h, s, v = to_hsv(image)
  return from_hsv(hues[h], saturations[s], values[v]), label


def to_hsv(image):
  """Gives hue 0..179, saturation and value 0..255, as OpenCV does in 8 bits.

  Args:
    image: uint8 [H, W, 3].

  Returns:
    Three integer arrays [H, W].
  """
  red, green, blue = (image[..., i].astype(np.int32) for i in range(3))
  value = np.maximum(np.maximum(red, green), blue)
  span = value - np.minimum(np.minimum(red, green), blue)
  # In sixths of the circle, times span; the first of equal colours counts.
  hue = np.where(
    value == red,
    green - blue,
    np.where(value == green, blue - red + 2 * span, red - green + 4 * span),
  )
  hue = (hue * _per(180 / 6)[span] + 2048) >> 12
  hue += np.where(hue < 0, 180, 0)
  return hue, (span * _per(255)[value] + 2048) >> 12, value


def from_hsv(hue, saturation, value):
  """Undoes `to_hsv` as far as 8 bits can; uint8 [H, W, 3].

  Parity: rounds; OpenCV does so or cuts off, as it was built.
  """
  # How far each colour lies below the value, as a part of saturation * value.
  sixths = (np.array([[5], [3], [1]]) + np.arange(180) / 30) % 6
  below = np.clip(np.minimum(sixths, 4 - sixths), 0, 1).astype(np.float32)
  depth = saturation.astype(np.float32) * value / np.float32(255)
  made = np.empty((*hue.shape, 3), np.uint8)
  for colour in range(3):
    level = value - depth * below[colour][hue]
    np.add(level, 0.5, out=made[..., colour], casting='unsafe')
  return made


def short_side(image, label, size):
  """Resizes so that the shorter side is `size`: AttnFD's validation.

  No recipe: what comes out keeps the aspect. Pillow's antialiased bilinear;
  labels nearest.
  """
  shape = short_side_shape(label.shape, size)
  return _window(image, label, shape, (0, 0), shape)


def short_side_shape(shape, size):
  """Rows and columns that `short_side` makes of an image of a shape."""
  return tuple(size * x // min(shape) for x in shape)


def plain(rng, image, label, size):
  """Resizes without keeping the aspect: DCAMA's, IFA's on the source data."""
  return (
    transforms.resize_image(image, size),
    transforms.resize_label(label, size),
  )


def stretch(rng, image, label, size):
  """Resizes without keeping the aspect, as OpenCV does: HDMNet's."""
  shape = (size, size)
  return (
    transforms.sample_image(image, shape),
    transforms.sample_label(label, shape),
  )


def fitted(side, longest, size):
  """How long `fit` makes a side of an image; integers, or arrays of them.

  Parity: both sides are cut to multiples of 8, so that even the longer one
  falls short of `size` (472 of 473). The original makes nothing of a side below
  8; here it stays 8.
  """
  cut = side * size // longest // 8 * 8
  least = min(8, size)
  return cut + (cut < least) * (least - cut)


def fit(rng, image, label, size):
  """Fits the longer side and pads with black and void: BAM's validation.

  The image lies in the upper left corner; see `fitted`.
  """
  shape = tuple(fitted(x, max(label.shape), size) for x in label.shape)
  image = transforms.sample_image(image, shape)
  label = transforms.sample_label(label, shape)
  canvas = (size, size)
  return (
    _place(image, (0, 0), canvas, BLACK),
    _place(label, (0, 0), canvas, VOID),
  )


def crop(rng, image, label, size):
  """Cuts out a square that keeps 85 % of the pixels of label 1.

  The 32nd try is taken as it is. Smaller images are first padded on all sides
  with the mean colour and void.

  Parity: for episodes label 1 is the foreground; when the base learner trains
  it is merely the first class, an accident of the original that is kept.
  """
  shape = tuple(max(side, size) for side in label.shape)
  corner = tuple((b - a) // 2 for a, b in zip(label.shape, shape, strict=True))
  image = _place(image, corner, shape, MEAN_COLOUR)
  label = _place(label, corner, shape, VOID)
  foreground = label == 1
  wanted = 0.85 * np.count_nonzero(foreground)
  for _ in range(32):
    y, x = (int(rng.integers(side - size + 1)) for side in shape)
    window = slice(y, y + size), slice(x, x + size)
    if np.count_nonzero(foreground[window]) >= wanted:
      break
  return image[window].copy(), label[window].copy()


def polyp(rng, image, label, size):
  """Resizes without keeping the aspect: Polyp-PVT's and KDAS's.

  Parity: the originals resize masks like images and train on soft borders. Our
  labels are integers: the border is where their mask is a half, which nearest
  neighbour would miss by up to half a pixel, and more where it shrinks.
  """
  return (
    transforms.resize_image(image, size),
    transforms.resize_label_bilinear(label, size),
  )


def polyp_soft(rng, image, label, size):
  """The same with the originals' soft masks: shares of label 1, of `SOFT`.

  Void stays void.
  """
  # Parity: the originals have 255 levels; the last one is void here.
  mask = Image.fromarray((label == 1).astype(np.uint8) * SOFT)
  share = np.asarray(mask.resize((size, size), Image.BILINEAR))
  void = transforms.resize_label(label, size) == VOID
  return (
    transforms.resize_image(image, size),
    np.where(void, np.uint8(VOID), share),
  )


@dataclasses.dataclass(frozen=True)
class Spun:
  """Rotates by up to 90 degrees and flips, then resizes.

  Parity: the originals' default is without: their flag takes effect only when
  written on the command line. What comes in from outside is background.
  """

  last: Callable = polyp  # a recipe that brings it to its size

  def __call__(self, rng, image, label, size):
    """See the head of the file."""
    image, label = rotate_nearest(rng, image, label, (-90, 90))
    image, label = flip(rng, image, label, axis=0)
    image, label = flip(rng, image, label, axis=1)
    return self.last(rng, image, label, size)


@dataclasses.dataclass(frozen=True)
class Perturbed:
  """Scales, rotates, blurs and flips: BAM, HDMNet and their base learner."""

  factors: tuple[float, float]  # of the scale
  last: Callable = crop  # a recipe that brings it to its size

  def __call__(self, rng, image, label, size):
    """See the head of the file."""
    image, label = scale(rng, image, label, self.factors)
    image, label = rotate(rng, image, label, (-10, 10))
    image, label = blur(rng, image, label)
    image, label = flip(rng, image, label)
    return self.last(rng, image, label, size)


@dataclasses.dataclass(frozen=True)
class Turned:
  """Flips, turns and recolours: IFA's queries, made of support images.

  Parity: the original changes colours before it resizes. Here they change
  after, which hardly differs and costs the same for images of any size.
  """

  flips: float = 0.5  # probability of each
  tiles: bool = False  # whether to shuffle 2 x 2 tiles

  def __call__(self, rng, image, label, size):
    """See the head of the file."""
    image, label = flip(rng, image, label, self.flips, axis=1)
    image, label = flip(rng, image, label, self.flips, axis=0)
    image, label = quarter_turns(rng, image, label)
    if self.tiles:
      image, label = shuffle_tiles(rng, image, label)
    image, label = plain(rng, image, label, size)
    image, label = brightness_contrast(rng, image, label)
    return hue_saturation_value(rng, image, label)


@dataclasses.dataclass(frozen=True)
class Cropped:
  """Flips, crops at a random scale and blurs: AttnFD's DeepLab.

  Parity: images smaller than the crop are padded with black, and that counts as
  background (`fill` 0) for VOC, SBD and COCO; 255 is the repair, and what
  Cityscapes has.
  """

  fill: int = 0  # label of the padding
  factors: tuple[float, float] = (0.5, 2.0)  # shorter side / size

  def __call__(self, rng, image, label, size):
    """See the head of the file."""
    image, label = flip(rng, image, label)
    low, high = (int(factor * size) for factor in self.factors)
    short = max(int(rng.integers(low, high + 1)), 1)
    shape = tuple(x * short // min(label.shape) for x in label.shape)
    corner = tuple(int(rng.integers(max(x - size, 0) + 1)) for x in shape)
    inside = tuple(min(x, size) for x in shape)
    image, label = _window(image, label, shape, corner, inside)
    image = _place(image, (0, 0), (size, size), BLACK)
    label = _place(label, (0, 0), (size, size), self.fill)
    return soft_blur(rng, image, label)


RECIPES = {
  'none': plain,
  'stretch': stretch,
  'fit': fit,
  'bam': Perturbed((0.9, 1.1)),
  'bam_coco': Perturbed((0.8, 1.25)),
  'hdmnet': Perturbed((0.9, 1.1), stretch),
  'hdmnet_coco': Perturbed((0.8, 1.25), stretch),
  'base': Perturbed((0.5, 2.0)),
  'ifa': Turned(),
  'ifa_deepglobe': Turned(flips=0.8, tiles=True),
  'attnfd': Cropped(),
  'attnfd_void': Cropped(fill=VOID),  # the repair
  'attnfd_cityscapes': Cropped(fill=VOID),
  'polyp': polyp,
  'polyp_augmented': Spun(),
  'polyp_soft': polyp_soft,
  'polyp_soft_augmented': Spun(polyp_soft),
}


def is_soft(name):
  """Whether a recipe gives soft labels."""
  return name.startswith('polyp_soft')


def is_fixed(name):
  """Whether a recipe gives the same of a record each time: it has no chance."""
  return name in ('none', 'stretch', 'fit', 'polyp', 'polyp_soft')


def names():
  """Lists the recipes."""
  return tuple(RECIPES)


def get(name, **fields):
  """Finds a recipe by its name.

  Args:
    name: one of `names()`.
    **fields: of the recipe that shall be others than usual; fill=255 for
      'attnfd'.

  Raises:
    ValueError: for an unknown name or field; says which there are.
  """
  if name not in RECIPES:
    raise ValueError(
      f'no augmentation {name!r}; there are: {", ".join(names())}'
    )
  recipe = RECIPES[name]
  known = getattr(recipe, '__dataclass_fields__', {})
  if unknown := sorted(set(fields) - set(known)):
    raise ValueError(
      f'augmentation {name!r} has no {", ".join(unknown)}; it has: '
      f'{", ".join(known) or "no fields"}'
    )
  return dataclasses.replace(recipe, **fields) if fields else recipe


def _place(array, corner, shape, fill):
  """Lays an array on a canvas filled with a colour or a label."""
  rows, columns = array.shape[:2]
  if (rows, columns) == tuple(shape):
    return array
  canvas = np.empty((*shape, *array.shape[2:]), np.uint8)
  canvas[:] = fill
  y, x = corner
  canvas[y : y + rows, x : x + columns] = array
  return canvas


def _rotation(shape, degrees, frame=0):
  """Pillow's six numbers: where each result's pixel comes from.

  Counter-clockwise about the middle; the source has a frame around it.
  """
  cosine = math.cos(math.radians(degrees))
  sine = math.sin(math.radians(degrees))
  y, x = (side / 2 for side in shape)
  return (
    cosine, -sine, x + frame - cosine * x + sine * y,
    sine, cosine, y + frame - sine * x - cosine * y,
  )  # fmt: skip


def _rotate_nearest(array, degrees, fill):
  rows, columns = array.shape[:2]
  inverse = _rotation((rows, columns), degrees)
  made = Image.fromarray(array).transform(
    (columns, rows), Image.AFFINE, inverse, Image.NEAREST, fillcolor=fill
  )
  return np.asarray(made)


def _window(image, label, shape, corner, inside):
  """Cuts a window [*inside] at a corner out of both resized to a shape.

  Pillow's BILINEAR and NEAREST. Only the window is made: what lies beyond it
  would be most of the work.
  """
  steps = [a / b for a, b in zip(label.shape, shape, strict=True)]
  first = [c * step for c, step in zip(corner, steps, strict=True)]
  last = [
    min((c + count) * step, side)
    for c, count, step, side in zip(
      corner, inside, steps, label.shape, strict=True
    )
  ]
  resized = Image.fromarray(image).resize(
    inside[::-1], Image.BILINEAR, box=(*first[::-1], *last[::-1])
  )
  rows, columns = (
    np.minimum((np.arange(count) + c + 0.5) * step, side - 1).astype(np.int64)
    for c, count, step, side in zip(
      corner, inside, steps, label.shape, strict=True
    )
  )
  return np.asarray(resized), label[rows[:, None], columns]


def _per(whole):
  """OpenCV's table of whole / i in 1/4096; 0 for i = 0."""
  parts = np.rint(whole * 4096 / np.maximum(np.arange(256), 1))
  return np.where(np.arange(256) > 0, parts, 0).astype(np.int32)
