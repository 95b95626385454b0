r"""Tables of finished runs: mean and spread over seeds and support draws.

    python -m launch.collect runs/
    python -m launch.collect runs/ --paper --out tables
    python -m launch.collect runs/ --metric fb_iou --size test_native

Rows are dataset x method x backbone, columns are shots. A cell is the mean and
the sample standard deviation (n - 1) in per cent, over runs that differ in
nothing but `seed` and `support.seed`; where runs of a cell differ in more, the
row is split and the keys are shown. What is missing is named, with commands.

--out DIR also writes table.md, table.csv (a line per cell, with the folders),
table.tex (needs \usepackage{booktabs}) and scores.png.

--paper sets the published numbers beside, from paper.json. They are no means:
each is the best of a grid, selected on the test set, and is marked so.
"""

import argparse
import collections
import csv
import dataclasses
import decimal
import functools
import importlib
import io
import json
import math
import os
import pathlib
import re
import shlex
import statistics
import sys

from distillfss_jax import files
from launch import sweep

FORMATS = ('terminal', 'markdown', 'csv', 'latex', 'plot')
AVERAGED = ('seed', 'support.seed')
METHODS = {
  ('distillfss', 'student'): 'DistillFSS',
  ('distillfss', 'teacher'): 'DistillFSS teacher',
  ('transferfss', 'teacher'): 'TransferFSS',
}
ARGUMENTS = {'distillfss': 'distill', 'transferfss': 'transfer'}
SYSTEMS = {'DistillFSS': 'distillfss', 'TransferFSS': 'transferfss'}
NEEDED = {
  'name': str, 'system': str, 'student': str, 'seed': int, 'data.name': str,
  'model.backbone.name': str, 'support.shots': int, 'support.rule': str,
  'support.seed': int,
}  # fmt: skip
# Of a run's folder; they are large and hold no runs.
INSIDE = ('checkpoints', 'tensorboard', 'panels')
TITLES = {'miou': 'mIoU', 'fb_iou': 'FB-IoU', 'f1': 'F1'}


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's folder: its config by dotted path; results None if unfinished."""

  folder: pathlib.Path
  config: dict
  results: dict | None

  @property
  def kind(self) -> tuple[str, str]:
    """What is trained: the system, and which student if it has one."""
    distills = self.config['system'] == 'distillfss'
    return self.config['system'], self.config['student'] if distills else ''

  @property
  def draw(self) -> tuple[int, int]:
    """What a mean is taken over."""
    return tuple(self.config[key] for key in AVERAGED)

  def of(self, *keys: str) -> tuple:
    """Values of the config."""
    return tuple(self.config.get(key) for key in keys)


@dataclasses.dataclass(frozen=True)
class Cell:
  """Scores in 0..1 of runs that differ in nothing but their draws."""

  runs: tuple[Run, ...]
  scores: tuple[float, ...]

  @property
  def mean(self) -> float:
    """In per cent."""
    return 100 * statistics.fmean(self.scores)

  @property
  def std(self) -> float | None:
    """In per cent, ddof 1; None for a single run."""
    return 100 * statistics.stdev(self.scores) if len(self.scores) > 1 else None

  def __str__(self):
    spread = '' if self.std is None else f' ± {tenths(self.std)}'
    return f'{tenths(self.mean)}{spread} (n={len(self.scores)})'


@dataclasses.dataclass
class Row:
  """Cells by shots; `settings` are the keys that tell it from its neighbours.

  `paper` marks the published ones, whose cells are `Published`.
  """

  dataset: str
  method: str
  backbone: str
  settings: str
  cells: dict
  paper: bool = False


@dataclasses.dataclass(frozen=True)
class Published:
  """A number of the paper, in per cent, with its marks and its source."""

  score: float
  marks: str
  source: str

  def __str__(self):
    return f'{tenths(self.score)}{self.marks}'


def tenths(value: float) -> str:
  """With one decimal; a half goes up, as people round."""
  # 15.95 is stored as a little less, and would be shown as 15.9.
  number = decimal.Decimal(f'{value:.6f}')
  return str(number.quantize(decimal.Decimal('0.1'), decimal.ROUND_HALF_UP))


# Reading.


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
    if 'config.json' not in names and 'results.json' not in names:
      continue
    try:
      run = load(pathlib.Path(folder))
    except (OSError, ValueError) as error:
      warnings.append(f'{error}; it is left out')
      continue
    if run:
      (unfinished if run.results is None else finished).append(run)
  return finished, unfinished, warnings


