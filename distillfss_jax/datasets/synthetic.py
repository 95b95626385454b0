"""Synthetic nuclei: microscopy-like images from a seed, without a disk.

Nuclei of many sizes, shapes and textures under uneven light, bright on dark
(fluorescence) or dark on bright (stained tissue, brightfield), with debris that
is no nucleus. Brightness alone does not tell nucleus from background; a person
sees them at once. For demonstrations and tests that need no download.
"""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from distillfss_jax.data import core

KINDS = ('round', 'elongated', 'lobed', 'mitotic')
PALETTE = ((0, 0, 0), (80, 200, 255), (255, 170, 60), (130, 220, 90),
           (240, 90, 170))  # fmt: skip
_SPLITS = {'train': 0, 'test': 1}
# Optical density of red, green and blue per unit of stain.
_HAEMATOXYLIN = np.array([0.95, 1.05, 0.50])
_EOSIN = np.array([0.10, 0.62, 0.30])
_TINTS = ((1, 1, 1), (0.25, 0.45, 1), (0.3, 1, 0.45), (1, 0.35, 0.3))

LIGHTS = {'both': 0.5, 'fluorescence': 1.0, 'transmission': 0.0}


def load(
  num_train=64,
  num_test=32,
  image_size=128,
  classes=1,
  seed=0,
  zoom=1.0,
  light='both',
):
  """Makes the dataset; record i of a split depends on (seed, split, i) alone.

  Args:
    num_train: images to choose supports from.
    num_test: images to score.
    image_size: side in pixels, at least 32.
    classes: 1, where every nucleus is of class 'nucleus', to 4: 'round',
      'elongated', 'lobed' and ring-like 'mitotic' ones, told apart by shape
      and texture; an image then holds some of the classes, image i always
      class i mod n.
    seed: 0 .. 2**32 - 1.
    zoom: how much larger nuclei are, 0.5 to 3; there are fewer then.
    light: 'fluorescence' (bright on dark), 'transmission' (stained, dark on
      bright), or 'both', half of the images each.

  Raises:
    ValueError: for numbers out of these ranges.
  """
  if not 1 <= classes <= len(KINDS):
    raise ValueError(f'classes must be 1 to {len(KINDS)}, got {classes}')
  if image_size < 32:
    raise ValueError(f'image_size must be at least 32, got {image_size}')
  if not 0.5 <= zoom <= 3:
    raise ValueError(f'zoom must be 0.5 to 3, got {zoom}')
  if light not in LIGHTS:
    raise ValueError(f'light {light!r} is not one of {tuple(LIGHTS)}')
  if num_train < 1 or num_test < 1:
    raise ValueError(
      f'num_train and num_test must be at least 1, got {num_train}, {num_test}'
    )
  train, test = (
    Generated(split, count, image_size, classes, seed, zoom, LIGHTS[light])
    for split, count in (('train', num_train), ('test', num_test))
  )
  named = ('nucleus',) if classes == 1 else KINDS[:classes]
  return core.Dataset('synthetic', named, PALETTE[: 1 + classes], train, test)


class Generated(Sequence):
  """Random access to records that are drawn when they are read."""

  def __init__(self, split, count, size, ways, seed, zoom, bright):
    """Takes 'train' or 'test', how many, and what `load` takes."""
    self._key = (seed, _SPLITS[split])
    self._size, self._ways, self._zoom = size, ways, zoom
    self._bright = bright  # the chance that an image is bright on dark
    self.ids = tuple(f'{split}-{i:05d}' for i in range(count))
    self.sizes = np.full((count, 2), size, np.int32)

  def _random(self, i):
    return np.random.RandomState([*self._key, i])

  @functools.cached_property
  def present(self):
    """Which class occurs in which image, bool [N, n]."""
    return np.array(
      [self._occurring(self._random(i), i) for i in range(len(self))]
    )

  def _occurring(self, random, i):
    occurring = random.rand(self._ways) < 0.6
    occurring[i % self._ways] = True
    return occurring

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, i):
    i = range(len(self))[i]  # IndexError beyond the end, as iteration needs
    random = self._random(i)
    ways = np.flatnonzero(self._occurring(random, i))
    label, stain, cytoplasm = _cells(
      random, self._size, self._zoom, self._ways, ways
    )
    bright = random.rand() < self._bright
    develop = _fluorescence if bright else _transmission
    image = develop(random, stain, cytoplasm)
    return {'image': image, 'label': label, 'id': self.ids[i]}


def _smooth(random, size, cells):
  """Slow noise [size, size], about -1..1: a coarse grid, interpolated."""
  grid = random.uniform(-1, 1, (cells, cells)).astype(np.float32)
  big = Image.fromarray(grid).resize((size, size), Image.BICUBIC)
  return np.asarray(big)


