"""PASCAL VOC 2012 with the labels of SBD, and its four folds PASCAL-5i.

Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010;
Hariharan et al., "Semantic contours from inverse detectors", ICCV 2011 (SBD);
Shaban et al., "One-shot learning for semantic segmentation", BMVC 2017 (the
folds). It is prepared once with all 20 classes; folds are chosen when it is
loaded. 255 is void: the borders of VOC's own labels; SBD has none.
"""

import collections
import dataclasses
import io
import logging
import pathlib
import re

import numpy as np
import scipy.io
import tensorflow_datasets as tfds

from distillfss_jax.data import builder, core, download, prepared

FOLDS, _WAYS = 4, 5
PARTS = {'train': 'trn', 'test': 'val'}  # and their names in published lists
_COUNTS = {'train': 1464, 'sbd': 9118, 'test': 1449}
_WHOLE = {'train': 1464 + 9118, 'test': 1449}
# (image, class) pairs in the published lists of each fold.
_PAIRS = {'train': (2286, 3425, 5883, 2086), 'test': (346, 451, 725, 346)}
_ALL_TRAIN = ('train', 'sbd')
_LIST = re.compile(
  r'(?P<top>(?:(?:.*/)?VOC2012/)?)ImageSets/Segmentation/(train|val)\.txt'
)
_SBD = re.compile(r'(?P<top>(?:.*/)?)cls/[^/]+\.mat')


