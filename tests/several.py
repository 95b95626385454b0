"""Runs that are killed, and runs of several devices or processes.

A run's config is named as 'module:function', and made anew in the program of
its own that a process is.
"""

import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from distillfss_jax import parallel, train
from distillfss_jax.workdir import checkpoint

HERE = pathlib.Path(__file__).resolve().parent


def state(folder, step):
  """The newest checkpoint, which must be of that step, {path: array}."""
  leaves = checkpoint.load(folder / 'checkpoints')
  assert int(leaves['step']) == step
  return leaves


def losses(folder):
  """{step: loss}, of the log."""
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return {row['step']: row['train/loss'] for row in rows if 'train/loss' in row}


class Killed(BaseException):
  """As if by a signal that cannot be heard."""


def killed_and_restarted(config, folder, step, monkeypatch):
  """The results of a run that dies after a step, and goes on."""
  seen = train._Job._check_finite

  def dies(self, before, log):
    seen(self, before, log)
    if before >= step:
      raise Killed

  monkeypatch.setattr(train._Job, '_check_finite', dies)
  with pytest.raises(Killed):
    train.run(config, folder)
  monkeypatch.setattr(train._Job, '_check_finite', seen)
  return train.run(config, folder)


def check_equal(folder, other, step):
  """Two runs have ended with the same numbers, bit by bit."""
  theirs = state(other, step)
  for path, x in state(folder, step).items():
    np.testing.assert_array_equal(x, theirs[path], err_msg=path)
  assert losses(folder) == losses(other)


def work(folder, make, arguments, processes, process, address):
  """What a program of `run_on` does."""
  if processes > 1:
    parallel.start(address, processes, process)
  module, name = make.split(':')
  config = getattr(importlib.import_module(module), name)(*arguments)
  train.run(config, pathlib.Path(folder))


def run_on(folder, make, arguments=(), *, devices=1, processes=1, level=0):
  """Runs a config in programs of their own, and waits for them.

  Args:
    folder: of the run.
    make: 'module:function' of the tests, which gives the config.
    arguments: of that function.
    devices: of each process.
    processes: of the run.
    level: how far XLA optimises; 0 compiles fastest.
  """
  environment = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} '
    f'--xla_backend_optimization_level={level}',
    PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]),
  )
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  jobs = []
  for i in range(processes):
    said = (str(folder), make, tuple(arguments), processes, i, address)
    jobs.append(
      subprocess.Popen(
        [sys.executable, '-c', f'import several; several.work(*{said!r})'],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  try:
    for job in jobs:
      said, _ = job.communicate(timeout=600)
      assert job.returncode == 0, said[-3000:]
  finally:
    for job in jobs:
      job.kill()
      job.communicate()


def check_close(folder, other, step, *, loss, rtol, atol):
  """Two runs have ended with nearly the same numbers.

  Args:
    folder: of one run.
    other: of the other.
    step: the last.
    loss: relative tolerance of each step's loss.
    rtol: of parameters and buffers.
    atol: of them.
  """
  one, two = losses(folder), losses(other)
  assert one.keys() == two.keys()
  for at, x in two.items():
    assert one[at] == pytest.approx(x, rel=loss)
  theirs = state(other, step)
  for path, x in state(folder, step).items():
    if path.startswith('opt_state/'):
      continue  # of gradients, which small batches' norms make differ more
    np.testing.assert_allclose(
      x, theirs[path], rtol=rtol, atol=atol, err_msg=path
    )


def check_devices(place, make, arguments, step, *, level=0):
  """Two and eight devices, and two processes, end as one device does.

  Args:
    place: a folder for the runs.
    make, arguments, level: see `run_on`.
    step: the last. Two tell enough: of more, a deep network with norms of eight
      tiny images makes much of the last digits. PSPNet's first gradients differ
      by 5e-7 on two devices, and by a percent on one that compiles with other
      optimisations.
  """
  run_on(place / 'alone', make, arguments, level=level)
  for devices, processes in ((2, 1), (8, 1), (1, 2)):
    folder = place / f'{devices}_{processes}'
    run_on(
      folder,
      make,
      arguments,
      devices=devices,
      processes=processes,
      level=level,
    )
    check_close(folder, place / 'alone', step, loss=1e-3, rtol=2e-2, atol=2e-3)
