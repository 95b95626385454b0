"""The published numbers, and how they stand beside ours."""

import itertools
import json
import pathlib
from collections.abc import Iterator

from launch import tables
from launch.results import Run


def load() -> dict:
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
    marks = f'*{counted}' + ('‡' if table['source'] == 'notebook' else '')
    for row in [row for row in table['rows'] if row['dataset'] == dataset]:
      cells = found.setdefault((row['method'], row['backbone']), {})
      for shots, score in zip(row['shots'], row['scores'], strict=True):
        if score is not None:
          cell = tables.Published(score, marks, table['source'])
          cells.setdefault(shots, cell)
  return {row: dict(sorted(found[row].items())) for row in sorted(found)}


def dataset_of(run: Run, paper: dict) -> str:
  """The name in the paper of a run's dataset, or nothing."""
  for name, about in paper['datasets'].items():
    args = {f'data.args.{key}': value for key, value in about['args'].items()}
    if {'data.name': name, **args}.items() <= run.config.items():
      return name
  return ''


def beside(
  rows: list[tables.Row], runs: list[Run], paper: dict
) -> tuple[list[tables.Row], list[str]]:
  """Rows with the paper's in between, and the paper's datasets among them."""
  names = {run.dataset: dataset_of(run, paper) for run in runs}
  found = []
  for dataset, mine in itertools.groupby(rows, lambda row: row.dataset):
    theirs = {}
    if names[dataset]:
      theirs = _rows(dataset, published(paper, names[dataset]))
    for row, alike in itertools.groupby(mine, lambda row: row.label[1:3]):
      # It names no backbone of methods that it has not trained.
      there = [x for x in (row, (row[0], '')) if x in theirs]
      found += [*alike, *(theirs.pop(x) for x in there)]
    found += theirs.values()
  return found, sorted({*names.values()} - {''})


def _rows(dataset, cells):
  return {
    row: tables.Row(dataset, f'{row[0]}, paper', row[1], '', cells[row], True)
    for row in cells
  }


def notes(
  paper: dict, datasets: list[str], rows: list[tables.Row], size: str
) -> Iterator[str]:
  """Yields what has to be said below a table that holds the paper's rows."""
  yield (
    '* the paper: the best of a grid (settings and unseeded repetitions), '
    'selected on the test set; not comparable with a mean over seeds'
  )
  about = {name: paper['datasets'][name] for name in datasets}
  counted = [f'{k}: {its["counted"]}' for k, its in about.items()
             if its['counted']]  # fmt: skip
  if counted:
    yield f'† shots are counted otherwise there: {"; ".join(counted)}'
  cells = [cell for row in rows if row.paper for cell in row.cells.values()]
  for table in paper['tables']:
    if table['source'] == 'notebook' and any('‡' in x.marks for x in cells):
      yield f'‡ from {table["from"]}'
  for name, its in about.items():
    if its['size'] != size:
      yield f'{name}: the paper scores as --size {its["size"]}, this is {size}'
