"""Writing a file whole or not at all, and saying why it cannot be."""

import contextlib
import errno
import os
import pathlib
import tempfile


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
def writing(folder: str | os.PathLike):
  """Says of an error of the file system, inside, what to do about it."""
  try:
    yield
  except OSError as error:
    code = error.errno or errno.EIO
    raise OSError(
      f'cannot write into {folder}: {os.strerror(code)}; make room, make it '
      'writable, or give another --workdir'
    ) from error
