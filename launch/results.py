"""The folders of runs, as they are read."""

import json
import math
import os
import pathlib

AVERAGED = ('seed', 'support.seed')  # what a mean is taken over
SYSTEMS = {'DistillFSS': 'distillfss', 'TransferFSS': 'transferfss'}
NEEDED = {
  'name': str, 'system': str, 'student': str, 'seed': int, 'data.name': str,
  'model.backbone.name': str, 'support.shots': int, 'support.rule': str,
  'support.seed': int,
}  # fmt: skip
# Of a run's folder; they are large and hold no runs.
INSIDE = ('checkpoints', 'tensorboard', 'panels')


class Run:
  """A run's folder: its config by dotted path; results None if unfinished.

  `kind` is what is trained: the system, and which student if it has one. A mean
  is taken over runs that differ in their `draw`.
  """

  def __init__(self, folder: pathlib.Path, config: dict, results: dict | None):
    """Takes what was read; `dataset` is set once all runs are known."""
    self.folder, self.config, self.results = folder, config, results
    self.dataset = ''
    distills = config['system'] == 'distillfss'
    self.kind = config['system'], config['student'] if distills else ''
    self.backbone = config['model.backbone.name']
    self.shots = config['support.shots']
    self.draw = tuple(config[key] for key in AVERAGED)
    self.place = self.kind, self.backbone, self.shots, self.draw


def method(kind: tuple[str, str], role: str = '') -> str:
  """Its name in the tables, such as 'DistillFSS (light) teacher'."""
  system, student = kind
  name = {theirs: name for name, theirs in SYSTEMS.items()}.get(system, system)
  which = f' ({student})' if student not in ('', 'full') else ''
  # What is trained for its own sake goes without saying.
  plain = 'student' if student else 'teacher'
  return name + which + (f' {role}' if role not in ('', plain) else '')


def read(root: str | os.PathLike) -> tuple[list[Run], list[Run], list[str]]:
  """Finds the runs below a folder.

  Returns:
    Finished runs, unfinished ones, and warnings that name what is damaged.
  """
  finished, unfinished, warnings = [], [], []

  def cannot(error):
    warnings.append(f'{error.filename} cannot be read: {error.strerror}')

  for folder, below, names in os.walk(root, onerror=cannot):
    below[:] = sorted(x for x in below if x not in INSIDE and x[0] != '.')
    if {'config.json', 'results.json'} & set(names):
      try:
        if run := load(pathlib.Path(folder)):
          (unfinished if run.results is None else finished).append(run)
      except (OSError, ValueError) as error:
        warnings.append(f'{error}; it is left out')
  return finished, unfinished, warnings


def load(folder: pathlib.Path) -> Run | None:
  """Reads a run's folder; None where a config.json is no run's.

  Raises:
    ValueError: something is damaged or of another version.
  """
  done = (folder / 'results.json').exists()
  if not (folder / 'config.json').is_file():
    raise ValueError(f'{folder}/results.json has no config.json beside it')
  config = flat(json_object(folder / 'config.json'))
  if not done and 'system' not in config:
    return None  # converted weights also have one
  for key, kind in NEEDED.items():
    if type(config.get(key)) is not kind:
      raise ValueError(
        f'{folder}/config.json is damaged or of another version: {key} is '
        f'{config.get(key)!r}, not of type {kind.__name__}'
      )
  return Run(
    folder, config, json_object(folder / 'results.json') if done else None
  )


def json_object(path: pathlib.Path) -> dict:
  """Reads a file of one JSON object; ValueError where it is damaged."""
  try:
    value = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f'{path} is damaged ({error}): delete it and run its command again'
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} is damaged (no JSON object)')
  return value


def flat(config: dict, path: str = '') -> dict:
  """{'a': {'b': 1}} as {'a.b': 1}."""
  found = {}
  for key, value in config.items():
    inner = isinstance(value, dict)
    found |= flat(value, f'{path}{key}.') if inner else {path + key: value}
  return found


def scores(run: Run, size: str, metric: str) -> dict[str, float]:
  """The score of each role of a finished run.

  Raises:
    ValueError: the results lack it, or hold no number there.
  """
  name, roles = f'{run.folder}/results.json', run.results.get(size)
  if not isinstance(roles, dict) or not roles:
    raise ValueError(f'{name} has no scores under {size!r}')
  found = {}
  for role, values in roles.items():
    values = values if isinstance(values, dict) else {}
    found[role] = value = values.get(metric)
    if type(value) not in (int, float) or not math.isfinite(value):
      known = ', '.join(k for k, v in values.items() if isinstance(v, float))
      raise ValueError(
        f'{name}: {size}/{role}/{metric} is {value!r}, not a number; there '
        f'are: {known or "none"}'
      )
  return found
