"""What runs lack, and the commands that fill it."""

import collections
import itertools
import pathlib
import re
import shlex
from collections.abc import Iterator

from launch import paper as paper_lib
from launch import plan, results
from launch.results import Run, todays


def _argument(key, value):
  """A key of a config and its value, as what follows the colon has them."""
  if key == 'system':
    recipe = value in results.RECIPES
    return 'recipe' if recipe else 'method', value.removesuffix('fss')
  short = {'support.shots': 'shots', 'model.backbone.name': 'backbone'}
  return short.get(key, key.removeprefix('data.args.')), value


def _arguments(run):
  """What may follow the colon to give this run, as far as its config knows."""
  config, taken = run.config, {}
  keys = ['system', 'support.shots', 'model.backbone.name']
  keys += ['student'] if config['student'] != 'full' else []
  keys += [key for key in config if key.startswith('data.args.')]
  for key in [*keys, 'seed']:
    if type(config[key]) in (str, int):
      value = run.kind[0] if key == 'system' else config[key]
      name, value = _argument(key, value)
      if todays(config['name'], f'{name}={value}'):
        taken[name] = value
  return taken


def cell_of(run: Run) -> dict | None:
  """The cell of a sweep that is this run; None if no command gives it.

  Keys come in the order that the folder's name has, where a sweep named it.
  """
  arguments, found = _arguments(run), []
  for cell in (arguments, arguments | {'smoke': True}):
    base = todays(run.config['name'], plan.arguments(cell))
    if base and run.config.keys() <= base.keys():
      changed = [k for k, v in base.items() if run.config.get(k, v) != v]
      found.append(cell | {f'config.{k}': run.config[k] for k in changed})
  if not found:
    return None
  cell = min(found, key=lambda cell: sum('.' in key for key in cell))
  named = re.findall(r'(?:^|,)([\w.]+)(?==|,|$)', run.folder.name)
  named = [key if key in cell else f'config.{key}' for key in named]
  return {key: cell[key] for key in named if key in cell} | cell


def fill(run: Run, changes: dict) -> dict | None:
  """The cell of a run like this one, with other values of some config keys.

  None where there is none: its config does not take them.
  """
  config, cell = {**run.config, 'system': run.kind[0]}, cell_of(run)
  if cell is None:
    return None
  changes = {k: v for k, v in changes.items() if v != config[k]}
  if changes.keys() & {'system', 'model.backbone.name'}:
    # Weights and fields of one backbone do not fit another.
    own = 'config.model.init', 'config.model.backbone'
    cell = {k: v for k, v in cell.items() if not k.startswith(own)}
  for key, value in changes.items():
    name, given = _argument(key, value)
    if name in cell or name == 'student':
      cell[name] = given
    else:
      cell[f'config.{key}'] = value
  if cell.get('student') == 'full':
    del cell['student']
  base = todays(config['name'], plan.arguments(cell)) or {}
  made = base | {k.removeprefix('config.'): cell[k] for k in cell if '.' in k}
  wanted = {key: config[key] for key in results.NEEDED} | changes
  accepted = made.keys() == base.keys()
  if made:
    made['system'] = results.kind_of(made)[0]
  return cell if accepted and wanted.items() <= made.items() else None


def command(stem: str, cell: dict, folder: pathlib.Path) -> str:
  """The command line that runs a cell in a folder."""
  cell = {k: tuple(v) if isinstance(v, list) else v for k, v in cell.items()}
  flags = plan.flags_of(f'configs/{stem}.py', cell)
  main = 'python', '-m', 'distillfss_jax.main'
  return shlex.join([*main, *flags, '--workdir', str(folder)])


def _like(run, changes, root):
  """The command of a run like this one; '' if its config takes no such one.

  Without changes it is the run itself, which goes on.
  """
  cell, stem, folder = fill(run, changes), run.config['name'], run.folder
  if cell is None:
    return ''
  if changes:
    home = folder.parent if folder.parent.name == stem else root / stem
    folder = home / plan.name_of(cell)
  return command(stem, cell, folder)


