"""Grids: what they are made of, what is run, stopped, gone on with, submitted.

Most runs here are those of a fake main: a few lines that do what main does at
its ends. The slow test has real ones.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from distillfss_jax import config as configs
from launch import local, plan, sweep

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMEOUT = 120

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
  config = ConfigDict()
  for item in filter(None, (arg or '').split(',')):
    if item.partition('=')[0] not in ('shots', 'smoke'):
      raise ValueError(f'no config argument {item!r}; there are: shots, smoke')
  config.seed = 0
  config.kind = 'good'
  config.optim = ConfigDict({'lr': 1e-3, 'trainable': ('D',)})
  return config.lock()

def sweep():
  for shots in (5, 10):
    yield {'shots': shots, 'config.optim.lr': 3e-4}
"""

# What it does is the config's kind.
FAKE = """
import json, os, pathlib, signal, sys, time
flags = dict(x.split('=', 1) for x in sys.argv if x.startswith('--config.'))
kind = flags.get('--config.kind', 'good')
folder = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])
saved = folder / 'checkpoints'
saved.mkdir(parents=True, exist_ok=True)
step = len(list(saved.iterdir()))

def stop(*_):
  (saved / str(step + 1)).mkdir()
  print('saved', flush=True)
  sys.exit(75)

if kind == 'stubborn':
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
  signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: sys.exit('error: the Ctrl-C came here'))
names = ('CUDA_VISIBLE_DEVICES', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
with (folder / 'starts').open('a') as file:
  began = {name: os.environ.get(name) for name in names}
  began.update(cores=sorted(os.sched_getaffinity(0)), pid=os.getpid())
  print(json.dumps(began), file=file)
if kind == 'bad' and not (folder.parent / 'repaired').exists():
  print('10 %\\r20 %\\r30 %')
  sys.exit('error: no such thing')
if kind == 'dies':
  os.kill(os.getpid(), signal.SIGKILL)
if kind == 'empty':
  sys.exit()
if kind == 'lost':
  sys.exit(75)
if kind == 'used':
  sys.exit(69)
if kind == 'steps' and step < 6:
  stop()
if kind in ('slow', 'stubborn') and not step:
  time.sleep(60)
if kind == 'short':
  time.sleep(0.3)
(folder / 'results.json').write_text('{}')
"""

# These tests may be run by nohup, which it would inherit.
MAIN = """
import fcntl
import os
import signal
import sys
import termios
from launch import local, plan, sweep
if os.environ.pop('TAKES_TERMINAL', None):
  fcntl.ioctl(0, termios.TIOCSCTTY, 0)
hup = signal.SIG_IGN if 'IGNORE_HUP' in os.environ else signal.SIG_DFL
signal.signal(signal.SIGHUP, hup)
plan.MAIN = (sys.executable, sys.argv[1])
local.POLL, local.GRACE = 0.01, float(sys.argv[2])
sweep.main(sys.argv[3:])
"""


class Home:
  """A folder with a config, a fake main and a fake cluster's commands."""

  def __init__(self, path):
    """Makes the files below `path`."""
    self.path, self.runs = path, path / 'runs' / 'small'
    self.bin = path / 'bin'
    self.bin.mkdir()
    self.config = path / 'small.py'
    self.config.write_text(CONFIG)
    self.fake = path / 'fake.py'
    self.fake.write_text(FAKE)

  def start(
    self, *arguments, grace=20.0, stdin=None, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, **environment,
  ):  # fmt: skip
    """Starts a sweep in a session of its own, as in a terminal of its own.

    If stdin is a terminal, that is the session's.
    """
    if stdin is not None:
      environment['TAKES_TERMINAL'] = '1'
    command = [sys.executable, '-c', MAIN, str(self.fake), str(grace)]
    command += ['small.py', *arguments]
    keep = {k: v for k, v in os.environ.items() if k not in LEFT_OUT}
    path = os.pathsep.join((str(self.bin), os.environ['PATH']))
    return subprocess.Popen(
      command, cwd=self.path, text=True, start_new_session=True,
      stdin=stdin, stdout=stdout, stderr=stderr,
      env={**keep, 'PATH': path, 'PYTHONPATH': str(ROOT), **environment},
    )  # fmt: skip

  def sweep(self, *arguments, **kwargs):
    """Runs a sweep to its end."""
    return finish(self.start(*arguments, **kwargs))

  def add(self, name, text):
    """Adds a program that the sweep finds on its PATH."""
    (self.bin / name).write_text(text)
    (self.bin / name).chmod(0o755)

  def starts(self, name):
    """What a run's processes said of themselves when they began."""
    path = self.runs / name / 'starts'
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]

  def is_free(self, name):
    """Whether no process has a run's log locked."""
    with (self.runs / f'{name}.log').open('ab') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
    return True

  def log(self, name):
    """The log of a run."""
    return (self.runs / f'{name}.log').read_text()

  def finished(self):
    """The names of all finished runs."""
    return sorted(x.parent.name for x in self.runs.glob('*/results.json'))

  def wait(self, *names):
    """Waits until all of the runs have begun."""
    until(lambda: all(self.starts(name) for name in names))