def load(folder: pathlib.Path) -> Run | None:
  """Reads a run's folder; None where a config.json is no run's.

  Raises:
    ValueError: something is damaged or of another version.
  """
  done = (folder / 'results.json').exists()
  if not (folder / 'config.json').is_file():
    raise ValueError(f'{folder}/results.json has no config.json beside it')
  config = flat(_object(folder / 'config.json'))
  if not done and 'system' not in config:
    return None  # converted weights also have one
  for key, kind in NEEDED.items():
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
      raise ValueError(
        f'{folder}/config.json is damaged or of another version: {key} is '
        f'{value!r}, not of type {kind.__name__}'
      )
  return Run(folder, config, _object(folder / 'results.json') if done else None)


def _object(path):
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
    if isinstance(value, dict):
      found |= flat(value, f'{path}{key}.')
    else:
      found[path + key] = value
  return found


def scores(run: Run, size: str, metric: str) -> dict[str, float]:
  """The score of each role of a finished run.

  Raises:
    ValueError: the results lack it, or hold no number there.
  """
  name = f'{run.folder}/results.json'
  roles = run.results.get(size)
  if not isinstance(roles, dict) or not roles:
    raise ValueError(f'{name} has no scores under {size!r}')
  found = {}
  for role, values in roles.items():
    value = values.get(metric) if isinstance(values, dict) else None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
      known = ', '.join(k for k, v in values.items() if isinstance(v, float)) \
        if isinstance(values, dict) else 'none'  # fmt: skip
      raise ValueError(
        f'{name}: {size}/{role}/{metric} is {value!r}, not a number; there '
        f'are: {known}'
      )
    found[role] = value
  return found


def unique(runs: list[Run]) -> tuple[list[Run], list[str]]:
  """Runs without those that repeat another, draw and all; and warnings."""
  kept, warnings = {}, []
  for run in runs:
    first = kept.setdefault(_frozen(run.config), run)
    if first is not run:
      warnings.append(
        f'{run.folder} repeats {first.folder}, config and seed: it is left out'
      )
  return list(kept.values()), warnings


def _frozen(value):
  return json.dumps(value, sort_keys=True)


def datasets(runs: list[Run]) -> dict[pathlib.Path, str]:
  """What each run's dataset is called, with what tells it from its like."""
  apart = collections.defaultdict(list)
  for run in runs:
    apart[run.config['data.name']].append(run)
  found = {}
  for name, alike in apart.items():
    keys = [k for k in _differing(alike) if k.startswith('data.args.')]
    keys = [k for k in keys if k != 'data.args.data_dir']
    for run in alike:
      found[run.folder] = ' '.join([name, *_settings(run, keys, 10)])
  return found


def _differing(runs):
  """The keys, in the config's order, whose values are not all the same."""
  keys = dict.fromkeys(key for run in runs for key in run.config)
  return [
    key
    for key in keys
    if len({_frozen(run.config.get(key, '(absent)')) for run in runs}) > 1
  ]


def _settings(run, keys, start=0):
  return [f'{k[start:]}={run.config.get(k, "(absent)")}' for k in keys]


# Grouping.


def rows(
  runs: list[Run], names: dict[pathlib.Path, str], size: str, metric: str
) -> tuple[list[Row], list[str], list[str]]:
  """Groups finished runs into rows.

  Args:
    runs: without repetitions.
    names: of their datasets, by folder.
    size, metric: which score.

  Returns:
    Rows, notes on what differs between the cells of a row, and warnings.
  """
  groups, warnings = collections.defaultdict(list), []
  for run in runs:
    try:
      found = scores(run, size, metric)
    except ValueError as error:
      warnings.append(f'{error}; it is left out')
      continue
    for role, score in found.items():
      key = (names[run.folder], _method(run, role), *_backbone(run))
      groups[key].append((run, score))
  made, notes = [], []
  for (dataset, method, backbone), scored in groups.items():
    for settings, cells in _split(scored):
      row = Row(dataset, method, backbone, settings, cells)
      made.append(row)
      notes += _uneven(row)
  made.sort(key=_order)
  return made, notes, warnings


def _backbone(run):
  return run.of('model.backbone.name')


def _method(run, role):
  system, student = run.kind
  name = METHODS.get((system, role), f'{system} {role}')
  if student in ('', 'full'):
    return name
  first, _, rest = name.partition(' ')
  return f'{first} ({student}) {rest}'.strip()


