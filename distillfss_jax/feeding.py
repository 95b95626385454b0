"""Batches from the reader to the devices, read while the devices work.

A dispatch takes many steps, so it needs their batches stacked. How many lie in
memory is bounded by bytes: of tables of indices a whole dispatch, of large
images one or two.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from distillfss_jax import parallel

MOST_BYTES = 256 << 20  # of batches that wait, or are in a dispatch


class Feed:
  """Reads ahead in a thread; says where the reader is, for checkpoints.

  Args:
    iterator: of elements, with `get_state` (grain's).
    as_batch: element -> batch, a pytree of arrays [b, ...] of this process, and
      [b] bool, which of its items count.
    rows: items of all processes -> rows that the devices can share.
    mesh: the devices.
    own: whether this process has a part of each batch, else all have all.
    most: steps of a dispatch.

  Attributes:
    per_dispatch: steps whose batches are stacked: at most `most`, fewer where
      they are large.
  """

  def __init__(
    self,
    iterator: Iterator,
    as_batch: Callable[[Any], Any],
    *,
    rows: Callable[[int], int],
    mesh: jax.sharding.Mesh,
    own: bool,
    most: int,
  ):
    self._iterator, self._as_batch = iterator, as_batch
    self._rows, self._mesh, self._own = rows, mesh, own
    self._state = iterator.get_state()  # after what was taken
    first = self._read()
    size = sum(x.nbytes for x in jax.tree.leaves(first[0]))
    fit = max(1, MOST_BYTES // (2 * max(size, 1)))
    self.per_dispatch = min(most, fit)
    self._queue = queue.Queue(maxsize=min(fit, 2 * most))
    self._queue.put(first)
    self._ends = threading.Event()
    self._thread = threading.Thread(target=self._read_on, daemon=True)
    self._thread.start()

  def take(self, count: int) -> tuple[Any, jax.Array]:
    """Batches of the next `count` steps, and the places of their items.

    Returns:
      Arrays [per_dispatch, rows, ...] on the devices; steps from `count` on
      are padding.

    Raises:
      Whatever reading raises.
    """
    taken = [self._next() for _ in range(count)]
    batches = [batch for batch, _ in taken]
    places = np.stack([self._numbered(valid) for _, valid in taken])
    missing = self.per_dispatch - count
    short = places.shape[1] - len(taken[0][1])

    def stacked(*arrays):
      x = np.stack(arrays)
      return np.pad(x, ((0, missing), (0, short), *((0, 0),) * (x.ndim - 2)))

    places = np.pad(places, ((0, missing), (0, 0)), constant_values=-1)
    return parallel.share_steps(
      (jax.tree.map(stacked, *batches), places), self._mesh, own=self._own
    )

  def get_state(self) -> Any:
    """Where the reader stands after what was taken."""
    return self._state

  def close(self) -> None:
    """Ends the thread."""
    self._ends.set()
    while self._thread.is_alive():
      try:  # it may wait for room
        self._queue.get_nowait()
      except queue.Empty:
        self._thread.join(0.01)

  def _numbered(self, valid):
    """[rows] the place of each row of a batch; -1 for what does not count."""
    here = len(valid)
    parts = jax.process_count() if self._own else 1
    part = jax.process_index() if self._own else 0
    rows = self._rows(here * parts) // parts
    # Process p reads the items p, p + processes, ... of a batch.
    numbers = part + parts * np.arange(rows)
    counts = np.pad(np.asarray(valid, bool), (0, rows - here))
    return np.where(counts, numbers, -1).astype(np.int32)

  def _read(self):
    """The next batch with what counts, and where the reader stands then."""
    element = next(self._iterator)
    return *self._as_batch(element), self._iterator.get_state()

  def _read_on(self):
    while not self._ends.is_set():
      try:
        read = self._read()
      except StopIteration:
        return
      except Exception as error:  # is raised where the batch is asked for
        read = error
      self._queue.put(read)
      if isinstance(read, Exception):
        return

  def _next(self):
    read = self._queue.get()
    if isinstance(read, Exception):
      raise read
    batch, valid, self._state = read
    return batch, valid
