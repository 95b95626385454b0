"""WeedMap: sugar beet and weeds from the air, tiles of the RedEdge-M camera.

Sa et al., "WeedMap: a large-scale semantic weed mapping framework using aerial
multispectral imaging and deep neural network for precision farming", Remote
Sensing 10 (2018). Below a field's folder: `tile/R|G|B/<stem>.png`, one channel
each, and beside `tile/` the 16-bit `<field>_<stem>_GroundTruth_iMap.png`. Tiles
may be the owners' or cut smaller (`frame0009_2`), as in the DistillFSS paper.
"""

import functools
import logging
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, prepared

COUNTS = {'003': 408}  # tiles of a field, where they are published
SPLIT = '000:003'  # fields for training : fields for testing
_RELEASE = '2018-weedMap-dataset-release'
_TOPS = (
  '', 'RedEdge', 'Tiles/RedEdge', f'{_RELEASE}/Tiles/RedEdge',
)  # fmt: skip
_CHANNELS = ('R', 'G', 'B')
_LABELS = {0: 0, 2: 2, 10000: 1}  # value of an iMap -> label
_BLACK = 10  # pixels that a tile may have without any light


class Weedmap(builder.SegmentationBuilder):
  """Crop and weeds in aerial images of sugar beet fields, RedEdge-M camera."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('crop', 'weed')
  PALETTE = ((0, 0, 0), (0, 158, 115), (213, 94, 0))
  DOWNLOAD = (
    'get the Remote Sensing 2018 Weed Map Dataset (https://projects.asl.ethz.'
    'ch/datasets/doku.php?id=weedmap:remotesensing2018weedmap; its terms are '
    'there), and give the folder Tiles/RedEdge with the fields 000 and '
    '003, or a zip of it, as --raw'
  )


def load(data_dir='data', remove_black_images=False):
  """Loads the prepared dataset.

  Args:
    data_dir: folder of all prepared datasets.
    remove_black_images: leave out train tiles with more than 10 black pixels,
      those at the border of a field; decodes each train tile once.

  Raises:
    FileNotFoundError: when it was not prepared.
    ValueError: when no train tile remains.
  """
  made = prepared.load_prepared(Weedmap, data_dir)
  if not remove_black_images:
    return made
  black = {x['id'] for x in made.train if _is_black(x['image'])}
  if len(black) == len(made.train):
    raise ValueError(
      f'all {len(black)} train tiles have more than {_BLACK} black pixels: '
      'load them with remove_black_images=False'
    )
  return prepared.load_prepared(
    Weedmap, data_dir, lambda row: row['id'] not in black
  )


def _is_black(image):
  return np.count_nonzero(~image.any(-1)) > _BLACK


def prepare(raw, data_dir, *, split=SPLIT, skip_bad=False):
  """Turns the tiles into ArrayRecord; see `builder.prepare`.

  `split` names the fields for training and for testing, as '000,001:003'.
  """
  fields = _fields(split)
  layout = functools.partial(Layout, fields=fields)
  return builder.prepare(
    Weedmap, layout, raw, data_dir, skip_bad=skip_bad, split=split
  )


def _fields(split):
  """'000,001:003' as {'train': ['000', '001'], 'test': ['003']}."""
  if not re.fullmatch(r'\d{3}(,\d{3})*:\d{3}(,\d{3})*', split):
    raise ValueError(
      f'split {split!r} does not name fields as in {SPLIT!r} or 000,001:003: '
      'those for training, a colon, those for testing'
    )
  train, test = (part.split(',') for part in split.split(':'))
  if len({*train, *test}) < len(train + test):
    raise ValueError(f'split {split!r} names a field twice')
  return {'train': train, 'test': test}


class Layout:
  """Folders of fields at the top, in RedEdge/ or in the owners' release.

  Parity: tiles of a field are in the order of their names; the original's are
  in that of a directory listing, which is lost.
  """

  def __init__(self, files, fields):
    """Finds the tiles; ValueError where a field has none."""
    self._files, self._fields = files, fields
    self._there = set(files.names)
    named = fields['train'] + fields['test']
    self.top, tiles = max(
      ((top, _tiles(files.names, top, named)) for top in _TOPS),
      key=lambda found: sum(map(bool, found[1].values())),
    )
    missing = [field for field in named if not tiles[field]]
    if missing:
      places = ' or '.join(f'{field}/tile/R/*.png' for field in missing)
      raise ValueError(
        f'{files} has no {places}, at its top or in RedEdge/ or Tiles/RedEdge/ '
        f'({len(files.names)} files): {Weedmap.DOWNLOAD}'
      )
    for field in set(tiles).intersection(COUNTS):
      if len(tiles[field]) != COUNTS[field]:
        logging.warning(
          'weedmap: %d tiles of field %s are there, %d are published',
          len(tiles[field]),
          field,
          COUNTS[field],
        )
    self._tile = {
      f'{field}_{stem}': (field, stem)
      for field in named
      for stem in tiles[field]
    }
    self.ids = list(self._tile)

  def split(self, ids):
    """Divides the ids by their fields."""
    return {
      part: [i for i in ids if self._tile[i][0] in named]
      for part, named in self._fields.items()
    }

  def _path(self, field, rest):
    path = f'{self.top}/{field}/{rest}'.removeprefix('/')
    if path not in self._there:
      raise download.BadFileError(f'{path}: is missing')
    return path

  def image(self, id_):
    """The three channels of a tile as one image, uint8 [H, W, 3]."""
    field, stem = self._tile[id_]
    paths = [self._path(field, f'tile/{x}/{stem}.png') for x in _CHANNELS]
    channels = [self._files.decode(path, 'L') for path in paths]
    for path, channel in zip(paths[1:], channels[1:], strict=True):
      if channel.shape != channels[0].shape:
        sizes = [f'{x.shape[1]}x{x.shape[0]}' for x in (channel, channels[0])]
        raise download.BadFileError(
          f'{path}: channel is {sizes[0]}, that of {paths[0]} {sizes[1]}'
        )
    return np.stack(channels, -1)

  def label(self, id_, size):
    """The iMap of a tile as labels, uint8 [H, W] in {0, 1, 2}."""
    field, stem = self._tile[id_]
    path = self._path(field, f'groundtruth/{field}_{stem}_GroundTruth_iMap.png')
    values = self._files.decode(path, 'I')  # 16 bit: not of 8
    download.same_size(path, values, size)
    found = np.unique(values).tolist()
    if not set(found) <= set(_LABELS):
      shown = ', '.join(str(x) for x in found if x not in _LABELS)
      raise download.BadFileError(
        f'{path}: has values {shown[:100]}; expected 0, 2 (weed), 10000 (crop)'
      )
    label = np.zeros(values.shape, np.uint8)
    for value, one in _LABELS.items():
      label[values == value] = one
    return label


def _tiles(listed, top, fields):
  """Finds the stems of each field's red channel, sorted."""
  found = {field: [] for field in fields}
  below = f'{top}/' if top else ''
  of_tile = re.compile(re.escape(below) + r'(\d{3})/tile/R/([^/]+)\.png')
  for name in listed:
    match = of_tile.fullmatch(name)
    if match and match[1] in found:
      found[match[1]].append(match[2])
  return {field: sorted(stems) for field, stems in found.items()}
