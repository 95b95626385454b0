"""Several processes on loopback: the numbers of one, and what a death does."""

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_run
from tensorboard import context
from tensorboard.backend.event_processing import (
  data_provider,
  plugin_event_multiplexer,
)
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import backend_context
from test_run import finish, leaves, log, rows, scores, steps_saved

from distillfss_jax import parallel
from distillfss_jax.workdir import locking

STEPS = 16
# AdamW makes much of rounding: small steps keep runs comparable.
CONFIG = (
  '--config=configs/demo.py:smoke',
  f'--config.steps={STEPS}',
  '--config.eval.every=8',
  '--config.checkpoint_every=4',
  '--config.optim.lr=1e-5',
  # What compiles in less time: a teacher alone, scored at one size.
  '--config.system=transferfss',
  "--config.optim.trainable=('D',)",
  '--config.eval.native=False',
  '--config.eval.untrained=False',
  '--config.eval.brightness=False',
)


# Compiles in half the time.
start = functools.partial(
  test_run.start, more_flags='--xla_backend_optimization_level=0'
)
assert_same = functools.partial(test_run.assert_same, step=STEPS)


def run(*args):
  return finish(start(*args))


def free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start_all(workdir, processes, *arguments):
  """Starts the processes of a run, of one device each."""
  port = free_port()
  return [
    start(
      workdir,
      *(arguments or CONFIG),
      f'--coordinator=127.0.0.1:{port}',
      f'--num_processes={processes}',
      f'--process_id={i}',
    )
    for i in range(processes)
  ]


def run_all(workdir, processes, *arguments):
  started = start_all(workdir, processes, *arguments)
  return [finish(process) for process in started]


def wait_for(condition, processes):
  """Polls until something is there; a process that ended is a failure."""
  until = time.monotonic() + 300
  while not condition():
    assert time.monotonic() < until
    for process in processes:
      assert process.poll() is None, process.communicate()[1][-3000:]
    time.sleep(0.01)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def one(home):
  """The run in one process."""
  done = run(home / 'one', *CONFIG)
  assert done.returncode == 0, done.stderr
  return home / 'one'


@pytest.fixture(scope='module')
def two(home):
  """The same in two."""
  first, second = run_all(home / 'two', 2)
  assert first.returncode == 0, first.stderr[-3000:]
  assert second.returncode == 0, second.stderr[-3000:]
  assert 'mIoU' in first.stdout
  assert 'mIoU' not in second.stdout
  return home / 'two'


def assert_close(one, other):
  """Two runs found the same, up to rounding."""
  for found, wanted in zip(rows(other), rows(one), strict=True):
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
  wanted, found = (scores(x)['test']['teacher'] for x in (one, other))
  assert found['miou'] == pytest.approx(wanted['miou'], abs=2e-3)
  assert found['fb_iou'] == pytest.approx(wanted['fb_iou'], abs=2e-3)
  ours, theirs = leaves(one, STEPS), leaves(other, STEPS)
  assert ours.keys() == theirs.keys()
  for path in ours:
    if path.startswith('params/'):
      # 16 steps of 1e-5: where a gradient is rounding, all may differ.
      np.testing.assert_allclose(ours[path], theirs[path], atol=4e-4)


def test_two_processes_are_one(one, two):
  assert_close(one, two)
  files = {path.name for path in two.rglob('*') if path.is_file()}
  wanted = {path.name for path in one.rglob('*') if path.is_file()}
  # Every process has its log, only one writes the rest.
  assert len(list(two.glob('log.*.INFO.*'))) == 2
  plain = lambda names: {x for x in names if 'log.' not in x and '.v2' not in x}  # noqa: E731
  assert {x for x in plain(wanted) if x.endswith(('.png', '.json', '.md'))} == {
    x for x in plain(files) if x.endswith(('.png', '.json', '.md'))
  }


@pytest.mark.slow
def test_four_processes_are_one(home, one):
  """Also when they were stopped and started again."""
  workdir = home / 'four'
  processes = start_all(workdir, 4)
  wait_for((workdir / 'metrics.jsonl').exists, processes)
  processes[2].send_signal(signal.SIGTERM)
  done = [finish(process) for process in processes]
  assert [x.returncode for x in done] == [75] * 4, done[0].stderr[-3000:]
  assert 0 < steps_saved(workdir)[-1] < STEPS
  done = run_all(workdir, 4)
  assert [x.returncode for x in done] == [0] * 4, done[0].stderr[-3000:]
  assert_close(one, workdir)


