"""How a run is asked to stop: SIGTERM and Ctrl-C, granted where it can save.

The exit code says whether starting the same command again goes on.
"""

import contextlib
import os
import signal
import threading
import time

AGAIN = os.EX_TEMPFAIL  # 75: saved; the same command goes on


INTERRUPTED = 128 + signal.SIGINT


ECHO = 2.0  # seconds in which a signal's repetition is the same signal


class Stopped(BaseException):
  """A run was asked to stop, by the signal of this number."""

  # Like KeyboardInterrupt it passes by whoever handles any Exception: to the
  # reader of checkpoints it would be a damaged one.

  def __init__(self, signum):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum

  @property
  def code(self):
    """What the process exits with."""
    return INTERRUPTED if self.signum == signal.SIGINT else AGAIN


class Stop:
  """Hears SIGTERM and Ctrl-C; a context, of the main thread.

  Attributes:
    wanted: number of the signal that came inside `deferred`, 0 for none.
  """

  def __init__(self):
    self.wanted = 0
    self._deferred = False
    self._before = {}
    self._since = -1.0

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for signum in (signal.SIGTERM, signal.SIGINT):
        self._before[signum] = signal.signal(signum, self._hear)
    return self

  def __exit__(self, *error):
    for signum, handler in self._before.items():
      signal.signal(signum, handler)

  @contextlib.contextmanager
  def deferred(self):
    """Inside, a first signal is only noted; elsewhere it raises Stopped."""
    self._deferred = True
    try:
      yield
    finally:
      self._deferred = False

  def _hear(self, signum, frame):
    del frame
    # Schedulers and scripts may each pass on the same signal.
    if self.wanted and time.monotonic() - self._since < ECHO:
      return
    if not self._deferred or self.wanted:
      raise Stopped(signum)
    self.wanted, self._since = signum, time.monotonic()
    name = signal.Signals(signum).name
    line = f'{name}: stopping when the step under way is done and saved; once '
    with contextlib.suppress(OSError):  # print could be in the middle of a line
      os.write(2, f'{line}more stops at once\n'.encode())