def _fine(random, size, sigma):
  """Fast noise [size, size] of unit deviation, grains of `sigma` pixels."""
  noise = random.standard_normal((size, size)).astype(np.float32)
  noise = ndimage.gaussian_filter(noise, sigma, mode='wrap')
  return noise / noise.std()


def _cells(random, size, zoom, ways, present):
  """Places the nuclei.

  Returns:
    label uint8 [size, size]; stain float32, how much a nucleus takes up, 0..1.5
    with texture; cytoplasm float32 0..1, the body of the cell around it.
  """
  label = np.zeros((size, size), np.uint8)
  stain = np.zeros((size, size), np.float32)
  cytoplasm = np.zeros((size, size), np.float32)
  grain = _fine(random, size, size * random.uniform(0.006, 0.014))
  typical = zoom * size * random.uniform(0.035, 0.085)
  covered = random.uniform(0.06, 0.32)
  count = int(np.clip(covered * size**2 / (np.pi * typical**2), 4, 48))
  crowding = random.uniform(0.8, 1.25)  # below 1 neighbours touch
  texture, evenness = random.uniform(0.06, 0.22), random.uniform(0.2, 0.9)
  placed = np.zeros((0, 3))
  for k in range(max(count, len(present))):
    way = present[k] if k < len(present) else random.choice(present)
    if ways > 1:
      kind = KINDS[way]
    else:
      kind = random.choice(KINDS[:3], p=(0.62, 0.30, 0.08))
    radius = typical * np.clip(
      np.exp(0.22 * random.standard_normal()), 0.6, 1.6
    )
    place = _place(random, size, placed, radius, crowding, k < len(present))
    if place is None:
      continue
    placed = np.vstack([placed, (*place, radius)])
    depth, body, halo, rows, columns = _nucleus(
      random, kind, *place, radius, size
    )
    strength = random.uniform(evenness, 1.0) * (
      1.15 if kind == 'mitotic' else 1
    )
    body = body * strength * (1 + texture * grain[rows, columns])
    inside = (depth > 0) & (label[rows, columns] == 0)
    label[rows, columns][inside] = way + 1
    stain[rows, columns] = np.maximum(stain[rows, columns], body)
    halo = halo * random.uniform(0.4, 1)
    cytoplasm[rows, columns] = np.maximum(cytoplasm[rows, columns], halo)
  return label, stain, cytoplasm


def _place(random, size, placed, radius, crowding, must):
  """Finds (row, column) away from the others; None if full, unless it must."""
  margin = radius if must else 0.3 * radius
  best, best_gap = None, -np.inf
  for _ in range(40 if must else 8):
    place = random.uniform(margin, size - margin, 2)
    gap = np.inf
    if len(placed):
      away = np.hypot(*(placed[:, :2] - place).T)
      gap = np.min(away - crowding * (placed[:, 2] + radius))
    if gap >= 0:
      return place
    if gap > best_gap:
      best, best_gap = place, gap
  return best if must else None


def _nucleus(random, kind, row, column, radius, size):
  """Draws one nucleus in the window around it.

  Returns:
    depth below its outline in pixels (negative outside), body (0..1, what of
    the stain it takes), halo (0..1, gone before the window ends), and the
    slices of the window.
  """
  reach = (2.9 if kind == 'elongated' else 2.1) * radius + 2
  rows = slice(max(int(row - reach), 0), min(int(row + reach) + 1, size))
  columns = slice(
    max(int(column - reach), 0), min(int(column + reach) + 1, size)
  )
  y, x = np.ogrid[rows, columns]
  turn = random.uniform(0, 2 * np.pi)
  y, x = y - row, x - column
  along = np.cos(turn) * x + np.sin(turn) * y
  across = np.cos(turn) * y - np.sin(turn) * x
  angle = np.arctan2(across, along)
  wave = sum(
    amplitude * np.cos(k * angle + random.uniform(0, 2 * np.pi))
    for k, amplitude in ((2, 0.05), (3, 0.05), (5, 0.025))
  )
  if kind == 'lobed':
    lobes = []
    for third in range(3):
      where = turn + third * 2 * np.pi / 3 + random.uniform(-0.3, 0.3)
      away = radius * random.uniform(0.5, 0.62)
      lobe = np.hypot(x - away * np.cos(where), y - away * np.sin(where))
      lobes.append(radius * random.uniform(0.48, 0.6) - lobe)
    depth, squeeze = np.maximum.reduce(lobes), 1
  else:
    low, high = (0.36, 0.5) if kind == 'elongated' else (0.8, 1.0)
    aspect = random.uniform(low, high)
    stretch = aspect**-0.5
    distance = np.hypot(along / stretch, across * stretch)
    squeeze = min(1, 1.3 * aspect)  # the short side is what makes it deep
    depth = (radius * (1 + wave) - distance) * squeeze
  edge = np.clip(depth / 1.6 + 0.5, 0, 1)
  body = edge * (0.72 + 0.28 * np.clip(depth / (0.6 * radius), 0, 1))
  if kind == 'mitotic':
    ring = np.exp(-(((depth - 0.3 * radius) / (0.2 * radius)) ** 2))
    body = edge * (0.22 + 0.9 * ring)
  elif kind != 'lobed':
    for _ in range(random.randint(0, 3)):  # nucleoli
      dy, dx = random.uniform(-0.45, 0.45, 2) * radius
      spot = np.hypot(y - dy, x - dx) / (0.2 * radius)
      body = body - 0.35 * edge * np.exp(-(spot**2))
  halo = np.clip(1 + depth / (0.5 * radius * squeeze), 0, 1)
  return depth, body, halo, rows, columns