def _order(row):
  place = [*METHODS.values()]
  first = row.method.partition(' (')[0]
  known = place.index(first) if first in place else len(place)
  return row.dataset, row.backbone, known, row.method, row.settings


def _split(scored):
  """Yields (settings, cells) such that runs of a cell differ in draws only."""
  at = collections.defaultdict(list)
  for run, score in scored:
    at[run.config['support.shots']].append((run, score))
  keys = {k for v in at.values() for k in _differing([run for run, _ in v])}
  keys = [k for k in scored[0][0].config if k in keys] + sorted(
    keys - scored[0][0].config.keys()
  )
  keys = [k for k in keys if k not in AVERAGED]
  lines = collections.defaultdict(lambda: collections.defaultdict(list))
  for shots, alike in sorted(at.items()):
    for run, score in sorted(alike, key=lambda x: x[0].draw):
      lines[', '.join(_settings(run, keys))][shots].append((run, score))
  for settings, cells in lines.items():
    yield (
      settings,
      {
        shots: Cell(*map(tuple, zip(*alike, strict=True)))
        for shots, alike in cells.items()
      },
    )


def _uneven(row):
  """Notes on keys that are the same in every cell, but not in all of a row."""
  firsts = [cell.runs[0] for cell in row.cells.values()]
  skipped = (*AVERAGED, 'support.shots')
  for key in _differing(firsts):
    if key not in skipped:
      values = ', '.join(
        f'{run.config.get(key, "(absent)")} at {shots} shots'
        for shots, run in zip(row.cells, firsts, strict=True)
      )
      name = ' '.join(filter(None, _label(row)))
      yield f'{name}: {key} differs along the row: {values}'


def _label(row):
  return row.dataset, row.method, row.backbone, row.settings


# The paper.


def load_paper() -> dict:
  """The published tables; see `about` in the file."""
  path = pathlib.Path(__file__).with_name('paper.json')
  return json.loads(path.read_text())


def published(paper: dict, dataset: str) -> dict[tuple[str, str], dict]:
  """{(method, backbone): {shots: Published}} of a dataset.

  Where tables repeat a cell the first one counts: the README, the project
  page, then the notebook, which is older.
  """
  counted = '†' if paper['datasets'][dataset]['counted'] else ''
  found = {}
  for table in paper['tables']:
    old = '‡' if table['source'] == 'notebook' else ''
    for row in table['rows']:
      if row['dataset'] != dataset:
        continue
      cells = found.setdefault((row['method'], row['backbone']), {})
      for shots, score in zip(row['shots'], row['scores'], strict=True):
        if score is not None:
          marks = f'*{counted}{old}'
          cells.setdefault(shots, Published(score, marks, table['source']))
  return {
    key: dict(sorted(cells.items())) for key, cells in sorted(found.items())
  }


def of_paper(run: Run, paper: dict) -> str:
  """The name in the paper of a run's dataset, or nothing."""
  name = run.config['data.name']
  args = paper['datasets'].get(name, {'args': None})['args']
  if args is None:
    return ''
  same = all(run.config.get(f'data.args.{k}') == v for k, v in args.items())
  return name if same else ''


def beside(
  made: list[Row], runs: list[Run], names: dict, paper: dict
) -> tuple[list[Row], list[str]]:
  """Rows with the paper's in between, and the paper's datasets among them."""
  known = {
    names[run.folder]: of_paper(run, paper)
    for run in runs
    if of_paper(run, paper)
  }
  result = []
  for dataset in dict.fromkeys(row.dataset for row in made):
    mine = [row for row in made if row.dataset == dataset]
    theirs = published(paper, known[dataset]) if dataset in known else {}
    for i, row in enumerate(mine):
      result.append(row)
      key = row.method, row.backbone
      last = key not in [(x.method, x.backbone) for x in mine[i + 1 :]]
      if last and key in theirs:
        result.append(_of_paper(dataset, key, theirs.pop(key)))
    result += [_of_paper(dataset, key, x) for key, x in theirs.items()]
  shown = {row.dataset for row in made}
  return result, sorted({v for k, v in known.items() if k in shown})


def _of_paper(dataset, key, cells):
  method, backbone = key
  return Row(dataset, f'{method}, paper', backbone, '', cells, paper=True)


