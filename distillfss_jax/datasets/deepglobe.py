"""DeepGlobe land cover: six kinds of land in satellite images.

Demir et al., "DeepGlobe 2018: A challenge to parse the Earth through satellite
images", CVPR workshops 2018. Images of 2448x2448, `<id>_sat.jpg`, with a colour
for each class in `<id>_mask.png`. They are cut into 6x6 tiles here, `<id>_<ij>`
with row i and column j, of which those with enough of two classes are kept.
"""

import functools
import logging
import pathlib
import re
import threading

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from distillfss_jax.data import builder, download, prepared

SPLITS = ('reference', 'drawn')
UNKNOWN = {'void': 255, 'reference': 1}
PUBLISHED = 803  # labelled images; COUNT would be that of tiles
TILES = 6  # per side
RAREST = 0.048  # share of a tile that its rarest colour must exceed
_FILE = re.compile(r'(?P<top>(?:.+/)?)(?P<id>[^/_]+)_(sat\.jpg|mask\.png)')
_LISTED = re.compile(r'([^/_,"\s]+)_(?:mask_)?(\d\d)\b')
# Labels by colour: 4 where there is red, 2 green, 1 blue; 0 is no class.
_LABELS = np.array([0, 5, 4, 1, 0, 3, 2, 6], np.uint8)


class Deepglobe(builder.SegmentationBuilder):
  """Tiles of satellite images with six classes of land, DeepGlobe 2018."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('urban', 'agriculture', 'rangeland', 'forest', 'water', 'barren')
  PALETTE = (
    (0, 0, 0), (213, 94, 0), (240, 228, 66), (204, 121, 167), (0, 158, 115),
    (0, 114, 178), (230, 230, 230),
  )  # fmt: skip
  DOWNLOAD = (
    'get the land cover training data of DeepGlobe 2018 (http://deepglobe.org, '
    'or balraj98/deepglobe-land-cover-classification-dataset on Kaggle; for '
    'research, by the terms of the challenge), and give the zip, or the folder '
    'it unpacks to, as --raw'
  )


def load(data_dir='data'):
  """Loads the prepared dataset; FileNotFoundError when there is none."""
  return prepared.load_prepared(Deepglobe, data_dir)


def prepare(raw, data_dir, *, split=None, unknown='void', skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  `split`: 'reference' takes the test tiles from test.csv beside the images, or
  one folder up; 'drawn' is ours: 20 % of the images with all their tiles. None
  is the first where there is a test.csv, else the second.

  `unknown`: the label of black, the owners' "unknown" (clouds and the like).

  Parity: (Q32) the reference's argmax over no match turns it into class 1,
  urban; here it is void. 'reference' does what the reference does.
  """
  if split not in (None, *SPLITS):
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  if unknown not in UNKNOWN:
    raise ValueError(f'unknown {unknown!r} is not one of {tuple(UNKNOWN)}')
  layout = functools.partial(Layout, split_name=split, unknown=unknown)
  options = {'split': split, 'unknown': unknown}
  return builder.prepare(
    Deepglobe, layout, raw, data_dir, skip_bad=skip_bad, **options
  )


