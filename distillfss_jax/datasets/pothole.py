"""Pothole Mix: damage of road surfaces, from five datasets and some more.

Moscoso Thompson et al., "SHREC 2022: pothole and crack detection in the road
pavement using images and RGB-D data", Computers & Graphics 107 (2022). Images
in `<part>/<subset>/images/`, masks in `<part>/<subset>/masks/` with potholes
and cracks in colours of their own; here all damage is one class.
"""

import collections
import logging
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, prepared

SPLITS = ('published',)
_FILE = re.compile(
  r'(?P<top>(?:pothole-mix/)?)(?P<part>training|testing)/(?P<subset>[^/]+)/'
  r'images/(?P<file>(?P<stem>[^/.]+)[^/]*\.(?i:jpe?g|png))'
)


class Pothole(builder.SegmentationBuilder):
  """Potholes and cracks in images of roads, Pothole Mix."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('pothole',)
  PALETTE = ((0, 0, 0), (230, 159, 0))
  DOWNLOAD = (
    'get Pothole Mix from Mendeley Data '
    '(https://data.mendeley.com/datasets/kfth5g2xk3, whose licence counts), '
    'and give the zip with training/ and testing/, or the folder it unpacks '
    'to, as --raw'
  )


def load(data_dir='data'):
  """Loads the prepared dataset; FileNotFoundError when there is none."""
  return prepared.load_prepared(Pothole, data_dir)


def prepare(raw, data_dir, *, split='published', skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  The one `split` is that of the owners' folders: training/ and testing/. Like
  the reference we do not read validation/.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  return builder.prepare(Pothole, Layout, raw, data_dir, skip_bad=skip_bad)


class Layout:
  """training/ and testing/, at the top or in pothole-mix/."""

  def __init__(self, files):
    """Finds the ids; ValueError when there are none of the right layout."""
    self._files = files
    found = [x for x in map(_FILE.fullmatch, files.names) if x]
    self.top = max((x['top'] for x in found), default='')
    found = [x for x in found if x['top'] == self.top]
    if {x['part'] for x in found} != {'training', 'testing'}:
      raise ValueError(
        f'{files} has no <subset>/images/*.jpg in training/ and in testing/, '
        f'at its top or in pothole-mix/ ({len(files.names)} files in all): '
        f'{Pothole.DOWNLOAD}'
      )
    self._found = _by_id(found)
    self.ids = sorted(self._found)

  def split(self, ids):
    """Divides the ids by their folder, both sorted."""
    parts = {'train': 'training', 'test': 'testing'}
    return {
      name: sorted(i for i in ids if self._found[i]['part'] == part)
      for name, part in parts.items()
    }

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(self._found[id_][0], 'RGB')

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(self._found[id_][0])

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W] in {0, 1}: any colour is damage."""
    one = self._found[id_]
    file = re.sub(r'\.(?i:jpg)$', '.png', one['file'])
    name = f'{self.top}{one["part"]}/{one["subset"]}/masks/{file}'
    mask = self._files.decode(name, 'L')
    download.same_size(name, mask, size)
    return (mask > 0).astype(np.uint8)


def _by_id(found):
  """Names the matches: {'<subset>.<stem up to its first dot>': match}.

  Parity: images of one subset may share such an id, and the reference then
  takes one for the other; they get '<part>.<subset>.<file>' instead.
  """
  short = [f'{x["subset"]}.{x["stem"]}' for x in found]
  times = collections.Counter(short)
  if shared := sum(n for n in times.values() if n > 1):
    logging.info('pothole: %d images share an id and get a longer one', shared)
  return {
    id_ if times[id_] == 1 else f'{x["part"]}.{x["subset"]}.{x["file"]}': x
    for id_, x in zip(short, found, strict=True)
  }