class Pascal(builder.SegmentationBuilder):
  """20 kinds of objects in photographs, PASCAL VOC 2012 and SBD."""

  VERSION = tfds.core.Version('1.0.0')
  CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat',
    'chair', 'cow', 'diningtable', 'dog', 'horse', 'motorbike', 'person',
    'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
  )  # fmt: skip
  # VOC's own: bits 0, 3 of a label are the high bits of red, and so on.
  PALETTE = tuple(
    tuple(
      sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
      for channel in range(3)
    )
    for label in range(21)
  )
  DOWNLOAD = (
    'get VOCtrainval_11-May-2012.tar from '
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ (photographs, Flickr's "
    'terms of use), and for 10582 training images instead of 1464 benchmark.tgz'
    ' (SBD) from http://home.bharathh.info/pubs/codes/SBD/download.html, or '
    'SegmentationClassAug; unpack all into one folder and give it as --raw'
  )


def fold_labels(fold):
  """The five labels, of 1..20, that a fold leaves for testing."""
  return tuple(range(_WAYS * fold + 1, _WAYS * fold + _WAYS + 1))


def load(data_dir='data', fold=None, augmented=True, void=True):
  """Loads VOC's training images, then SBD's; VOC's val images are the test.

  Args:
    data_dir: folder of all prepared datasets.
    fold: None for all 20 classes; 0..3 for the five of a fold, as labels 1..5,
      in the images where one occurs.
    augmented: with the training images that have their labels from SBD: all
      10582 of VOC's dense benchmark, in place of 1464.
    void: False counts void as background.

  Raises:
    FileNotFoundError: when it was not prepared.
  """
  if fold is not None and fold not in range(FOLDS):
    raise ValueError(f'fold {fold!r} is not one of 0..{FOLDS - 1}, or None')
  labels = range(1, 21) if fold is None else fold_labels(fold)
  there = prepared.manifest(Pascal, data_dir)
  if augmented and there:
    splits = collections.Counter(row['split'] for row in there['records'])
    if not splits['sbd']:
      logging.warning(
        'pascal: SBD was not there when it was prepared: %d images train, of '
        '%d that augmented=True stands for',
        splits['train'],
        _WHOLE['train'],
      )
  made = prepared.load_prepared(
    Pascal,
    data_dir,
    None
    if fold is None
    else lambda row: not set(labels).isdisjoint(row['present']),
    train=_ALL_TRAIN if augmented else ('train',),
  )
  if fold is not None:
    made = core.with_classes(made, labels)
  # Parity: the reference has PASCAL without void, which its scores do not know.
  return made if void else core.without_void(made)


def pool(
  data_dir='data',
  fold=0,
  part='train',
  min_area=2048,
  exclusive=False,
  lists='',
):
  """What episodes of PASCAL-5i are drawn from; see `core.pool`.

  Args:
    data_dir: folder of all prepared datasets.
    fold: 0..3; its five classes are those of the test part, the 15 others of
      the training part. 4 trains on all 20 (IFA).
    part: 'train', of VOC and SBD, or 'test', of VOC's val.
    min_area: pixels of a class that an image must have.
    exclusive: without images that hold a class of the other part (BAM).
    lists: folder of the published lists, trn/fold0.txt to val/fold3.txt with
      lines `<image>__<class>`: just these pairs, in their order; no area
      counts. Or one file with lines `JPEGImages/<image>.jpg ...`, as BAM and
      HDMNet have it (voc_sbd_merge_noduplicate.txt, 5953 of the 10582 training
      images): just these images, in the training part.

  Raises:
    FileNotFoundError: when it, or a list, is not there.
    ValueError: for unknown arguments or lists that do not fit.
  """
  if part not in PARTS:
    raise ValueError(f'part {part!r} is not one of {tuple(PARTS)}')
  if fold not in range(FOLDS + (part == 'train')):
    raise ValueError(
      f'fold {fold!r} of part {part!r} is not one of 0..{FOLDS - 1}; 4, all '
      "classes, is for part 'train'"
    )
  of_images = bool(lists) and pathlib.Path(lists).expanduser().is_file()
  if lists and exclusive and not of_images:
    raise ValueError('lists say which pairs there are: exclusive cannot')
  made = prepared.load_prepared(Pascal, data_dir, train=_ALL_TRAIN)
  source = getattr(made, part)
  skipped = prepared.manifest(Pascal, data_dir)['skipped']
  folds = [f for f in range(FOLDS) if (f == fold) == (part == 'test')]
  labels = [label for f in folds for label in fold_labels(f)]
  names = tuple(made.classes[label - 1] for label in labels)
  if lists and not of_images:
    pairs = _published(pathlib.Path(lists), part, folds, source, skipped)
    indices = [(i, labels.index(label)) for i, label in pairs]
    return core.Pool(
      source,
      names,
      np.array(indices, np.int32).reshape(-1, 2),
      np.array(labels, np.int32),
    )
  found = core.pool(source, names, labels, min_area, exclusive=exclusive)
  if of_images and part == 'train':
    keep = _listed_images(pathlib.Path(lists).expanduser(), source)
    pairs = found.pairs[np.isin(found.pairs[:, 0], keep)]
    return dataclasses.replace(found, pairs=pairs)
  count = sum(_PAIRS[part][f] for f in folds)
  # What `prepare` left out was there, too.
  whole = len(source) <= _WHOLE[part] <= len(source) + len(skipped)
  if whole and not exclusive and len(found.pairs) != count:
    logging.warning(
      'pascal: %d pairs of image and class have %d pixels, the published lists '
      'have %d: give their folder as lists to draw from the same',
      len(found.pairs),
      min_area,
      count,
    )
  return found


def _listed_images(path, source):
  """Indices of the images that a list of BAM's form names."""
  lines = [line.split()[0] for line in path.read_text().splitlines() if line]
  wanted = [pathlib.PurePosixPath(line).stem for line in lines]
  index = {id_: i for i, id_ in enumerate(source.ids)}
  found = [index[id_] for id_ in wanted if id_ in index]
  if not found:
    raise ValueError(
      f'{path} names none of the {len(index)} prepared images; its lines '
      'should be like JPEGImages/2008_000008.jpg'
    )
  if len(found) < len(wanted):
    logging.warning(
      'pascal: %d of the %d images of %s are not prepared',
      len(wanted) - len(found),
      len(wanted),
      path,
    )
  return found


def _published(folder, part, folds, source, skipped):
  """[(index in source, label)] of the lists of some folds, in their order."""
  index = {id_: i for i, id_ in enumerate(source.ids)}
  pairs, left_out = [], []
  for fold in folds:
    path = folder.expanduser() / PARTS[part] / f'fold{fold}.txt'
    if not path.is_file():
      raise FileNotFoundError(
        f'{path} does not exist: lists must be the folder of trn/fold0.txt to '
        'val/fold3.txt'
      )
    for number, line in enumerate(path.read_text().split(), 1):
      id_, _, label = line.rpartition('__')
      if not label.isdecimal() or int(label) not in fold_labels(fold):
        raise ValueError(
          f'{path}:{number}: {line!r} is not <image>__<class> with a class of '
          f'{fold_labels(fold)[0]}..{fold_labels(fold)[-1]}'
        )
      i, label = index.get(id_), int(label)
      if i is None and id_ not in skipped:
        raise ValueError(
          f'{path}:{number}: image {id_!r} is not one of the {len(index)} '
          f'{part} images that are prepared; are SBD and VOC both there?'
        )
      if i is None or not source.present[i, label - 1]:
        left_out.append(line)
      else:
        pairs.append((i, label))
  if left_out:
    logging.warning(
      'pascal: %d of %d pairs of the lists are left out, without a prepared '
      'image or without the class in its label: %s',
      len(left_out),
      len(pairs) + len(left_out),
      ', '.join(left_out[:5]),
    )
  if not pairs:
    raise ValueError(f'{folder}: the {PARTS[part]} lists of {folds} are empty')
  return pairs


def prepare(raw, data_dir, *, skip_bad=False):
  """Turns all labelled images into ArrayRecord; see `builder.prepare`."""
  return builder.prepare(Pascal, Layout, raw, data_dir, skip_bad=skip_bad)


class Layout:
  """VOC2012/, or what it holds at the top; SBD's folder beside it.

  Parity: the lists of VOC and SBD decide, so that VOC's val is never trained
  on. DistillFSS draws 20 % of all labelled images for testing instead.
  """

  def __init__(self, files):
    """Finds the lists; ValueError where VOC's are missing."""
    self._files, self._there = files, set(files.names)
    found = [x for x in map(_LIST.fullmatch, files.names) if x]
    self.top = min((x['top'] for x in found), key=len, default='')
    if {x[2] for x in found if x['top'] == self.top} != {'train', 'val'}:
      raise ValueError(
        f'{files} has no ImageSets/Segmentation/train.txt and val.txt, in '
        f'VOCdevkit/VOC2012/, VOC2012/ or at its top ({len(files.names)} files '
        f'in all): {Pascal.DOWNLOAD}'
      )
    found = (x for x in map(_SBD.fullmatch, files.names) if x)
    self._sbd = min((x['top'] for x in found), key=len, default=None)
    self._aug = [
      f'{top}SegmentationClassAug/' for top in dict.fromkeys((self.top, ''))
    ]
    train, test = (
      self._listed(f'{self.top}ImageSets/Segmentation/{name}.txt')
      for name in ('train', 'val')
    )
    more = {
      pathlib.PurePosixPath(name).stem
      for name in files.names
      if name.endswith('.png') and f'{name.rpartition("/")[0]}/' in self._aug
    }
    if self._sbd is not None:
      for name in ('train', 'val'):
        more.update(self._listed(f'{self._sbd}{name}.txt'))
    train = [i for i in train if i not in set(test)]
    self._splits = {
      'train': train,
      'sbd': sorted(more.difference(train, test)),
      'test': test,
    }
    self.ids = [i for ids in self._splits.values() for i in ids]
    for name, ids in self._splits.items():
      if ids and len(ids) != _COUNTS[name]:
        logging.warning(
          'pascal: %d images of split %s are there, %d are published',
          len(ids),
          name,
          _COUNTS[name],
        )

  def _listed(self, name):
    if name not in self._there:
      raise ValueError(f'{self._files} has no {name}: {Pascal.DOWNLOAD}')
    text = self._files.text(name, 'replace')
    return list(dict.fromkeys(text.split()))

  def _first(self, *names):
    for name in names:
      if name in self._there:
        return name
    raise download.BadFileError(f'{names[0]}: is missing')

  def split(self, ids):
    """Divides the ids as the lists do, each part in their order."""
    good = set(ids)
    return {
      name: [i for i in listed if i in good]
      for name, listed in self._splits.items()
    }

  def encoded(self, id_):
    """Reads the JPEG file of an id."""
    return self._files.read(self._image(id_))

  def image(self, id_):
    """Reads the image of an id, uint8 [H, W, 3]."""
    return self._files.decode(self._image(id_), 'RGB')

  def _image(self, id_):
    names = [f'{self.top}JPEGImages/{id_}.jpg']
    if self._sbd is not None:
      names.append(f'{self._sbd}img/{id_}.jpg')
    return self._first(*names)

  def label(self, id_, size):
    """Reads the label of an id, uint8 [H, W] in {0..20, 255}.

    Parity: VOC's own label before SegmentationClassAug before SBD's, as AttnFD
    has it; DistillFSS would take SegmentationClassAug before VOC's own.
    """
    names = [f'{self.top}SegmentationClass/{id_}.png']
    names += [f'{folder}{id_}.png' for folder in self._aug]
    if self._sbd is not None:
      names.append(f'{self._sbd}cls/{id_}.mat')
    name = self._first(*names)
    read = _matlab if name.endswith('.mat') else _indices
    label = read(name, self._files.read(name))
    download.same_size(name, label, size)
    if strange := sorted({*np.unique(label).tolist()} - {*range(21), 255}):
      raise download.BadFileError(
        f'{name}: has values {strange[:5]}, expected 0..20 and 255'
      )
    return label.astype(np.uint8)


def _indices(name, contents):
  """The values of a palette or grey PNG as they are, whatever the colours."""
  with download.picture(contents, name) as (found, _):
    if found.mode not in ('P', 'L'):
      raise download.BadFileError(
        f'{name}: is a picture of mode {found.mode}, expected class indices '
        '0..20 and 255, one channel of 8 bits (palette or grey)'
      )
    return download.pixels(found)


def _matlab(name, contents):
  """The field Segmentation of SBD's struct GTcls."""
  try:
    label = scipy.io.loadmat(io.BytesIO(contents))['GTcls']['Segmentation']
    return np.asarray(label[0, 0], np.int64)
  except Exception as error:  # its reader raises whatever bad bytes lead to
    reason = str(error).replace('\n', ' ')
    raise download.BadFileError(
      f'{name}: has no GTcls.Segmentation that can be read ({reason:.100})'
    ) from error
