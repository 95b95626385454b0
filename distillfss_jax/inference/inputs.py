"""Images by folders, patterns and files, and the names their outputs get."""

import dataclasses
import glob
import os
import pathlib
from collections.abc import Iterable

from PIL import Image

from distillfss_jax.data import download


@dataclasses.dataclass(frozen=True)
class Input:
  """An image to be read.

  path: of its file.
  name: of its outputs, without a suffix: its path below the folder that was
    given, or below what of a pattern is no pattern.
  """

  path: pathlib.Path
  name: str

  @property
  def file(self) -> str:
    """Its name with the suffix of its file."""
    return self.name + self.path.suffix


def find(given: Iterable[str], out: pathlib.Path) -> list[Input]:
  """The images that folders, patterns and files name, in order of their names.

  Args:
    given: paths; of folders all images below are taken, as by their suffix.
    out: the folder of the outputs, which must not be among the inputs.

  Raises:
    ValueError: something does not exist or holds no image, or two images would
      have outputs of one name.
  """
  found = {}
  for text in given:
    for path, below in _paths(text, out):
      name = path.relative_to(below).with_suffix('').as_posix()
      other = found.setdefault(name, path)
      if other != path and not other.samefile(path):
        raise ValueError(
          f'{other} and {path} would both be written as {name}: rename one, or '
          'give a folder that holds both'
        )
  return [Input(path, name) for name, path in sorted(found.items())]


def _paths(text, out):
  """(path, what its name is relative to) of what one argument names."""
  path = pathlib.Path(text).expanduser()
  if path.is_dir():
    if out.resolve().is_relative_to(path.resolve()):
      raise ValueError(
        f'--out {out} lies in {path}: what is written would be read the next '
        'time; choose another folder'
      )
    files = [
      path / name
      for name in download.Files(path, '').names
      if name.lower().endswith(download.SUFFIXES)
    ]
    if not files:
      raise ValueError(
        f'{path} holds no image: none of its files ends in '
        f'{", ".join(download.SUFFIXES)}'
      )
    return [(file, path) for file in files]
  if path.is_file():
    return [(path, path.parent)]
  if glob.has_magic(text):
    fixed = path
    while glob.has_magic(str(fixed)):
      fixed = fixed.parent
    found = sorted(glob.glob(str(path), recursive=True))
    files = [pathlib.Path(x) for x in found if os.path.isfile(x)]
    if files:
      return [(file, fixed) for file in files]
    raise ValueError(f'no file is named as {text}')
  raise ValueError(f'{text} does not exist')


def sizes(inputs: Iterable[Input]) -> dict[str, tuple[int, int]]:
  """{name: (rows, columns)} of images, from the heads of their files.

  Raises:
    BadFileError: one is no image, too large, or cannot be read.
  """
  found = {}
  for one in inputs:
    with (
      download.guard(one.path, 'is no image that can be read'),
      Image.open(one.path, formats=download.FORMATS) as picture,
    ):
      download.refuse_large(one.path, *picture.size)
      found[one.name] = picture.size[::-1]
  return found
