"""Checkpoints that are verified: orbax, our checksums, and a way back.

Orbax writes in the background and never leaves a half-written step under its
final name, but it restores damaged bytes without a word and gives up on the
first unreadable step. So every leaf is saved with a checksum, and `restore`
goes back from the newest step to the newest step that verifies.
"""

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from distillfss_jax import parallel

# These say nothing about a checkpoint that cannot be read.
_PASSING = (errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)


class Restored(NamedTuple):
  """What `Checkpointer.restore` found.

  step: optimiser steps done when it was saved.
  state: the saved tree, bit for bit, placed like the tree asked for.
  data_state: what the data iterator's `get_state()` gave, for `set_state`.
  extra: the saved dict, after a journey through JSON.
  """

  step: int
  state: Any
  data_state: Any
  extra: dict


class Checkpointer:
  """Saves and restores the state of one run in one folder.

  Every process of a run makes the same calls with a replicated state; process
  0 writes it. Step folders are orbax checkpoints of two items: `state`, a flat
  dict of arrays by path, and `record`, JSON with the checksums and the rest.
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
    """Opens `directory`, creates it if missing, and changes nothing in it.

    Args:
      directory: the run's `checkpoints/` folder.
      keep: how many newest steps stay; two or more allow falling back.

    Raises:
      OSError: the folder cannot be created.
    """
    if keep < 1:
      raise ValueError(f'keep must be at least 1, got {keep}')
    self.directory = pathlib.Path(os.path.abspath(directory))
    self._done = set()  # steps this object has saved or verified
    self._damaged = set()  # steps `restore` could not verify
    self._tidy = False  # whether leftovers of killed saves are gone
    with self._writing():
      self.directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=preservation_policy.LatestN(keep),
          enable_async_checkpointing=True,
        ),
      )

  def save(
    self,
    step: int,
    state: Any,
    data_state: Any = None,
    extra: dict | None = None,
  ) -> None:
    """Copies the state to the host and writes it in the background.

    The arrays may be donated or overwritten as soon as this returns. A step
    this object has saved or restored already is not written again. The first
    save removes what killed saves left behind.

    Args:
      step: optimiser steps done.
      state: a tree of arrays; replicated if there are several processes.
      data_state: the data iterator (anything with `get_state`), or its state:
        bytes or JSON-able. Each process has its own.
      extra: a JSON-able dict, the same on every process.

    Raises:
      OSError: this save, or the one before it, could not be written.
      TypeError: a leaf is no array of numbers, or `extra` is not JSON-able.
      ValueError: the folder holds later steps that nobody found damaged.
    """
    step = int(step)
    if step in self._done:
      return
    leaves = {path: _to_host(path, x) for path, x in _paths(state).items()}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing drops GIL
      digests = list(pool.map(_digest, leaves.values()))
    record = {
      'leaves': {
        path: {**_kind(x), 'digest': digest}
        for (path, x), digest in zip(leaves.items(), digests, strict=True)
      },
      'data': _gather(_pack(data_state)),
      'extra': extra or {},
    }
    record = json.loads(json.dumps(record))  # what will be read, e.g. str keys
    with self._writing():
      self._clear_way_for(step)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          # Orbax refuses arrays without elements; their shape says it all.
          state=ocp.args.StandardSave(
            {path: x for path, x in leaves.items() if x.size}
          ),
          record=ocp.args.JsonSave({**record, 'digest': _seal(record)}),
        ),
      )
    self._done.add(step)

  def restore(
    self, state: Any, renamed: Mapping[str, str] | None = None
  ) -> Restored | None:
    """Returns the newest step that verifies, or None if there is none.

    Damaged steps are named in a warning, skipped, and deleted by the next
    `save`.

    Args:
      state: a tree of what is wanted: arrays or `jax.ShapeDtypeStruct`s.
        Arrays come back with the sharding given here, NumPy arrays as NumPy
        arrays.
      renamed: {beginning of a path when it was saved: the same today}, such as
        {'rest/': 'buffers/'}, for checkpoints from before a change of names.

    Raises:
      ValueError: an undamaged checkpoint holds other leaves, shapes or types
        than `state`, or was saved by another number of processes; or two of
        its leaves are `renamed` to one.
      OSError: the file system does not answer: of none is it known whether it
        is damaged.
    """
    self.wait()
    unread = None
    # Those that process 0 sees: folders may reach the others late.
    steps = sorted(self._manager.all_steps(), reverse=True)
    steps = json.loads(_gather(json.dumps(steps))[0])
    for step in steps:
      reason = ''
      try:
        record, leaves = self._read(step)
      except (MemoryError, PermissionError):
        raise  # says nothing about the checkpoint
      except Exception as error:  # damaged bytes can raise anything at all
        reason = _first_line(error)
        if _says(error, *_PASSING):
          raise self._unreadable(step, reason) from error
        if _says(error, errno.EIO):  # the disk, or the way to it
          unread = unread or self._unreadable(step, reason)
      if not parallel.gather(not reason).all():
        logging.warning(
          'Checkpoint of step %d in %s is damaged (%s): trying the next older.',
          step,
          self.directory,
          reason or 'unreadable on another process',
        )
        self._damaged.add(step)
        continue
      asked, tree = _paths(state), jax.tree.structure(state)
      leaves = _renamed(leaves, renamed)
      _check_same(step, asked, leaves)
      self._done.add(step)
      return Restored(
        step,
        jax.tree.unflatten(
          tree, [_place(x, leaves[path]) for path, x in asked.items()]
        ),
        _unpack(record['data']),
        record['extra'],
      )
    if unread:
      raise unread  # to start over would delete what may be whole
    if steps:
      logging.warning(
        'No checkpoint in %s is intact (steps %s): the run starts over.',
        self.directory,
        ', '.join(map(str, sorted(steps))),
      )
    return None

  def wait(self) -> None:
    """Blocks until the running save is on disk.

    Raises:
      OSError: it could not be written.
    """
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits for the running save and ends the background threads.

    Raises:
      OSError: it could not be written.
    """
    with self._writing():
      self._manager.close()

  def _unreadable(self, step, reason):
    return OSError(
      errno.EIO,
      f'cannot read the checkpoint of step {step} in {self.directory} '
      f'({reason}): try again when the file system answers, or remove the '
      'folder to start over',
    )

  def _read(self, step):
    """Returns the verified record and host arrays of a step, or raises."""
    record = _read_record(self.directory / str(step))
    return record, _read_verified(self.directory / str(step), record)

  def _clear_way_for(self, step):
    """Deletes leftovers, damaged steps, and an unverified one of this number.

    Only the run that saves may tidy up: to one that reads beside it, a save
    under way looks like the leftover of a killed one.
    """
    if not self._tidy and jax.process_index() == 0:
      for leftover in self.directory.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(leftover)
    self._tidy = True
    later = [s for s in self._manager.all_steps() if s >= step]
    for old in sorted(self._damaged | {s for s in later if s == step}):
      self._manager.delete(old)
    later = [s for s in later if s > step and s not in self._damaged]
    self._damaged.clear()
    if later:
      raise _LaterStepsError(
        f'cannot save step {step} into {self.directory}: it holds the later '
        f'step {max(later)}. Call restore() first, or use another folder.'
      )

  @contextlib.contextmanager
  def _writing(self):
    """Turns whatever storage raises into one error that names the folder."""
    try:
      yield
    except _LaterStepsError:
      raise
    except Exception as error:  # tensorstore reports a full disk as ValueError
      # Orbax waits for other processes in the background.
      for one in (error, error.__cause__):
        if one is not None and parallel.lost(one):
          raise one from None
      self._done.clear()  # whatever was under way may be tried again
      raise OSError(
        getattr(error, 'errno', None) or errno.EIO,
        f'cannot write checkpoints into {self.directory}: '
        f'{_first_line(error)}. Make room, make the folder writable, or '
        'choose another one',
      ) from error


