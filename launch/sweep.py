"""Runs a grid of experiments, on this machine or on a SLURM cluster.

    python -m launch.sweep configs/nucleus.py
    python -m launch.sweep configs/nucleus.py --grid shots=5,10 seed=0:5
    python -m launch.sweep configs/nucleus.py --via slurm --profile my.toml
    python -m launch.sweep configs/nucleus.py --via print

A cell of the grid is a dict: keys without a dot are arguments of the config,
keys that start with 'config.' change its values. Its run lies in
<root>/<config>/<name of the cell>, its output beside that in <name>.log. The
same command goes on where it was: finished runs are skipped, runs that were
stopped go on, failed ones are named and wait for --retry.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from distillfss_jax import files
from launch import results

MAIN = (sys.executable, '-m', 'distillfss_jax.main')
SCRIPT = pathlib.Path(__file__).with_name('slurm_array.sh')

# A run that ends so was stopped, not wrong. It says 75 or 130 itself, unless it
# is stopped so early that it cannot.
STOPPED = (75, 130, -signal.SIGTERM, -signal.SIGINT)
IN_USE = 69  # another process is at work in its folder
STALLS = 3  # times in a row that it may be stopped without a new checkpoint
GRACE = 60.0  # seconds to save in, after a Ctrl-C
POLL = 0.1  # seconds between looks at the runs under way

# What sbatch calls the settings of --profile and of the flags.
SETTINGS = {
  'account': '--account',
  'partition': '--partition',
  'time': '--time',
  'gpus': '--gpus',
  'cpus': '--cpus-per-task',
  'mem': '--mem',
  'qos': '--qos',
  'constraint': '--constraint',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A cell of the grid, the folder of its run and the flags of main."""

  cell: dict
  folder: pathlib.Path
  flags: tuple[str, ...]

  @property
  def name(self) -> str:
    """The cell as text."""
    return self.folder.name

  @property
  def command(self) -> tuple[str, ...]:
    """What starts the run, and what goes on with it."""
    return (*MAIN, *self.flags, '--workdir', str(self.folder))

  @property
  def log(self) -> pathlib.Path:
    """Where its output goes."""
    return self.folder.with_name(f'{self.name}.log')

  @property
  def mark(self) -> pathlib.Path:
    """The file that is there if it failed: how, and of which command."""
    return self.folder.with_name(f'{self.name}.failed')

  @property
  def finished(self) -> bool:
    """Whether its results are there."""
    return (self.folder / 'results.json').exists()

  def newest_step(self) -> int:
    """The step of its newest checkpoint, -1 without one."""
    found = (self.folder / 'checkpoints').glob('*')
    return max((int(x.name) for x in found if x.name.isdecimal()), default=-1)


# The grid.


def split(text: str) -> list[str]:
  """Splits at the commas that stand in no bracket and no quotes."""
  closing = {'(': ')', '[': ']', '{': '}', "'": "'", '"': '"'}
  parts, awaited = [''], []
  for char in text:
    if char == ',' and not awaited:
      parts.append('')
      continue
    parts[-1] += char
    if awaited and char == awaited[-1]:
      awaited.pop()
    elif char in closing and not (awaited and awaited[-1] in '\'"'):
      awaited.append(closing[char])
  if awaited:
    raise ValueError(f'{text!r} lacks a closing {awaited[-1]}')
  return parts


def values(item: str) -> tuple[str, list[str]]:
  """Reads 'key=a,b,0:3' as the key and its values a, b, 0, 1, 2."""
  key, equals, text = item.partition('=')
  if not (key and equals):
    raise ValueError(
      f'--grid takes keys with their values, such as shots=5,10; got {item!r}'
    )
  found = []
  for part in split(text):
    bounds = re.fullmatch(r'(\d+):(\d+)', part)
    several = map(str, range(*map(int, bounds.groups()))) if bounds else [part]
    several = [_unquoted(x) for x in several]
    if not several or not part:
      raise ValueError(f"{item!r} has an empty value; write {key}='' for one")
    found += several
  return key, found


def _unquoted(text):
  quoted = len(text) > 1 and text[0] == text[-1] and text[0] in '\'"'
  return text[1:-1] if quoted else text


def grid(items: Iterable[str]) -> Iterator[dict]:
  """Yields the cells of all combinations, the last key fastest."""
  axes = [values(item) for item in items]
  keys = [key for key, _ in axes]
  for key in keys:
    if keys.count(key) > 1:
      raise ValueError(f'--grid has {key!r} twice')
  for chosen in itertools.product(*(found for _, found in axes)):
    yield dict(zip(keys, chosen, strict=True))