def paper_notes(
  paper: dict, known: list[str], made: list[Row], size: str
) -> list[str]:
  """What has to be said below a table that holds the paper's numbers."""
  marks = ''.join(
    str(cell.marks) for row in made if row.paper for cell in row.cells.values()
  )
  notes = [
    '* the paper: the best of a grid (settings and unseeded repetitions), '
    'selected on the test set; not comparable with a mean over seeds'
  ]
  if '†' in marks:
    counted = [f'{k}: {paper["datasets"][k]["counted"]}' for k in known
               if paper['datasets'][k]['counted']]  # fmt: skip
    notes.append(f'† shots are counted otherwise there: {"; ".join(counted)}')
  if '‡' in marks:
    source = next(t for t in paper['tables'] if t['source'] == 'notebook')
    notes.append(f'‡ from {source["from"]}')
  for name in known:
    its = paper['datasets'][name]['size']
    if its != size:
      notes.append(f'{name}: the paper scores as --size {its}, this is {size}')
  return notes


# What is missing.


@functools.cache
def get_config(stem: str, arg: str) -> dict:
  """A config by its file's stem, as a flat dict.

  Raises:
    ValueError: the file does not know the argument.
    ImportError: there is no such file.
  """
  if not re.fullmatch(r'\w+', stem):
    raise ImportError(f'{stem!r} is no config of configs/')
  config = importlib.import_module(f'configs.{stem}').get_config(arg)
  return flat(json.loads(config.to_json_best_effort()))


def _arguments(run):
  """What may follow the colon to give this run, as far as its config knows."""
  config = run.config
  wanted = {
    'method': ARGUMENTS.get(config['system']),
    'shots': config['support.shots'],
    'backbone': config['model.backbone.name'],
    'student': config['student'] if config['student'] != 'full' else None,
    **{k[10:]: v for k, v in config.items() if k.startswith('data.args.')},
    'seed': config['seed'],
  }
  taken = {}
  for key, value in wanted.items():
    if isinstance(value, str | int) and not isinstance(value, bool):
      try:
        get_config(config['name'], f'{key}={value}')
      except (ValueError, TypeError):
        continue
      taken[key] = value
  return taken


def _join(arguments):
  return ','.join(
    key if value is True else f'{key}={value}'
    for key, value in arguments.items()
  )


def cell_of(run: Run) -> dict | None:
  """The cell of a sweep that is this run; None if no command gives it.

  Keys come in the order that the folder's name has, where a sweep named it.
  """
  stem = run.config['name']
  best = None
  try:
    plain = _arguments(run)
    for more in ({}, {'smoke': True}):
      arguments = plain | more
      try:
        base = get_config(stem, _join(arguments))
      except ValueError:
        continue
      if run.config.keys() - base.keys():
        continue
      changed = {
        f'config.{key}': value
        for key, value in base.items()
        if run.config.get(key, value) != value
      }
      changed = {k: run.config[k[7:]] for k in changed}
      if best is None or len(changed) < len(best[1]):
        best = arguments, changed
  except ImportError:
    return None
  if best is None:
    return None
  cell = best[0] | best[1]
  named = re.findall(r'(?:^|,)([\w.]+)(?==|,|$)', run.folder.name)
  named = [k if k in cell else f'config.{k}' for k in named]
  first = {key: cell[key] for key in named if key in cell}
  return first | cell


def fill(run: Run, changes: dict) -> dict | None:
  """The cell of a run like this one, with other values of some config keys.

  None where there is none: its config does not take them.
  """
  cell = cell_of(run)
  if cell is None:
    return None
  config, stem = run.config, run.config['name']
  if any(changes.get(k, config[k]) != config[k] for k in
         ('system', 'model.backbone.name')):  # fmt: skip
    # Weights and fields of one backbone do not fit another.
    cell = {
      k: v for k, v in cell.items()
      if not k.startswith(('config.model.init', 'config.model.backbone'))
    }  # fmt: skip
  short = {
    'system': 'method', 'student': 'student', 'support.shots': 'shots',
    'model.backbone.name': 'backbone', 'seed': 'seed',
  }  # fmt: skip
  for key, value in changes.items():
    name = short.get(key, key)
    if name in cell:
      cell[name] = ARGUMENTS.get(value, value) if key == 'system' else value
    elif value != config.get(key) and key == 'student':
      cell['student'] = value
    elif value != config.get(key):
      cell[f'config.{key}'] = value
  if cell.get('student') == 'full':
    del cell['student']
  wanted = {k: config[k] for k in NEEDED} | changes
  return cell if _gives(stem, cell, wanted) else None