@pytest.mark.slow
def test_all_stop_at_the_same_step(home, two):
  """A signal to one process stops both, saved; started again, they go on."""
  workdir = home / 'stopped'
  processes = start_all(workdir, 2)
  wait_for((workdir / 'metrics.jsonl').exists, processes)
  processes[1].send_signal(signal.SIGTERM)
  done = [finish(process) for process in processes]
  assert [x.returncode for x in done] == [75, 75], done[0].stderr[-3000:]
  for x in done:
    assert 'stopped by SIGTERM: the same command with --workdir' in x.stderr
    assert 'Traceback' not in x.stderr
  assert 0 < steps_saved(workdir)[-1] < STEPS
  assert not (workdir / 'lock').exists()
  again = run_all(workdir, 2)
  assert [x.returncode for x in again] == [0, 0], again[0].stderr[-3000:]
  assert_same(workdir, two)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [1, 0])
def test_a_lost_process_ends_the_other(home, two, victim):
  workdir = home / f'lost{victim}'
  processes = start_all(workdir, 2)
  wait_for(lambda: steps_saved(workdir), processes)
  processes[victim].kill()
  begin = time.monotonic()
  other = finish(processes[1 - victim])
  assert time.monotonic() - begin < 60
  finish(processes[victim])
  # JAX may be quicker to end the process, by SIGABRT, in its own words.
  assert other.returncode in (75, -signal.SIGABRT)
  assert (
    'another process of this run was lost' in other.stderr
    or 'another task died' in other.stderr
  )
  again = run_all(workdir, 2)
  assert [x.returncode for x in again] == [0, 0], again[0].stderr[-3000:]
  assert_same(workdir, two)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_other(home):
  workdir = home / 'hung'
  processes = start_all(workdir, 2)
  wait_for(lambda: steps_saved(workdir), processes)
  processes[1].send_signal(signal.SIGSTOP)
  begin = time.monotonic()
  other = finish(processes[0])
  assert time.monotonic() - begin < 60
  assert other.returncode in (75, -signal.SIGABRT)
  processes[1].kill()
  finish(processes[1])


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--coordinator=127.0.0.1:1'], '--num_processes, --process_id is missing'),
    (['--num_processes=2', '--process_id=1'], '--coordinator is missing'),
    (
      ['--coordinator=127.0.0.1:1', '--num_processes=2', '--process_id=2'],
      '--process_id must be 0..1',
    ),
    (['--distributed'], 'do not find each other'),
  ],
)
def test_wrong_flags(tmp_path, flags, said):
  done = run(tmp_path / 'run', *CONFIG, *flags)
  assert done.returncode == 1
  assert said in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_one_run_in_a_folder(home, one):
  """A second one is refused; the first stops when asked to, and goes on."""
  workdir = home / 'used'
  first = start(workdir, *CONFIG)
  wait_for((workdir / 'metrics.jsonl').exists, [first])
  first.send_signal(signal.SIGSTOP)  # so that it is not done too soon
  second = run(workdir, *CONFIG)
  assert second.returncode == 69
  assert f'{workdir} is in use by process {first.pid} on' in second.stderr
  first.send_signal(signal.SIGCONT)
  first.send_signal(signal.SIGTERM)
  assert_stopped(workdir, finish(first), 75)
  assert run(workdir, *CONFIG).returncode == 0
  assert_same(workdir, one)


@pytest.mark.slow
def test_a_folder_in_use_is_so_for_all_processes(home):
  """Else a scheduler takes the others' word for it that the run is wrong."""
  workdir = home / 'used_by_one'
  workdir.mkdir()
  with locking.Lock(workdir):
    done = run_all(workdir, 2)
  assert [x.returncode for x in done] == [69, 69]
  assert f'in use by process {os.getpid()} on' in done[0].stderr
  assert 'process 0 cannot start' in done[1].stderr


def test_what_says_that_a_process_is_lost(monkeypatch):
  gloo = 'UNKNOWN: Gloo AllGather failed: Connection closed by peer'
  monkeypatch.setattr(parallel, 'started', lambda: True)
  # JAX raises it so from the second call of a program on.
  assert parallel.lost(ValueError(gloo))
  assert parallel.lost(jax.errors.JaxRuntimeError(gloo))
  assert not parallel.lost(ValueError('no backbone of this connection'))
  assert not parallel.lost(jax.errors.JaxRuntimeError('INTERNAL: a fault'))
  monkeypatch.setattr(parallel, 'started', lambda: False)
  assert not parallel.lost(ValueError(gloo))


LEFT_ALONE = """
import os, sys
from distillfss_jax import parallel
mine = int(sys.argv[2])
parallel.start(sys.argv[1], 2, mine)
parallel.gather(1)
if mine:
  os._exit(9)
try:
  parallel.gather(2)
except Exception as error:
  print(type(error).__name__, parallel.lost(error), flush=True)
  os._exit(0)
"""


