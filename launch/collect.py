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
import os
import pathlib
import sys

from distillfss_jax import config as configs
from distillfss_jax import files
from launch import missing, results, sweep, tables
from launch import paper as paper_lib
from launch.results import Run


def unique(runs: list[Run]) -> tuple[list[Run], list[str]]:
  """Runs without those that repeat another, draw and all; and warnings."""
  kept, warnings = {}, []
  for run in runs:
    first = kept.setdefault(repr(sorted(run.config.items())), run)
    if first is not run:
      warnings.append(
        f'{run.folder} repeats {first.folder}, config and seed: it is left out'
      )
  return list(kept.values()), warnings


def name_datasets(runs: list[Run]) -> None:
  """Names each run's dataset, with what tells it from its like."""
  for name in {run.config['data.name'] for run in runs}:
    alike = [run for run in runs if run.config['data.name'] == name]
    keys = [key for key in _differing(alike) if key.startswith('data.args.')
            and key != 'data.args.data_dir']  # fmt: skip
    for run in alike:
      settings = ' '.join([name, *_settings(run, keys)])
      run.dataset = settings.replace(' data.args.', ' ')


def _differing(runs):
  """The keys, in the config's order, whose values are not all the same."""
  return configs.differing(run.config for run in runs)


def _settings(run, keys):
  return [f'{key}={run.config.get(key, "(absent)")}' for key in keys]


def rows(
  runs: list[Run], size: str, metric: str
) -> tuple[list[tables.Row], list[str], list[str]]:
  """Groups finished runs, without repetitions, into rows.

  Returns:
    Rows, notes on what differs between the cells of a row, and warnings.
  """
  groups, warnings = collections.defaultdict(list), []
  for run in runs:
    try:
      found = results.scores(run, size, metric)
    except ValueError as error:
      warnings.append(f'{error}; it is left out')
      continue
    for role, score in found.items():
      key = run.dataset, results.method(run.kind, role), run.backbone
      groups[key].append((run, score))
  made = [
    tables.Row(*key, settings, cells)
    for key, scored in groups.items()
    for settings, cells in _split(scored).items()
  ]
  notes = [note for row in made for note in _uneven(row)]
  scored = (x for row in made for cell in row.cells.values() for x in cell.runs)
  if any(run.on_tests for run in scored):
    notes.insert(0, tables.ON_TESTS_SAYS)
  made.sort(key=lambda x: (x.dataset, x.backbone, x.method, x.settings))
  return made, notes, warnings


def _split(scored):
  """{settings: cells}, such that runs of a cell differ in draws only."""
  at = collections.defaultdict(list)
  for run, _ in scored:
    at[run.shots].append(run)
  apart = {key for alike in at.values() for key in _differing(alike)}
  apart -= set(results.AVERAGED)
  order = [*scored[0][0].config, *sorted(apart)]  # as in the config
  keys = sorted(apart, key=order.index)
  lines = collections.defaultdict(dict)
  for run, score in sorted(scored, key=lambda x: (x[0].shots, x[0].draw)):
    cells = lines[', '.join(_settings(run, keys))]
    cell = cells.setdefault(run.shots, tables.Cell([], []))
    cell.runs.append(run)
    cell.scores.append(score)
  return lines


def _uneven(row):
  """Notes on keys that are the same in every cell, but not in all of a row."""
  firsts = [cell.runs[0] for cell in row.cells.values()]
  for key in _differing(firsts):
    if key not in (*results.AVERAGED, 'support.shots'):
      values = ', '.join(
        f'{run.config.get(key, "(absent)")} at {run.shots} shots'
        for run in firsts
      )
      name = ' '.join(filter(None, row.label))
      yield f'{name}: {key} differs along the row: {values}'


def collect(
  root: str | os.PathLike,
  *,
  paper: bool = False,
  metric: str = 'miou',
  size: str = 'test',
) -> tuple[tables.Report, list[str]]:
  """Reads the runs below a folder into a report; also gives warnings.

  Raises:
    ValueError: there is no finished run, or none with such a score.
  """
  if paper and metric != 'miou':
    raise ValueError(f'--paper has miou only, got --metric {metric}')
  finished, unfinished, warnings = _read(root)
  made, notes, damaged = rows(finished, size, metric)
  if not made:
    raise ValueError(
      f'none of the {len(finished)} finished runs below {root} has '
      f'{size}/{metric}: {damaged[0]}'
    )
  good = {x for row in made for cell in row.cells.values() for x in cell.runs}
  scored = [run for run in finished if run in good]
  root = pathlib.Path(root)
  if paper:
    book = paper_lib.load()
    made, known = paper_lib.beside(made, scored, book)
    notes = [*paper_lib.notes(book, known, made, size), *notes]
    holes = missing.paper_holes(scored, unfinished, book, root)
  else:
    holes = missing.holes(scored, unfinished, root)
  title = (
    f'{size} {tables.TITLES.get(metric, metric)} in per cent: mean ± standard '
    'deviation over seeds and support draws'
  )
  report = tables.Report(title, made, notes, list(holes), unfinished)
  return report, warnings + damaged


def _read(root):
  """Finished runs, each once, unfinished ones, and warnings."""
  if not pathlib.Path(root).is_dir():
    raise ValueError(f'no folder {root}: give the one that holds the runs')
  finished, unfinished, warnings = results.read(root)
  if not finished:
    raise ValueError(_empty(root, unfinished, warnings))
  finished, repeated = unique(finished)
  name_datasets([*finished, *unfinished])
  return finished, unfinished, warnings + repeated


def _empty(root, unfinished, warnings):
  first = 'python -m distillfss_jax.main --config configs/nucleus.py:shots=5'
  said = f'no finished run below {root}'
  if unfinished:
    folders = ', '.join(str(run.folder) for run in unfinished)
    said += f' ({len(unfinished)} unfinished: {folders})'
  said = '; '.join([said, *warnings])
  return f'{said}; runs are made by: {first} --workdir {root}/nucleus/first'


def _parse(argv):
  parser = sweep.Parser(
    description=__doc__, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  known, add = list(tables.FORMATS), parser.add_argument
  add('folder', help='finds all runs below it')
  add('--paper', action='store_true')
  add('--metric', default='miou')
  # Any that the runs have: results.json lists its evaluations.
  add('--evaluation', '--size', dest='size', default='test')
  add('--out', help='folder for the files')
  add('--format', help=f'some of {",".join(known)}; by default all with --out')
  flags = parser.parse_args(argv)
  default = known if flags.out else known[:1]
  flags.format = flags.format.split(',') if flags.format else default
  if unknown := [name for name in flags.format if name not in known]:
    parser.error(f'no format {unknown[0]!r}; there are: {", ".join(known)}')
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
      file, make = tables.FORMATS[name]
      if flags.out and file:
        files.write_atomically(pathlib.Path(flags.out) / file, make(report))
      else:
        print(make(report), end='')
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
