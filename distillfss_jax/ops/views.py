"""Views of annotated images: augmentation on the device, inside the step.

A view is a window of an image, turned, mirrored, scaled and stretched, with its
label, and then with other colours. Shapes are static and all chance comes from
a key, so that a step and its views are one compiled program and a run that was
stopped goes on with the same views. Images are read at the resolution that a
view needs: from averages of 2 x 2 and 4 x 4 pixels where it shrinks them.

*Recolouring* is the part that carries a model from one staining, light or
camera to another: the luminance through a ramp between two random colours,
which is dark to light or light to dark.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from distillfss_jax.ops import random

Array = jax.Array

LUMA = (0.299, 0.587, 0.114)  # of RGB, ITU-R BT.601
_LEVELS = 3  # full resolution, 2 x 2 and 4 x 4 averages
QUANTILES = (0.01, 0.995)  # of the luminance, between which it is stretched
_SAMPLE = 8  # every so many rows and columns tell the quantiles


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Where a view lies in its image.

  sides: least and most pixels that the side of a whole image may have in a
    view, log-uniform.
  turned: share of views that are turned by any angle; the others are by 0, 90,
    180 or 270 degrees.
  mirrored: share of views that are mirrored.
  aspect: the sides are scaled by e^a and e^-a, a within +-aspect.
  aimed: share of views that show a given place, such as an object: of small
    ones others would hardly ever show any (nnU-Net, 1904.08128, takes a third).
  """

  sides: tuple[float, float] = (96.0, 384.0)
  turned: float = 0.5
  mirrored: float = 0.5
  aspect: float = 0.15
  aimed: float = 1 / 3


@dataclasses.dataclass(frozen=True)
class Appearance:
  """How the colours of a view may change; every share is of all views.

  gamma, gamma_share: exponents e^g, g within +-gamma.
  recoloured: share whose luminance goes through a ramp of colours.
  light: share of the recoloured whose dark becomes light.
  inverted: share of the others that become their negative.
  gain, gain_share: factors e^g of single channels.
  contrast, brightness, tone_share: factors e^c about the mean, and e^b.
  permuted: share whose channels change places.
  noise: largest deviation of the noise, of values in [0, 1].
  blurred: share that is blurred by a 3 x 3 binomial.
  kept: share in which none of this changes anything.
  """

  gamma: float = 0.7
  gamma_share: float = 0.5
  recoloured: float = 0.35
  light: float = 0.7
  inverted: float = 0.2
  gain: float = 0.35
  gain_share: float = 0.5
  contrast: float = 0.7
  brightness: float = 0.4
  tone_share: float = 0.8
  permuted: float = 0.5
  noise: float = 0.04
  blurred: float = 0.25
  kept: float = 0.0


def atlas(images: Array) -> Array:
  """Images uint8 [n, S, S, 3] and their averages as [n, pixels, 3] uint8.

  Row by row: the image, then every 2 x 2, then every 4 x 4 pixels' average. It
  is what `draw` reads, and is made once where the images stay the same.

  Raises:
    ValueError: the images are not square, or S is no multiple of 4.
  """
  n, side, width, channels = images.shape
  least = 2 ** (_LEVELS - 1)
  if side != width or side % least:
    raise ValueError(
      f'images are {side}x{width}; views are made of squares whose side is a '
      f'multiple of {least}: resize them'
    )
  x, parts = images.astype(jnp.float32), []
  for level in range(_LEVELS):
    if level:
      half = x.shape[1] // 2
      x = x.reshape(n, half, 2, half, 2, channels).mean((2, 4))
    parts.append(jnp.round(x).astype(jnp.uint8).reshape(n, -1, channels))
  return jnp.concatenate(parts, 1)


def draw(
  key: Array,
  images: Array,
  labels: Array,
  which: Array,
  size: int,
  geometry: Geometry = Geometry(),
  appearance: Appearance | None = Appearance(),
  places: Array | None = None,
) -> tuple[Array, Array]:
  """Random views and their labels.

  Args:
    key: all chance comes from it.
    images: `atlas` of [n, S, S, 3].
    labels: [n, S, S] integers; or values of any dtype, or [n, S, S, k] of them,
      nearest pixels of which are taken.
    which: int [v], the image of each view.
    size: side of a view.
    geometry: where it lies.
    appearance: how its colours change; None leaves them.
    places: [n, k, 2], rows and columns in each image to aim at (`places_of`).

  Returns:
    images float32 [v, size, size, 3] in [0, 1], labels [v, size, size].
  """
  if images.shape[0] * images.shape[1] > 2**31:
    raise ValueError(
      f'{len(images)} images of {labels.shape[1]} pixels are more than 32 bits '
      'can count: take fewer or smaller ones'
    )
  keys = jax.random.split(key, 3 * len(which)).reshape(3, -1)

  def aim(key, image):
    return places[image, jax.random.randint(key, (), 0, places.shape[1])]

  def one(key, place):
    return frame(key, labels.shape[1], size, geometry, place)

  if places is None:
    frames = jax.vmap(lambda key: one(key, None))(keys[0])
  else:
    frames = jax.vmap(one)(keys[0], jax.vmap(aim)(keys[2], which))
  seen, known = look(images, labels, which, frames, size)
  if appearance is not None:
    seen = jax.vmap(lambda k, x: recolour(k, x, appearance))(keys[1], seen)
  return seen, known