LEFT_OUT = (
  'CUDA_VISIBLE_DEVICES', 'JAX_PLATFORMS', 'XLA_PYTHON_CLIENT_MEM_FRACTION',
  'XLA_CLIENT_MEM_FRACTION',
)  # fmt: skip


def finish(process):
  out, err = process.communicate(timeout=TIMEOUT)
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(condition):
  end = time.monotonic() + TIMEOUT
  while not condition():
    assert time.monotonic() < end, 'it does not come'
    time.sleep(0.01)


def refused(*arguments):
  """The one line an error is told in, and then nothing is begun."""
  before = tree(pathlib.Path())
  with pytest.raises(SystemExit) as ended:
    sweep.main(['small.py', *arguments])
  said = ended.value.code  # with a text, the exit code is 1
  assert isinstance(said, str)
  assert said.startswith('error: ')
  assert '\n' not in said
  assert tree(pathlib.Path()) == before
  return said


def tree(path):
  return {
    str(x.relative_to(path)): x.stat().st_mtime_ns for x in path.rglob('*')
  }


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return Home(tmp_path)


# The grid.


@pytest.mark.parametrize(
  ('text', 'parts'),
  [
    ('5,10', ['5', '10']),
    ("('A','student'),('D',)", ["('A','student')", "('D',)"]),
    ("'a,b',c", ["'a,b'", 'c']),
    ('[1,(2,3)],{4,5}', ['[1,(2,3)]', '{4,5}']),
    ('"(",2', ['"("', '2']),
    ('', ['']),
  ],
)
def test_split(text, parts):
  assert plan.split(text) == parts


def test_values():
  assert plan.values('seed=0:3,7') == ('seed', ['0', '1', '2', '7'])
  assert plan.values("config.model.init='',x") == (
    'config.model.init', ['', 'x'],
  )  # fmt: skip
  assert plan.values('a=b=c') == ('a', ['b=c'])


@pytest.mark.parametrize(
  ('item', 'said'),
  [
    ('shots', "shots=5,10; got 'shots'"),
    ('shots=', "'shots=' has an empty value; write shots=''"),
    ('=5', "got '=5'"),
    ('a=5,,6', "'a=5,,6' has an empty value"),
    ('seed=5:5', "'seed=5:5' has an empty value"),
    ('seed=7:5', "'seed=7:5' has an empty value"),
    ("a=('A',2", 'lacks a closing )'),
  ],
)
def test_bad_values(item, said):
  with pytest.raises(ValueError, match=re.escape(said)):
    plan.values(item)


@pytest.mark.parametrize(
  ('grid', 'said'),
  [
    (['seed=0:1000000000'], "'seed=0:1000000000' has 1,000,000,000 values"),
    (['config.seed=3,7:100000000000000000'], '99,999,999,999,999,994 values'),
    (['seed=0:5000,0:5001'], "'seed=0:5000,0:5001' has 5,000 values"),
    (['seed=0:101', 'config.steps=0:100'], '0:101 config.steps=0:100'),
    ([f'config.{x}=0:9999' for x in 'abcde'], '9,999 values'),
  ],
)
def test_a_grid_that_is_too_large(home, grid, said):
  """It is counted, and never made: these would not fit into any memory."""
  error = refused('--grid', *grid)
  assert said in error
  assert 'a sweep at most 2,000 runs' in error


def test_a_sweep_that_does_not_end(home, monkeypatch):
  """The file's sweep() may be a mistake too."""
  monkeypatch.setattr(plan, 'MOST', 50)
  home.config.write_text(
    CONFIG.replace('for shots in (5, 10):', 'import itertools\n  for shots in '
                   'itertools.count():')
  )  # fmt: skip
  assert 'the sweep() of small.py has more than 50 cells' in refused()


def test_as_many_runs_as_there_may_be(monkeypatch, home):
  monkeypatch.setattr(plan, 'MOST', 4)
  grid = ['config.seed=0:2', 'shots=5,10']
  assert len(plan.plan('small.py', grid, [], 'runs')) == 4
  home.config.write_text(CONFIG.replace('(5, 10)', '(1, 2, 3, 4)'))
  assert len(plan.plan('small.py', [], [], 'runs')) == 4


def test_grid_is_a_product_with_the_last_key_fastest():
  cells = list(plan.grid(['b=1,2', 'config.a=x,y']))
  assert [tuple(cell.values()) for cell in cells] == [
    ('1', 'x'), ('1', 'y'), ('2', 'x'), ('2', 'y'),
  ]  # fmt: skip
  assert list(cells[0]) == ['b', 'config.a']


