"""Industrial: defects of 20 kinds of products and surfaces, in 4 folds.

Shi et al., "Few-shot semantic segmentation for industrial defect recognition",
Computers in Industry 148 (2023): Industrial-5i. `data.json` names the classes
and lists the images of each that have a defect ("bad"); beside each `.png` lies
its mask, a `.bmp`. It is prepared once with all classes; a fold of five is
chosen when it is loaded.
"""

import collections
import posixpath

import numpy as np
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, core, download, prepared

SPLITS = ('reference',)
FOLDS = 4
_COUNT = 20
_INDEX = 'data.json'
_COLOURS = (
  (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167),
)  # fmt: skip


class Industrial(builder.SegmentationBuilder):
  """Defects of 20 kinds of products and surfaces, Industrial-5i."""

  VERSION = tfds.core.Version('1.0.0')
  # `prepare` puts the names of data.json here.
  CLASSES = tuple(f'class {i + 1}' for i in range(_COUNT))
  # Those of a fold are four apart, and all differ.
  PALETTE = ((0, 0, 0), *(_COLOURS[i // FOLDS] for i in range(_COUNT)))
  DOWNLOAD = (
    'get Industrial-5i of "Few-shot semantic segmentation for industrial '
    'defect recognition" (Computers in Industry 148, 2023) from its authors '
    '(its parts, such as MVTec AD, have licences of their own, mostly '
    'non-commercial), and give the folder with data.json and the images, or '
    'a zip of it, as --raw'
  )


def load(data_dir='data', fold=0):
  """Loads the five classes of a fold, of both parts, as labels 1..5.

  Args:
    data_dir: folder of all prepared datasets.
    fold: 0..3; fold f has the classes f+1, f+5, f+9, f+13 and f+17 of the
      twenty.

  Raises:
    FileNotFoundError: when it was not prepared.
  """
  if fold not in range(FOLDS):
    raise ValueError(f'fold {fold!r} is not one of 0..{FOLDS - 1}')
  labels = tuple(range(fold + 1, _COUNT + 1, FOLDS))
  made = prepared.load_prepared(
    Industrial, data_dir, lambda row: not set(labels).isdisjoint(row['present'])
  )
  return core.with_classes(made, labels)


def prepare(raw, data_dir, *, split='reference', skip_bad=False):
  """Turns the images of all 20 classes into ArrayRecord; see `builder.prepare`.

  The only `split` is the reference's: 20 % of all for testing.
  """
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is not one of {SPLITS}')
  if (done := prepared.manifest(Industrial, data_dir)) is not None:
    return done, False
  with download.Files(raw, Industrial.DOWNLOAD) as files:
    found = Layout(files)

  class Named(Industrial, skip_registration=True):
    __doc__ = Industrial.__doc__
    name = Industrial.name
    CLASSES = tuple(found.classes)

  return builder.prepare(Named, Layout, raw, data_dir, skip_bad=skip_bad)


class Layout:
  """data.json at the top or in a folder, with the paths it lists.

  `classes` are the names of labels 1..20; `ids` are in the order of data.json.
  """

  def __init__(self, files):
    """Reads data.json; ValueError where it is missing or says too little."""
    self._files, self._there = files, set(files.names)
    index = min(
      (x for x in files.names if posixpath.basename(x) == _INDEX),
      key=lambda x: (x.count('/'), x),
      default=None,
    )
    if index is None:
      raise ValueError(
        f'{files} has no {_INDEX} ({len(files.names)} files of other names): '
        f'{Industrial.DOWNLOAD}'
      )
    self.top = posixpath.dirname(index)
    self.classes, rows = _read(index, files)
    self._row = {id_: (path, label) for id_, path, label in rows}
    self.ids = list(self._row)
    if len(self.ids) < len(rows):
      counts = collections.Counter(id_ for id_, _, _ in rows)
      several = [f'{id_} ({n})' for id_, n in counts.items() if n > 1]
      raise ValueError(
        f'{index}: images share an id made of their folder and name: '
        f'{", ".join(several[:5])}; {len(several)} in all. Each image must be '
        'listed once'
      )

  def split(self, ids):
    """Divides the ids: 20 % of all classes together for testing.

    Parity: the reference's rule on the rows in their order in data.json, which
    is that of the reference. Images that are left out change nothing for
    others. Train is in the order of data.json, as in every run of the
    reference but the first, test in that of the shuffle.
    """
    test = [self.ids[i] for i in download.held_out(range(len(self.ids)))]
    good, held_out = set(ids), set(test)
    return {
      'train': [i for i in self.ids if i in good and i not in held_out],
      'test': [i for i in test if i in good],
    }

  def _path(self, path):
    for below in ('', 'data'):  # data/ itself may lie beside data.json
      place = posixpath.join(self.top, below, path)
      if place in self._there:
        return place
    raise download.BadFileError(f'{posixpath.join(self.top, path)}: is missing')

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(self._path(self._row[id_][0]), 'RGB')

  def encoded(self, id_):
    """Reads the file that `image` decodes."""
    return self._files.read(self._path(self._row[id_][0]))

  def label(self, id_, size):
    """Reads the mask of an id, uint8 [H, W] in {0, class}."""
    path, label = self._row[id_]
    path = self._path(f'{path.removesuffix(".png")}.bmp')
    mask = self._files.decode(path, 'L')
    download.same_size(path, mask, size)
    if not mask.any():
      raise download.BadFileError(f'{path}: mask has no defect')
    return np.where(mask > 0, label, 0).astype(np.uint8)


def _read(name, files):
  """(classes, [(id, path below data/, label)]) of data.json."""
  try:
    said = files.json(name)
    classes = said['clsName']
    listed = [(x, path) for x in said['clsDic'] for path in _bad(said, x)]
    different = len(set(classes))
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise _wrong(
      name, f'has no clsName and clsDic[...]["bad"] ({error!r:.100})'
    ) from error
  if different != _COUNT or len(classes) != _COUNT:
    raise _wrong(name, f'has {different} different classes, expected {_COUNT}')
  rows = []
  for class_, path in listed:
    if class_ not in classes:
      raise _wrong(name, f'class {class_!r} is in clsDic but not in clsName')
    parts = path.split('/')
    if len(parts) < 4 or parts[0] != 'data' or not path.endswith('.png'):
      raise _wrong(
        name, f'lists {path!r}, expected data/<folder>/<folder>/<file>.png'
      )
    id_ = f'{parts[-3]}_{parts[-1].split(".")[0]}'
    rows.append((id_, '/'.join(parts[1:]), classes.index(class_) + 1))
  return classes, rows


def _wrong(name, what):
  return ValueError(
    f'{name}: {what}; is it the right file? {Industrial.DOWNLOAD}'
  )


def _bad(said, class_):
  paths = said['clsDic'][class_]['bad']
  if not all(isinstance(path, str) for path in paths):
    raise TypeError(f'paths of {class_!r} are no texts')
  return paths