def _blobs(random, size, count, radius):
  """Soft spots [size, size], 0..1: what lies out of focus, or on the lens."""
  made = np.zeros((size, size), np.float32)
  y, x = np.ogrid[:size, :size]
  for _ in range(count):
    row, column = random.uniform(0, size, 2)
    wide, long = radius * random.uniform(0.6, 1.4, 2)
    rows = np.exp(-(((y - row) / wide) ** 2))
    columns = np.exp(-(((x - column) / long) ** 2))
    made = np.maximum(made, random.uniform(0.4, 1) * rows * columns)
  return made


def _specks(random, size):
  """Small sharp dirt [size, size], 0..1."""
  made = np.zeros((size, size), np.float32)
  count = random.poisson(7)
  rows, columns = random.randint(0, size, (2, count))
  made[rows, columns] = random.uniform(0.5, 1, count)
  sigma = size * random.uniform(0.004, 0.009)
  made = ndimage.gaussian_filter(made, sigma)
  return np.minimum(made * 2 * np.pi * sigma**2, 1)


def _fluorescence(random, stain, cytoplasm):
  """Bright nuclei on dark: glow of the medium, haze, few photons."""
  size = len(stain)
  light = 1 + random.uniform(0.2, 0.55) * _smooth(random, size, 3)
  glow = 0.55 + 0.45 * _smooth(random, size, 3)
  signal = stain * np.clip(light, 0.3, None)
  signal = signal + random.uniform(0.1, 0.5) * glow
  signal += random.uniform(0.02, 0.18) * cytoplasm
  signal += 0.06 * _smooth(random, size, 12)
  haze = _blobs(random, size, random.poisson(2.5), size * 0.09)
  signal += random.uniform(0.2, 0.6) * haze
  signal += random.uniform(0.3, 0.8) * _specks(random, size)
  sigma = size / 128 * random.uniform(0.3, 1.1)
  signal = ndimage.gaussian_filter(signal, sigma)
  signal = np.clip(signal, 0, None) * random.uniform(0.45, 0.85)
  photons = random.uniform(60, 600)
  noise = random.standard_normal((size, size))
  signal = signal + noise * np.sqrt(signal / photons + 1e-4)
  if random.rand() < 0.5:
    tint = np.ones(3)
  else:
    tint = np.array(_TINTS[random.randint(1, len(_TINTS))])
  shown = np.clip(signal, 0, 1)[..., None] ** random.uniform(0.75, 1.1)
  # What is very bright turns pale, as it does in a camera.
  return _bytes(shown * tint + 0.25 * shown**3 * (1 - tint))


def _transmission(random, stain, cytoplasm):
  """Dark nuclei on bright: light through stained tissue (Beer-Lambert)."""
  size = len(stain)
  tissue = np.clip(0.7 + _smooth(random, size, 5), 0, 1.3)
  fibres = _fine(random, size, (size * 0.006, size * 0.02))
  eosin = tissue * (1 + 0.16 * fibres) + 0.4 * cytoplasm
  pink = random.rand() < 0.65
  eosin = eosin * (random.uniform(0.35, 0.95) if pink else 0.08)
  haze = _blobs(random, size, random.poisson(2.5), size * 0.08)
  nuclei = stain * random.uniform(0.6, 1.3) + random.uniform(0.1, 0.4) * haze
  nuclei += random.uniform(0.02, 0.2) * tissue
  nuclei += random.uniform(0.5, 1.2) * _specks(random, size)
  vary = random.uniform(0.85, 1.15, (2, 3))
  blue = _HAEMATOXYLIN if pink else np.array([0.9, 0.95, 0.75])
  density = nuclei[..., None] * blue * vary[0]
  density = density + eosin[..., None] * _EOSIN * vary[1]
  light = 0.86 + random.uniform(0.08, 0.22) * _smooth(random, size, 3)
  image = light[..., None] * random.uniform(0.94, 1.06, 3) * np.exp(-density)
  sigma = size / 128 * random.uniform(0.3, 0.9)
  image = ndimage.gaussian_filter(image, (sigma, sigma, 0))
  noise = random.standard_normal((size, size, 1))
  noise = noise + 0.5 * random.standard_normal((size, size, 3))
  return _bytes(image + random.uniform(0.005, 0.022) * noise)


def _bytes(image):
  return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