def test_a_folder_of_another_config_is_not_taken_for_finished(home):
  """Two cells may have one name, and a config's file may have changed."""
  grid = ('--grid', "config.optim.trainable=('A/b',)")
  assert home.sweep(*grid).returncode == 0
  [folder] = home.runs.glob('*/results.json')
  config = {'seed': 0, 'kind': 'good', 'optim': {'lr': 1e-3}}
  config['optim']['trainable'] = ['A/b']
  place = folder.with_name('config.json')
  place.write_text(json.dumps(config))  # as main leaves it
  assert '1 of 1 are finished' in home.sweep(*grid).stdout
  said = refused('--grid', "config.optim.trainable=('A_b',)")
  assert 'holds a run of another config; give another --root' in said
  assert "optim.trainable was ['A/b'], is ['A_b']" in said
  place.write_text('{"seed": 0')
  assert f'{place.relative_to(home.path)} is damaged' in refused(*grid)
  place.write_text(json.dumps(config))
  home.config.write_text(CONFIG.replace('1e-3', '1e-2'))
  assert 'optim.lr was 0.001, is 0.01' in refused(*grid)


def test_a_sweep_from_before_a_change(home, monkeypatch):
  """Keys of old are taken; runs lie where they did, and lack new options."""
  grid = ['config.rate=0.1,0.2', 'config.art=good']
  with pytest.raises(ValueError, match="no key 'rate'"):
    plan.plan('small.py', grid, [], 'runs')
  monkeypatch.setattr(configs, 'RENAMED', {'rate': 'optim.lr', 'art': 'kind'})
  home.config.write_text(CONFIG)
  runs = plan.plan('small.py', grid, [], 'runs')
  assert [run.name for run in runs] == [
    'rate=0.1,art=good',
    'rate=0.2,art=good',
  ]
  assert runs[0].flags[2:] == ('--config.rate=0.1', '--config.art=good')
  runs[1].folder.mkdir(parents=True)
  place = runs[1].folder / 'config.json'
  saved = {'seed': 0, 'art': 'good', 'rate': 0.2}  # before there was trainable
  saved['optim'] = {}
  place.write_text(json.dumps(saved))
  plan.plan('small.py', grid, [], 'runs')
  place.write_text(json.dumps({**saved, 'rate': 0.3}))
  with pytest.raises(ValueError, match=r'optim\.lr was 0\.3, is 0\.2'):
    plan.plan('small.py', grid, [], 'runs')


@pytest.mark.parametrize(
  ('cell', 'name'),
  [
    ({'method': 'distill', 'shots': 5}, 'method=distill,shots=5'),
    ({'shots': 5, 'config.optim.lr': 3e-4}, 'shots=5,optim.lr=0.0003'),
    ({'config.optim.lr': '3e-4', 'smoke': True}, 'optim.lr=0.0003,smoke'),
    ({'config.eval.native': True}, 'eval.native=True'),
    ({'name': '007', 'config.steps': '04'}, 'name=007,steps=4'),
    ({'config.optim.trainable': "('A','B')"}, 'optim.trainable=__A_,_B__'),
    ({'config.model.init': 'a/b c'}, 'model.init=a_b_c'),
  ],
)
def test_names(cell, name):
  assert plan.name_of(cell) == name


def test_the_benchmark_is_planned(tmp_path):
  """The sweep() of every real config is a grid that main takes."""
  for path in sorted((ROOT / 'configs').glob('[!_]*.py')):
    if 'def sweep' in path.read_text():
      runs = plan.plan(str(path), [], ['config.steps=4'], str(tmp_path))
      assert len(runs) > 1
      assert all(run.folder.parent.name == path.stem for run in runs)
  assert not list(tmp_path.iterdir())


def test_a_run_is_a_command(tmp_path):
  config = str(ROOT / 'configs' / 'nucleus.py')
  items = ['shots=5,10', "config.optim.trainable=('A','student')"]
  runs = plan.plan(config, items, ['smoke'], str(tmp_path))
  folder = tmp_path / 'nucleus'
  name = 'shots=10,optim.trainable=__A_,_student__,smoke'
  assert runs[1].folder == folder / name
  assert runs[1].log == folder / f'{name}.log'
  assert runs[1].command == (
    sys.executable, '-m', 'distillfss_jax.main',
    '--config', f'{config}:shots=10,smoke',
    "--config.optim.trainable=('A','student')",
    '--workdir', str(folder / name),
  )  # fmt: skip


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (('--grid', 'shot=5'), ("'shot=5'", 'there are: shots')),
    (('--grid', 'config.sed=1'), ("'sed'", 'seed', 'optim')),
    (('--grid', 'config.seed.x=1'), ("'x'", 'none')),
    (('--grid', 'optim.lr=1'), ('config.optim.lr',)),
    (('--grid', 'config.optim.lr=1e-3,x'), ('config.optim.lr', "'x'")),
    (('--grid', 'config.optim.lr=1e-3,0.001'), ('optim.lr=0.001', '2 cells')),
    (('--grid', 'config.seed=0:2', 'config.seed=3'), ('config.seed', 'twice')),
    (('--set', 'shots=3'), ('shots', '--set')),
    (('--set', 'smok'), ("'smok'", 'shots')),
    (('--grid', 'shots'), ("'shots'", 'shots=5,10')),
    (('--grid', f'config.kind={"x" * 250}'), ('too long',)),
    (('--jobs', '0'), ("'0'", '--jobs')),
    (('--via', 'cloud'), ('cloud', 'local')),
    (('--grids', 'shots=5'), ('--grids',)),
    (('--gpus', '1'), ('--via slurm',)),
    (('--via', 'slurm', '--profile', 'no.toml'), ('no.toml',)),
  ],
  ids=lambda x: ' '.join(x)[:40],
)
def test_what_is_wrong_is_said_before_anything_starts(home, arguments, said):
  error = refused(*arguments)
  for word in said:
    assert word in error


