"""Devices: the mesh, and a per-device program mapped over it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = 'data'


def mesh(*, local: bool = False) -> Mesh:
  """All devices (of this process only, if local) along one axis, `data`."""
  devices = jax.local_devices() if local else jax.devices()
  return Mesh(np.array(devices), (AXIS,))


def mapped(
  fn: Callable, over: Mesh, *, donate: tuple[int, ...] = ()
) -> Callable:
  """Compiles a per-device program: what `jax.pmap` is now, written out.

  Every device gets all arguments whole, takes its share by its index along
  `AXIS`, and returns what all devices agree on. `jax.pmap` itself is in
  maintenance mode and is this form. Gradients are those of the device's own
  share, for the program to sum: with `check_vma` on, differentiating a
  replicated input sums them already, and summing again multiplies them by the
  number of devices.

  Args:
    fn: of positional arguments.
    over: the mesh.
    donate: arguments whose memory may be reused.
  """
  whole = PartitionSpec()
  program = jax.shard_map(
    fn, mesh=over, in_specs=whole, out_specs=whole, check_vma=False
  )
  return jax.jit(program, donate_argnums=donate)


def replicate(tree: Any, over: Mesh) -> Any:
  """Puts host values, the same in every process, whole on every device."""
  return jax.device_put(tree, NamedSharding(over, PartitionSpec()))


def share(tree: Any, over: Mesh) -> Any:
  """Cuts the leading axis of host arrays over the devices of this process."""
  return jax.device_put(tree, NamedSharding(over, PartitionSpec(AXIS)))


def local(tree: Any) -> Any:
  """The process-local copy of replicated arrays."""
  return jax.tree.map(
    lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree
  )
