"""Runs one experiment: python -m distillfss_jax.main --config configs/demo.py.

Values are changed by --config.name.key=value. Everything a run leaves lies in
its folder, --workdir, by default runs/<config>-<time>.
"""

import multiprocessing
import os
import pathlib
import sys
import time
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from distillfss_jax import config as configs
from distillfss_jax import parallel, train
from distillfss_jax.workdir import locking, signals

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The experiment: a file, and arguments after a colon.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, "The run's folder; by default runs/<config>-<time>."
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'One of several processes: SLURM, MPI or TPU say which.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'One of several processes: host:port of process 0.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes there are, with --coordinator.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which one this is, from 0, with --coordinator.'
)


def main(argv):
  """Runs or resumes the experiment of the flags."""
  if len(argv) > 1:
    sys.exit(f'error: unknown arguments {argv[1:]}; see --help')
  config = _CONFIG.value
  if config is None:
    sys.exit('error: --config is missing, such as --config configs/demo.py')
  place = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  together = _DISTRIBUTED.value or any(x is not None for x in place)
  if together and not _WORKDIR.value:
    sys.exit(
      'error: several processes need the same --workdir, on a file system that '
      'all of them see'
    )
  started = time.strftime('%Y%m%d-%H%M%S')
  workdir = pathlib.Path(_WORKDIR.value or f'runs/{config.name}-{started}')
  # The terminal shows progress and warnings; the rest goes to the run's log.
  logging.set_verbosity(logging.WARNING)
  logging.set_stderrthreshold('warning')
  parallel.keep_programs(workdir.parent)
  finished = (workdir / 'results.json').exists()
  try:
    # A finished run needs nobody: others may be gone already.
    if together and not finished:
      parallel.start(*place)
    results = train.run(config, workdir)
  except signals.Stopped as stopped:
    again = f'the same command with --workdir {workdir} goes on'
    _leave(stopped.code, f'stopped by {stopped}: {again}')
  except Exception as error:
    _fail(error, workdir)
  if finished:
    print(f'{workdir} holds a finished run: nothing is left to do')
  if jax.process_index() == 0:
    print(train.score_table(results))
    print(f'\nfolder: {workdir}\nlook:   {workdir}/panels')
    print(f'or:     tensorboard --logdir {workdir.parent}')


def _fail(error, workdir):
  """Ends the process with what an error means; raises what nobody foresaw."""
  if parallel.lost(error):
    _leave(
      signals.AGAIN,
      'error: another process of this run was lost, and this one ends with it '
      f'({str(error).splitlines()[0][:200]}). Start all of them again with '
      f'--workdir {workdir}: the run goes on from its newest checkpoint',
    )
  if isinstance(error, locking.InUseError):
    _leave(locking.IN_USE, f'error: {error}')
  if isinstance(error, ConnectionError):
    _leave(signals.AGAIN, f'error: {error}')
  if isinstance(error, ValueError | TypeError | OSError):
    _leave(1, f'error: {error}')
  if not parallel.started():
    raise error
  traceback.print_exception(error)
  _leave(1, f'error: {type(error).__name__}: {str(error)[:200]}')


def _leave(code, line):
  """Ends the process with a line on the terminal."""
  logging.flush()
  print(line, file=sys.stderr, flush=True)
  if parallel.started():
    # The orderly way waits minutes for processes that may be gone.
    for worker in multiprocessing.active_children():
      worker.kill()
    os._exit(code)
  sys.exit(code)


def parse(argv: list[str]) -> list[str]:
  """Parses flags; whatever is wrong with them is one line on the terminal."""
  try:
    # ml_collections looks for overrides in sys.argv, which this list is.
    argv[:] = configs.check_flags(argv)
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, TypeError, OSError) as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
