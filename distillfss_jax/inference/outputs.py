"""What is written of an answer, whole or not at all, and what of all answers.

OUT/settings.json        what made them: nothing else may go on with them
OUT/masks/NAME.png       indexed, with the run's palette
OUT/overlays/NAME.jpg    OUT/confidence/NAME.png
OUT/probabilities/NAME.npy, or NAME/0_background.png, ... of 16 bits
OUT/geojson/NAME.geojson OUT/labelme/NAME.json
OUT/records/NAME.json    what predictions.csv says of it, written last
OUT/predictions.csv      OUT/annotations.json
"""

import csv
import dataclasses
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

from distillfss_jax import files
from distillfss_jax.inference import outlines
from distillfss_jax.inference.inputs import Input
from distillfss_jax.inference.segmenter import Segmenter
from distillfss_jax.workdir import pictures

OUTLINES = ('coco', 'geojson', 'labelme')
PROBABILITIES = ('png', 'npy')
KINDS = (
  'masks', 'overlays', 'confidence', 'probabilities', 'geojson', 'labelme',
  'records',
)  # fmt: skip
COLUMNS = (
  'image', 'class', 'pixels', 'share', 'parts', 'mean_part', 'largest_part',
  'confidence',
)  # fmt: skip
_SETTINGS = 'settings.json'
_TABLES = (
  'predictions.csv', 'annotations.json', 'classes.txt', 'scores.json',
)  # fmt: skip
_ROWS = 512  # of an overlay, drawn at once


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What to write beside masks and the table.

  overlay, confidence: whether. probabilities: of PROBABILITIES, or ''.
  outlines: some of OUTLINES.
  """

  overlay: bool = False
  confidence: bool = False
  probabilities: str = ''
  outlines: tuple[str, ...] = ()


def refuse_foreign(out: pathlib.Path) -> None:
  """Keeps what others have made, such as drawn masks, from being replaced.

  Raises:
    ValueError: something of an output's name is there, and no settings of ours.
  """
  path, advice = out / _SETTINGS, 'give another --out'
  known = files.read_json(path, advice) if path.exists() else {}
  if {'digest', 'scale'} <= known.keys():
    return
  there = [x for x in (_SETTINGS, *_TABLES) if (out / x).exists()]
  there += [x for x in KINDS if (out / x).is_dir() and any((out / x).iterdir())]
  if there:
    raise ValueError(
      f'{out} has {", ".join(there)}, which predict did not write and would '
      'replace: give another --out'
    )


class Folder:
  """The folder of all outputs; it has passed `refuse_foreign`.

  Args:
    out: the folder; it is made if it is not there.
    segmenter: whose answers they are.
    wanted: what to write.
    scale: see `Segmenter.predict`.
    overwrite: whether to forget what is there.

  Raises:
    ValueError: it holds the outputs of something else.
    OSError: it cannot be written.
  """

  def __init__(
    self,
    out: pathlib.Path,
    segmenter: Segmenter,
    wanted: Wanted,
    *,
    scale: float | None = None,
    overwrite: bool = False,
  ):
    self.out, self.segmenter = out, segmenter
    self.wanted, self.scale = wanted, scale
    settings = {
      'digest': segmenter.digest,
      'scale': scale,
      'classes': list(segmenter.classes),
      'palette': [list(colour) for colour in segmenter.palette],
    }
    path = out / _SETTINGS
    if path.exists() and not overwrite:
      before = files.read_json(path, 'give another --out, or --overwrite')
      if differ := [k for k, x in settings.items() if before.get(k) != x]:
        raise ValueError(
          f'{out} holds what another run or another --scale made ('
          f'{", ".join(differ)} differ): give another --out, or --overwrite'
        )
    self._tidy()
    if overwrite:  # without its record an image counts as not yet there
      shutil.rmtree(out / 'records', ignore_errors=True)
    files.write_atomically(path, json.dumps(settings, indent=2) + '\n')

  def _tidy(self):
    """Removes what a killed process has left half-written."""
    within = ((self.out / kind).rglob('.*') for kind in KINDS)
    names = '|'.join(map(re.escape, (_SETTINGS, *_TABLES, 'shares')))
    own = rf'\.({names})\.\w{{8}}'  # as `files` names them
    half = [x for x in self.out.glob('.*') if re.fullmatch(own, x.name)]
    for path in itertools.chain(half, *within):
      if re.fullmatch(r'\..+\.\w{8}', path.name):
        path.unlink()

  def paths(self, name: str) -> dict[str, pathlib.Path]:
    """{kind: path} of what an image leaves, the record last."""
    wanted, found = self.wanted, {'masks': '.png'}
    found |= {'overlays': '.jpg'} if wanted.overlay else {}
    found |= {'confidence': '.png'} if wanted.confidence else {}
    if wanted.probabilities:
      found['probabilities'] = {'png': '', 'npy': '.npy'}[wanted.probabilities]
    suffixes = {'geojson': '.geojson', 'labelme': '.json'}
    found |= {x: suffixes[x] for x in wanted.outlines if x in suffixes}
    found['records'] = '.json'
    return {
      kind: self.out / kind / f'{name}{end}' for kind, end in found.items()
    }

  def missing(self, one: Input) -> bool:
    """Whether something of an image is not there yet.

    Raises:
      ValueError: what is there is of another image of that name.
    """
    paths = self.paths(one.name)
    try:
      record = files.read_json(paths['records'])
    except (OSError, ValueError):
      return True
    was, now = record.get('read'), _stamp(one.path)
    if not isinstance(was, dict) or was.keys() != now.keys():
      return True
    if was != now and was['path'] != now['path']:
      changed = {k for k in now if was[k] != now[k]}
      if changed != {'path'}:  # else it was moved, or is named otherwise
        raise ValueError(
          f'{self.out} holds the outputs of {was["path"]} under the name '
          f'{one.name}, which {one.path} would have, too: give another --out, '
          'or --overwrite'
        )
    elif was != now:
      return True
    # A file may be left of what --overwrite has replaced since.
    made = record.get('made', ())
    return not all(
      name in made and (self.out / name).exists() for name in self._made(paths)
    )

  def _made(self, paths):
    """What a record vouches for: paths below the folder."""
    return [
      path.relative_to(self.out).as_posix()
      for kind, path in paths.items()
      if kind != 'records'
    ]

  def write(self, one: Input, image: np.ndarray) -> None:
    """Answers an image, and writes what is wanted of it.

    Args:
      one: where the image comes from.
      image: uint8 [H, W, 3].
    """
    paths, size = self.paths(one.name), image.shape[:2]
    paths['records'].unlink(missing_ok=True)  # nothing is whole until the end
    palette = self.segmenter.palette
    labels, sure = np.empty(size, np.uint8), np.empty(size, np.uint8)
    sums = np.zeros(len(palette))  # of the confidence of each label
    with _Shares(self.out, self.wanted.probabilities, size, palette) as shares:
      for band in self.segmenter.bands(image, scale=self.scale):
        found = band.probabilities.argmax(0)
        most = band.probabilities.max(0)
        rows = slice(band.top, band.top + len(found))
        labels[rows], sure[rows] = found, np.rint(255 * most)
        sums += np.bincount(found.ravel(), most.ravel(), len(palette))
        shares.add(rows, band.probabilities)
      if 'probabilities' in paths:
        shares.save(paths['probabilities'], self.segmenter.classes)
    files.write_atomically(paths['masks'], indexed(labels, palette))
    if 'overlays' in paths:
      files.write_atomically(
        paths['overlays'], _jpeg(_overlay(image, labels, palette))
      )
    if 'confidence' in paths:
      files.write_atomically(
        paths['confidence'], _encoded(Image.fromarray(sure))
      )
    del image, sure  # of large ones room is needed for their parts
    classes = self.segmenter.classes
    if 'geojson' in paths:
      made = outlines.geojson(labels, classes, palette)
      files.write_atomically(paths['geojson'], outlines.text(made))
    if 'labelme' in paths:
      path = paths['labelme']
      where = os.path.relpath(one.path.resolve(), path.parent.resolve())
      made = outlines.labelme(labels, classes, pathlib.Path(where).as_posix())
      files.write_atomically(path, outlines.text(made))
    record = {
      'image': one.file,
      'read': _stamp(one.path),
      'size': list(size),
      'made': self._made(paths),
      'classes': measures(labels, classes, sums),
    }
    files.write_atomically(
      paths['records'], json.dumps(record, indent=2) + '\n'
    )

  def mask(self, name: str) -> np.ndarray:
    """The labels that were written of an image."""
    with Image.open(self.out / 'masks' / f'{name}.png') as found:
      return np.asarray(found)

  def conclude(self, inputs: Sequence[Input]) -> None:
    """Writes what is of all images together, from what each has left."""
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator='\n')
    table.writerow(COLUMNS)
    for one in inputs:
      path = self.out / 'records' / f'{one.name}.json'
      record = files.read_json(path)
      for name, found in record['classes'].items():
        table.writerow([record['image'], name, *found.values()])
    files.write_atomically(self.out / 'predictions.csv', rows.getvalue())
    names = '\n'.join(self.segmenter.classes)
    files.write_atomically(self.out / 'classes.txt', f'{names}\n')
    if 'coco' in self.wanted.outlines:
      named = ((one.file, self.mask(one.name)) for one in inputs)
      made = outlines.coco(named, self.segmenter.classes)
      files.write_atomically(self.out / 'annotations.json', outlines.text(made))


def _stamp(path):
  """What tells a file from others, and from what it was."""
  known = path.stat()
  return {
    'path': str(path.resolve()),
    'bytes': known.st_size,
    'modified_ns': known.st_mtime_ns,
  }


def measures(
  labels: np.ndarray, classes: Sequence[str], sums: np.ndarray
) -> dict[str, dict]:
  """What a label map says of each class.

  Args:
    labels: uint8 [H, W].
    classes: names of labels 1..n.
    sums: [1+n], of the confidence of each label's pixels.

  Returns:
    {class: pixels; their share of the image; connected parts, their mean size
    and the largest, in pixels; the mean confidence, None without a pixel}.
  """
  found = {}
  for label, name in enumerate(classes, 1):
    numbers, count = ndimage.label(labels == label)
    areas = np.bincount(numbers.ravel())[1:]
    pixels = int(areas.sum())
    found[name] = {
      'pixels': pixels,
      'share': round(pixels / labels.size, 6),
      'parts': count,
      'mean_part': round(pixels / count, 2) if count else None,
      'largest_part': int(areas.max()) if count else None,
      'confidence': round(sums[label] / pixels, 4) if pixels else None,
    }
  return found


def indexed(labels: np.ndarray, palette: Iterable[Sequence[int]]) -> bytes:
  """A label map as an indexed PNG."""
  picture = Image.fromarray(labels, 'P')
  picture.putpalette([int(x) for colour in palette for x in colour])
  return _encoded(picture)


class _Shares:
  """Probabilities that wait, beside the outputs, until all are there.

  Of a large image they would not fit into memory.
  """

  def __init__(self, out, kind, size, palette):
    self._kind, self._out = kind, out
    self._shape = (*size, len(palette))
    self._file = self._array = None

  def __enter__(self):
    if not self._kind:
      return self
    handle, name = tempfile.mkstemp(prefix='.shares.', dir=self._out)
    os.close(handle)
    self._file = pathlib.Path(name)
    kind = np.float32 if self._kind == 'npy' else np.uint16
    try:
      self._array = np.lib.format.open_memmap(
        self._file, 'w+', kind, self._shape
      )
      # Without room for it, what is written into a mapped file kills.
      if hasattr(os, 'posix_fallocate'):
        with self._file.open('r+b') as file:
          os.posix_fallocate(file.fileno(), 0, self._file.stat().st_size)
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *error):
    self._array = None
    if self._file is not None:
      self._file.unlink(missing_ok=True)

  def add(self, rows, probabilities):
    """Takes those of some rows, [1+n, rows, W]."""
    if self._array is None:
      return
    if self._kind == 'png':
      probabilities = np.rint(65535 * probabilities)
    self._array[rows] = np.moveaxis(probabilities, 0, -1)

  def save(self, path, classes):
    """Writes them: one file, or a folder with one of each label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    self._array.flush()
    if self._kind == 'npy':
      self._file.chmod(0o644)
      os.replace(self._file, path)
      return
    for label, name in enumerate(('background', *classes)):
      name = re.sub(r'[^\w.-]+', '_', name)
      plane = np.ascontiguousarray(self._array[..., label])
      files.write_atomically(
        path / f'{label}_{name}.png', _encoded(Image.fromarray(plane))
      )


def _overlay(image, labels, palette):
  """`pictures.overlay` of an image of any size, in strips of rows."""
  height, width = labels.shape
  line, made = pictures.outline(height, width), np.empty_like(image)
  for top in range(0, height, _ROWS):
    end, first = min(height, top + _ROWS), max(0, top - line)
    rows = slice(first, min(height, end + line))
    strip = pictures.overlay(image[rows], labels[rows], palette, line=line)
    made[top:end] = strip[top - first : end - first]
  return made


def _jpeg(image):
  made = io.BytesIO()
  Image.fromarray(image).save(made, 'JPEG', quality=90)
  return made.getvalue()


def _encoded(picture):
  made = io.BytesIO()
  picture.save(made, 'PNG', compress_level=4)
  return made.getvalue()
