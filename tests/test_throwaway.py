"""A system of a file of its own trains through the one loop, unchanged."""

import pathlib

import jax
import numpy as np
import pytest
import several

from configs import common
from distillfss_jax import systems, train

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


def test_it_trains_is_killed_and_goes_on(known, tmp_path, monkeypatch):
  results = train.run(config(), tmp_path / 'whole')
  assert set(results['evaluations']) == {'test', 'test_native'}
  assert 'miou_with_background' in results['test']['student']
  assert results['checkpoint']['chosen_on'] == 'validation'
  assert results['steps'] == STEPS
  whole = several.state(tmp_path / 'whole', STEPS)

  again = several.killed_and_restarted(
    config(), tmp_path / 'killed', 5, monkeypatch
  )
  assert again['test'] == results['test']
  assert again['checkpoint'] == results['checkpoint']
  several.check_equal(tmp_path / 'killed', tmp_path / 'whole', STEPS)

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
  one = several.state(tmp_path / 'one', 1)
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


def config_of_a_process():
  """The same, where the throw-away system is not known yet."""
  systems.__path__.append(str(HERE / 'throwaway'))
  return config()


MAKE = 'test_throwaway:config_of_a_process'


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  folder = tmp_path_factory.mktemp('alone') / 'run'
  several.run_on(folder, MAKE)
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
  folder = tmp_path / 'run'
  several.run_on(folder, MAKE, devices=devices, processes=processes)
  several.check_close(folder, alone, STEPS, loss=1e-4, rtol=2e-3, atol=2e-4)
