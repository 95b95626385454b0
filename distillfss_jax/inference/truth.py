"""Predicted masks against drawn ones."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from distillfss_jax.data import download, mask_meaning, pairs
from distillfss_jax.inference.inputs import Input
from distillfss_jax.ops.metrics import Confusion


@dataclasses.dataclass(frozen=True)
class Truth:
  """Drawn masks of images, and what their values mean.

  files: the folder's.
  of: {name of an image: its mask's file}.
  coding: of their values. labels: of those of the coding, ours.
  """

  files: download.Files
  of: dict[str, str]
  coding: mask_meaning.Coding
  labels: np.ndarray

  def label(self, name: str, size: tuple[int, int]) -> np.ndarray:
    """The labels of an image, uint8 [H, W]; 255 is void.

    Raises:
      BadFileError: the mask is of another size.
    """
    file = self.of[name]
    mask = mask_meaning.decode(self.files.read(file), file)
    download.same_size(file, mask.values, size)
    return self.labels[self.coding.label(mask)]


def read(
  folder: str,
  inputs: Sequence[Input],
  classes: Sequence[str],
  meaning: str | None = None,
) -> Truth:
  """Finds the masks of images, and what they mean, before long work.

  Args:
    folder: of masks, named as the images, or with _mask or the like appended.
    inputs: the images.
    classes: names of labels 1..n.
    meaning: a file of lines as in classes.txt; None takes the values 1..n for
      the classes, or of one class whatever is not background.

  Raises:
    ValueError: an image has no mask, or they mean other classes.
  """
  if not pathlib.Path(folder).expanduser().is_dir():
    raise ValueError(f'--masks {folder} is no folder')
  files = download.Files(folder, '')
  masks = {
    name: pathlib.PurePosixPath(name).with_suffix('').as_posix()
    for name in files.names
    if name.lower().endswith(download.SUFFIXES)
  }
  found, _ = pairs.match({one.name: one.name for one in inputs}, masks)
  if lacking := [one.name for one in inputs if one.name not in found]:
    raise ValueError(
      f'--masks {folder} has no mask for {len(lacking)} of {len(inputs)} '
      f'images: {download.few(lacking)}'
    )
  if twice := [x for names in found.values() if len(names) > 1 for x in names]:
    raise ValueError(
      f'--masks {folder} has several masks of one image: {download.few(twice)}'
    )
  of = {name: names[0] for name, names in found.items()}
  seen = [mask_meaning.survey(files.read(file), file) for file in of.values()]
  coding = mask_meaning.decide(seen, _listed(meaning, classes))
  return Truth(files, of, coding, _labels(coding, classes, folder))


def _listed(meaning, classes):
  if meaning is not None:
    path = pathlib.Path(meaning).expanduser()
    if not path.is_file():
      raise ValueError(f'--meaning {meaning} does not exist')
    lines = path.read_text(encoding='utf-8-sig').splitlines()
    return mask_meaning.parse_classes(lines, str(path))
  if len(classes) == 1:
    return None
  numbers = range(1 + len(classes))
  lines = [f'{i} {name}' for i, name in enumerate(('background', *classes))]
  return mask_meaning.Listed(
    'value', tuple(classes), dict(zip(numbers, numbers, strict=True)),
    tuple(numbers), tuple(lines), "the run's classes",
  )  # fmt: skip


def _labels(coding, classes, folder):
  """Our labels of the coding's, uint8 [256]."""
  found = np.full(256, 255, np.uint8)
  found[0] = 0
  if len(classes) == len(coding.classes) == 1:
    found[1] = 1
    return found
  for label, name in enumerate(coding.classes, 1):
    if name not in classes:
      raise ValueError(
        f'the masks of {folder} show {name!r}; the classes are '
        f'{", ".join(classes)}: say which value is which with --meaning, a '
        'file of lines like `1 name`'
      )
    found[label] = 1 + list(classes).index(name)
  return found


def scores(
  truth: Truth,
  inputs: Sequence[Input],
  classes: Sequence[str],
  mask: Callable[[str], np.ndarray],
) -> dict:
  """The scores of predictions, at the images' own sizes.

  Args:
    truth: the drawn masks.
    inputs: the images.
    classes: names of labels 1..n.
    mask: name of an image -> its predicted labels.

  Returns:
    What `Confusion.scores` gives over all pixels, and under 'images' the mean
    IoU of each, None where it has nothing to find and nothing was found.
  """
  total, each = Confusion.empty(1 + len(classes)), {}
  for one in inputs:
    predicted = mask(one.name)
    label = truth.label(one.name, predicted.shape)
    found = Confusion.of(label, predicted, 1 + len(classes))
    total.add(found.counts)
    each[one.file] = found.miou
  return {**total.scores(tuple(classes)), 'images': each}