def load(
  directory: str | os.PathLike,
  renamed: Mapping[str, str] | None = None,
  wanted: int | None = None,
) -> dict[str, np.ndarray]:
  """All leaves of the newest step that verifies, {path: array}.

  Args:
    directory: a `checkpoints/` folder; nothing in it is changed.
    renamed: as `Checkpointer.restore` takes it.
    wanted: the step that it has to be, if only one will do.

  Raises:
    OSError: there is no such folder.
    ValueError: no step in it is intact, or not the wanted one, or two leaves
      are `renamed` to one.
  """
  directory = pathlib.Path(os.path.abspath(directory))
  if not directory.is_dir():
    raise FileNotFoundError(f'there is no folder {directory}')
  steps = [int(p.name) for p in directory.iterdir() if p.name.isdecimal()]
  reasons = []
  if wanted is not None:
    if wanted not in steps:
      reasons.append(f'step {wanted} is not there')
    steps = [step for step in steps if step == wanted]
  for step in sorted(steps, reverse=True):
    try:
      record = _read_record(directory / str(step))
      leaves = _read_verified(directory / str(step), record)
      break
    except (MemoryError, PermissionError):
      raise
    except Exception as error:  # damaged bytes can raise anything at all
      reasons.append(f'step {step}: {_first_line(error)}')
  else:
    which = 'no checkpoint' if wanted is None else 'not the one that was scored'
    raise ValueError(
      f'{which} in {directory} is intact'
      + (f' ({"; ".join(reasons)})' if reasons else ': there is none')
    )
  if reasons:
    logging.warning(
      'Step %d in %s is taken, for what is newer is damaged (%s)',
      step, directory, '; '.join(reasons),
    )  # fmt: skip
  return _renamed(leaves, renamed)


