"""A run's folder has one owner; the lock of a dead one is recognised."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid

from distillfss_jax import files

IN_USE = os.EX_UNAVAILABLE  # 69: another process is at work in the folder


LOCK = 'lock'


BEAT = 10.0  # seconds between an owner's signs of life


SILENCE = 45.0  # without any, an owner on another host is taken for dead


HALF = 2.0  # a lock may be half written where it cannot be made at once


_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class InUseError(ValueError):
  """Another process is at work in the folder."""


class Lock:
  """One owner at a time of a run's folder; a context.

  The file says who the owner is, and a thread of the owner counts in it. Of an
  owner on this machine the system knows whether it lives; one elsewhere is dead
  when its count stands still for a while, which needs no clock that agrees.

  Args:
    folder: the run's folder, which exists.
    option: of the command, which names it.
  """

  def __init__(self, folder: str | os.PathLike, option: str = '--workdir'):
    self._path, self._option = pathlib.Path(folder) / LOCK, option
    self._mine = {**_me(), 'token': uuid.uuid4().hex}
    self._ended = threading.Event()
    self._lost = False

  def __enter__(self):
    """Takes the folder.

    Raises:
      InUseError: another process is at work in it.
      OSError: the lock cannot be read or written.
    """
    while not self._create():
      seen = self._look()
      owner = _whole(seen[-1]) if seen else None
      if owner is not None and self._lives(owner):
        raise InUseError(
          f'{self._path.parent} is in use by process {owner["pid"]} on '
          f'{owner["host"]}: wait for it, stop it, or give another '
          f'{self._option}. (If it is dead, remove {self._path})'
        )
      if owner is None and seen is not None:
        time.sleep(HALF)  # it may be being written
      self._remove(seen)
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *error):
    self._ended.set()
    self._thread.join(BEAT)
    with contextlib.suppress(OSError):
      if (_owner(self._path) or {}).get('token') == self._mine['token']:
        self._path.unlink(missing_ok=True)

  def check(self):
    """Raises InUseError where another process has taken the folder."""
    if self._lost:
      owner = _owner(self._path) or {'pid': '?', 'host': '?'}
      raise InUseError(
        f'{self._path.parent} was taken over by process {owner["pid"]} on '
        f'{owner["host"]} while this one gave no sign of life: this one ends'
      )

  def _create(self):
    """Makes the lock where there is none; says whether it is this one's."""
    # A link appears with all its content: nobody ever sees half a lock.
    whole = self._path.with_name(f'.{LOCK}.{self._mine["token"]}')
    try:
      whole.write_text(self._text(0))
      os.link(whole, self._path)
    except FileExistsError:
      # NFS may say so of the link that it has just made.
      return (_owner(self._path) or {}).get('token') == self._mine['token']
    except OSError as error:
      if error.errno not in _NO_LINKS:
        raise
      return self._create_in_place()
    finally:
      whole.unlink(missing_ok=True)
    return True

  def _create_in_place(self):
    """The same on a file system without links."""
    try:
      with self._path.open('x') as file:
        file.write(self._text(0))
    except FileExistsError:
      return False
    return True

  def _look(self):
    """What tells the lock that is there from any other; None without one."""
    with _unless_gone(), self._path.open('rb') as file:
      about = os.fstat(file.fileno())
      return about.st_ino, about.st_mtime_ns, file.read()
    return None

  def _remove(self, seen):
    """Removes a stale lock, if it is still the one that was seen."""
    with _one_at_a_time(self._path.parent):
      if seen is not None and self._look() == seen:
        self._path.unlink(missing_ok=True)

  def _text(self, count):
    return json.dumps({**self._mine, 'count': count})

  def _beat(self):
    count = 0
    while not self._ended.wait(BEAT):
      # A file system that fails for a while is no reason to give up.
      with contextlib.suppress(OSError):
        owner = _owner(self._path)
        if owner is not None and owner.get('token') != self._mine['token']:
          self._lost = True
          return
        count += 1
        files.write_atomically(self._path, self._text(count))

  def _lives(self, owner):
    mine = self._mine
    if (owner['host'], owner['boot']) == (mine['host'], mine['boot']):
      return _started(owner['pid']) == owner['started'] is not None
    print(
      f'{self._path} is of process {owner["pid"]} on {owner["host"]}: looking '
      f'whether it lives, for up to {SILENCE:.0f} s',
      file=sys.stderr,
      flush=True,
    )
    until = time.monotonic() + SILENCE
    while time.monotonic() < until:
      time.sleep(min(1.0, SILENCE / 10))
      now = _owner(self._path)
      if now != owner:
        return now is not None  # or it has left
    return False


@contextlib.contextmanager
def _one_at_a_time(folder):
  """Among all that ask for a folder; without it where the system cannot."""
  # Between a look and a removal another could have come. What the system locks
  # for a process is free when that is dead.
  handle = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # NFS cannot lock folders
      fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def _me():
  """Who this process is, also among those that reuse its number."""
  return {
    'host': socket.gethostname(),
    'boot': _read('/proc/sys/kernel/random/boot_id') + _namespace(),
    'pid': os.getpid(),
    'started': _started(os.getpid()),
  }


def _namespace():
  """In which container: each numbers its own processes."""
  try:
    return f' {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _started(pid):
  """When a process of this machine was started; None where there is none."""
  if not os.path.exists('/proc/self/stat'):  # no Linux
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return None
    except PermissionError:
      pass
    return 'unknown'
  # The name in the second field may hold spaces, but it ends with ')'.
  fields = _read(f'/proc/{pid}/stat').rpartition(')')[2].split()
  dead = not fields or fields[0] in ('Z', 'X')
  return None if dead else fields[19]


def _read(path):
  try:
    return pathlib.Path(path).read_text().strip()
  except OSError:
    return ''


def _owner(path):
  """What a lock says; None where it is gone or not whole."""
  with _unless_gone():
    return _whole(path.read_bytes())
  return None


@contextlib.contextmanager
def _unless_gone():
  """Passes over a file that is not there, or no more while it is read."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOENT, errno.ESTALE):
      raise


def _whole(text):
  """The owner that a lock's content names; None where it is not whole."""
  try:
    owner = json.loads(text)
    return owner if {'host', 'boot', 'pid', 'started'} <= set(owner) else None
  except (ValueError, TypeError):
    return None
