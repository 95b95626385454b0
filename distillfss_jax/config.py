"""Configs: loading them, checking what is changed in them, and comparing them.

A config is a `ConfigDict` that the `get_config(arg)` of a file returns; it is
named as 'configs/nucleus.py:shots=5', where what follows the colon is `arg`.
Its keys are written with dots, as 'data.image_size'. A run's folder keeps its
config in config.json, which outlives changes of the code: keys that have
another name now are in `RENAMED`, and those that came later in `ADDED`, with
what they must be for a run from before to go on as it began.
"""

import itertools
import json
import math
import os
import pathlib
import re
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from distillfss_jax import files

# {key of old: key of today}, the oldest change first; either may be a group of
# keys, such as 'model'. Applied to saved configs and to flags, so that folders
# and commands from before a change go on.
RENAMED: dict[str, str] = {
  f'model.{key}': f'model.fields.{key}'
  for key in (
    'heads', 'dropout', 'positional', 'concat_support', 'voting', 'mix_size',
  )
}  # fmt: skip

# {key of today: its default}, of keys that older folders lack.
ADDED: dict[str, Any] = {
  'model.name': 'dcama',
  'optim.power': 0.9,
  'optim.stairs': [],
  'optim.warmup': '0',
  'optim.nesterov': True,
  'optim.clip_norm': 0.0,
  'optim.clip_value': 0.0,
  'optim.groups': [],
  'epochs': 0.0,
  'eval.keep_best': False,
  'eval.patience': 0,
  'eval.epochs': 0.0,
  'eval.short_side': False,
  'eval.saliency': False,
  'eval.masks': False,
  'eval.calibration': False,
  'dense.select': 'validation',
  'source.test_seeds': [],
  'support.ids': [],
  'source.test_recipe': 'none',
  'source.test_exact': False,
  'source.generalised': 0,
  'source.pairs': 0,
  'source.parts': ['train', 'test'],
  'source.test_data': '',
  'source.protocol': 'apart',
  'source.metric': 'class_miou',
  'source.reference_batch': 0,
  'source.reference_classes': 0,
  'source.chosen_by': 'test',
  'support.seed': 0,
  'support.unlabelled': '',
  'teacher.keep_gb': 8.0,
  'views.temperature': 1.0,
}
# Those of `ADDED` that only some configs with their group have: the key that
# tells which.
_WITH = {
  'eval.short_side': 'dense.select',
  'eval.saliency': 'dense.select',
  'eval.masks': 'dense.select',
  'eval.calibration': 'eval.brightness',
  'support.ids': 'support.rule',
  'support.unlabelled': 'views.look',
}


def load(text: str) -> ConfigDict:
  """The config of 'file.py' or 'file.py:arg'.

  Raises:
    ValueError: there is no such file, it is no config, or it takes no such
      argument; says what exists.
  """
  path, _, arg = text.partition(':')
  return read_file(path)['get_config'](*([arg] if arg else []))