def common(items: Iterable[str]) -> dict:
  """Reads --set: what all cells share; a word without a value is a flag."""
  found = {}
  for item in items:
    key, equals, text = item.partition('=')
    if not key or key in found:
      raise ValueError(f'--set has no key, or a key twice, in {item!r}')
    found[key] = _unquoted(text) if equals else True
  return found


def name_of(cell: dict) -> str:
  """The cell as the name of a folder, such as 'shots=5,optim.lr=0.0003'."""
  parts = []
  for key, value in cell.items():
    if key.startswith('config.'):
      # 1e-3 and 0.001 are the same run.
      if re.fullmatch(r'[+-]?\d[\d.]*(e[+-]?\d+)?', str(value), re.I):
        value = _number(str(value))
      parts.append(f'{key.removeprefix("config.")}={value}')
    else:
      parts.append(_argument(key, value))
  return re.sub('[^A-Za-z0-9_.=,+-]', '_', ','.join(parts))


def _number(text):
  for kind in (int, float):
    with contextlib.suppress(ValueError):
      return kind(text)
  return text


def _argument(key, value):
  return key if value is True else f'{key}={value}'


def plan(config: str, items: Sequence[str], shared: Sequence[str], root: str):
  """Returns the runs of a sweep, checked: main takes all of their flags.

  Args:
    config: a file, without arguments.
    items: of --grid; without any the file's `sweep()` says what the cells are.
    shared: of --set.
    root: the folder of all sweeps.

  Raises:
    ValueError: something is unknown or double; says what, and what exists.
  """
  module = _load(config)
  if not items and 'sweep' not in module:
    raise ValueError(
      f'{config} has no sweep() that says what its grid is; give one, such as '
      '--grid seed=0:5'
    )
  extra, runs = common(shared), []
  for cell in grid(items) if items else module['sweep']():
    if double := sorted(cell.keys() & extra.keys()):
      raise ValueError(f'--set has {", ".join(double)}, which the grid has too')
    runs.append(_run(config, {**cell, **extra}, root))
  if not runs:
    raise ValueError(f'the sweep() of {config} is empty')
  for name, count in collections.Counter(run.name for run in runs).items():
    if count > 1:
      raise ValueError(f'{count} cells of the grid have the name {name}')
  for run in runs:
    _check_folder(run, check(module['get_config'], run))
  return runs


def _check_folder(run, config):
  """Raises ValueError where a run's folder holds a run of another config."""
  # Names do not say all of a cell, and a config's file may have changed.
  path = run.folder / 'config.json'
  if not path.is_file():
    return
  old = results.flat(results.json_object(path))
  new = results.flat(json.loads(config.to_json_best_effort()))
  differ = [
    f'{key} was {old.get(key, "absent")!r}, is {new.get(key, "absent")!r}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]
  if differ:
    raise ValueError(
      f'{run.folder} holds a run of another config; give another --root, or '
      f'remove that folder. It differs in: {"; ".join(differ)}'
    )


def _load(config):
  path = pathlib.Path(config)
  if not path.is_file():
    folder = path.parent if path.parent.is_dir() else pathlib.Path('configs')
    known = ', '.join(sorted(map(str, folder.glob('[!_]*.py')))) or 'none'
    hint = '; its arguments go into --grid or --set' if ':' in config else ''
    raise ValueError(f'no config {config}; there are: {known}{hint}')
  module = runpy.run_path(config)
  if 'get_config' not in module:
    raise ValueError(f'{config} has no get_config(): it is not a config')
  return module


def arguments(cell: dict) -> str:
  """What follows the colon of --config."""
  return ','.join(_argument(k, v) for k, v in cell.items() if '.' not in k)


def flags_of(config: str, cell: dict) -> tuple[str, ...]:
  """The flags of main that give a cell."""
  given = arguments(cell)
  changes = (f'--{key}={value}' for key, value in cell.items() if '.' in key)
  return '--config', f'{config}:{given}' if given else config, *changes


def _run(config, cell, root):
  name = name_of(cell)
  if len(name) > 240:
    raise ValueError(f'the name of a cell is too long for a folder: {name}')
  folder = pathlib.Path(root) / pathlib.Path(config).stem / name
  return Run(cell, folder, flags_of(config, cell))


def check(get_config, run: Run) -> ConfigDict:
  """The config of a run; ValueError for one that main would refuse."""
  given = arguments(run.cell)
  try:
    config = get_config(*([given] if given else []))
    for key in (key for key in run.cell if '.' in key):
      _check_key(config, key)
    # Types of values are checked by what will read them.
    line, reader = ['sweep', *run.flags[2:]], flags.FlagValues()
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=reader, sys_argv=line
    )
    reader(line)
    return config
  except (ValueError, TypeError, flags.Error) as error:
    said = ' '.join(str(error).split())
    raise ValueError(f'{said} (in the cell {run.name})') from error