def holes(
  runs: list[Run], unfinished: list[Run], root: pathlib.Path
) -> Iterator[tuple[str, str]]:
  """Yields what the rectangle of the runs lacks: (what, command) each.

  Its sides are the datasets, methods and backbones of all runs, and the shots
  and draws of a dataset. What a config does not take is no hole; a run of
  any settings fills one.
  """
  sides = {run.place[:2] for run in runs if _takes_method(run)}
  for dataset in sorted({run.dataset for run in runs}):
    mine = [run for run in runs if run.dataset == dataset]
    there = {run.place for run in mine}
    started = {run.place: run for run in unfinished if run.dataset == dataset}
    for place, like in _places(mine, sides):
      if place not in there:
        yield from _hole(place, like, started.get(place), root)


def _takes_method(run):
  return todays(run.config['name'], 'method=distill')


def _places(runs, sides):
  """Yields the places of a dataset's rectangle, and the likest run of each."""
  pairs = {run.place[:2] for run in runs}
  # One that takes no method, such as the demo, stands for itself.
  if all(map(_takes_method, runs)):
    pairs |= sides
  kinds, backbones = (sorted(set(x)) for x in zip(*pairs, strict=True))
  shots = sorted({run.shots for run in runs})
  for kind, backbone in itertools.product(kinds, backbones):
    like = _likest(runs, kind, backbone)
    # A support seed means something under its own rule only.
    rule = like.config['support.rule']
    draws = {run.draw for run in runs if run.config['support.rule'] == rule}
    for rest in itertools.product(shots, sorted(draws)):
      yield (kind, backbone, *rest), like


def _likest(runs, kind, backbone):
  """The run whose settings a missing one takes over."""

  def rest(run):
    skipped = (*results.AVERAGED, 'support.shots')
    return repr(sorted(x for x in run.config.items() if x[0] not in skipped))

  def likeness(run):
    return run.backbone == backbone, run.kind == kind, usual[rest(run)]

  usual = collections.Counter(map(rest, runs))
  return max(runs, key=likeness)


def _hole(place, like, started, root):
  """Yields what is missing at a place and its command, if anything is."""
  kind, backbone, shots, (seed, draw) = place
  system, student = kind
  if not (student and like.config['student']):  # one of both has none
    student = like.config['student'] if like.kind[0] == system else 'full'
  changes = {
    'system': system, 'support.shots': shots, 'model.backbone.name': backbone,
    'seed': seed, 'support.seed': draw, 'student': student,
  }  # fmt: skip
  line = _like(started, {}, root) if started else _like(like, changes, root)
  if line or like.place[:2] == place[:2]:
    what = f'{like.dataset}, {results.method(kind)}, {backbone}'
    what += f', {shots} shots' if shots else ''
    what += f', seed {seed}' + (f', support seed {draw}' if draw else '')
    yield what + (', unfinished' if started and line else ''), line


def paper_holes(
  runs: list[Run], unfinished: list[Run], paper: dict, root: pathlib.Path
) -> Iterator[tuple[str, str]]:
  """Yields the paper's cells of DistillFSS and TransferFSS without a run."""
  mine, begun = collections.defaultdict(list), collections.defaultdict(list)
  for run in [*runs, *unfinished]:
    group = begun if run.results is None else mine
    row = results.method(run.kind), run.backbone
    group[paper_lib.dataset_of(run, paper), *row].append(run)
  for dataset, about in paper['datasets'].items():
    for row, cells in paper_lib.published(paper, dataset).items():
      at = dataset, *row
      there = {run.shots for run in mine[at]}
      lacking = [
        x for x in cells if x not in there and row[0] in results.SYSTEMS
      ]
      for shots in lacking:
        started = [run for run in begun[at] if run.shots == shots]
        what = f'{", ".join(at)}, {shots} shots'
        line = _of_paper(at, shots, started, mine[at], about['args'], root)
        yield what + (', unfinished' if started else ''), line


def _of_paper(at, shots, started, mine, args, root):
  """The command of a cell of the paper: like our runs of its row, if any."""
  dataset, method, backbone = at
  line = ''
  if started:
    line = _like(started[0], {}, root)
  elif mine:
    like = _likest(mine, *mine[0].place[:2])
    line = _like(like, {'support.shots': shots}, root)
  # The paper's teachers; from random weights nothing is comparable.
  cell = {
    'method': results.SYSTEMS[method].removesuffix('fss'), 'shots': shots,
    'backbone': backbone, **args, 'config.model.init': f'dcama_{backbone}',
  }  # fmt: skip
  return line or command(dataset, cell, root / dataset / plan.name_of(cell))