def _gives(stem, cell, wanted):
  """Whether a cell's command is accepted and gives what is wanted."""
  plain = {k: v for k, v in cell.items() if '.' not in k}
  try:
    config = get_config(stem, _join(plain))
  except (ValueError, ImportError):
    return False
  changed = {k[7:]: v for k, v in cell.items() if k.startswith('config.')}
  if changed.keys() - config.keys():
    return False
  config = config | changed
  return all(config[k] == v for k, v in wanted.items())


def workdir(root: str | os.PathLike, stem: str, cell: dict) -> pathlib.Path:
  """The folder a sweep gives to a cell."""
  return pathlib.Path(root) / stem / sweep.name_of(cell)


def command(stem: str, cell: dict, folder: str | os.PathLike) -> str:
  """The command line that runs a cell in a folder."""
  plain = {k: v for k, v in cell.items() if '.' not in k}
  words = ['python', '-m', 'distillfss_jax.main', '--config']
  words.append(f'configs/{stem}.py' + (f':{_join(plain)}' if plain else ''))
  for key, value in cell.items():
    if key.startswith('config.'):
      value = tuple(value) if isinstance(value, list) else value
      words.append(f'--{key}={value}')
  return shlex.join([*words, '--workdir', str(folder)])


def _home(run, root):
  """Where the sweep of a run has its folders."""
  if run.folder.parent.name == run.config['name']:
    return run.folder.parent.parent
  return pathlib.Path(root)


def holes(
  runs: list[Run], unfinished: list[Run], names: dict, root: str | os.PathLike
) -> list[tuple[str, str]]:
  """What the rectangle of the runs lacks: (what, command) each.

  Its sides are the datasets, methods and backbones of all runs, and the shots
  and draws of a dataset. What a config does not take is no hole; a run of
  any settings fills one.
  """
  found = []
  sides = {(run.kind, *_backbone(run)) for run in runs if _takes_method(run)}
  for dataset in sorted({names[run.folder] for run in runs}):
    mine = [run for run in runs if names[run.folder] == dataset]
    begun = [run for run in unfinished if names[run.folder] == dataset]
    there = {_place(run) for run in mine}
    started = {_place(run): run for run in begun}
    own = {(run.kind, *_backbone(run)) for run in mine}
    # One that takes no method, such as the demo, stands for itself.
    pairs = own | sides if all(map(_takes_method, mine)) else own
    kinds = sorted({kind for kind, _ in pairs})
    for kind in kinds:
      for backbone in sorted({backbone for _, backbone in pairs}):
        like = _likest(mine, kind, backbone)
        for place in _places(mine, kind, backbone, like):
          if place not in there:
            found += _hole(dataset, place, like, started.get(place), root)
  return found


def _takes_method(run):
  try:
    get_config(run.config['name'], 'method=distill')
  except (ValueError, ImportError):
    return False
  return True


def _place(run):
  return (
    run.kind, run.config['model.backbone.name'], run.config['support.shots'],
    run.draw,
  )  # fmt: skip


def _places(runs, kind, backbone, like):
  # A support seed means something under its own rule only.
  rule = like.of('support.rule')
  draws = sorted({x.draw for x in runs if x.of('support.rule') == rule})
  for shots in sorted({run.config['support.shots'] for run in runs}):
    for draw in draws:
      yield kind, backbone, shots, draw


def _likest(runs, kind, backbone):
  """The run whose settings a missing one takes over."""

  def rest(run):
    skipped = (*AVERAGED, 'support.shots')
    return _frozen({k: v for k, v in run.config.items() if k not in skipped})

  usual = collections.Counter(map(rest, runs))

  def likeness(run):
    same = run.kind == kind, run.config['model.backbone.name'] == backbone
    return all(same), same[1], same[0], usual[rest(run)]

  return max(runs, key=likeness)


def _hole(dataset, place, like, started, root):
  (system, student), backbone, shots, (seed, draw) = place
  changes = {
    'system': system, 'support.shots': shots, 'model.backbone.name': backbone,
    'seed': seed, 'support.seed': draw,
  }  # fmt: skip
  changes['student'] = student or 'full'
  if like.kind[0] == system and not student:
    changes['student'] = like.config['student']
  stem = like.config['name']
  cell = cell_of(started) if started else fill(like, changes)
  if cell is None:
    if like.kind == place[0] and _backbone(like) == (backbone,):
      yield _what(dataset, place), ''
    return
  folder = started.folder if started else workdir(_home(like, root), stem, cell)
  what = _what(dataset, place) + (', unfinished' if started else '')
  yield what, command(stem, cell, folder)


