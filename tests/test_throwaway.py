"""A system of a file of its own trains through the one loop, unchanged."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import common
from distillfss_jax import systems, train
from distillfss_jax.workdir import checkpoint

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 8


def config():
  """Dense training of the throw-away system on the embedded data."""
  made = common.dense(common.base())
  made.name = made.system = 'pair'
  made.data.image_size = 16
  made.data.args.update(num_train=24, num_test=3, image_size=32, classes=2)
  made.dense.batch_size, made.dense.held_out = 8, 0.25
  made.epochs = STEPS * 8 / 18  # 18 of the 24 images train
  made.log_every, made.checkpoint_every = 3, 2
  made.eval.every, made.eval.keep_best, made.eval.panels = 4, True, 1
  made.optim.name, made.optim.lr, made.optim.schedule = 'sgd', 0.1, 'poly'
  made.optim.clip_norm, made.optim.nesterov = 5.0, False
  made.optim.trainable = ('student/.*',)
  made.optim.groups = (
    ('student/outer/.*', 10.0, 0.0, '', ''),
    ('student/inner/.*', 1.0, None, '1 epochs', ''),
  )
  return made.lock()


@pytest.fixture
def known(monkeypatch):
  """The folder of the throw-away system is one more place of systems."""
  places = [*systems.__path__, str(HERE / 'throwaway')]
  monkeypatch.setattr(systems, '__path__', places)


def state(folder, step=STEPS):
  leaves = checkpoint.load(folder / 'checkpoints')
  assert int(leaves['step']) == step
  return leaves


def losses(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return {row['step']: row['train/loss'] for row in rows if 'train/loss' in row}


class Killed(BaseException):
  """As if by a signal that cannot be heard."""


def test_it_trains_is_killed_and_goes_on(known, tmp_path, monkeypatch):
  results = train.run(config(), tmp_path / 'whole')
  assert set(results['evaluations']) == {'test', 'test_native'}
  assert 'miou_with_background' in results['test']['student']
  assert results['checkpoint']['chosen_on'] == 'validation'
  assert results['steps'] == STEPS
  whole = state(tmp_path / 'whole')

  seen = train._Job._check_finite

  def dies(self, step, log):
    seen(self, step, log)
    if step >= 5:
      raise Killed

  monkeypatch.setattr(train._Job, '_check_finite', dies)
  with pytest.raises(Killed):
    train.run(config(), tmp_path / 'killed')
  monkeypatch.setattr(train._Job, '_check_finite', seen)
  again = train.run(config(), tmp_path / 'killed')
  assert again['test'] == results['test']
  assert again['checkpoint'] == results['checkpoint']
  for path, x in state(tmp_path / 'killed').items():
    np.testing.assert_array_equal(x, whole[path], err_msg=path)
  assert losses(tmp_path / 'killed') == losses(tmp_path / 'whole')

  # Two updates a step: the queue has moved twice, in turn at both sizes.
  assert (whole['buffers/queue'] != 0).any(1).all()
  start = checkpoint_of_first_step(tmp_path)
  assert not np.array_equal(start['buffers/queue'], whole['buffers/queue'])
  assert (start['buffers/queue'] != 0).any(1).sum() == 2


def checkpoint_of_first_step(tmp_path):
  """The state after one step: what moves, and what stands still."""
  made = config()
  with made.unlocked():
    made.epochs, made.steps, made.eval.every = 0.0, 1, 0
    made.eval.keep_best = False
  train.run(made, tmp_path / 'one')
  one = state(tmp_path / 'one', 1)
  system, draw = systems.build(made, 2)
  initial = jax.device_get(draw())
  assert system.coupled
  moved = {
    path
    for path, x in initial.items()
    if not np.array_equal(x, one.get(f'params/{path}', x))
  }
  # The first convolution waits for its epoch; the teacher is frozen.
  assert moved == {
    'student/norm/scale', 'student/norm/bias',
    'student/outer/kernel', 'student/outer/bias',
  }  # fmt: skip
  assert not np.array_equal(
    one['buffers/teacher/norm/mean'], initial['teacher/norm/mean']
  )
  return one


def work(folder, processes, process, address):
  """A run of one process, in a program of its own."""
  if processes > 1:
    from distillfss_jax import parallel

    parallel.start(address, processes, process)
  systems.__path__.append(str(HERE / 'throwaway'))
  train.run(config(), folder)


def start(folder, devices, processes=1, process=0, address=''):
  environment = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} '
    '--xla_backend_optimization_level=0',  # compiles faster
    PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]),
  )
  arguments = (str(folder), processes, process, address)
  code = f'import test_throwaway; test_throwaway.work(*{arguments!r})'
  return subprocess.Popen(
    [sys.executable, '-c', code],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(jobs):
  try:
    for job in jobs:
      said, _ = job.communicate(timeout=600)
      assert job.returncode == 0, said[-3000:]
  finally:
    for job in jobs:
      job.kill()
      job.communicate()


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  folder = tmp_path_factory.mktemp('alone') / 'run'
  finish([start(folder, 1)])
  return folder


@pytest.mark.parametrize(
  ('devices', 'processes'),
  [
    (2, 1),
    pytest.param(8, 1, marks=pytest.mark.slow),
    pytest.param(1, 2, marks=pytest.mark.slow),
  ],
)
def test_devices_and_processes_change_nothing(
  alone, tmp_path, devices, processes
):
  """Batch statistics, norms and queues are those of the whole batch."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  folder = tmp_path / 'run'
  finish(
    [start(folder, devices, processes, i, address) for i in range(processes)]
  )
  one, other = losses(alone), losses(folder)
  assert one.keys() == other.keys()
  for step, loss in one.items():
    assert other[step] == pytest.approx(loss, rel=1e-4)
  ours, theirs = state(folder), state(alone)
  for path, x in theirs.items():
    np.testing.assert_allclose(
      ours[path], x, rtol=2e-3, atol=2e-4, err_msg=path
    )