class _LaterStepsError(ValueError):
  """A step is saved behind the newest one: no fault of the storage."""


def _first_line(error):
  """Returns the head of an error's text; orbax and tensorstore write pages."""
  text = str(error).strip().splitlines() or [type(error).__name__]
  return text[0][:200]


def _says(error, *codes):
  """Whether an error is one of the system's, by tensorstore's words or not."""
  return getattr(error, 'errno', None) in codes or any(
    os.strerror(code) in str(error) for code in codes
  )


def _paths(tree):
  """Returns {path: leaf} in the order of the tree's leaves."""
  leaves = jax.tree.leaves_with_path(tree)
  named = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in leaves
  }
  if len(named) < len(leaves):
    raise ValueError("two leaves have the same path: avoid '/' in dict keys")
  return named


def _renamed(leaves, renamed):
  """{path: leaf} by the paths of today: one beginning is replaced, once."""
  longest_first = sorted(renamed or (), key=len, reverse=True)
  found = {}
  for path, leaf in leaves.items():
    before = next((x for x in longest_first if path.startswith(x)), None)
    if before is not None:
      path = renamed[before] + path.removeprefix(before)
    if path in found:
      raise ValueError(f'two leaves of the checkpoint are renamed to {path}')
    found[path] = leaf
  return found


def _to_host(path, x):
  """Returns a NumPy view or copy; orbax copies it before `save` returns."""
  if not isinstance(x, jax.Array | np.ndarray) or (
    jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) or x.dtype.kind in 'OSU'
  ):
    raise TypeError(
      f'{path} is a {type(x).__name__}: only arrays of numbers are saved in a '
      'state; put other things into `extra`, and of a PRNG key its key_data'
    )
  return np.asarray(x)


def _kind(x):
  """Returns shape and type of an array, which may be abstract."""
  return {'shape': list(x.shape), 'dtype': jnp.dtype(x.dtype).name}