def test_a_program_called_again_says_that_a_process_is_lost():
  place = f'127.0.0.1:{free_port()}'
  command = [sys.executable, '-c', LEFT_ALONE, place]
  first, second = (
    subprocess.Popen(
      [*command, str(i)], text=True, cwd=test_run.ROOT,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for i in range(2)
  )  # fmt: skip
  second.communicate(timeout=300)
  out, said = first.communicate(timeout=300)
  # JAX may be quicker.
  assert first.returncode in (0, -signal.SIGABRT), said
  if not first.returncode:
    assert out.endswith(' True\n'), out


def assert_stopped(workdir, done, code):
  assert done.returncode == code, done.stderr
  assert 'Traceback' not in done.stderr
  assert not (workdir / 'lock').exists()
  step = steps_saved(workdir)[-1]
  assert step < STEPS
  assert f'stopped at step {step}' in log(workdir)


@pytest.mark.slow
def test_interrupted_and_restarted(home, one):
  workdir = home / 'interrupted'
  process = start(workdir, *CONFIG)
  wait_for((workdir / 'metrics.jsonl').exists, [process])
  process.send_signal(signal.SIGINT)
  assert_stopped(workdir, finish(process), 130)
  assert run(workdir, *CONFIG).returncode == 0
  assert_same(workdir, one)


def kill_at_random(process, workdir, generator):
  """Kills it somewhere: half the time while it saves."""
  if generator.random() < 0.5:
    nth, seen = generator.randrange(1, 4), set()
    while process.poll() is None and len(seen) < nth:
      with contextlib.suppress(OSError):
        seen |= {x.name for x in workdir.glob('checkpoints/*tmp*')}
    time.sleep(generator.random() * 0.05)
  else:
    wait = time.monotonic() + generator.random() * 12
    while process.poll() is None and time.monotonic() < wait:
      time.sleep(0.01)
  process.kill()
  finish(process)


@pytest.mark.slow
def test_killed_at_twenty_moments(home):
  """Each continuation ends bit-equal; some die inside a save."""
  frequent = (*CONFIG, '--config.checkpoint_every=1')
  whole = home / 'whole'
  assert run(whole, *frequent).returncode == 0
  generator, inside, unfinished = random.Random(0), 0, 0
  for i in range(20):
    workdir = home / f'killed{i}'
    process = start(workdir, *frequent)
    kill_at_random(process, workdir, generator)
    inside += any(workdir.glob('checkpoints/*tmp*'))
    unfinished += not (workdir / 'results.json').exists()
    done = run(workdir, *frequent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(workdir, whole)
    assert not any(workdir.glob('checkpoints/*tmp*'))
    shutil.rmtree(workdir)
  print('killed while saving:', inside, 'unfinished:', unfinished)
  assert inside >= 3
  assert unfinished >= 15


@pytest.mark.slow
def test_a_flipped_byte_in_any_file_is_detected(home, one):
  """Whatever file of a checkpoint is damaged, the run knows, or it is equal."""
  generator = random.Random(0)
  newest = one / 'checkpoints' / str(STEPS)
  names = sorted(x.relative_to(one) for x in newest.rglob('*') if x.is_file())
  assert len(names) > 5
  for i, name in enumerate(names):
    workdir = home / f'flipped{i}'
    shutil.copytree(one, workdir)
    (workdir / 'results.json').unlink()
    raw = bytearray((workdir / name).read_bytes())
    if not raw:
      continue
    raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    (workdir / name).write_bytes(raw)
    done = run(workdir, *CONFIG)
    assert done.returncode == 0, (name, done.stderr[-3000:])
    assert_same(workdir, one)
    shutil.rmtree(workdir)


def test_hparams_of_a_sweep(home, one):
  """What TensorBoard makes its table and parallel coordinates of."""
  multiplexer = plugin_event_multiplexer.EventMultiplexer()
  multiplexer.AddRunsFromDirectory(str(one.parent))
  multiplexer.Reload()
  provider = data_provider.MultiplexerDataProvider(multiplexer, str(home))
  backend = backend_context.Context(
    base_plugin.TBContext(data_provider=provider)
  )
  request = context.RequestContext()
  of_runs = backend.hparams_metadata(request, '')
  experiment = backend.experiment_from_metadata(
    request, '', True, of_runs, [], None
  )
  hparams = {x.name: x for x in experiment.hparam_infos}
  assert {
    'model/backbone/name', 'support/shots', 'seed', 'optim/lr', 'system',
    'data/args/num_test',
  } <= set(hparams)  # fmt: skip
  assert hparams['optim/lr'].domain_interval.min_value == 1e-5
  metrics = {info.name.tag for info in experiment.metric_infos}
  assert {'test/teacher_miou', 'train/loss'} <= metrics
