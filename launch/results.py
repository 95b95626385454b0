"""The folders of runs, as they are read."""

import functools
import os
import pathlib
import re

from distillfss_jax import config as configs
from distillfss_jax import files

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
AVERAGED = ('seed', 'support.seed')  # what a mean is taken over
SYSTEMS = {'DistillFSS': 'distillfss', 'TransferFSS': 'transferfss'}
MODELS = {'BAM': 'bam', 'HDMNet': 'hdmnet', 'DCAMA': 'dcama', 'IFA': 'ifa',
          'SSP': 'ssp', 'U-Net': 'unet'}  # fmt: skip
RECIPES = ('ours', 'unet')  # of the system that is a fine-tuned U-Net
NEEDED = {
  'name': str, 'system': str, 'student': str, 'seed': int, 'data.name': str,
  'model.backbone.name': str, 'support.shots': int, 'support.rule': str,
  'support.seed': int,
}  # fmt: skip
# What runs have of these that learn without a support.
WITHOUT = {
  'student': '', 'support.shots': 0, 'support.rule': '', 'support.seed': 0,
}  # fmt: skip
# What runs have whose shots are drawn of a source, and have no student.
SOURCE = {'student': '', 'support.rule': 'drawn', 'support.seed': 0}
# Of a run's folder; they are large and hold no runs.
INSIDE = ('checkpoints', 'tensorboard', 'panels')


class Run:
  """A run's folder: its config by dotted path; results None if unfinished.

  `kind` is what is trained: the system, and which student if it has one. A mean
  is taken over runs that differ in their `draw`. `on_tests` says that the test
  images chose the checkpoint.
  """

  def __init__(self, folder: pathlib.Path, config: dict, results: dict | None):
    """Takes what was read; `dataset` is set once all runs are known."""
    self.folder, self.config, self.results = folder, config, results
    self.dataset = ''
    self.kind = kind_of(config)
    self.backbone = config['model.backbone.name']
    self.shots = config['support.shots']
    self.draw = tuple(config[key] for key in AVERAGED)
    self.place = self.kind, self.backbone, self.shots, self.draw
    chosen = (results or {}).get('checkpoint')
    chosen = chosen.get('chosen_on') if isinstance(chosen, dict) else None
    # Shots that are left out are no test images, either.
    apart = ('validation', 'leave_one_out')
    self.on_tests = bool(chosen) and not str(chosen).startswith(apart)


def kind_of(config: dict) -> tuple[str, str]:
  """What is trained; where nothing is, the model that is tested as it is."""
  if config.get('steps') == 0 and not config.get('epochs'):
    return config['model.name'], ''
  if 'distiller.name' in config:  # a row of a table of distillers
    name = config['distiller.name']
    return ('no distiller' if name == 'none' else name), 'full'
  if config['system'] == 'finetune':
    # Ours leaves the backbone as it is.
    ours = 'decoder' in (config.get('optim.trainable') or ())
    return RECIPES[0 if ours else 1], 'full'
  distills = config['system'] == 'distillfss'
  return config['system'], config['student'] if distills else ''


def method(kind: tuple[str, str], role: str = '') -> str:
  """Its name in the tables, such as 'DistillFSS (light) teacher'."""
  system, student = kind
  names = {theirs: name for name, theirs in (SYSTEMS | MODELS).items()}
  name = names.get(system, system)
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


@functools.cache
def todays(name: str, arg: str = '') -> dict | None:
  """A config of today by its file's stem, flat.

  None where there is none of that name, or it takes no such argument.
  """
  if not re.fullmatch(r'\w+', name):  # else it could be any file at all
    return None
  try:
    get_config = configs.read_file(CONFIGS / f'{name}.py')['get_config']
    return _whole(configs.flat(get_config(*([arg] if arg else []))))
  except (ValueError, TypeError):
    return None


def load(folder: pathlib.Path) -> Run | None:
  """Reads a run's folder; None where a config.json is no run's.

  Raises:
    ValueError: something is damaged or of another version.
  """
  done = (folder / 'results.json').exists()
  if not (folder / 'config.json').is_file():
    raise ValueError(f'{folder}/results.json has no config.json beside it')
  config = configs.saved(folder / 'config.json')
  if not done and 'system' not in config:
    return None  # converted weights also have one
  config = _whole(_asked(folder, config))
  for key, kind in NEEDED.items():
    if type(config.get(key)) is not kind:
      raise ValueError(
        f'{folder}/config.json is damaged or of another version: {key} is '
        f'{config.get(key)!r}, not of type {kind.__name__}'
      )
  scored = files.read_json(folder / 'results.json') if done else None
  return Run(folder, _defaults(config) | config, scored)


def _asked(folder, config):
  """A run's flat config as it was asked for: its own choices left open.

  Each draw of the support chooses for itself, and is one draw of the same.
  """
  if not (folder / 'held_out.json').exists():
    return config
  told = files.read_json(folder / 'held_out.json')
  chosen = told.get('choice') if isinstance(told, dict) else None
  if not isinstance(chosen, dict):
    raise ValueError(f'{folder}/held_out.json tells no choice')
  return config | {k: x for k, x in configs.CHOSEN.items() if k in chosen}


def _whole(config):
  """A flat config, also of a run whose support is drawn, or that has none."""
  lacks = {'source': SOURCE, 'dense': WITHOUT}.get(config.get('task'), {})
  if config.get('system') == 'finetune':
    lacks = {'student': ''}
  return lacks | config


def _defaults(config):
  """What a run of a config has where it was saved before there was a key.

  The arguments of constructors have defaults of their own.
  """
  kind, _ = kind_of(config)
  arg = f'recipe={kind}' if kind in RECIPES else ''
  return {
    key: value
    for key, value in (todays(config['name'], arg) or {}).items()
    if not {'args', 'fields'} & set(key.split('.'))
  }


def scores(run: Run, size: str, metric: str) -> dict[str, float]:
  """The score of each role of a finished run in one of its evaluations.

  Raises:
    ValueError: the results lack it, or hold no number there.
  """
  name, roles = f'{run.folder}/results.json', run.results.get(size)
  if not isinstance(roles, dict) or not roles:
    known = run.results.get('evaluations')
    known = ', '.join(known) if isinstance(known, dict) else 'test, test_native'
    raise ValueError(f'{name} has no scores under {size!r}; there are: {known}')
  found = {}
  for role, values in roles.items():
    values = values if isinstance(values, dict) else {}
    if metric in values and values[metric] is None and len(roles) > 1:
      continue  # there was nothing to score
    found[role] = value = values.get(metric)
    # A score is at most 1, a loss or a count some more.
    if type(value) not in (int, float) or not abs(value) < 1e9:
      known = ', '.join(k for k, v in values.items() if isinstance(v, float))
      raise ValueError(
        f'{name}: {size}/{role}/{metric} is {value!r}, not a score; there '
        f'are: {known or "none"}'
      )
  return found
