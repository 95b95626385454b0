"""Kvasir-SEG: polyps in colonoscopy images.

Jha et al., "Kvasir-SEG: A segmented polyp dataset", MMM 2020. One class:
`images/<id>.jpg` and a mask of the same name in `masks/`, also a JPEG.
"""

import functools
import logging
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, download, prepared

SPLITS = ('reference', 'published')
_FILE = re.compile(
  r'(?P<top>(?:Kvasir-SEG/)?)(images|masks)/(?P<id>[^/]+)\.jpg'
)


class Kvasir(builder.SegmentationBuilder):
  """Polyps in colonoscopy images, Kvasir-SEG."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('polyp',)
  PALETTE = ((0, 0, 0), (86, 180, 233))
  COUNT = 1000
  DOWNLOAD = (
    'get kvasir-seg.zip from https://datasets.simula.no/kvasir-seg (for '
    'research and education), and give the zip, or the folder it unpacks to, '
    'as --raw'
  )


def load(data_dir='data'):
  """Loads the prepared dataset; FileNotFoundError when there is none."""
  return prepared.load_prepared(Kvasir, data_dir)


def prepare(raw, data_dir, *, split='reference', skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  `split`: 'reference' holds out 20 % of the sorted ids by the reference's rule;
  'published' follows train.txt and val.txt beside images/. The owners' zip has
  no such lists, but others publish some to be put there.

  Parity: the reference applied its rule to the order of a directory listing,
  which is lost, so that its 200 test images cannot be recovered.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  layout = functools.partial(Layout, split_name=split)
  return builder.prepare(
    Kvasir, layout, raw, data_dir, skip_bad=skip_bad, split=split
  )


class Layout:
  """images/ and masks/, at the top or in Kvasir-SEG/."""

  def __init__(self, files, split_name='reference'):
    """Finds the ids; ValueError when there are none of the right layout."""
    self._files = files
    found = [x for x in map(_FILE.fullmatch, files.names) if x]
    self.top = max((x['top'] for x in found), default='')
    found = [x for x in found if x['top'] == self.top]
    if {x[2] for x in found} != {'images', 'masks'}:
      raise ValueError(
        f'{files} has no images/<id>.jpg and masks/<id>.jpg, at its top or in '
        f'Kvasir-SEG/ ({len(files.names)} files in all): {Kvasir.DOWNLOAD}'
      )
    self.ids = sorted({x['id'] for x in found})
    self._lists = None
    if split_name == 'published':
      self._lists = [self._listed(name) for name in ('train.txt', 'val.txt')]

  def _listed(self, name):
    if f'{self.top}{name}' not in self._files.names:
      raise ValueError(
        f"split 'published' needs train.txt and val.txt beside images/, and "
        f'{self._files} has no {self.top}{name}: add it, or choose --split '
        'reference'
      )
    text = self._files.text(f'{self.top}{name}', 'replace')
    return [line.removesuffix('.jpg') for line in text.split()]

  def split(self, ids):
    """Divides the ids: train sorted, test in the order of the rule or list."""
    if self._lists is None:
      test = download.held_out(ids)
    else:
      there, (train, held_out) = set(ids), self._lists
      test = [i for i in held_out if i in there]
      if extra := there.difference(train, test):
        logging.info(
          'kvasir: %d images that neither list names go to train', len(extra)
        )
    return {'train': sorted(set(ids).difference(test)), 'test': test}

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(f'{self.top}images/{id_}.jpg', 'RGB')

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(f'{self.top}images/{id_}.jpg')

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W] in {0, 1}.

    JPEG blurs its edges; like the reference we keep what is nearly white.
    """
    name = f'{self.top}masks/{id_}.jpg'
    mask = self._files.decode(name, 'RGB')[..., 0]
    download.same_size(name, mask, size)
    return (mask > 245).astype(np.uint8)
