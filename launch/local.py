"""Runs of a sweep on this machine: some at a time, each on its share of it."""

import collections
import contextlib
import dataclasses
import fcntl
import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from launch.plan import Run

# A run that ends so was stopped, not wrong. It says 75 or 130 itself, unless it
# is stopped so early that it cannot.
STOPPED = (75, 130, -signal.SIGTERM, -signal.SIGINT)
IN_USE = 69  # another process is at work in its folder
STALLS = 3  # times in a row that it may be stopped without a new checkpoint
GRACE = 60.0  # seconds to save in, after a Ctrl-C
POLL = 0.1  # seconds between looks at the runs under way


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


class Sweep:
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
    """From here on Ctrl-C, SIGTERM or a closed terminal end it in order."""
    heard = [signal.SIGINT, signal.SIGTERM]
    # Under nohup it is ignored, and nobody is to hear of it. What a script
    # starts in the background ignores Ctrl-C too, but who sends it means it.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
      heard.append(signal.SIGHUP)
    for number in heard:
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
      self._fail(
        run,
        run.mark.read_text(errors='replace').partition('\n')[0],
        _tail(run.log),
      )
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
      _tell(
        f'stopping: waiting for {len(self.jobs)} to save; '
        'Ctrl-C again kills them'
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
    _tell(f'[{done}/{len(self.runs)}{rest}] {run.name} {what}')

  def _conclude(self):
    for run, how, lines in self.failed:
      _tell(f'\nfailed ({how}): {run.name}', 'stderr')
      for line in lines:
        _tell(f'  | {line}', 'stderr')
      _tell(f'  its log: {run.log}', 'stderr')
      _tell(f'  it alone: {shlex.join(run.command)}', 'stderr')
    done = sum(run.finished for run in self.runs)
    counts = f'{done} of {len(self.runs)} done'
    if self.failed:
      counts += f', {len(self.failed)} failed (--retry tries them again)'
    if self.busy:
      counts += f', {len(self.busy)} run by another process'
    if self.signals and done < len(self.runs):
      _tell(f'stopped: {counts}; the same command goes on')
      return 128 + self.signals[0]
    _tell(counts)
    return int(done < len(self.runs))


def _tell(text, where='stdout'):
  """Prints; without a word more once the terminal or the pipe is closed."""
  try:
    print(text, file=getattr(sys, where), flush=True)
  except OSError:  # what it says is less than the runs it looks after
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, getattr(sys, where).fileno())
    os.close(nowhere)


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