def _read_record(folder):
  """Returns the record of a step's folder, or raises."""
  record = ocp.JsonCheckpointHandler().restore(folder / 'record')
  if record.pop('digest') != _seal(record):
    raise ValueError('the record of checksums differs from its own checksum')
  return record


def _read_verified(folder, record):
  """Returns {path: array} of a step's folder, or raises."""
  leaves = _read_arrays(folder / 'state', record)
  for path, leaf in record['leaves'].items():
    # The same bytes may be read as another type or shape.
    if {**_kind(leaves[path]), 'digest': _digest(leaves[path])} != leaf:
      raise ValueError(f'{path} differs from its checksum')
  return leaves


def _read_arrays(folder, record):
  """Returns {path: array} of an orbax `state` item, without orbax.

  Orbax reads all leaves in an event loop that it closes at the first error,
  and each leaf that arrives later dies with a traceback on the terminal.
  """
  spec = {'driver': 'ocdbt', 'base': folder.as_uri() + '/'}
  opened = {
    path: ts.open(
      {'driver': 'zarr', 'kvstore': {**spec, 'path': path}}, read=True
    )
    for path, leaf in record['leaves'].items()
    if 0 not in leaf['shape']
  }
  reads = {path: store.result().read() for path, store in opened.items()}
  return {
    path: reads[path].result()
    if path in reads
    else np.empty(leaf['shape'], jnp.dtype(leaf['dtype']))
    for path, leaf in record['leaves'].items()
  }


def _digest(array):
  raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return hashlib.blake2b(raw, digest_size=16).hexdigest()


def _seal(record):
  text = json.dumps(record, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _place(asked, array):
  """Returns a verified host array as the kind of array that was asked for."""
  if isinstance(asked, np.ndarray):
    return array
  sharding = getattr(asked, 'sharding', None)
  if isinstance(asked, jax.Array) and not asked.committed:
    sharding = None  # stays free to follow the arrays it is combined with
  if sharding is None:
    return jnp.array(array)
  # Unlike device_put, this needs no communication between processes.
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def _check_same(step, asked, saved):
  """Raises a ValueError that lists how a tree and a checkpoint differ."""
  wanted = {path: _kind(x) for path, x in asked.items()}
  found = {path: _kind(x) for path, x in saved.items()}

  def say(path):
    if path not in found:
      return f'{path}: not in the checkpoint'
    if path not in wanted:
      return f'{path}: in the checkpoint only'
    return f'{path}: {found[path]} in the checkpoint, {wanted[path]} wanted'

  differ = [
    say(path)
    for path in sorted(found.keys() | wanted.keys())
    if found.get(path) != wanted.get(path)
  ]
  if differ:
    more = f'\n  and {len(differ) - 8} more' if len(differ) > 8 else ''
    raise ValueError(
      f'the checkpoint of step {step} is of another model or optimiser:\n  '
      + '\n  '.join(differ[:8])
      + more
      + '\nUse the config it was saved with, or another folder.'
    )


def _pack(data_state):
  """Returns JSON text of a data iterator's state."""
  if hasattr(data_state, 'get_state'):
    data_state = data_state.get_state()
  if isinstance(data_state, bytes):
    return json.dumps({'bytes': base64.b64encode(data_state).decode()})
  return json.dumps({'json': data_state})


def _unpack(texts):
  """Returns this process's data state."""
  if len(texts) != jax.process_count():
    if len(set(texts)) > 1:
      raise ValueError(
        f'the checkpoint holds the data order of {len(texts)} processes, this '
        f'run has {jax.process_count()}: start as many as before'
      )
    texts = texts[:1] * jax.process_count()
  packed = json.loads(texts[jax.process_index()])
  if 'bytes' in packed:
    return base64.b64decode(packed['bytes'])
  return packed['json']


def _gather(text):
  """Returns the texts of all processes, in order."""
  raw = np.frombuffer(text.encode(), np.uint8)
  sizes = parallel.gather(raw.size)
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: raw.size] = raw
  rows = parallel.gather(padded)
  return [
    bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)
  ]
