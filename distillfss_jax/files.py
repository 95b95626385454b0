"""Writing a file whole or not at all, reading what runs left, and digests."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

LARGEST = 2**26  # bytes of a JSON file of a run; the largest list ids of images
NESTED = 64  # levels of it; ours have up to 5


def write_atomically(path: str | os.PathLike, data: str | bytes) -> None:
  """Writes `data` to `path`: a reader sees the old file or the new, never half.

  Text is stored as UTF-8. Missing parent folders are created.

  Raises:
    OSError: the folder cannot be written or the disk is full; the old file is
      then still there, and no temporary file is left.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(data, str):
    data = data.encode()
  handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    # mkstemp makes private files; results are meant to be read by others.
    os.chmod(name, path.stat().st_mode if path.exists() else 0o644)
    os.replace(name, path)
  except BaseException:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(name)
    raise


@contextlib.contextmanager
def writing(folder: str | os.PathLike, option: str = '--workdir'):
  """Says of an error of the file system, inside, what to do about it.

  Args:
    folder: that is written into.
    option: of the command, which names it.
  """
  try:
    yield
  except OSError as error:
    code = error.errno or errno.EIO
    raise OSError(
      f'cannot write into {folder}: {os.strerror(code)}; make room, make it '
      f'writable, or give another {option}'
    ) from error


def read_json(
  path: str | os.PathLike,
  advice: str = 'delete it and run its command again',
) -> dict:
  """Reads a file of one JSON object that a run left behind.

  Whoever reads these files may take it that values are of JSON's types, that
  numbers are int64 or finite float64 (or NaN or Infinity, which Python writes),
  and that walking through them by recursion ends.

  Args:
    path: the file.
    advice: what to do where it is damaged.

  Raises:
    ValueError: it is damaged; one line with the file, the reason, the advice.
    OSError: it cannot be read.
  """
  path = pathlib.Path(path)
  try:
    with path.open('rb') as file:
      text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
      raise ValueError(f'more than {LARGEST} bytes')
    value = json.loads(text, parse_int=_whole, parse_float=_fraction)
    if not isinstance(value, dict):
      raise ValueError('no JSON object')
    _check_json(value)
    return value
  except (ValueError, RecursionError) as error:
    deep = isinstance(error, RecursionError)
    reason = f'nested deeper than {NESTED} levels' if deep else error
    raise ValueError(f'{path} is damaged ({reason}): {advice}') from error


def _whole(text):
  # Python refuses to read thousands of digits, with advice for programmers.
  if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
    raise ValueError(f'the number {text[:20]}... is too large')
  return int(text)


def _fraction(text):
  if not math.isfinite(float(text)):
    raise ValueError(f'the number {text[:20]} is too large')
  return float(text)


def _check_json(value):
  level = [value]
  for _ in range(NESTED + 1):
    inner = []
    for x in level:
      if isinstance(x, dict):
        inner += [*x.keys(), *x.values()]
      elif isinstance(x, list):
        inner += x
      elif isinstance(x, str):
        x.encode()  # half a surrogate pair cannot be printed or written
    level = inner
  if level:
    raise RecursionError


def digest_of(*parts: Any) -> str:
  """A digest of arrays and texts: data that change under a run are noticed."""
  found = hashlib.blake2b(digest_size=16)
  for part in parts:
    if isinstance(part, np.ndarray):
      found.update(repr((part.shape, part.dtype.str)).encode())
      found.update(np.ascontiguousarray(part).view(np.uint8).data)
    else:
      found.update(repr(part).encode())
  return found.hexdigest()