def read_file(path: str | os.PathLike) -> dict[str, Any]:
  """What a file of configs defines: `get_config`, perhaps `sweep`.

  Raises:
    ValueError: there is no such file, or it is no config.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    folder = path.parent if path.parent.is_dir() else pathlib.Path('configs')
    known = ', '.join(sorted(map(str, folder.glob('[!_]*.py')))) or 'none'
    raise ValueError(f'no config {path}; there are: {known}')
  try:
    defined = runpy.run_path(str(path))
  except Exception as error:  # whatever its code does
    raise ValueError(
      f'{path} cannot be loaded: {type(error).__name__}: {error}'
    ) from error
  if 'get_config' not in defined:
    raise ValueError(f'{path} has no get_config(): it is not a config')
  return defined


# What leaves a key open: the run chooses, and its folder has the choice.
CHOSEN = {'views.look': 'auto', 'views.temperature': 0.0}

_NOTHING = object()  # equal to no value

# {key: (least, most)} of numbers whose wrong values would be noticed late.
_BOUNDS = {
  'seed': (0, 2**32 - 1),
  'steps': (0, 10**9),
  'epochs': (0, 10**6),
  'micro_batch': (0, 10**6),
  'log_every': (1, 10**9),
  'checkpoint_every': (1, 10**9),
  'data.image_size': (16, 4096),
  'data.workers': (0, 256),
  'eval.every': (0, 10**9),
  'eval.batch_size': (1, 10**5),
  'eval.panels': (0, 1000),
  'eval.patience': (0, 10**9),
  'eval.epochs': (0, 10**6),
  'support.shots': (1, 10**5),
  'teacher.keep_gb': (0, 10**6),
  'views.temperature': (0, 1000),
  'support.seed': (0, 2**32 - 1),
  'episodes.subsample': (0, 10**5),
  'episodes.draws': (0, 10**6),
  'source.batch_size': (1, 10**5),
  'source.tests': (1, 10**7),
  'source.generalised': (0, 10**7),
  'source.pairs': (0, 10**7),
  'source.reference_batch': (0, 10**7),
  'source.reference_classes': (0, 10**5),
  'dense.batch_size': (1, 10**5),
  'optim.lr': (0, math.inf),
  'optim.weight_decay': (0, math.inf),
  'optim.clip_norm': (0, math.inf),
  'optim.clip_value': (0, math.inf),
}


def check_values(config: ConfigDict) -> None:
  """Raises ValueError for numbers that no run can have; names all of them."""
  values = flat(config)
  wrong = [
    f'config.{key}={values[key]!r}, which must be '
    + (f'{least} to {most}' if most < 10**9 else f'at least {least}')
    for key, (least, most) in _BOUNDS.items()
    if key in values and not least <= values[key] <= most
  ]
  if wrong:
    raise ValueError('; '.join(wrong))
  every, epochs = values.get('eval.every', 0), values.get('eval.epochs', 0)
  if every and epochs:
    raise ValueError(
      f'config.eval.every={every} and config.eval.epochs={epochs} both say '
      'when to test on the way: set one of them to 0'
    )
  if values.get('eval.patience', 0) and not values.get('eval.keep_best'):
    raise ValueError(
      f'config.eval.patience={values["eval.patience"]} waits for a better '
      'checkpoint, and none is kept: set config.eval.keep_best=True, or '
      'patience to 0'
    )


def renamed(key: str) -> str:
  """A key of old as it is called today; any other as it is."""
  for old, new in RENAMED.items():
    if key == old or key.startswith(f'{old}.'):
      key = new + key.removeprefix(old)
  return key


def check_key(config: ConfigDict, key: str) -> None:
  """Raises ValueError where a config lacks a key; says what exists."""
  value = config
  for part in key.split('.'):
    known = list(value) if isinstance(value, ConfigDict) else []
    if part not in known:
      raise ValueError(
        f'no key {part!r} in config.{key}; there are: '
        f'{", ".join(known) or "none"}'
      )
    value = value[part]


def check_flags(argv: Iterable[str]) -> list[str]:
  """A command line, with keys of --config.key as they are called today.

  Raises:
    ValueError: the config that --config names cannot be loaded, or lacks a key.
  """
  # ml_collections would raise from deep inside, without saying what exists.
  argv, keys = list(argv), []
  for i, arg in enumerate(argv):
    if found := re.fullmatch(r'(--?(?:no)?config\.)([^=]+)(=.*)?', arg, re.S):
      dashes, key, value = found.groups('')
      keys.append(renamed(key))
      argv[i] = dashes + keys[-1] + value
  pairs = itertools.pairwise([*argv, ''])
  named = [b for a, b in pairs if a in ('-config', '--config')]
  named += [x.partition('=')[2] for x in argv if re.match('--?config=', x)]
  if named:
    config = load(named[0])
    for key in keys:
      check_key(config, key)
  return argv


def saved(path: str | os.PathLike) -> dict[str, Any]:
  """A config.json as {key: value}, with the keys of today.

  Raises:
    ValueError: the file is damaged.
    OSError: it cannot be read.
  """
  found = {renamed(k): v for k, v in flat(files.read_json(path)).items()}
  groups = {key.rpartition('.')[0] for key in found}
  added = {k: v for k, v in ADDED.items() if k.rpartition('.')[0] in groups}
  there = found.keys() | added.keys()
  added = {k: v for k, v in added.items() if _WITH.get(k, k) in there}
  if 'views' in groups and 'eval.calibration' in added:
    added['eval.calibration'] = True  # more is said of it, nothing else is done
  if 'dense.select' in added and not found.get('dense.held_out'):
    added['dense.select'] = 'test'  # there was nothing else to choose by
  return {**added, **found}


def restored(path: str | os.PathLike) -> ConfigDict:
  """The config of a run, from its config.json, with the keys of today.

  Tuples come back as lists, as JSON has them.

  Raises:
    ValueError: the file is damaged.
    OSError: it cannot be read.
  """
  made = _groups(files.read_json(path))  # also those without a key
  for key, value in saved(path).items():
    *groups, name = key.split('.')
    place = made
    for group in groups:
      place = place.setdefault(group, {})
    place[name] = value
  return ConfigDict(made)


def _groups(config):
  return {k: _groups(v) for k, v in config.items() if isinstance(v, Mapping)}


def flat(config: ConfigDict | Mapping) -> dict[str, Any]:
  """A config as {key: value}: {'a': {'b': (1,)}} is {'a.b': [1]}, as in JSON.

  Groups without a key leave nothing.
  """
  if isinstance(config, ConfigDict):
    config = json.loads(config.to_json_best_effort())
  found = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      found |= {f'{key}.{inner}': x for inner, x in flat(value).items()}
    else:
      found[key] = value
  return found


def differences(
  before: ConfigDict | Mapping, now: ConfigDict | Mapping
) -> list[str]:
  """How a saved config differs from one of today, as 'key was 1, is 2'.

  What `before` lacks is no difference: `saved` has filled in what an option
  that came later must be, nor what `now` leaves open. What only `before` has is
  one: it meant something.

  Args:
    before: saved, flat or nested; see `saved`.
    now: of today.
  """
  before, now = flat(before), flat(now)

  def said(config, key):
    return repr(config[key]) if key in config else 'absent'

  return [
    f'{key} was {said(before, key)}, is {said(now, key)}'
    for key in sorted(before)
    if not (key in CHOSEN and now.get(key) == CHOSEN[key])
    and before[key] != now.get(key, ADDED.get(key, _NOTHING))
  ]


def differing(configs: Iterable[Mapping[str, Any]]) -> list[str]:
  """The keys, in order, whose values are not the same in all flat configs."""
  configs = list(configs)
  return [
    key
    for key in dict.fromkeys(itertools.chain(*configs))
    # As text, since in Python 1 and true are equal, and lists have no hash.
    if len({repr(x[key]) if key in x else '' for x in configs}) > 1
  ]