def _what(dataset, place):
  (system, student), backbone, shots, (seed, draw) = place
  name = next((m for (s, _), m in METHODS.items() if s == system), system) + (
    f' ({student})' if student not in ('', 'full') else ''
  )
  drawn = f', support seed {draw}' if draw else ''
  return f'{dataset}, {name}, {backbone}, {shots} shots, seed {seed}{drawn}'


def paper_holes(
  runs: list[Run], unfinished: list[Run], paper: dict, root: str | os.PathLike
) -> list[tuple[str, str]]:
  """The paper's cells of DistillFSS and TransferFSS without a run."""
  found = []
  for dataset, about in paper['datasets'].items():
    mine = [run for run in runs if of_paper(run, paper) == dataset]
    begun = [run for run in unfinished if of_paper(run, paper) == dataset]
    for (method, backbone), cells in published(paper, dataset).items():
      if method not in SYSTEMS:
        continue
      kind = SYSTEMS[method], 'full' if method == 'DistillFSS' else ''
      for shots in cells:
        key = kind, backbone, shots
        if any(_place(run)[:3] == key for run in mine):
          continue
        started = next((x for x in begun if _place(x)[:3] == key), None)
        what = f'{dataset}, {method}, {backbone}, {shots} shots'
        found.append(_of_the_paper(what, key, about, mine, started, root))
  return found


def _of_the_paper(what, key, about, mine, started, root):
  """A cell of the paper and its command: like our runs of the row, if any."""
  kind, backbone, shots = key
  stem, cell = what.partition(',')[0], None
  like = [run for run in mine if _place(run)[:2] == key[:2]]
  if started:
    cell, folder = cell_of(started), started.folder
    what, stem = f'{what}, unfinished', started.config['name']
  elif like:
    like = _likest(like, kind, backbone)
    stem, cell = like.config['name'], fill(like, {'support.shots': shots})
    root = _home(like, root)
  if cell is None:
    # The paper's teachers; from random weights nothing is comparable.
    method = ARGUMENTS[kind[0]]
    cell = {
      'method': method, 'shots': shots, 'backbone': backbone, **about['args'],
      'config.model.init': f'dcama_{backbone}',
    }  # fmt: skip
  if not started:
    folder = workdir(root, stem, cell)
  return what, command(stem, cell, folder)


# Showing.


@dataclasses.dataclass(frozen=True)
class Report:
  """What is shown, in whatever form."""

  title: str
  rows: list[Row]
  notes: list[str]
  missing: list[tuple[str, str]]
  unfinished: list[Run]

  @property
  def shots(self) -> list[int]:
    """The columns."""
    return sorted({shots for row in self.rows for shots in row.cells})

  def table(self) -> tuple[list[str], list[list[str]], int]:
    """Header, cells, and how many columns are text."""
    split = any(row.settings for row in self.rows)
    header = ['dataset', 'method', 'backbone', *(['settings'] if split else [])]
    lines = []
    for row in self.rows:
      line = [row.dataset, row.method, row.backbone or '-']
      line += [row.settings or '-'] if split else []
      line += [str(row.cells.get(shots, '-')) for shots in self.shots]
      lines.append(line)
    return [*header, *(f'{x} shots' for x in self.shots)], lines, len(header)