def test_an_error_is_one_line(home):
  done = home.sweep('--grid', 'shot=5')
  assert (done.returncode, done.stdout) == (1, '')
  assert done.stderr.startswith('error: ')
  assert done.stderr.count('\n') == 1


def test_configs_without_a_grid(home):
  text = CONFIG.partition('def sweep')[0]
  home.config.write_text(text)
  assert 'has no sweep()' in refused()
  home.config.write_text('')
  assert 'get_config' in refused()
  home.config.unlink()
  assert 'no config small.py' in refused()


# Runs on this machine.


def test_a_sweep_runs_what_is_not_finished(home):
  (home.runs / 'shots=5,optim.lr=0.0003').mkdir(parents=True)
  (home.runs / 'shots=5,optim.lr=0.0003' / 'results.json').write_text('{}')
  done = home.sweep()
  assert done.returncode == 0, done.stderr
  assert '1 of 2 are finished' in done.stdout
  assert '[1/2] shots=10,optim.lr=0.0003 starts' in done.stdout
  assert '[2/2] shots=10,optim.lr=0.0003 finished in' in done.stdout
  assert done.stdout.endswith('2 of 2 done\n')
  assert not home.starts('shots=5,optim.lr=0.0003')
  log = home.log('shots=10,optim.lr=0.0003')
  assert log.startswith(f'== {time.strftime("%Y")}')
  assert shlex.join(('--config', 'small.py:shots=10')) in log
  before = tree(home.path)
  again = home.sweep()
  assert (again.returncode, again.stdout) == (0, '2 of 2 are finished\n')
  assert tree(home.path) == before


def test_it_says_how_long_it_takes(home):
  grid = ('--grid', 'config.seed=0:3', '--set', 'config.kind=short')
  done = home.sweep(*grid)
  assert re.search(r'\[1/3, about \d s left\] .* finished in \d s', done.stdout)


def test_a_failing_run(home):
  grid = ('--grid', 'config.kind=bad,good,dies,empty')
  done = home.sweep(*grid)
  assert done.returncode == 1
  assert home.finished() == ['kind=good']
  assert '1 of 4 done, 3 failed (--retry' in done.stdout
  assert 'failed (exit code 1): kind=bad\n' in done.stderr
  assert '\n  | 30 %\n' in done.stderr  # not the states before it
  assert '\n  | error: no such thing\n' in done.stderr
  assert 'failed (SIGKILL): kind=dies' in done.stderr
  assert 'failed (ended without results.json): kind=empty' in done.stderr
  alone = re.search(r'it alone: (.*kind=bad.*)', done.stderr)[1]
  how, command = (home.runs / 'kind=bad.failed').read_text().splitlines()
  assert (how, command) == ('exit code 1', alone)

  again = home.sweep(*grid)
  assert again.returncode == 1
  assert 'kind=bad failed before; --retry' in again.stdout
  assert len(home.starts('kind=bad')) == 1

  (home.runs / 'repaired').touch()
  retried = home.sweep(*grid, '--retry')
  assert retried.returncode == 1
  assert home.finished() == ['kind=bad', 'kind=good']
  assert not (home.runs / 'kind=bad.failed').exists()
  assert (home.runs / 'kind=dies.failed').exists()
  assert home.log('kind=bad').count('== 2') == 2
  # The command of the report does it too.
  (home.runs / 'kind=bad' / 'results.json').unlink()
  subprocess.run(shlex.split(alone), cwd=home.path, check=True)
  assert home.finished() == ['kind=bad', 'kind=good']


def test_a_stopped_run_goes_on(home):
  """As often as it likes while its checkpoints grow."""
  done = home.sweep('--grid', 'config.kind=steps,good')
  assert done.returncode == 0, done.stderr
  assert len(home.starts('kind=steps')) == 7
  assert 'kind=steps goes on from step 6' in done.stdout
  # It waits for its turn.
  assert done.stdout.index('kind=good') < done.stdout.index('from step 1')


def test_a_run_that_is_always_stopped_fails(home):
  done = home.sweep('--grid', 'config.kind=lost,good')
  assert done.returncode == 1
  assert len(home.starts('kind=lost')) == 1 + local.STALLS
  assert home.finished() == ['kind=good']
  mark = (home.runs / 'kind=lost.failed').read_text()
  assert mark.startswith('exit code 75, 4 times without a new checkpoint\n')