def places_of(key: Array, labels: Array, ways: int, count: int) -> Array:
  """Random pixels of the objects, each class as often as the others.

  Args:
    key: of the chance.
    labels: [n, S, S] integers, 1..ways the classes.
    ways: how many.
    count: of pixels.

  Returns:
    float32 [n, count, 2], rows and columns of their middles; any pixels of an
    image without objects.
  """
  n, side = labels.shape[:2]
  flat = labels.reshape(n, -1)

  def of_image(key, labels):
    masks = labels == jnp.arange(1, 1 + ways)[:, None]
    masks = jnp.where(masks.any(), masks, True)
    upto = jnp.cumsum(masks, 1)  # [ways, pixels]
    keys = jax.random.split(key)
    shown = jnp.log(masks.any(1).astype(jnp.float32))
    way = jax.random.categorical(keys[0], shown, shape=(count,))
    chance = jax.random.uniform(keys[1], (count,))
    number = jnp.floor(chance * upto[way, -1]).astype(upto.dtype)
    found = jax.vmap(lambda n: jnp.searchsorted(upto[n], number, side='right'))(
      jnp.arange(ways)
    )
    return found[way, jnp.arange(count)]

  # One image at a time: there may be many, and each takes its size per class.
  index = jax.lax.map(lambda x: of_image(*x), (jax.random.split(key, n), flat))
  return jnp.stack([index // side, index % side], -1) + 0.5


def frame(
  key: Array,
  side: int,
  size: int,
  geometry: Geometry,
  place: Array | None = None,
) -> Array:
  """A random affine map [2, 3] from a view's pixels to its image's.

  It takes (row, column, 1), counted from the middle of the view, to a row and
  column of the image, whose corner is (0, 0).

  Args:
    key: of the chance.
    side: of the image.
    size: of the view.
    geometry: what may happen.
    place: a row and column that the view shows if it is an aimed one.
  """
  k = jax.random.split(key, 6)
  low, high = (math.log(x) for x in geometry.sides)
  wanted = jnp.exp(jax.random.uniform(k[0], minval=low, maxval=high))
  any_angle = jax.random.uniform(k[1], maxval=2 * math.pi)
  quarter = jnp.round(any_angle * 2 / math.pi) * (math.pi / 2)
  chances = jax.random.uniform(k[2], (2,))
  angle = jnp.where(chances[0] < geometry.turned, any_angle, quarter)
  mirror = jnp.where(chances[1] < geometry.mirrored, -1.0, 1.0)
  aspect = jnp.exp(
    jax.random.uniform(k[3], minval=-geometry.aspect, maxval=geometry.aspect)
  )
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  turn = jnp.array([[cos, -sin], [sin, cos]]) * jnp.array([1.0, mirror])
  pixels = side / wanted * jnp.array([[aspect], [1 / aspect]])
  # Inside the image where the view is smaller, the image inside it elsewhere.
  room = jnp.abs(side - size * pixels[:, 0]) / 2
  off = jax.random.uniform(k[4], (2,), minval=-1.0)
  middle = side / 2 + room * off
  if place is not None:
    # Not in the middle: objects are met at all places of a view.
    near = place + off * size * pixels[:, 0] / 4
    near = jnp.clip(near, side / 2 - room, side / 2 + room)
    aimed = jax.random.uniform(k[5]) < geometry.aimed
    middle = jnp.where(aimed, near, middle)
  return jnp.concatenate([turn * pixels, middle[:, None]], 1)


def look(
  images: Array, labels: Array, which: Array, frames: Array, size: int
) -> tuple[Array, Array]:
  """What is seen through frames: bilinear, labels nearest.

  Beyond its border an image goes on mirrored, and so does its label.

  Args:
    images: `atlas` of [n, S, S, 3].
    labels: [n, S, S], or [n, S, S, k].
    which: int [v], the image of each frame.
    frames: [v, 2, 3], as `frame` makes them.
    size: side of a view.

  Returns:
    float32 [v, size, size, 3] in [0, 1], and labels [v, size, size, ...].
  """
  n, side = labels.shape[:2]
  steps = jnp.arange(size) + 0.5 - size / 2
  rows, columns = jnp.meshgrid(steps, steps, indexing='ij')
  ones = jnp.ones_like(rows)
  grid = jnp.stack([rows, columns, ones], -1)
  places = jnp.einsum('vij,yxj->vyxi', frames, grid, precision='highest')
  inside = jnp.abs((places + side) % (2 * side) - side)
  first = which[:, None, None] * side**2
  nearest = jnp.minimum(inside.astype(jnp.int32), side - 1)
  known = labels.reshape(n * side**2, *labels.shape[3:])[
    first + nearest[..., 0] * side + nearest[..., 1]
  ]

  shrunk = jnp.sqrt(jnp.abs(jnp.linalg.det(frames[:, :, :2])))
  level = jnp.clip(jnp.round(jnp.log2(shrunk)), 0, _LEVELS - 1)
  level = level.astype(jnp.int32)
  widths = [side >> i for i in range(_LEVELS)]
  starts = [sum(w * w for w in widths[:i]) for i in range(_LEVELS)]
  width = jnp.asarray(widths)[level][:, None, None]
  start = which * images.shape[1] + jnp.asarray(starts)[level]
  start = start[:, None, None]
  inside = inside / (2.0 ** level[:, None, None, None]) - 0.5
  inside = jnp.clip(inside, 0, width[..., None] - 1)
  low = inside.astype(jnp.int32)
  share = inside - low
  high = jnp.minimum(low + 1, width[..., None] - 1)
  flat = images.reshape(-1, images.shape[-1])

  def at(y, x):
    return flat[start + y * width + x].astype(jnp.float32)

  down, right = share[..., :1], share[..., 1:]
  (y0, x0), (y1, x1) = (jnp.moveaxis(p, -1, 0) for p in (low, high))
  top = at(y0, x0) * (1 - right) + at(y0, x1) * right
  bottom = at(y1, x0) * (1 - right) + at(y1, x1) * right
  return (top * (1 - down) + bottom * down) / 255, known


def luminance(image: Array) -> Array:
  """[..., 3] to [...]."""
  return image @ jnp.asarray(LUMA, image.dtype)


def stretched(values: Array) -> Array:
  """[h, w] between its 1st and 99.5th percentile, as [0, 1]."""
  low, high = jnp.quantile(values[::_SAMPLE, ::_SAMPLE], jnp.asarray(QUANTILES))
  return jnp.clip((values - low) / jnp.maximum(high - low, 1e-3), 0, 1)


def recolour(key: Array, image: Array, appearance: Appearance) -> Array:
  """A view [h, w, 3] in [0, 1] in other colours."""
  a = appearance
  k = jax.random.split(key, 8)
  chance = jax.random.uniform(k[0], (8,))

  def between(key, bound, shape=()):
    return jnp.exp(jax.random.uniform(key, shape, minval=-bound, maxval=bound))

  x = jnp.where(
    chance[0] < a.gamma_share,
    jnp.maximum(image, 1e-6) ** between(k[1], a.gamma),
    image,
  )
  ramp = _ramp(k[2], stretched(luminance(x)), chance[2] < a.light)
  negative = jnp.where(chance[3] < a.inverted, 1 - x, x)
  x = jnp.where(chance[1] < a.recoloured, ramp, negative)
  x = jnp.where(chance[4] < a.gain_share, x * between(k[3], a.gain, (3,)), x)
  contrast, brightness = between(k[4], jnp.array([a.contrast, a.brightness]), 2)
  mean = x.mean((0, 1))
  toned = ((x - mean) * contrast + mean) * brightness
  x = jnp.where(chance[5] < a.tone_share, toned, x)
  order = jax.random.permutation(k[5], 3)
  x = x @ jnp.where(chance[6] < a.permuted, jnp.eye(3)[order], jnp.eye(3))
  x = jnp.where(chance[7] < a.blurred, _blurred(x), x)
  deviation = a.noise * jax.random.uniform(k[6])
  x = jnp.clip(x + deviation * _noise(k[7], x.shape), 0, 1)
  if not a.kept:
    return x
  kept = jax.random.uniform(jax.random.fold_in(key, len(k))) < a.kept
  return jnp.where(kept, image, x)


def _ramp(key, values, light):
  """[h, w] in [0, 1] through a ramp from a dark colour to a light one."""
  dark, bright = jax.random.uniform(key, (2, 3))
  dark, bright = 0.5 * dark, 0.5 + 0.5 * bright
  share = jnp.where(light, 1 - values, values)[..., None]
  return dark + (bright - dark) * share


def _blurred(x):
  """[h, w, 3] through (1, 2, 1) / 4 along both axes; borders repeat."""
  x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)), mode='edge')
  x = (x[:-2] + 2 * x[1:-1] + x[2:]) / 4
  return (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4


def _noise(key, shape):
  """Uniform noise of deviation 1: a counter costs less than normal numbers."""
  counter = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
  bits = random.fold(random.seed_of(key), counter)
  return (bits.astype(jnp.float32) / 2.0**32 - 0.5) * math.sqrt(12)