def aligned(header: list[str], lines: list[list[str]], left: int) -> str:
  """A table for the terminal; columns from `left` on to the right."""
  # report.table sets texts to the left, and takes a second to import.
  widths = [
    max(map(len, column)) for column in zip(header, *lines, strict=True)
  ]
  dashes = ['-' * width for width in widths]
  return '\n'.join(
    '  '.join(
      text.ljust(width) if i < left else text.rjust(width)
      for i, (text, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in [header, dashes, *lines]
  )


def terminal(report: Report) -> str:
  """The report as text."""
  parts = [report.title, '', aligned(*report.table()), *report.notes]
  if report.unfinished:
    parts.append(f'\nunfinished: {len(report.unfinished)}')
    parts += [f'  {run.folder}' for run in report.unfinished]
  if report.missing:
    parts.append(f'\nmissing: {len(report.missing)}')
    for what, line in report.missing:
      parts += [what, f'  {line or "(no command: its config is not known)"}']
  return '\n'.join(parts) + '\n'


def markdown(report: Report) -> str:
  """The report as Markdown."""
  header, lines, left = report.table()
  rule = ['---' if i < left else '---:' for i in range(len(header))]
  lines = [[_escaped(x) for x in line] for line in lines]
  parts = [report.title, '']
  parts += ['| ' + ' | '.join(x) + ' |' for x in (header, rule, *lines)]
  for note in report.notes:
    parts += ['', _escaped(note)]
  if report.unfinished:
    parts += ['', f'Unfinished: {len(report.unfinished)}', '']
    parts += [f'- `{run.folder}`' for run in report.unfinished]
  if report.missing:
    parts += ['', f'Missing: {len(report.missing)}', '', '```bash']
    for what, line in report.missing:
      parts += [f'# {what}', *([line] if line else [])]
    parts.append('```')
  return '\n'.join(parts) + '\n'


def _escaped(text):
  return re.sub(r'([|*_])', r'\\\1', text)


def as_csv(report: Report) -> str:
  """A line per cell, in per cent; the paper's have no runs."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(
    ['dataset', 'method', 'backbone', 'settings', 'shots', 'n', 'mean', 'std',
     'seeds', 'support_seeds', 'folders', 'paper', 'paper_marks', 'paper_from']
  )  # fmt: skip
  for row in report.rows:
    for shots, cell in row.cells.items():
      line = [*_label(row), shots]
      if row.paper:
        line += [0, '', '', '', '', '', cell.score, cell.marks, cell.source]
      else:
        std = '' if cell.std is None else f'{cell.std:.4f}'
        seeds, drawn = zip(*(run.draw for run in cell.runs), strict=True)
        line += [
          len(cell.runs), f'{cell.mean:.4f}', std, ' '.join(map(str, seeds)),
          ' '.join(map(str, drawn)), ';'.join(str(x.folder) for x in cell.runs),
          '', '', '',
        ]  # fmt: skip
      writer.writerow(line)
  return out.getvalue()


LATEX = str.maketrans({
  '\\': r'\textbackslash{}', '&': r'\&', '%': r'\%', '$': r'\$', '#': r'\#',
  '_': r'\_', '{': r'\{', '}': r'\}', '~': r'\textasciitilde{}',
  '^': r'\textasciicircum{}', '±': r'$\pm$', '†': r'$^\dagger$',
  '‡': r'$^\ddagger$', '<': r'$<$', '>': r'$>$', '|': r'$|$',
})  # fmt: skip


def latex(report: Report) -> str:
  """The table for a paper that uses booktabs."""
  header, lines, left = report.table()
  columns = 'l' * left + 'r' * (len(header) - left)
  parts = [rf'\begin{{tabular}}{{{columns}}}', r'\toprule']
  body = [' & '.join(x.translate(LATEX) for x in y) for y in (header, *lines)]
  parts += [rf'{body[0]} \\', r'\midrule']
  parts += [rf'{line} \\' for line in body[1:]]
  parts += [r'\bottomrule', r'\end{tabular}']
  for note in (report.title, *report.notes):
    parts.append(rf'\par{{\footnotesize {note.translate(LATEX)}}}')
  return '\n'.join(parts) + '\n'


def plot(report: Report) -> bytes:
  """A PNG: score against shots, a panel per dataset, the paper's dashed."""
  from matplotlib.figure import Figure  # slow to import, seldom needed

  panels = list(dict.fromkeys(row.dataset for row in report.rows))
  across = min(len(panels), 3)
  down = -(-len(panels) // across)
  figure = Figure(
    figsize=(7 * across, 4.6 * down), dpi=110, layout='constrained'
  )
  plots = figure.subplots(down, across, squeeze=False).ravel()
  for axes in plots[len(panels) :]:
    axes.set_axis_off()
  for axes, dataset in zip(plots, panels, strict=False):
    colours = {}
    mine = [row for row in report.rows if row.dataset == dataset]
    for row in mine:
      _draw(axes, row, colours)
    ticks = sorted({shots for row in mine for shots in row.cells})
    axes.set_xscale('log')
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_title(dataset)
    axes.set_xlabel('shots')
    axes.set_ylabel('per cent')
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc=(1.01, 0.1))
  notes = [x for x in report.notes if x[0] in '*†‡']
  figure.suptitle('\n'.join([report.title, *notes]), fontsize=8, wrap=True)
  out = io.BytesIO()
  figure.savefig(out, format='png')
  return out.getvalue()


def _draw(axes, row, colours):
  """A line; the paper's takes the colour of ours, and is grey without."""
  name = ' '.join(filter(None, _label(row)[1:]))
  key = row.method.removesuffix(', paper'), row.backbone
  shots = list(row.cells)
  if row.paper:
    mine = colours.get(key)
    marker = '.' if mine else 'ox+*sd|_^v'[len(axes.lines) % 10]
    axes.plot(
      shots, [x.score for x in row.cells.values()], '--', marker=marker,
      color=mine or '0.7', label=name, linewidth=1, zorder=1,
    )  # fmt: skip
    return
  place = len(axes.containers)
  colour = f'C{place % 10}'
  colours[key] = colour
  cells = row.cells.values()
  axes.errorbar(
    shots, [x.mean for x in cells], [x.std or 0 for x in cells],
    marker='osD^v<>'[place % 7], color=colour, capsize=3, label=name,
  )  # fmt: skip


WRITTEN = {
  'markdown': ('table.md', markdown),
  'csv': ('table.csv', as_csv),
  'latex': ('table.tex', latex),
  'plot': ('scores.png', plot),
}


def collect(
  root: str | os.PathLike,
  *,
  paper: bool = False,
  metric: str = 'miou',
  size: str = 'test',
) -> tuple[Report, list[str]]:
  """Reads the runs below a folder into a report; also gives warnings.

  Raises:
    ValueError: there is no finished run, or none with such a score.
  """
  if not pathlib.Path(root).is_dir():
    raise ValueError(f'no folder {root}: give the one that holds the runs')
  if paper and metric != 'miou':
    raise ValueError(f'--paper has miou only, got --metric {metric}')
  finished, unfinished, warnings = read(root)
  if not finished:
    raise ValueError(_empty(root, unfinished, warnings))
  finished, repeated = unique(finished)
  names = datasets([*finished, *unfinished])
  made, notes, damaged = rows(finished, names, size, metric)
  warnings += repeated + damaged
  if not made:
    raise ValueError(
      f'none of the {len(finished)} finished runs below {root} has '
      f'{size}/{metric}: {damaged[0]}'
    )
  good = {r.folder for x in made for c in x.cells.values() for r in c.runs}
  scored = [run for run in finished if run.folder in good]
  if paper:
    tables = load_paper()
    made, known = beside(made, scored, names, tables)
    notes = paper_notes(tables, known, made, size) + notes
    missing = paper_holes(scored, unfinished, tables, root)
  else:
    missing = holes(scored, unfinished, names, root)
  title = (
    f'{size} {TITLES.get(metric, metric)} in per cent: mean ± standard '
    'deviation over seeds and support draws'
  )
  return Report(title, made, notes, missing, unfinished), warnings


def _empty(root, unfinished, warnings):
  first = 'python -m distillfss_jax.main --config configs/nucleus.py:shots=5'
  said = f'no finished run below {root}'
  if unfinished:
    said += f' ({len(unfinished)} unfinished: '
    said += f'{", ".join(str(run.folder) for run in unfinished)})'
  said += ''.join(f'; {warning}' for warning in warnings)
  return f'{said}; runs are made by: {first} --workdir {root}/nucleus/first'


class Parser(argparse.ArgumentParser):
  """Arguments whose errors are one line."""

  def error(self, message):
    """Ends the program."""
    sys.exit(f'error: {message}; see --help')


def _parse(argv):
  parser = Parser(
    description=__doc__, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument('folder', help='finds all runs below it')
  parser.add_argument('--paper', action='store_true')
  parser.add_argument('--metric', default='miou')
  parser.add_argument('--size', default='test', choices=('test', 'test_native'))
  parser.add_argument('--out', help='folder for the files')
  parser.add_argument(
    '--format', help=f'some of {",".join(FORMATS)}; by default all with --out'
  )
  flags = parser.parse_args(argv)
  default = FORMATS if flags.out else FORMATS[:1]
  flags.format = flags.format.split(',') if flags.format else default
  if unknown := [x for x in flags.format if x not in FORMATS]:
    parser.error(f'no format {unknown[0]!r}; there are: {", ".join(FORMATS)}')
  if 'plot' in flags.format and not flags.out:
    parser.error('--format plot needs --out, a folder for the picture')
  return flags


def main(argv: list[str] | None = None) -> None:
  """The command line."""
  flags = _parse(argv)
  for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors='replace')  # terminals without ±
  try:
    report, warnings = collect(
      flags.folder, paper=flags.paper, metric=flags.metric, size=flags.size
    )
    for warning in warnings:
      print(f'warning: {warning}', file=sys.stderr)
    for name in flags.format:
      if name == 'terminal':
        print(terminal(report), end='')
        continue
      file, make = WRITTEN[name]
      if flags.out:
        files.write_atomically(pathlib.Path(flags.out) / file, make(report))
      else:
        print(make(report), end='')
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