def _check_key(config, path):
  first, *rest = path.split('.')
  if first != 'config':
    raise ValueError(
      f'no config argument {path!r}; the keys of a config are written '
      f'config.{path}'
    )
  value = config
  for key in rest:
    known = list(value) if isinstance(value, ConfigDict) else []
    if key not in known:
      raise ValueError(
        f'no key {key!r} in {path}; there are: {", ".join(known) or "none"}'
      )
    value = value[key]


# On this machine.


def gpus() -> list[str]:
  """The GPUs there are for jobs, as CUDA_VISIBLE_DEVICES names them.

  Asks nvidia-smi: to ask jax takes seconds and the memory of all of them.
  """
  if os.environ.get('JAX_PLATFORMS') == 'cpu':
    return []
  try:
    done = subprocess.run(
      ['nvidia-smi', '-L'],
      capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
  except (OSError, subprocess.SubprocessError):
    return []
  lines = [x for x in done.stdout.splitlines() if x.startswith('GPU ')]
  every = [str(i) for i in range(len(lines))]
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is None:
    return every
  # CUDA too stops at the first that it does not know.
  known = lambda x: x in every or x.startswith(('GPU-', 'MIG-'))  # noqa: E731
  named = [x.strip() for x in visible.split(',')]
  return list(itertools.takewhile(known, named))


def shares(jobs: int, devices: Sequence[str]) -> list[tuple[dict, set | None]]:
  """What each of the jobs at a time gets: (environment, cores or None)."""
  if devices:
    return [(_gpu_share(i, jobs, devices), None) for i in range(jobs)]
  if not hasattr(os, 'sched_getaffinity'):  # only Linux has it
    return [({}, None)] * jobs
  cores = sorted(os.sched_getaffinity(0))
  ends = [i * len(cores) // jobs for i in range(jobs + 1)]
  # More jobs than cores: some cores are shared.
  return [
    ({}, set(cores[begin:end] or [cores[i % len(cores)]]))
    for i, (begin, end) in enumerate(itertools.pairwise(ends))
  ]


def _gpu_share(i, jobs, devices):
  mine = i % len(devices)
  environment = {'CUDA_VISIBLE_DEVICES': devices[mine]}
  together = len(range(mine, jobs, len(devices)))
  names = ('XLA_PYTHON_CLIENT_MEM_FRACTION', 'XLA_CLIENT_MEM_FRACTION')
  if together > 1 and not any(name in os.environ for name in names):
    environment[names[0]] = f'{0.9 / together:.3f}'
  return environment


@dataclasses.dataclass
class _Job:
  """A run under way."""

  run: Run
  process: subprocess.Popen
  log: object
  head: int  # where in the log its output begins
  step: int  # of the newest checkpoint when it began
  begin: float


class Local:
  """A sweep on this machine: some runs at a time, each on its share of it.

  Every run's log is locked (flock) by sweep and run together. Two sweeps of one
  grid so divide its runs, a run whose sweep was killed is not started beside
  itself, and there is no lock to be stale: it ends with the last process that
  has the log open.
  """

  def __init__(self, runs, todo, places, retry):
    """Takes all runs, those to do, `shares`, and whether to retry."""
    self.runs, self.places, self.retry = runs, places, retry
    self.queue = collections.deque(todo)
    self.jobs = {}  # by index of places
    self.stalls = collections.Counter()
    self.seconds = collections.Counter()  # of each run, in this sweep
    self.took = []  # seconds of each finished one
    self.failed = []  # (run, how, last lines)
    self.busy = []
    self.signals = []
    self.asked = None  # when the runs were asked to stop

  def run(self) -> int:
    """Runs all there is to do; returns the exit code."""
    self._listen()
    try:
      while self.jobs or (self.queue and not self.signals):
        self._stop() if self.signals else self._fill()
        time.sleep(POLL)
        self._reap()
    finally:
      for job in self.jobs.values():  # only if the loop above is broken
        job.process.terminate()
    return self._conclude()

  def _listen(self):
    """From here on a signal ends the sweep in order."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      # nohup's are not to hear that the terminal is gone. What a script starts
      # in the background would not hear of Ctrl-C, but who sends it means it.
      hup = number == signal.SIGHUP
      if not hup or signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, _: self.signals.append(number))

  def _fill(self):
    for place in range(len(self.places)):
      while self.queue and place not in self.jobs and not self.signals:
        self._start(place, self.queue.popleft())

  def _start(self, place, run):
    log = _claim(run)
    if log is None:
      self.busy.append(run)
      return self._say('is run by another process', run)
    # Another sweep may have been here since this one looked.
    if run.finished:
      log.close()
      return self._say('finished by another sweep', run)
    if run.mark.exists() and not self.retry:
      self._fail(run, run.mark.read_text().partition('\n')[0], _tail(run.log))
      return log.close()
    run.mark.unlink(missing_ok=True)
    now = time.strftime('%Y-%m-%d %H:%M:%S')
    by = f'{socket.gethostname()}, sweep {os.getpid()}'
    log.write(f'== {now}, {by}: {shlex.join(run.command)}\n'.encode())
    step, head = run.newest_step(), log.tell()
    self._say('starts' if step < 0 else f'goes on from step {step}', run)
    process = _spawn(run, log, *self.places[place])
    self.jobs[place] = _Job(run, process, log, head, step, time.monotonic())

  def _reap(self):
    for place, job in list(self.jobs.items()):
      code = job.process.poll()
      if code is not None:
        del self.jobs[place]
        _kill_all(job.process)  # workers of one that died
        self._ended(job, code)  # with the lock: it may leave a mark
        # A worker that outlives the run would keep the lock.
        fcntl.flock(job.log, fcntl.LOCK_UN)
        job.log.close()

  def _ended(self, job, code):
    run = job.run
    self.seconds[run] += time.monotonic() - job.begin
    self.stalls[run] += 1
    if run.newest_step() > job.step:
      self.stalls[run] = 0
    if run.finished:
      self.took.append(self.seconds[run])
      self._say(f'finished in {_span(self.seconds[run])}', run)
    elif code == IN_USE:
      self.busy.append(run)
      self._say('is run by another process', run)
    elif self.signals:
      # Whatever it says, it was us; what is wrong with it will come again.
      self._say('stopped', run)
    elif code in STOPPED and self.stalls[run] <= STALLS:
      self._say(f'was stopped ({_how(code)}), is queued again', run)
      self.queue.append(run)
    else:
      how = _how(code)
      if code in STOPPED:
        how += f', {self.stalls[run]} times without a new checkpoint'
      run.mark.write_text(f'{how}\n{shlex.join(run.command)}\n')
      self._fail(run, how, _tail(run.log, job.head))

  def _fail(self, run, how, lines):
    self.failed.append((run, how, lines))
    self._say(f'failed ({how})', run)

  def _stop(self):
    """Asks the runs to stop; kills those that do not."""
    if self.asked is None:
      self.asked = time.monotonic()
      for job in self.jobs.values():
        job.process.terminate()
      with contextlib.suppress(OSError):  # the terminal may be gone
        print(
          f'stopping: waiting for {len(self.jobs)} to save; '
          'Ctrl-C again kills them',
          flush=True,
        )
      return
    late = time.monotonic() - self.asked > GRACE
    if late or signal.SIGINT in self.signals[1:]:
      for job in self.jobs.values():
        _kill_all(job.process)

  def _say(self, what, run):
    done = sum(run.finished for run in self.runs)
    left = len(self.queue) + len(self.jobs)
    rest = ''
    if self.took and left:
      mean = sum(self.took) / len(self.took)
      rest = f', about {_span(mean * left / len(self.places))} left'
    print(f'[{done}/{len(self.runs)}{rest}] {run.name} {what}', flush=True)

  def _conclude(self):
    for run, how, lines in self.failed:
      print(f'\nfailed ({how}): {run.name}', file=sys.stderr)
      for line in lines:
        print(f'  | {line}', file=sys.stderr)
      print(f'  its log: {run.log}', file=sys.stderr)
      print(f'  it alone: {shlex.join(run.command)}', file=sys.stderr)
    done = sum(run.finished for run in self.runs)
    counts = f'{done} of {len(self.runs)} done'
    if self.failed:
      counts += f', {len(self.failed)} failed (--retry tries them again)'
    if self.busy:
      counts += f', {len(self.busy)} run by another process'
    if self.signals and done < len(self.runs):
      print(f'stopped: {counts}; the same command goes on', flush=True)
      return 128 + self.signals[0]
    print(counts, flush=True)
    return int(done < len(self.runs))


def _claim(run):
  """Opens a run's log and locks it; None if another process has the lock."""
  run.log.parent.mkdir(parents=True, exist_ok=True)
  log = run.log.open('ab', buffering=0)
  try:
    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    log.close()
    return None
  except OSError:
    pass  # a file system without locks
  return log


def _spawn(run, log, environment, cores):
  """Starts a run on its share of the machine."""
  before = os.sched_getaffinity(0) if cores else None
  if cores:
    os.sched_setaffinity(0, cores)  # its child has it from its first moment
  try:
    # In a session of its own the terminal's Ctrl-C does not reach it.
    return subprocess.Popen(
      run.command, stdin=subprocess.DEVNULL, stdout=log,
      stderr=subprocess.STDOUT, start_new_session=True,
      env={'PYTHONUNBUFFERED': '1', **os.environ, **environment},
    )  # fmt: skip
  finally:
    if cores:
      os.sched_setaffinity(0, before)


def _kill_all(process):
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)  # with its workers


def _how(code):
  if code == 0:
    return 'ended without results.json'
  return f'exit code {code}' if code > 0 else signal.Signals(-code).name


def _tail(path, head=0, count=8):
  """The last lines of a log; of a progress bar only its last state."""
  with path.open('rb') as file:
    file.seek(max(head, file.seek(0, os.SEEK_END) - 20_000))
    text = file.read().decode(errors='replace')
  lines = [line.rstrip().rpartition('\r')[2] for line in text.split('\n')]
  return [line for line in lines if line.strip()][-count:]


def _span(seconds):
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = seconds / 60
  return f'{minutes:.0f} min' if minutes < 100 else f'{minutes / 60:.1f} h'


# On a cluster.


def settings(profile: str | None, given: dict) -> dict:
  """The settings of a profile's file and of the flags, which win."""
  found = {}
  if profile:
    try:
      found = tomllib.loads(pathlib.Path(profile).read_text())
    except (OSError, ValueError) as error:
      raise ValueError(f'cannot read the profile {profile}: {error}') from error
  known = (*SETTINGS, 'setup')
  for key, value in found.items():
    if key not in known:
      raise ValueError(
        f'{profile}: unknown key {key!r}; there are: {", ".join(known)}'
      )
    if isinstance(value, dict | list | bool):
      raise ValueError(f'{profile}: {key} needs text or a number, got {value}')
  return {**found, **{k: v for k, v in given.items() if v is not None}}


def batch(runs: Sequence[Run], chosen: dict, jobs: int | None):
  """Returns the sbatch command of some runs, and the script that it reads."""
  folder = runs[0].folder.parent
  index = f'0-{len(runs) - 1}' + (f'%{jobs}' if jobs else '')
  # The script sends a run's output to the run's own log. What is said before
  # it knows which, of the setup say, goes here. A % would be a pattern.
  output = str(folder / 'slurm.log').replace('%', '%%')
  command = [
    'sbatch', f'--array={index}', f'--job-name=sweep-{folder.name}',
    *(f'{SETTINGS[k]}={v}' for k, v in chosen.items() if k in SETTINGS),
    '--requeue', '--open-mode=append', f'--output={output}',
    # B: for the script; without it only what srun starts would be told.
    '--signal=B:USR1@90', f'--chdir={pathlib.Path.cwd()}',
  ]  # fmt: skip
  lines = []
  for i, run in enumerate(runs):
    words = run.command
    if 'setup' in chosen:
      words = ('python', *words[1:])
    place = shlex.quote(str(run.folder))
    lines.append(f'  {i}) folder={place} command=({shlex.join(words)}) ;;')
  setup = '# no setup: the interpreter is that of the sweep'
  if 'setup' in chosen:
    setup = (
      f'{str(chosen["setup"]).rstrip()}\n'
      '(($? == 0)) || { echo "error: the setup failed" >&2; exit 1; }'
    )
  script = SCRIPT.read_text()
  script = script.replace('# {setup}', setup)
  return command, script.replace('# {cells}', '\n'.join(lines))


def submit(runs: Sequence[Run], todo: Sequence[Run], chosen: dict, jobs):
  """Submits the runs that are to do as one job array; says what sbatch says."""
  command, script = batch(todo, chosen, jobs)
  if shutil.which('sbatch') is None:
    raise ValueError(
      'there is no sbatch on this machine; call this where jobs are '
      'submitted, or use --via local'
    )
  table = [
    {
      'cell': run.cell,
      'folder': str(run.folder),
      'log': str(run.log),
      'command': list(run.command),
      'index': todo.index(run) if run in todo else None,
    }
    for run in runs
  ]
  files.write_atomically(
    todo[0].folder.with_name('sweep.json'), json.dumps(table, indent=1) + '\n'
  )
  done = subprocess.run(
    command, input=script, capture_output=True, text=True, check=False
  )
  if done.returncode:
    said = ' '.join((done.stderr or done.stdout).split())
    raise ValueError(f'sbatch failed ({done.returncode}): {said}')
  print(f'{len(todo)} of {len(runs)} runs: {done.stdout.strip()}')


# The command.


class Parser(argparse.ArgumentParser):
  """Arguments whose errors are one line."""

  def error(self, message):
    """Ends the program."""
    sys.exit(f'error: {message}; see --help')


def positive(text: str) -> int:
  """Reads a number from 1, as argparse wants it read."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'needs a number from 1, got {text!r}')
  return int(text)


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flag = Parser(
    prog='python -m launch.sweep',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  several = {'nargs': '+', 'action': 'extend', 'default': []}
  add = flag.add_argument
  add('config', help='a file of configs, without arguments')
  add('--via', choices=('local', 'slurm', 'print'), default='local',
      help='where; print shows the commands and does nothing')  # fmt: skip
  add('--grid', metavar='KEY=VALUES', **several,
      help='such as shots=5,10 seed=0:5; else its sweep()')  # fmt: skip
  add('--set', metavar='KEY[=VALUE]', **several,
      help='the same for every run, such as smoke config.steps=4')  # fmt: skip
  add('--jobs', type=positive,
      help='runs at a time; by default one per GPU, or one')  # fmt: skip
  add('--root', default='runs', help='where the folder of the sweep is')
  add('--retry', action='store_true', help='also what failed before')
  slurm = flag.add_argument_group('SLURM')
  slurm.add_argument('--profile', help='a TOML file with setup and these:')
  for name, theirs in SETTINGS.items():
    slurm.add_argument(f'--{name}', help=f"sbatch's {theirs}")
  return flag


def sweep(args: argparse.Namespace) -> int:
  """Runs, submits or shows a sweep; returns the exit code."""
  given = {name: getattr(args, name) for name in SETTINGS}
  on_slurm = args.via == 'slurm' or bool(args.profile or any(given.values()))
  if args.via == 'local' and on_slurm:
    raise ValueError('--profile and the flags of SLURM need --via slurm')
  chosen = settings(args.profile, given)
  runs = plan(args.config, args.grid, args.set, args.root)
  left = [run for run in runs if not run.finished]
  todo = [run for run in left if args.retry or not run.mark.exists()]
  # What --via print says on stdout can be pasted into a shell.
  said = sys.stderr if args.via == 'print' else sys.stdout
  if len(left) < len(runs):
    print(f'{len(runs) - len(left)} of {len(runs)} are finished', file=said)
  for run in left:
    if run not in todo:
      print(f'{run.name} failed before; --retry tries it again', file=said)
  if not todo:
    return int(bool(left))
  if args.via == 'print':
    show(todo, chosen, args.jobs, on_slurm)
  elif args.via == 'slurm':
    submit(runs, todo, chosen, args.jobs)
  else:
    devices = gpus()
    jobs = min(args.jobs or len(devices) or 1, len(todo))
    return Local(runs, todo, shares(jobs, devices), args.retry).run()
  return 0


def show(todo: Sequence[Run], chosen: dict, jobs, on_slurm: bool) -> None:
  """Prints what would be run or submitted, to be pasted into a shell."""
  if not on_slurm:
    text = '\n'.join(shlex.join(run.command) for run in todo)
  else:
    command, script = batch(todo, chosen, jobs)
    text = (
      f'mkdir -p {shlex.quote(str(todo[0].folder.parent))}\n'
      f"{shlex.join(command)} <<'END_OF_SCRIPT'\n{script}END_OF_SCRIPT"
    )
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
  print(text)


def main(argv: Sequence[str]) -> None:
  """Ends with the sweep's exit code, or with one line that says why not."""
  try:
    sys.exit(sweep(parser().parse_args(argv)))
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:  # before anything ran
    sys.exit(130)


if __name__ == '__main__':
  main(sys.argv[1:])
