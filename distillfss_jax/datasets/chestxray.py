"""Chest X-ray: lungs in radiographs of the Shenzhen Hospital.

Candemir et al., "Lung Segmentation in Chest Radiographs", IEEE TMI 2014;
Jaeger et al., "Two public chest X-ray datasets", 2014; masks by Stirenko et
al., 2018. `CXR_png/<id>.png` and `masks/<id>_mask.png`, as in the download that
cross-domain few-shot segmentation uses (PATNet, IFA). One class.
"""

import dataclasses
import logging
import posixpath
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, core, download, prepared

SPLITS = ('ours',)
PARTS = {'all': ('train', 'test'), 'train': ('train',), 'test': ('test',)}
_FILE = re.compile(
  r'(?P<top>(?:[^/]+/)*)(?P<kind>CXR_png|masks)/(?P<name>[^/]+)\.png'
)
_MASK = '_mask'
_MONTGOMERY = 'MCUCXR'


class Chestxray(builder.SegmentationBuilder):
  """Lungs in chest radiographs, Shenzhen Hospital X-ray set."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('lung',)
  PALETTE = ((0, 0, 0), (86, 180, 233))
  COUNT = 566  # with a mask, of 662
  DOWNLOAD = (
    'get https://www.kaggle.com/datasets/nikhilpandey360/'
    'chest-xray-masks-and-labels (CC0 by its page; the authors of the masks '
    'say CC BY-NC-SA 4.0), and give the zip, or the folder with CXR_png and '
    'masks, as --raw'
  )


def load(data_dir='data'):
  """Loads the prepared dataset; FileNotFoundError when there is none."""
  return prepared.load_prepared(Chestxray, data_dir)


def pool(data_dir='data', part='all'):
  """What episodes are drawn from, a `core.Pool` of one class.

  Args:
    data_dir: folder of all prepared datasets.
    part: 'train', 'test', or 'all' of both, as the original has it.
  """
  if part not in PARTS:
    raise ValueError(f'part {part!r} is not one of {tuple(PARTS)}')
  made = prepared.load_prepared(Chestxray, data_dir, train=PARTS[part], test=())
  found = core.pool(made.train, made.classes, (1,))
  # The original lists its files by name.
  order = sorted(range(len(found.pairs)), key=made.train.ids.__getitem__)
  return dataclasses.replace(found, pairs=found.pairs[order])


def prepare(raw, data_dir, *, split='ours', skip_bad=False):
  """Turns the images with a mask into ArrayRecord; see `builder.prepare`.

  The only `split` is ours, 20 % of the sorted ids by `download.held_out`: the
  original has none, its episodes are drawn from all images.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  return builder.prepare(Chestxray, Layout, raw, data_dir, skip_bad=skip_bad)


class Layout:
  """CXR_png/ and masks/, at the top or below other folders.

  Parity: the download also has radiographs of Montgomery County, MCUCXR_*,
  whose masks are named otherwise; the original's reader fails on them. They
  are passed over: the benchmark is of the Shenzhen ones.
  """

  def __init__(self, files):
    """Finds the ids; ValueError when there are none of the right layout."""
    self._files, self._there = files, set(files.names)
    found = [x for x in map(_FILE.fullmatch, files.names) if x]
    tops = {x['top'] for x in found if x['kind'] == 'CXR_png'}
    tops &= {x['top'] for x in found if x['name'].endswith(_MASK)}
    if not tops:
      raise ValueError(
        f'{files} has no folder with CXR_png/<id>.png and '
        f'masks/<id>{_MASK}.png ({len(files.names)} files in all): '
        f'{Chestxray.DOWNLOAD}'
      )
    # The download has all twice, the second time below data/.
    self.top = min(tops, key=lambda x: (x.count('/'), x))
    names = {'CXR_png': set(), 'masks': set()}
    for x in found:
      if x['top'] == self.top and _MONTGOMERY not in x['name']:
        names[x['kind']].add(x['name'])
    masks = {x[: -len(_MASK)] for x in names['masks'] if x.endswith(_MASK)}
    self.ids = sorted(masks)
    if without := len(names['CXR_png'] - masks):
      logging.info(
        'chestxray: %d images have no mask and are passed over', without
      )

  def split(self, ids):
    """Divides the ids: train sorted, test in the order of the rule."""
    test = download.held_out(ids)
    return {'train': sorted(set(ids).difference(test)), 'test': test}

  def _path(self, *parts):
    path = posixpath.join(self.top, *parts)
    if path not in self._there:
      raise download.BadFileError(f'{path}: is missing, and its mask is there')
    return path

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(self._path('CXR_png', f'{id_}.png'), 'RGB')

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(self._path('CXR_png', f'{id_}.png'))

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W] in {0, 1}."""
    path = self._path('masks', f'{id_}{_MASK}.png')
    mask = self._files.decode(path, 'L')
    download.same_size(path, mask, size)
    return (mask >= 128).astype(np.uint8)