@pytest.mark.parametrize(
  ('number', 'code'),
  [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_stopped_and_gone_on_with(home, number, code):
  grid = ('--grid', 'config.seed=0:3', '--set', 'config.kind=slow')
  process = home.start(*grid, '--jobs', '2')
  names = [f'seed={i},kind=slow' for i in range(3)]
  home.wait(*names[:2])
  os.killpg(process.pid, number)  # as a terminal does
  done = finish(process)
  assert done.returncode == code, done
  assert not done.stderr
  last = done.stdout.splitlines()[-1]
  assert last == 'stopped: 0 of 3 done; the same command goes on'
  assert not home.starts(names[2])
  for name in names[:2]:
    assert home.log(name).endswith('saved\n')
  assert not list(home.runs.glob('*.failed'))

  process = home.start(*grid, '--jobs', '1')
  home.wait(names[2])
  os.killpg(process.pid, number)
  done = finish(process)
  assert done.returncode == code
  assert 'stopped: 2 of 3 done' in done.stdout
  assert f'{names[0]} goes on from step 1' in done.stdout

  done = home.sweep(*grid, '--jobs', '2')
  assert done.returncode == 0
  assert home.finished() == names


def close_terminal(home, *arguments, **environment):
  """Starts a sweep in a terminal, closes that, and returns its exit code."""
  ours, its = os.openpty()
  process = home.start(
    *arguments, stdin=its, stdout=its, stderr=its, **environment
  )
  os.close(its)
  home.wait('kind=slow')
  os.close(ours)  # now it is sent SIGHUP, and can say nothing any more
  return process.wait(timeout=TIMEOUT)


def test_a_closed_terminal_stops_it(home):
  grid = ('--grid', 'config.kind=slow,good')
  assert close_terminal(home, *grid) == 129
  assert home.log('kind=slow').endswith('saved\n')
  assert not home.starts('kind=good')
  assert not list(home.runs.glob('*.failed'))
  assert home.sweep(*grid).returncode == 0
  assert home.finished() == ['kind=good', 'kind=slow']


def test_without_its_terminal_it_goes_on_under_nohup(home):
  home.fake.write_text(FAKE.replace('time.sleep(60)', 'time.sleep(1)'))
  grid = ('--grid', 'config.kind=slow,good,bad')
  assert close_terminal(home, *grid, IGNORE_HUP='1') == 1
  assert home.finished() == ['kind=good', 'kind=slow']
  assert (home.runs / 'kind=bad.failed').exists()


def test_a_pipe_that_is_closed_stops_nothing(home):
  """Such as that of `| head`."""
  process = home.start('--grid', 'config.kind=short,good')
  process.stdout.close()
  assert process.wait(timeout=TIMEOUT) == 0
  assert home.finished() == ['kind=good', 'kind=short']
  process.stderr.close()


def test_a_run_that_does_not_stop_is_killed(home):
  grid = ('--grid', 'config.kind=stubborn')
  process = home.start(*grid, grace=0.2)
  home.wait('kind=stubborn')
  process.send_signal(signal.SIGINT)
  assert finish(process).returncode == 130
  process = home.start(*grid)
  until(lambda: len(home.starts('kind=stubborn')) == 2)
  process.send_signal(signal.SIGINT)
  assert 'Ctrl-C again' in process.stdout.readline() + process.stdout.readline()
  process.send_signal(signal.SIGINT)
  assert finish(process).returncode == 130
  for began in home.starts('kind=stubborn'):
    with pytest.raises(ProcessLookupError):
      os.kill(began['pid'], 0)
  assert not list(home.runs.glob('*.failed'))


def test_two_sweeps_divide_the_grid(home):
  grid = ('--grid', 'config.seed=0:8', '--set', 'config.kind=short')
  both = [home.start(*grid, '--jobs', '2') for _ in range(2)]
  for done in map(finish, both):
    assert not done.stderr
  names = [f'seed={i},kind=short' for i in range(8)]
  assert [len(home.starts(name)) for name in names] == [1] * 8
  assert home.finished() == names


def test_a_run_in_use_is_no_failure(home):
  """Somebody runs it without a sweep."""
  done = home.sweep('--grid', 'config.kind=used')
  assert done.returncode == 1
  assert 'kind=used is run by another process' in done.stdout
  assert '0 of 1 done, 1 run by another process' in done.stdout
  assert not (home.runs / 'kind=used.failed').exists()


def test_a_run_outlives_its_sweep(home):
  """It is not started beside itself, and nothing has to be cleaned up."""
  grid = ('--grid', 'config.kind=slow')
  process = home.start(*grid)
  home.wait('kind=slow')
  process.kill()
  finish(process)
  done = home.sweep(*grid)
  assert done.returncode == 1
  assert 'kind=slow is run by another process' in done.stdout
  assert '0 of 1 done, 1 run by another process' in done.stdout
  os.kill(home.starts('kind=slow')[0]['pid'], signal.SIGTERM)
  until(lambda: home.is_free('kind=slow'))
  assert home.log('kind=slow').endswith('saved\n')
  assert home.sweep(*grid).returncode == 0


# Shares of the machine.


def test_jobs_share_the_cores(home):
  cores = sorted(os.sched_getaffinity(0))
  jobs = min(2, len(cores))
  grid = ('--grid', f'config.seed=0:{jobs}', '--set', 'config.kind=short')
  assert home.sweep(*grid, '--jobs', str(jobs)).returncode == 0
  taken = [
    core
    for name in home.finished()
    for core in home.starts(name)[0]['cores']
  ]  # fmt: skip
  assert sorted(taken) == cores
  assert home.starts(home.finished()[0])[0]['CUDA_VISIBLE_DEVICES'] is None


def test_shares_of_cores(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {2, 3, 5, 7, 9})
  assert local.shares(1, []) == [({}, {2, 3, 5, 7, 9})]
  assert local.shares(2, []) == [({}, {2, 3}), ({}, {5, 7, 9})]
  many = [cores for _, cores in local.shares(7, [])]
  assert all(many)
  assert set.union(*many) == {2, 3, 5, 7, 9}


NVIDIA_SMI = """#!/bin/sh
test "$1" = -L || exit 2
echo 'GPU 0: NVIDIA H200 (UUID: GPU-aa)'
echo 'GPU 1: NVIDIA H200 (UUID: GPU-bb)'
"""


@pytest.mark.parametrize(
  ('visible', 'jobs', 'wanted'),
  [
    (None, (), [('0', None), ('1', None)]),
    (None, ('--jobs', '3'), [('0', '0.450'), ('0', '0.450'), ('1', None)]),
    ('1', ('--jobs', '3'), [('1', '0.300')] * 3),
    ('GPU-bb,0', (), [('0', None), ('GPU-bb', None)]),
    ('0,7,1', (), [('0', None)]),
    ('', (), [('', None)]),
  ],
)
def test_jobs_share_the_gpus(home, visible, jobs, wanted):
  home.add('nvidia-smi', NVIDIA_SMI)
  count = len(wanted)
  # All of them have to be under way at once to be in all places.
  grid = ('--grid', f'config.seed=0:{count}', '--set', 'config.kind=slow')
  given = {} if visible is None else {'CUDA_VISIBLE_DEVICES': visible}
  process = home.start(*grid, *jobs, **given)
  names = [f'seed={i},kind=slow' for i in range(count)]
  home.wait(*names)
  process.send_signal(signal.SIGINT)
  assert finish(process).returncode == 130
  found = [home.starts(name)[0] for name in names]
  assert sorted(
    (began['CUDA_VISIBLE_DEVICES'], began['XLA_PYTHON_CLIENT_MEM_FRACTION'])
    for began in found
  ) == sorted(wanted, key=lambda x: x[0])
  everything = sorted(os.sched_getaffinity(0))
  assert all(began['cores'] == everything for began in found)


def test_gpus_are_none_where_nvidia_smi_fails(monkeypatch, home):
  for name in LEFT_OUT:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('PATH', str(home.bin))
  assert local.gpus() == []
  home.add('nvidia-smi', '#!/bin/sh\nexit 9\n')
  assert local.gpus() == []
  home.add('nvidia-smi', NVIDIA_SMI)
  assert local.gpus() == ['0', '1']
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert local.gpus() == []


def test_a_fraction_that_was_given_is_kept(monkeypatch):
  monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', '0.2')
  assert local.shares(2, ['0']) == [({'CUDA_VISIBLE_DEVICES': '0'}, None)] * 2


# SLURM.

SBATCH = """#!{python}
import json, os, pathlib, re, subprocess, sys
script = sys.stdin.read()
pathlib.Path('sbatch.json').write_text(json.dumps([sys.argv[1:], script]))
options = dict(x.split('=', 1) for x in sys.argv[1:] if '=' in x)
last = int(re.match(r'0-(\\d+)', options['--array'])[1])
queued = pathlib.Path('queued')
for index in range(last + 1):
  count = 0
  while True:
    queued.write_text('')
    task = dict(SLURM_ARRAY_JOB_ID='42', SLURM_ARRAY_TASK_ID=str(index),
                SLURM_JOB_ID=str(42 + index), SLURM_RESTART_COUNT=str(count))
    with open(options['--output'].replace('%%', '%'), 'a') as out:
      done = subprocess.run(['bash', '-s'], input=script, text=True, stdout=out,
                            stderr=out, env=os.environ | task)
    with open('codes', 'a') as file:
      print(index, done.returncode, file=file)
    if queued.read_text() != f'requeue 42_{{index}}\\n':
      break
    count += 1
print('Submitted batch job 42')
"""
SCONTROL = '#!/bin/sh\necho "$@" >>queued\n'


@pytest.fixture
def cluster(home):
  home.add('sbatch', SBATCH.format(python=sys.executable))
  home.add('scontrol', SCONTROL)
  return home


def test_slurm(cluster):
  grid = ('--grid', 'config.kind=good,steps,bad,lost', '--via', 'slurm')
  (cluster.runs / 'kind=good').mkdir(parents=True)
  (cluster.runs / 'kind=good' / 'results.json').write_text('{}')
  profile = cluster.path / 'my.toml'
  profile.write_text('account = "me"\ngpus = 1\ntime = 02:00:00\nmem = "9G"\n')
  flags = ('--profile', 'my.toml', '--mem', '8G', '--cpus', '4')
  done = cluster.sweep(*grid, *flags, '--jobs', '2')
  assert done.returncode == 0, done.stderr
  assert '3 of 4 runs: Submitted batch job 42' in done.stdout
  given, _ = json.loads((cluster.path / 'sbatch.json').read_text())
  assert set(given) == {
    '--array=0-2%2', '--job-name=sweep-small', '--account=me', '--gpus=1',
    '--time=02:00:00', '--mem=8G', '--cpus-per-task=4', '--requeue',
    '--open-mode=append', '--signal=B:USR1@90', f'--chdir={cluster.path}',
    '--output=runs/small/slurm.log',
  }  # fmt: skip
  table = json.loads((cluster.runs / 'sweep.json').read_text())
  assert [row['index'] for row in table] == [None, 0, 1, 2]
  assert table[1]['cell'] == {'config.kind': 'steps'}
  assert table[1]['folder'] == 'runs/small/kind=steps'
  assert table[1]['command'][2:] == [
    '--config', 'small.py', '--config.kind=steps',
    '--workdir', 'runs/small/kind=steps',
  ]  # fmt: skip
  # Each task ran its own run, stopped ones were queued again, with a limit.
  assert cluster.finished() == ['kind=good', 'kind=steps']
  assert not cluster.starts('kind=good')
  assert len(cluster.starts('kind=steps')) == 7
  assert len(cluster.starts('kind=lost')) == 4
  assert (cluster.path / 'codes').read_text().splitlines() == [
    *['0 75'] * 6, '0 0', '1 1', *['2 75'] * 4,
  ]  # fmt: skip
  assert 'error: no such thing' in cluster.log('kind=bad')
  assert (cluster.runs / 'slurm.log').read_text() == ''
  mark = (cluster.runs / 'kind=bad.failed').read_text().splitlines()
  assert mark[0] == 'exit code 1'
  assert shlex.split(mark[1]) == table[2]['command']
  assert 'without a new' in (cluster.runs / 'kind=lost.failed').read_text()

  again = cluster.sweep(*grid)
  assert again.returncode == 1
  assert 'kind=lost failed before; --retry' in again.stdout
  (cluster.runs / 'repaired').touch()
  assert cluster.sweep(*grid, '--retry').returncode == 0
  given, _ = json.loads((cluster.path / 'sbatch.json').read_text())
  assert '--array=0-1' in given
  assert 'kind=bad' in cluster.finished()
  assert not (cluster.runs / 'kind=bad.failed').exists()


def test_slurm_setup(cluster):
  """With a setup the interpreter is the one that it brings."""
  cluster.add('python', f'#!/bin/sh\nFROM_SETUP=1 exec {sys.executable} "$@"\n')
  cluster.fake.write_text(
    FAKE.replace('import', 'import os; assert os.environ["GREETING"] and '
                 'os.environ["FROM_SETUP"]\nimport', 1)
  )  # fmt: skip
  profile = cluster.path / 'my.toml'
  profile.write_text('setup = """\ntrue\nexport GREETING=hello\n"""\n')
  flags = ('--via', 'slurm', '--profile', 'my.toml')
  assert cluster.sweep(*flags).returncode == 0
  assert len(cluster.finished()) == 2
  profile.write_text('setup = "source nowhere/activate"\n')
  assert cluster.sweep(*flags, '--grid', 'shots=20').returncode == 0
  said = (cluster.runs / 'slurm.log').read_text()
  assert 'nowhere/activate' in said
  assert 'error: the setup failed' in said
  # No run failed: none was begun.
  assert not list(cluster.runs.glob('*.failed'))


def test_profiles(home):
  profile = home.path / 'my.toml'
  flags = ('--via', 'slurm', '--profile', 'my.toml')
  profile.write_text('partitio = "x"\n')
  error = refused(*flags)
  for word in ('partitio', 'partition', 'setup', 'constraint', 'my.toml'):
    assert word in error
  profile.write_text('[gpus]\na = 1\n')
  assert 'gpus needs text or a number' in refused(*flags)
  profile.write_text('gpus 1\n')
  assert 'my.toml' in refused(*flags)


def test_sbatch_missing_or_failing(home, monkeypatch):
  monkeypatch.setenv('PATH', str(home.bin))
  assert 'no sbatch on this machine' in refused('--via', 'slurm')
  home.add('sbatch', '#!/bin/sh\necho "sbatch: error: bad account" >&2\nexit 1')
  done = home.sweep('--via', 'slurm')
  assert done.returncode == 1
  assert done.stderr == 'error: sbatch failed (1): sbatch: error: bad account\n'


@contextlib.contextmanager
def task(home, kind):
  """A SLURM task whose run has begun."""
  home.add('scontrol', SCONTROL)
  shown = home.sweep(
    '--grid', f'config.kind={kind}', '--via', 'print', '--qos', 'x'
  )
  script = shown.stdout.partition('\n#!')[2].replace('END_OF_SCRIPT', '')
  home.runs.mkdir(parents=True, exist_ok=True)
  (home.path / 'script.sh').write_text(f'#!{script}')
  path = os.pathsep.join((str(home.bin), os.environ['PATH']))
  numbers = {'SLURM_ARRAY_JOB_ID': '42', 'SLURM_ARRAY_TASK_ID': '0'}
  process = subprocess.Popen(
    ['bash', 'script.sh'], cwd=home.path, text=True, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, env={**os.environ, 'PATH': path, **numbers},
  )  # fmt: skip
  try:
    home.wait(f'kind={kind}')
    yield process
  finally:
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
  ('number', 'queued'), [(signal.SIGUSR1, True), (signal.SIGTERM, False)]
)
def test_signals_of_slurm(home, number, queued):
  """Time is up: saved and queued again. Cancelled: saved."""
  with task(home, 'slow') as process:
    process.send_signal(number)
    out, _ = process.communicate(timeout=TIMEOUT)
  assert (process.returncode, out) == (75, '')
  assert home.log('kind=slow').endswith('saved\n')
  assert (home.path / 'queued').exists() == queued
  assert not list(home.runs.glob('*.failed'))
  assert home.sweep('--grid', 'config.kind=slow').returncode == 0


def test_a_task_of_slurm_and_a_sweep_know_of_each_other(home):
  with task(home, 'slow') as process:
    done = home.sweep('--grid', 'config.kind=slow')
    assert 'run by another process' in done.stdout
    with task(home, 'slow') as second:
      out, _ = second.communicate(timeout=TIMEOUT)
    assert second.returncode == 0
    assert 'run by another process' in out
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=TIMEOUT)
  assert len(home.starts('kind=slow')) == 1


