"""Devices and processes: the mesh, a program mapped over it, agreement."""

import os
import pathlib
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distillfss_jax.types import AXIS

START = 300  # seconds in which processes have to find each other
SILENCE = 40  # after which one that says nothing is taken for dead

# How JAX and its transports speak of another process that does not answer. Of
# a program's first call it is their own error, later a mere ValueError.
_STATUS = re.compile('[A-Z_]+: ')
_LOST = re.compile(
  r'(?i)gloo|nccl|coordination|heartbeat|connection|socket|UNAVAILABLE|'
  r'DEADLINE_EXCEEDED|ABORTED'
)


def keep_programs(folder: pathlib.Path) -> None:
  """Keeps compiled programs, so that the same one starts at once next time.

  Args:
    folder: where runs lie; programs lie in its .compiled. The environment's
      JAX_COMPILATION_CACHE_DIR is used instead where it is set.
  """
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    place = str(folder / '.compiled')
    jax.config.update('jax_compilation_cache_dir', place)
  if not os.environ.get('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
    # A start has dozens of small programs, which JAX alone would not keep.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the processes of a run; before anything else of JAX.

  Args:
    coordinator: 'host:port' of process 0, where it listens. Without it all
      three are found out under SLURM, Open MPI and on TPU.
    num_processes: of the run.
    process_id: of this one, 0 .. num_processes - 1.

  Raises:
    ValueError: what is missing cannot be found out.
    ConnectionError: process 0 is not there.
  """
  given = {
    '--coordinator': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ValueError(
      f'{", ".join(missing)} is missing: give all of {", ".join(given)}, or '
      'none of them where SLURM, MPI or a TPU says it'
    )
  if not missing and not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id must be 0..{num_processes - 1} (--num_processes is '
      f'{num_processes}), got {process_id}'
    )
  if process_id:
    _wait_for(coordinator)
  # SIGTERM is ours: the loop agrees on the step after which to stop.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=START,
      heartbeat_timeout_seconds=SILENCE,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f'the processes of this run do not find each other ({error}): give '
      f'{", ".join(given)} of each, and all of them the same coordinator'
    ) from error


def _wait_for(coordinator):
  """Waits until process 0 listens: JAX would abort without a word of ours."""
  host, _, port = coordinator.rpartition(':')
  if not (host and port.isdecimal()):
    raise ValueError(f'--coordinator must be host:port, got {coordinator!r}')
  until = time.monotonic() + START
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > until:
        raise ConnectionError(
          f'no answer of process 0 at {coordinator} within {START} s ({error})'
        ) from error
      time.sleep(1)


def started() -> bool:
  """Whether this process has joined others."""
  return jax.distributed.is_initialized()


def lost(error: BaseException) -> bool:
  """Whether an error says that another process does not answer."""
  said = str(error)
  theirs = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(said)
  return started() and bool(theirs and _LOST.search(said))


def gather(x: Any) -> np.ndarray:
  """What all processes say, [processes, ...]; all must ask."""
  x = np.asarray(x)
  if jax.process_count() == 1:
    return x[None]
  # As bytes: JAX would make int64 and float64 narrower.
  raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  raw = np.asarray(multihost_utils.process_allgather(raw))
  return raw.view(x.dtype).reshape(-1, *x.shape)


def of_first(x: np.ndarray) -> np.ndarray:
  """What process 0 has, in all; each gives an array of that shape and type."""
  if jax.process_count() == 1:
    return x
  return np.asarray(multihost_utils.broadcast_one_to_all(x))


def mesh(*, local: bool = False) -> Mesh:
  """All devices (of this process only, if local) along one axis, `data`."""
  devices = jax.local_devices() if local else jax.devices()
  return Mesh(np.array(devices), (AXIS,))


def mapped(
  fn: Callable,
  mesh: Mesh,
  *,
  cut: dict[int, int] | None = None,
  donate: tuple[int, ...] = (),
) -> Callable:
  """Compiles a per-device program: what `jax.pmap` is now, written out.

  Every device gets its part of the arguments in `cut` and all others whole,
  and returns what all devices agree on. `jax.pmap` itself is in maintenance
  mode and is this form. Gradients are those of the device's own part, for the
  program to sum: with `check_vma` on, differentiating a replicated input sums
  them already, and summing again multiplies them by the number of devices.

  Args:
    fn: of positional arguments.
    mesh: the devices.
    cut: {argument: axis of its arrays that the devices share}.
    donate: arguments whose memory may be reused.
  """
  whole, cut = PartitionSpec(), cut or {}

  def run(*args):
    specs = tuple(
      PartitionSpec(*(None,) * cut[i], AXIS) if i in cut else whole
      for i in range(len(args))
    )
    return jax.shard_map(
      fn, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False
    )(*args)

  return jax.jit(run, donate_argnums=donate)


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Puts host values, the same in every process, whole on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def share(tree: Any, mesh: Mesh) -> Any:
  """Cuts the leading axis of host arrays over the devices of this process."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def share_steps(tree: Any, mesh: Mesh, *, own: bool) -> Any:
  """Cuts the second axis of host arrays over all devices of all processes.

  Args:
    tree: of host arrays [t, b, ...].
    mesh: the devices.
    own: whether each process gives its own part of that axis; else all give
      the whole, and each device takes its part.
  """
  place = NamedSharding(mesh, PartitionSpec(None, AXIS))

  def put(x):
    if own:
      return jax.make_array_from_process_local_data(place, x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

  return jax.tree.map(put, tree)


def local(tree: Any) -> Any:
  """The process-local copy of replicated arrays."""
  return jax.tree.map(
    lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree
  )


def gather_maps(
  shown: dict[int, dict[str, np.ndarray]],
  roles: Sequence[str],
  show: Sequence[int],
  shape: tuple[int, ...],
) -> dict[int, dict[str, np.ndarray]]:
  """The maps that all processes together have; all must ask.

  Args:
    shown: {test: {role: uint8 map}} that this process has.
    roles: of each test.
    show: the tests that some process has.
    shape: of each map.
  """
  maps = np.zeros((len(show), len(roles), *shape), np.uint8)
  seen = np.zeros(len(show), bool)
  for i, index in enumerate(show):
    if index in shown:
      seen[i] = True
      maps[i] = [shown[index][role] for role in roles]
  maps, seen = gather(maps), gather(seen)
  return {
    index: dict(zip(roles, maps[seen[:, i].argmax(), i], strict=True))
    for i, index in enumerate(show)
  }
