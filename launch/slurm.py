"""Runs of a sweep as one array of jobs on a SLURM cluster."""

import json
import pathlib
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Sequence

from distillfss_jax import files
from launch.plan import Run

SCRIPT = pathlib.Path(__file__).with_name('slurm_array.sh')

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