# Print.


def test_print_changes_nothing(home):
  (home.runs / 'seed=1').mkdir(parents=True)
  (home.runs / 'seed=1' / 'results.json').write_text('{}')
  (home.runs / 'seed=2.failed').write_text('exit code 1\n')
  grid = ('--grid', 'config.seed=0:4', '--via', 'print')
  trainable = ('--set', "config.optim.trainable=('A','B')")
  before = tree(home.path)
  plain = home.sweep(*grid)
  quoted = home.sweep(*grid, *trainable)
  slurm = home.sweep(*grid, '--gpus', '2', '--jobs', '3')
  assert tree(home.path) == before
  assert '1 of 4 are finished' in plain.stderr
  assert 'seed=2 failed before' in plain.stderr
  lines = [shlex.split(line) for line in plain.stdout.splitlines()]
  assert [line[-1] for line in lines] == [
    'runs/small/seed=0', 'runs/small/seed=3',
  ]  # fmt: skip
  first = shlex.split(quoted.stdout.splitlines()[0])
  assert "--config.optim.trainable=('A','B')" in first
  assert 'sbatch --array=0-1%3' in slurm.stdout
  assert '--gpus=2' in slurm.stdout
  assert '#!/usr/bin/env bash' in slurm.stdout
  assert 'seed=3' in slurm.stdout


