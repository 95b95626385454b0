"""Nucleus: the 2018 Data Science Bowl, stage 1 training set (BBBC038).

Caicedo et al., "Nucleus segmentation across imaging experiments: the 2018 Data
Science Bowl", Nature Methods 16 (2019). One class, in images of many
microscopes, stains and sizes: `<id>/images/<file>.png` and one binary mask per
nucleus in `<id>/masks/*.png`.
"""

import functools
import json
import logging
import math
import pathlib
import re
import zipfile
import zlib

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import core

SPLITS = ('frozen', 'reference')
DOWNLOAD = (
  'get stage1_train.zip of BBBC038 (https://bbbc.broadinstitute.org/BBBC038) '
  'or of the Kaggle competition data-science-bowl-2018, and give the zip, or '
  'the folder it unpacks to, as --raw'
)
_TOPS = ('stage1_train', 'Nucleus', '')  # where <id> folders may lie
_FILE = re.compile(r'([^/.][^/]*)/(images|masks)/([^/.][^/]*\.\w+)')


class Nucleus(core.SegmentationBuilder):
  """Nuclei in light and fluorescence microscopy, 2018 Data Science Bowl."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('nucleus',)
  PALETTE = ((0, 0, 0), (80, 200, 255))


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
  made = core.manifest(Nucleus, data_dir)
  if made is None:
    raise FileNotFoundError(core.unprepared(Nucleus, data_dir))
  rows = {row['id']: row for row in made['records']}
  if split is None:
    train, test = (
      [row['id'] for row in made['records'] if row['split'] == part]
      for part in ('train', 'test')
    )
  else:
    train, test = split_ids(rows, split)
  place = core.folder(Nucleus, data_dir)
  train, test = (
    core.Prepared(place, [rows[i] for i in ids], len(Nucleus.CLASSES))
    for ids in (train, test)
  )
  return core.Dataset(
    Nucleus.name, Nucleus.CLASSES, Nucleus.PALETTE, train, test
  )


def split_ids(ids, split):
  """Divides ids into (train, test): train sorted, test in the split's order.

  The frozen file is what the reference's rule (20 % for testing, scikit-learn's
  shuffle with seed 42) gives for the sorted ids of the corrected archive. The
  reference applied it to the order of a directory listing, which is lost.
  """
  _known(split)
  ids = sorted(ids)
  if split == 'reference':
    test = reference_test(ids)
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


def reference_test(ids):
  """Gives the test ids the reference's rule picks, in its order."""
  shuffled = np.random.RandomState(42).permutation(len(ids))
  return [ids[i] for i in shuffled[: math.ceil(0.2 * len(ids))]]


@functools.cache
def frozen_split():
  """Reads splits/nucleus.json: lists 'train' and 'test' of ids."""
  path = pathlib.Path(__file__).with_name('splits') / 'nucleus.json'
  return json.loads(path.read_text())


def prepare(raw, data_dir, *, split='frozen', skip_bad=False):
  """Turns the owners' download into ArrayRecord under `data_dir`.

  The raw files are only read, a zip without unpacking it. `split` says which
  images lie in the TFDS splits 'train' and 'test'; `load` can divide them
  anew.

  Returns:
    (manifest, True), or at once (manifest, False) when it is there already.

  Raises:
    ValueError: without a usable download, or naming every bad file.
  """
  _known(split)
  done = core.manifest(Nucleus, data_dir)
  if done is not None:
    return done, False
  with Raw(raw) as files:
    place = core.folder(Nucleus, data_dir)
    if files.top and any(
      p.exists() and p.samefile(files.top) for p in place.parents
    ):
      raise ValueError(
        f'{place} would lie inside the raw folder {files.top}, which is only '
        'read: choose another --data_dir'
      )
    good, skipped = core.check(
      sorted(files.ids), files.image, files.label, skip_bad=skip_bad
    )
    by_id = {one.id: one for one in good}
    train, test = split_ids(by_id, split)
    if not (train and test):
      raise ValueError(
        f'split {split!r} leaves {len(train)} train and {len(test)} test '
        f'images of {len(good)}: is this stage1_train? --split reference '
        'divides any images'
      )
    splits = {
      'train': [by_id[i] for i in train],
      'test': [by_id[i] for i in test],
    }
    return core.write(Nucleus, data_dir, splits, skipped), True


class Raw:
  """A download as its owners publish it: a folder, or a zip read in place.

  The `<id>` folders lie at the top, in stage1_train/ or in Nucleus/.
  `ids` maps each to its 'images' and 'masks', lists of file names.
  """

  def __init__(self, path):
    """Lists the files; ValueError when there are none of the right layout."""
    if not path:
      raise ValueError(f'--raw is not given: {DOWNLOAD}')
    self._path = pathlib.Path(path).expanduser()
    self._zip, self.top = None, None
    if self._path.is_dir():
      listed = (p for p in self._path.glob('**/*') if p.is_file())
      listed = [p.relative_to(self._path).as_posix() for p in listed]
    elif self._path.is_file():
      try:
        self._zip = zipfile.ZipFile(self._path)
      except zipfile.BadZipFile as error:
        raise ValueError(
          f'{path} is neither a folder nor a whole zip file ({error}): '
          f'{DOWNLOAD}'
        ) from error
      listed = self._zip.namelist()
    else:
      raise ValueError(f'{path} does not exist: {DOWNLOAD}')
    for top in _TOPS:
      self.ids = _by_id(listed, top)
      if self.ids:
        break
    else:
      self.__exit__()
      raise ValueError(
        f'{path} has no <id>/images and <id>/masks, at its top or in '
        f'stage1_train/ or Nucleus/ ({len(listed)} files of other names): '
        f'{DOWNLOAD}'
      )
    if self._zip is None:
      self.top = self._path / top

  def __enter__(self):
    return self

  def __exit__(self, *error):
    if self._zip is not None:
      self._zip.close()

  def _decode(self, name, mode):
    try:
      if self._zip is None:
        contents = (self._path / name).read_bytes()
      else:
        contents = self._zip.read(name)
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
      # RuntimeError: a member that is encrypted or packed in an unknown way.
      raise core.BadFileError(f'{name}: cannot be read ({error})') from error
    return core.decode(contents, name, mode)

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    images = self.ids[id_]['images']
    if len(images) != 1:
      raise core.BadFileError(f'{id_}: {len(images)} files in images/, not one')
    return self._decode(images[0], 'RGB')

  def label(self, id_, size):
    """Unites the masks of an id, uint8 [H, W] in {0, 1}.

    Parity: (Q33) the reference adds the masks, so that a pixel where two
    nuclei overlap becomes label 2, which is no class; we take the logical or.
    """
    masks = self.ids[id_]['masks']
    if not masks:
      raise core.BadFileError(f'{id_}: no files in masks/')
    label, problems = np.zeros(size, bool), []
    for name in masks:
      try:
        mask = self._decode(name, 'L')
      except core.BadFileError as error:
        problems.append(str(error))
        continue
      if mask.shape != size:
        sizes = [f'{w}x{h}' for h, w in (mask.shape, size)]
        problems.append(f'{name}: mask is {sizes[0]}, its image {sizes[1]}')
        continue
      label |= mask >= 128
    if problems:
      raise core.BadFileError('; '.join(problems))
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
