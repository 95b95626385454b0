"""Nucleus: the 2018 Data Science Bowl, stage 1 training set (BBBC038).

Caicedo et al., "Nucleus segmentation across imaging experiments: the 2018 Data
Science Bowl", Nature Methods 16 (2019). One class, in images of many
microscopes, stains and sizes: `<id>/images/<file>.png` and one binary mask per
nucleus in `<id>/masks/*.png`.
"""

import functools
import json
import logging
import pathlib
import re

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, core, download, prepared

SPLITS = ('frozen', 'reference')
_TOPS = ('stage1_train', 'Nucleus', '')  # where <id> folders may lie
_FILE = re.compile(r'([^/.][^/]*)/(images|masks)/([^/.][^/]*\.\w+)')


class Nucleus(builder.SegmentationBuilder):
  """Nuclei in light and fluorescence microscopy, 2018 Data Science Bowl."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('nucleus',)
  PALETTE = ((0, 0, 0), (80, 200, 255))
  COUNT = (670, 664)  # at first, and as it was corrected
  DOWNLOAD = (
    'get stage1_train.zip of BBBC038 (https://bbbc.broadinstitute.org/BBBC038, '
    'CC0) or of the Kaggle competition data-science-bowl-2018, and give the '
    'zip, or the folder it unpacks to, as --raw'
  )


def load(data_dir='data', split=None):
  """Loads the prepared dataset.

  Args:
    data_dir: folder of all prepared datasets.
    split: 'frozen' is splits/nucleus.json, 'reference' the reference's rule
      applied to the ids that are there; equal where those are the 664 of the
      corrected archive. None is the one it was prepared with.

  Raises:
    FileNotFoundError: when it was not prepared.
  """
  made = prepared.manifest(Nucleus, data_dir)
  if made is None:
    raise FileNotFoundError(prepared.unprepared(Nucleus, data_dir))
  if split is None:
    return prepared.load_prepared(Nucleus, data_dir)
  rows = {row['id']: row for row in made['records']}
  # As in `prepare`, what was left out changes nothing for the others.
  parts = (
    [rows[i] for i in ids if i in rows]
    for ids in split_ids([*rows, *made['skipped']], split)
  )
  place = prepared.folder(Nucleus, data_dir)
  sources = prepared.divided(place, len(Nucleus.CLASSES), *parts)
  return core.Dataset(Nucleus.name, Nucleus.CLASSES, Nucleus.PALETTE, *sources)


def split_ids(ids, split):
  """Divides ids into (train, test): train sorted, test in the split's order.

  The frozen file is what the reference's rule (20 % for testing, scikit-learn's
  shuffle with seed 42) gives for the sorted ids of the corrected archive. The
  reference applied it to the order of a directory listing, which is lost.
  """
  _known(split)
  ids = sorted(ids)
  if split == 'reference':
    test = download.held_out(ids)
  else:
    frozen, there = frozen_split(), set(ids)
    test = [i for i in frozen['test'] if i in there]
    extra = there.difference(frozen['train'], frozen['test'])
    if extra:
      logging.info(
        'nucleus: %d images that splits/nucleus.json does not list go to train',
        len(extra),
      )
  held_out = set(test)
  return [i for i in ids if i not in held_out], test


def _known(split):
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')


@functools.cache
def frozen_split():
  """Reads splits/nucleus.json: lists 'train' and 'test' of ids."""
  path = pathlib.Path(__file__).with_name('splits') / 'nucleus.json'
  return json.loads(path.read_text())


def prepare(raw, data_dir, *, split='frozen', skip_bad=False):
  """Turns the download into ArrayRecord; see `builder.prepare`.

  `split` says which images lie in the TFDS splits 'train' and 'test'; `load`
  can divide them anew.
  """
  _known(split)
  layout = functools.partial(Layout, split_name=split)
  return builder.prepare(
    Nucleus, layout, raw, data_dir, skip_bad=skip_bad, split=split
  )


class Layout:
  """`<id>` folders at the top, in stage1_train/ or in Nucleus/.

  `files_of` maps each id to its 'images' and 'masks', lists of file names.
  """

  def __init__(self, files, split_name='frozen'):
    """Finds the ids; ValueError when there are none of the right layout."""
    self._files, self._split = files, split_name
    for top in _TOPS:
      self.files_of = _by_id(files.names, top)
      if self.files_of:
        self.top = top
        break
    else:
      raise ValueError(
        f'{files} has no <id>/images and <id>/masks, at its top or in '
        f'stage1_train/ or Nucleus/ ({len(files.names)} files of other names): '
        f'{Nucleus.DOWNLOAD}'
      )
    self.ids = sorted(self.files_of)

  def split(self, ids):
    """Divides the ids by the rule; ValueError where one part is empty."""
    train, test = split_ids(ids, self._split)
    if not (train and test):
      raise ValueError(
        f'split {self._split!r} leaves {len(train)} train and {len(test)} test '
        f'images of {len(ids)}: is this stage1_train? --split reference '
        'divides any images'
      )
    return {'train': train, 'test': test}

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    images = self.files_of[id_]['images']
    if len(images) != 1:
      raise download.BadFileError(
        f'{id_}: {len(images)} files in images/, not one'
      )
    return self._files.decode(images[0], 'RGB')

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(self.files_of[id_]['images'][0])

  def label(self, id_, size):
    """Unites the masks of an id, uint8 [H, W] in {0, 1}.

    Parity: (Q33) the reference adds the masks, so that a pixel where two
    nuclei overlap becomes label 2, which is no class; we take the logical or.
    """
    masks = self.files_of[id_]['masks']
    if not masks:
      raise download.BadFileError(f'{id_}: no files in masks/')
    label, problems = np.zeros(size, bool), []
    for name in masks:
      try:
        mask = self._files.decode(name, 'L')
        download.same_size(name, mask, size)
      except download.BadFileError as error:
        problems.append(str(error))
        continue
      label |= mask >= 128
    if problems:
      raise download.BadFileError('; '.join(problems))
    return label.astype(np.uint8)


def _by_id(listed, top):
  """Groups file names by id: {id: {'images': [...], 'masks': [...]}}."""
  found = {}
  prefix = f'{top}/' if top else ''
  for name in sorted(listed):
    match = _FILE.fullmatch(name.removeprefix(prefix))
    if name.startswith(prefix) and match:
      id_, kind, _ = match.groups()
      found.setdefault(id_, {'images': [], 'masks': []})[kind].append(name)
  return found