def test_what_is_printed_can_be_pasted(cluster):
  grid = ('--grid', 'config.seed=0:2', '--via', 'print')
  for flags in ((), ('--qos', 'x')):
    text = cluster.sweep(*grid, *flags).stdout
    path = os.pathsep.join((str(cluster.bin), os.environ['PATH']))
    subprocess.run(
      ['bash', '-e'], input=text, text=True, cwd=cluster.path, check=True,
      env={**os.environ, 'PATH': path}, capture_output=True,
    )  # fmt: skip
    for name in ('seed=0', 'seed=1'):
      (cluster.runs / name / 'results.json').unlink()
  assert len(cluster.starts('seed=1')) == 2


def test_it_starts_without_jax():
  """Seconds that a look at --help or a typo need not take."""
  code = 'import sys; from launch import sweep; print("jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
    check=True,
  )  # fmt: skip
  assert done.stdout == 'False\n'


# Real runs.


@pytest.mark.slow
def test_real_runs_interrupted_twice(tmp_path):
  command = [
    sys.executable, '-m', 'launch.sweep', 'configs/demo.py', '--jobs', '2',
    '--root', str(tmp_path), '--grid', 'config.seed=0:8',
    '--set', 'smoke', 'config.steps=4',
  ]  # fmt: skip
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}

  def finished():
    return len(list(tmp_path.glob('demo/*/results.json')))

  for enough in (1, 4):
    process = subprocess.Popen(
      command, cwd=ROOT, env=environment, text=True, start_new_session=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while finished() < enough:
      assert process.poll() is None, process.communicate()[0]
      time.sleep(0.05)
    time.sleep(4)  # the next ones are on their way
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert f'{finished()} of 8 done; the same command goes on' in out
    assert finished() < 8
  done = subprocess.run(
    command, cwd=ROOT, env=environment, text=True, capture_output=True,
    check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  assert finished() == 8
  assert not list(tmp_path.glob('demo/*.failed'))
  scores = set()
  for path in tmp_path.glob('demo/*/results.json'):
    results = json.loads(path.read_text())
    assert results['steps'] == 4
    scores.add(results['test']['student']['accuracy'])
  assert len(scores) > 1, 'the seeds are not different'
