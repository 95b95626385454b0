"""Tests of the devices: how many there are, and where, changes no number.

Each run is a process of its own, because the number of (virtual) devices is
fixed when a process starts.
"""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import parity
import pytest
from jax.sharding import PartitionSpec

from configs import common
from distillfss_jax import parallel, params, systems, train_step
from distillfss_jax.types import Table

_TESTS = pathlib.Path(__file__).resolve().parent
_SIZE, _IMAGES, _STEPS, _WAYS = 64, 5, 4, 2
# devices of each process, processes
_RUNS = {'one': (1, 1), 'two': (2, 1), 'eight': (8, 1), 'processes': (1, 2)}


def work(out, address='', processes=1, process=0):
  """Four steps with dropout on all devices there are; writes the numbers."""
  if processes > 1:
    jax.distributed.initialize(
      coordinator_address=address,
      num_processes=processes,
      process_id=process,
      initialization_timeout=120,
    )
  config = common.get_config()
  config.data.image_size = _SIZE
  config.model.backbone.name = 'resnet_tiny'
  config.model.fields.heads = 2
  config.student = 'light'
  config.backbone_mode = 'reference'
  config.optim.lr = 1e-4
  with config.unlocked():
    config.model.backbone.fields.width = 4
  assert config.model.fields.dropout == 0.5
  mesh = parallel.mesh()
  built = train_step.build(config, _WAYS, mesh)
  system, _ = systems.build(config, _WAYS)
  variables = params.flatten(parity.fill_randomly(system))

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (_IMAGES, _SIZE, _SIZE, 3), np.uint8)
  labels = rng.integers(0, 1 + _WAYS, (_IMAGES, _SIZE, _SIZE), np.int32)
  tables = np.stack(
    [[rng.permutation(_IMAGES)[:3] for _ in range(_IMAGES)]] * _STEPS
  ).astype(np.int32)
  rows = built.rows(_IMAGES)
  tables = np.pad(tables, ((0, 0), (0, rows - _IMAGES), (0, 0)))
  places = np.arange(rows, dtype=np.int32)
  places = np.tile(np.where(places < _IMAGES, places, -1), (_STEPS, 1))

  host = jax.device_get(
    (built.start(variables), built.shared(variables, images, labels))
  )
  state, bank = parallel.replicate(host, mesh)
  batches, places = parallel.share_steps(
    (Table(tables), places), mesh, own=False
  )
  state, logs = built.dispatch(state, bank, batches, places, _STEPS)
  state, logs = parallel.local((state, logs))
  found = {f'params/{path}': x for path, x in state.params.items()}
  found |= {f'start/{path}': variables[path] for path in state.params}
  found |= {f'rest/{path}': x for path, x in state.buffers.items()}
  found |= {f'parts/{name}': x for name, x in logs['parts'].items()}
  found |= {f'confusion/{r}': x for r, x in logs['counts'].items()}
  found |= {name: logs[name] for name in ('loss', 'grad_norm')}
  np.savez(out, devices=jax.device_count(), episodes=tables.shape[1], **found)
  if processes > 1:
    jax.distributed.shutdown()


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _start(out, devices, processes, process, address):
  """A process that runs `work`."""
  env = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} '
    '--xla_backend_optimization_level=0',  # compiles faster
    PYTHONPATH=os.pathsep.join([str(_TESTS), str(_TESTS.parent)]),
  )
  arguments = (str(out), address, processes, process)
  code = f'import test_parallel; test_parallel.work(*{arguments!r})'
  return subprocess.Popen(
    [sys.executable, '-c', code],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.fixture(scope='module')
def numbers(tmp_path_factory):
  """A function name -> [the numbers of each process of that run]."""
  folder = tmp_path_factory.mktemp('runs')

  @functools.cache
  def run(name):
    devices, processes = _RUNS[name]
    address = f'127.0.0.1:{_free_port()}'
    outs = [folder / f'{name}{i}.npz' for i in range(processes)]
    jobs = [
      _start(out, devices, processes, i, address) for i, out in enumerate(outs)
    ]
    found = []
    try:
      for out, job in zip(outs, jobs, strict=True):
        text, _ = job.communicate(timeout=600)
        assert job.returncode == 0, f'{name}: {text[-3000:]}'
        with np.load(out) as file:
          found.append(dict(file))
    finally:
      for job in jobs:
        job.kill()
        job.communicate()
    return found

  return run


@pytest.mark.parametrize(
  ('name', 'devices', 'episodes'),
  [
    # Devices are quick ones in test_throwaway.py, processes in test_cluster.py.
    pytest.param('two', 2, 6, marks=pytest.mark.slow),
    pytest.param('eight', 8, 8, marks=pytest.mark.slow),
    pytest.param('processes', 2, 6, marks=pytest.mark.slow),
  ],
)
def test_number_of_devices_changes_nothing(numbers, name, devices, episodes):
  """Episodes that only fill up the last device do not count either."""
  [one] = numbers('one')
  assert (one['devices'], one['episodes']) == (1, _IMAGES)
  assert (one['loss'] > 0).all()
  for other in numbers(name):
    assert (other['devices'], other['episodes']) == (devices, episodes)
    assert set(other) == set(one)
    for path in one:
      if path.split('/')[0] in ('loss', 'grad_norm', 'parts', 'rest'):
        # Eight devices share the threads otherwise, so the bank is rounded
        # otherwise, and gradients jump where a ReLU opens.
        rtol = 1e-4 if path == 'grad_norm' else 1e-5
        np.testing.assert_allclose(
          other[path], one[path], rtol=rtol, atol=2e-6, err_msg=path
        )
    for role in ('student', 'teacher'):
      ours, theirs = (
        other[f'confusion/support_miou/{role}'],
        (one[f'confusion/support_miou/{role}']),
      )
      # A pixel between two classes may fall to either side.
      assert np.abs(ours[0] - theirs[0]).sum() <= 1e-3 * theirs[0].sum()
      assert np.abs(ours - theirs).sum() <= 1e-3 * theirs.sum()
    # AdamW divides a gradient by its size, so where that is rounding, what it
    # adds is noise: all must agree together, not every element.
    off = moved = 0.0
    for path in one:
      if path.startswith('params/') and not path.endswith('/key/bias'):
        start = one[path.replace('params/', 'start/', 1)]
        off += ((other[path] - one[path]) ** 2).sum()
        moved += ((one[path] - start) ** 2).sum()
    assert moved > 0
    distance = (off / moved) ** 0.5
    print('distance:', distance)  # for `pytest -rP`
    # That of a run with one episode left out is 0.25.
  assert distance <= 3e-2


def test_mesh_replicate_share_local():
  """What every device holds: the whole, or its share; and back to the host."""
  mesh = parallel.mesh(local=True)
  assert mesh.axis_names == (parallel.AXIS,)
  tree = {'x': np.arange(6 * mesh.size).reshape(-1, 2), 'y': np.float32(3)}
  whole = parallel.replicate(tree, mesh)
  assert whole['x'].sharding.spec == PartitionSpec()
  back = parallel.local({**whole, 'z': 'text'})
  np.testing.assert_array_equal(back['x'], tree['x'])
  assert back['y'] == 3
  assert back['z'] == 'text'
  share = parallel.share({'x': tree['x']}, mesh)['x']
  assert share.sharding.spec == PartitionSpec(parallel.AXIS)
  assert share.addressable_data(0).shape == (3, 2)
  np.testing.assert_array_equal(share, tree['x'])


def test_mapped_program_knows_its_share():
  """A per-device sum over the axis; gradients are those of the own share."""
  mesh = parallel.mesh()

  def fn(x, y):
    i = jax.lax.axis_index(parallel.AXIS)
    own = jax.lax.dynamic_slice_in_dim(y, 2 * i, 2)
    grad = jax.grad(lambda x: (x * own).sum())(x)
    return jax.lax.psum(grad, parallel.AXIS)

  y = np.arange(2.0 * mesh.size, dtype=np.float32)
  found = parallel.mapped(fn, mesh)(np.float32(2), y)
  assert float(found) == y.sum()


def test_a_coordinator_that_is_not_there(monkeypatch):
  monkeypatch.setattr(parallel, 'START', 0)
  address = f'127.0.0.1:{_free_port()}'
  with pytest.raises(ConnectionError, match=f'process 0 at {address} within'):
    parallel.start(address, 2, 1)
  with pytest.raises(ValueError, match="must be host:port, got 'node1'"):
    parallel.start('node1', 2, 1)


def test_gather_keeps_types():
  """Alone it is one row; wide numbers stay wide."""
  for x in (np.int64(2**40), np.float64(0.1), np.bool_(True), np.arange(3)):
    found = parallel.gather(x)
    assert found.shape == (1, *np.shape(x))
    assert found.dtype == np.asarray(x).dtype
    np.testing.assert_array_equal(found[0], x)


def test_label_maps_of_all_processes(monkeypatch):
  """Two processes, each with one of two maps."""
  maps = [{3: {'teacher': np.full((4, 4), 1, np.uint8)}}, {}]
  maps[1][7] = {'teacher': np.full((4, 4), 2, np.uint8)}
  said = []
  monkeypatch.setattr(parallel, 'gather', lambda x: said.append(x) or x[None])
  for one in maps:
    parallel.gather_maps(one, ('teacher',), (3, 7), (4, 4))
  both = [np.stack([said[0], said[2]]), np.stack([said[1], said[3]])]
  monkeypatch.setattr(parallel, 'gather', lambda x: both.pop(0))
  found = parallel.gather_maps(maps[0], ('teacher',), (3, 7), (4, 4))
  assert (found[3]['teacher'] == 1).all()
  assert (found[7]['teacher'] == 2).all()


def test_programs_are_kept_beside_the_runs_or_where_the_environment_says(
  tmp_path, monkeypatch
):
  set_to = {}
  monkeypatch.setattr(jax.config, 'update', set_to.__setitem__)
  names = (
    'JAX_COMPILATION_CACHE_DIR', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
  )  # fmt: skip
  for name in names:
    monkeypatch.setenv(name, '/elsewhere')
  parallel.keep_programs(tmp_path)
  assert not set_to
  for name in names:
    monkeypatch.delenv(name)
  parallel.keep_programs(tmp_path)
  assert set_to['jax_compilation_cache_dir'] == str(tmp_path / '.compiled')
