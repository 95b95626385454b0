"""What a sweep consists of: the cells of a grid, each a run, all checked.

A cell is a dict: keys without a dot are arguments of the config, keys that
start with 'config.' change its values.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from distillfss_jax import config as configs

MAIN = (sys.executable, '-m', 'distillfss_jax.main')
MOST = 2_000  # runs of a sweep; each takes some milliseconds to check


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
    bounds = re.fullmatch(r'([0-9]{1,18}):([0-9]{1,18})', part)
    begin, end = map(int, bounds.groups()) if bounds else (0, 1)
    if not part or end <= begin:
      raise ValueError(f"{item!r} has an empty value; write {key}='' for one")
    _check_count(item, len(found) + end - begin)  # before there is a list
    found += map(str, range(begin, end)) if bounds else [_unquoted(part)]
  return key, found


def _check_count(what, count):
  if count > MOST:
    raise ValueError(
      f'{what!r} has {count:,} values, and a sweep at most {MOST:,} runs; did '
      'you mean so many? Divide it into several sweeps then'
    )


def _unquoted(text):
  quoted = len(text) > 1 and text[0] == text[-1] and text[0] in '\'"'
  return text[1:-1] if quoted else text


def grid(items: Iterable[str]) -> Iterator[dict]:
  """Yields the cells of all combinations, the last key fastest."""
  items = list(items)
  axes = [values(item) for item in items]
  keys = [key for key, _ in axes]
  for key in keys:
    if keys.count(key) > 1:
      raise ValueError(f'--grid has {key!r} twice')
  _check_count(' '.join(items), math.prod(len(found) for _, found in axes))
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


def plan(
  config: str, items: Sequence[str], shared: Sequence[str], root: str
) -> list[Run]:
  """Returns the runs of a sweep, checked: main takes all of their flags.

  Args:
    config: a file, without arguments.
    items: of --grid; without any the file's `sweep()` says what the cells are.
    shared: of --set.
    root: the folder of all sweeps.

  Raises:
    ValueError: something is unknown or double; says what, and what exists.
  """
  try:
    defined = configs.read_file(config)
  except ValueError as error:
    hint = '; its arguments go into --grid or --set' if ':' in config else ''
    raise ValueError(f'{error}{hint}') from error
  if not items and 'sweep' not in defined:
    raise ValueError(
      f'{config} has no sweep() that says what its grid is; give one, such as '
      '--grid seed=0:5'
    )
  extra, runs = common(shared), []
  cells = grid(items) if items else defined['sweep']()
  for cell in cells:
    if len(runs) == MOST:
      raise ValueError(f'the sweep() of {config} has more than {MOST:,} cells')
    if double := sorted(cell.keys() & extra.keys()):
      raise ValueError(f'--set has {", ".join(double)}, which the grid has too')
    runs.append(_run(config, {**cell, **extra}, root))
  if not runs:
    raise ValueError(f'the sweep() of {config} is empty')
  for name, count in collections.Counter(run.name for run in runs).items():
    if count > 1:
      raise ValueError(f'{count} cells of the grid have the name {name}')
  for run in runs:
    _check_folder(run, check(defined['get_config'], run))
  return runs


def _check_folder(run, config):
  """Raises ValueError where a run's folder holds a run of another config."""
  # Names do not say all of a cell, and a config's file may have changed.
  path = run.folder / 'config.json'
  if not path.is_file():
    return
  if differ := configs.differences(configs.saved(path), config):
    raise ValueError(
      f'{run.folder} holds a run of another config; give another --root, or '
      f'remove that folder. It differs in: {"; ".join(differ)}'
    )


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
      first, _, rest = key.partition('.')
      if first != 'config':
        raise ValueError(
          f'no config argument {key!r}; the keys of a config are written '
          f'config.{key}'
        )
      configs.check_key(config, configs.renamed(rest))
    # Types of values are checked by what will read them.
    line = ['sweep', *configs.check_flags(run.flags[2:])]
    reader = flags.FlagValues()
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=reader, sys_argv=line
    )
    reader(line)
    return config
  except (ValueError, TypeError, flags.Error) as error:
    said = ' '.join(str(error).split())
    raise ValueError(f'{said} (in the cell {run.name})') from error
