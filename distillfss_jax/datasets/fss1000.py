"""FSS-1000: 1000 classes of things, ten images of each.

Li et al., "FSS-1000: A 1000-Class Dataset for Few-Shot Segmentation", CVPR
2020. `<class>/<n>.jpg` and its mask `<class>/<n>.png`, n = 1..10. The class is
in the folder's name, labels are 0 and 1. Classes, not images, are divided: into
520 for training, 240 for validation, 240 for testing.
"""

import collections
import difflib
import logging
import posixpath
import re

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from distillfss_jax.data import builder, core, download, prepared

SPLITS = ('ours', 'lists')
PARTS = ('train', 'val', 'test')
SHOTS = 5  # images 1..5 of a class are for training, 6..10 for testing
_LISTS = {
  'train': ('trn.txt',),
  'val': ('val.txt',),
  'test': ('test.txt', 'fss_test_set.txt'),
}
_FILE = re.compile(
  r'(?P<top>(?:[^/]+/)*)(?P<class>[^/]+)/(?P<n>[1-9]|10)\.(?:jpg|png)'
)


class Fss1000(builder.SegmentationBuilder):
  """Ten images of each of 1000 classes, FSS-1000."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = ('object',)  # its name is that of the folder
  PALETTE = ((0, 0, 0), (86, 180, 233))
  COUNT = 10_000
  DOWNLOAD = (
    'get fewshot_data.zip by the link of https://github.com/HKUSTCV/FSS-1000 '
    '(which states no licence), and give the zip, or the folder of the 1000 '
    'folders <class>/{1..10}.{jpg,png}, as --raw'
  )


def load(data_dir='data', category=''):
  """Loads one class: its images 1..5 to train, 6..10 to test.

  Args:
    data_dir: folder of all prepared datasets.
    category: name of the class; '' for the first of those for testing.

  Raises:
    FileNotFoundError: when it was not prepared.
    ValueError: for an unknown class; lists those with a name like it.
  """
  rows = _rows(data_dir)
  names = sorted({_category(row) for row in rows})
  if not category:
    category = min(_category(row) for row in rows if row['split'] == 'test')
  if category not in names:
    near = difflib.get_close_matches(category, names, 5, 0.4) or names[:5]
    raise ValueError(
      f'no category {category!r} among the {len(names)} of fss1000; there are '
      f'{", ".join(near)}, ...'
    )
  own = [row for row in rows if _category(row) == category]
  own.sort(key=_number)
  sources = prepared.divided(
    prepared.folder(Fss1000, data_dir),
    1,
    [row for row in own if _number(row) <= SHOTS],
    [row for row in own if _number(row) > SHOTS],
  )
  return core.Dataset(Fss1000.name, (category,), Fss1000.PALETTE, *sources)


def pool(data_dir='data', part='test'):
  """What episodes are drawn from: a `core.Pool` of a split's classes.

  Each image is asked for the class of its folder, 1 in every record.

  Parity: images are in the original's order, that of a listing: classes sorted,
  and 1, 10, 2, ..., 9 in each. It draws shots by their number, 1 to 10: ours,
  by their place in that order, are others.

  Args:
    data_dir: folder of all prepared datasets.
    part: 'train', 'val' or 'test'.
  """
  if part not in PARTS:
    raise ValueError(f'part {part!r} is not one of {PARTS}')
  rows = [row for row in _rows(data_dir) if row['split'] == part]
  source = prepared.Prepared(prepared.folder(Fss1000, data_dir), rows, 1)
  classes, of = np.unique([_category(row) for row in rows], return_inverse=True)
  pairs = np.stack([np.arange(len(rows)), of], 1).astype(np.int32)
  names = tuple(classes.tolist())
  return core.Pool(source, names, pairs, np.ones(len(names), np.int32))


def _rows(data_dir):
  made = prepared.manifest(Fss1000, data_dir)
  if made is None:
    raise FileNotFoundError(prepared.unprepared(Fss1000, data_dir))
  return made['records']


def _category(row):
  return row['id'].split('/')[0]


def _number(row):
  return int(row['id'].split('/')[1])


def prepare(raw, data_dir, *, split='ours', skip_bad=False):
  """Turns all classes into ArrayRecord; see `builder.prepare`.

  `split`: 'ours' draws 240 of 1000 classes for testing and 240 for validation,
  as many in proportion of fewer, by a seeded permutation of the sorted names.
  'lists' reads trn.txt, val.txt and test.txt, one name per line, from the raw
  folder or its splits/; fss_test_set.txt of the owners' repository does for
  test.txt, and without the other two the rest is drawn.

  A mask of the owners' download, peregine_falcon/8.png, was found to be a
  photo: --skip_bad leaves it out.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')

  def layout(files):
    return Layout(files, lists=split == 'lists')

  return builder.prepare(
    Fss1000, layout, raw, data_dir, skip_bad=skip_bad, split=split
  )