class Layout:
  """One folder, anywhere, with `<id>_sat.jpg` and `<id>_mask.png`.

  The images of the owners' validation and test folders have no masks. Images
  with no tile to keep are not read.
  """

  def __init__(self, files, split_name=None, unknown='void'):
    """Reads all masks to find the tiles to keep; ValueError without any."""
    self._files = files
    self._last = threading.local()  # what a thread decoded, for its tiles
    self._labels = np.where(_LABELS, _LABELS, UNKNOWN[unknown]).astype(np.uint8)
    found = [x for x in map(_FILE.fullmatch, files.names) if x]
    tops = sorted({x['top'] for x in found if x[3] == 'mask.png'})
    if len(tops) != 1:
      what = f'in {", ".join(tops)}: give one of them' if tops else 'nowhere'
      raise ValueError(
        f'{files} should have one folder with <id>_sat.jpg and <id>_mask.png; '
        f'masks are {what} ({len(files.names)} files in all): '
        f'{Deepglobe.DOWNLOAD}'
      )
    self.top = tops[0]
    whole = sorted({x['id'] for x in found if x['top'] == self.top})
    if len(whole) != PUBLISHED:
      logging.warning(
        'deepglobe: %d labelled images are there, its owners publish %d',
        len(whole),
        PUBLISHED,
      )
    self._test = self._listed(split_name)
    self._bad = {}  # id of a whole image: why its mask has no tiles
    tiled = download.ahead(self._tiles, whole)
    bar = tqdm(tiled, 'tiling', len(whole), unit='image', mininterval=0.5)
    self.ids = [id_ for ids in bar for id_ in ids]
    if not self.ids:
      raise ValueError(
        f'{files}: none of {len(whole)} images has a tile with two colours '
        f'that each cover more than {RAREST:.1%} of it: {Deepglobe.DOWNLOAD}'
      )

  def _tiles(self, whole):
    """The ids of an image's tiles to keep; its own if there can be none."""
    try:
      return _kept(whole, self._colours(whole))
    except download.BadFileError as error:
      self._bad[whole] = error
      return [whole]

  def _listed(self, split_name):
    """The ids of test.csv, or None to draw them."""
    folder = pathlib.PurePosixPath(self.top)
    places = [str(x / 'test.csv') for x in (folder, folder.parent)]
    place = next((x for x in places if x in self._files.names), None)
    if split_name == 'reference' and not place:
      raise ValueError(
        f"split 'reference' needs {' or '.join(dict.fromkeys(places))} in "
        f'{self._files}: add it, or choose --split drawn'
      )
    if split_name == 'drawn' or not place:
      return None
    found = _LISTED.findall(self._files.text(place, 'replace'))
    return list(dict.fromkeys('_'.join(pair) for pair in found))

  def split(self, ids):
    """Divides the tiles: train in order, test in that of its list or draw.

    All tiles of an image go to one side: neighbours share fields, light and
    season, and a test tile would not be new to who has seen the one beside it.
    """
    tiles = {}
    for i in ids:
      tiles.setdefault(self.whole(i), []).append(i)
    if self._test is None:
      test = [i for whole in download.held_out(tiles) for i in tiles[whole]]
    else:
      there = set(ids)
      test = [i for i in self._test if i in there]
      logging.info(
        'deepglobe: %d of the %d tiles of test.csv are there',
        len(test),
        len(self._test),
      )
    held_out = set(test)
    return {'train': [i for i in ids if i not in held_out], 'test': test}

  def whole(self, id_):
    """The id of the image that a tile is of."""
    return id_.partition('_')[0]

  def image(self, id_):
    """Reads the image of a tile, uint8 [H, W, 3]."""
    return self._cut(id_)[0]

  def label(self, id_, size):
    """Reads the mask of a tile, uint8 [H, W]: 1..6 and the unknown's label."""
    del size  # it was compared for the whole image
    return self._labels[self._cut(id_)[1]]

  def _cut(self, id_):
    """A tile and its colours; tiles of one image decode it once."""
    whole, _, place = id_.partition('_')
    if whole in self._bad:
      raise self._bad[whole]
    if getattr(self._last, 'whole', None) != whole:
      image = self._files.decode(f'{self.top}{whole}_sat.jpg', 'RGB')
      colours = self._colours(whole)
      download.same_size(
        f'{self.top}{whole}_mask.png', colours, image.shape[:2]
      )
      self._last.whole, self._last.pair = whole, (image, colours)
    return [_tile(array, *map(int, place)) for array in self._last.pair]

  def _colours(self, id_):
    """Reads a mask, uint8 [H, W] in 0..7: which of the channels are on.

    Parity: the owners ask for a threshold of 128 because the masks may not be
    pure; the reference compares with pure colours, else it is class 1.
    """
    name = f'{self.top}{id_}_mask.png'
    mask = self._files.decode(name, 'RGB')
    height, width = mask.shape[:2]
    if height % TILES or width % TILES:
      raise download.BadFileError(
        f'{name}: {width}x{height} cannot be cut into {TILES}x{TILES} tiles; '
        'the owners publish 2448x2448'
      )
    return (mask >> 7) @ np.array([4, 2, 1], np.uint8)


def _tile(array, i, j):
  """The tile in row i and column j of 6x6, of [H, W] or [H, W, 3]."""
  height, width = (x // TILES for x in array.shape[:2])
  return array[i * height : (i + 1) * height, j * width : (j + 1) * width]


def _kept(id_, colours):
  """The ids of the tiles with two colours or more, all of them often enough."""
  kept = []
  for i, j in np.ndindex(TILES, TILES):
    tile = _tile(colours, i, j)
    counts = np.bincount(tile.ravel(), minlength=8)
    counts = counts[counts > 0]
    if len(counts) > 1 and counts.min() > RAREST * tile.size:
      kept.append(f'{id_}_{i}{j}')
  return kept