class Layout:
  """<class>/<n>.jpg and .png, at the top or below other folders.

  Other files of a class, such as <n>.jpeg beside <n>.jpg, are passed over.
  """

  def __init__(self, files, *, lists=False):
    """Finds the ids; ValueError when there are none of the right layout."""
    self._files, self._there = files, set(files.names)
    found = [x for x in map(_FILE.fullmatch, files.names) if x]
    tops = collections.Counter(x['top'] for x in found)
    self.top = max(tops, key=lambda x: (tops[x], -len(x)), default='')
    ids = {(x['class'], x['n']) for x in found if x['top'] == self.top}
    self.ids = ['/'.join(id_) for id_ in sorted(ids)]
    classes = sorted({class_ for class_, _ in ids})
    if len(classes) < len(PARTS):
      raise ValueError(
        f'{files} has {len(classes)} folders of the form '
        f'<class>/{{1..10}}.{{jpg,png}} ({len(files.names)} files in all), '
        f'expected {len(PARTS)} or more: {Fss1000.DOWNLOAD}'
      )
    parts = self._listed(classes) if lists else {}
    if drawn := [part for part in PARTS if part not in parts]:
      names = ', '.join(drawn)
      logging.warning('fss1000: classes of %s are drawn, by our rule', names)
    if 'test' in drawn:
      parts['test'] = _draw(classes, 240 / 1000)
    if 'val' in drawn:
      rest = sorted(set(classes) - parts['test'])
      parts['val'] = _draw(rest, 240 / 760)
      parts['train'] = set(rest) - parts['val']
    self._parts = parts

  def _listed(self, classes):
    """Dict of split -> set of classes, by the lists of the raw folder."""
    named = {x: names for x in PARTS if (names := self._read_list(x))}
    if set(named) not in ({'test'}, set(PARTS)):
      raise ValueError(
        "split 'lists' needs test.txt, with trn.txt and val.txt or alone, "
        f'beside the classes or in splits/; {self._files} has lists of '
        f'{", ".join(named) or "nothing"}: add them, or choose --split ours'
      )
    counts = collections.Counter(x for names in named.values() for x in names)
    if several := sorted(x for x, count in counts.items() if count > 1):
      raise ValueError(
        f'{", ".join(several[:5])}: in several lists of {self._files}; a class '
        'may be in one'
      )
    plain = {_plain(name): name for name in classes}
    left = set(plain).difference(counts) if 'train' in named else ()
    for what, names in (
      ('listed classes are not there', set(counts).difference(plain)),
      ('classes are in no list and left out', left),
    ):
      if names:
        few = ', '.join(sorted(names)[:5])
        logging.warning('fss1000: %d %s: %s', len(names), what, few)
    return {
      x: {plain[i] for i in names & set(plain)} for x, names in named.items()
    }

  def _read_list(self, part):
    for below in (self.top, f'{self.top}splits/', '', 'splits/'):
      for name in _LISTS[part]:
        path = posixpath.join(below, name)
        if path in self._there:
          text = self._files.text(path, 'replace')
          return {_plain(x.strip()) for x in text.splitlines() if x.strip()}
    return set()

  def split(self, ids):
    """Divides the ids by their classes, in the order of a listing."""
    return {
      part: [i for i in ids if i.split('/')[0] in self._parts[part]]
      for part in PARTS
    }

  def _path(self, id_, form):
    path = f'{self.top}{id_}.{form}'
    if path not in self._there:
      raise download.BadFileError(f'{path}: is missing')
    return path

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(self._path(id_, 'jpg'), 'RGB')

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(self._path(id_, 'jpg'))

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W] in {0, 1}.

    Parity: some masks of the download were not made as small as their image;
    the original resizes both without asking, and so do we, but say it.
    """
    path = self._path(id_, 'png')
    contents = self._files.read(path)
    colours = download.decode(contents, path, 'RGB')
    if (colours != colours[..., :1]).any(-1).mean() > 0.5:
      raise download.BadFileError(
        f'{path}: is a picture in colours, not a mask'
      )
    mask = (download.decode(contents, path, 'L') >= 128).astype(np.uint8)
    if mask.shape == tuple(size):
      return mask
    sizes = [f'{w}x{h}' for h, w in (mask.shape, size)]
    logging.warning('fss1000: %s: mask of %s resized to %s', path, *sizes)
    resized = Image.fromarray(mask).resize(size[::-1], Image.NEAREST)
    return np.asarray(resized)


def _plain(name):
  # The owners' list has an apostrophe that their folder has not.
  return name.replace("'", '')


def _draw(names, share):
  """The same part of sorted names every time, at least one."""
  shuffled = np.random.RandomState(42).permutation(names).tolist()
  return set(shuffled[: max(1, round(share * len(names)))])
