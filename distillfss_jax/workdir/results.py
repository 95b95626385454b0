"""Scores as files and tables: for people, and for programs."""

import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distillfss_jax import files


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
  """Returns rows as text for a terminal: aligned, numbers to the right."""
  texts, right = _cells(rows, header)
  widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
  lines = [
    '  '.join(
      text.rjust(width) if to_right else text.ljust(width)
      for text, width, to_right in zip(line, widths, right, strict=True)
    ).rstrip()
    for line in texts
  ]
  lines.insert(1, '  '.join('-' * width for width in widths))
  return '\n'.join(lines)


def markdown(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
  """Returns rows as a Markdown table, numbers to the right."""
  texts, right = _cells(rows, header)
  texts = [[text.replace('|', r'\|') for text in line] for line in texts]
  texts.insert(1, ['---:' if to_right else '---' for to_right in right])
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in texts)


def write_results(workdir: str | os.PathLike, results: Mapping) -> None:
  """Writes `<workdir>/results.json`, and results.md for people.

  Args:
    workdir: the run's folder.
    results: numbers, texts, lists and dicts of them, by name. NumPy and JAX
      numbers become numbers, rounded to six digits. In results.md, a dict of
      dicts such as {'per class': {'cell': {'iou': 0.8}}} is a table.

  Raises:
    ValueError: a number is not finite; the message names it. Leave out or
      set to None what is not defined.
  """
  plain = _plain(results, 'results')
  workdir = pathlib.Path(workdir)
  simple = {k: v for k, v in plain.items() if not isinstance(v, dict)}
  parts = ['# Results']
  if simple:
    parts.append(markdown(simple.items(), ('name', 'value')))
  for name, value in plain.items():
    if isinstance(value, dict) and value:
      parts += [f'## {name}', _section(value)]
  files.write_atomically(workdir / 'results.md', '\n\n'.join(parts) + '\n')
  # Last: whoever sees it takes the run for finished.
  files.write_atomically(
    workdir / 'results.json', json.dumps(plain, indent=2) + '\n'
  )


def write_images(
  workdir: str | os.PathLike,
  ids: Sequence[str],
  each: Mapping[str, Sequence[float | None]],
) -> None:
  """Writes `<workdir>/images.csv`: the mean IoU of each test image.

  Args:
    workdir: the run's folder.
    ids: of the images.
    each: {role: their scores, None where there is nothing to score}.
  """
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(('id', *each))
  for id_, *scores in zip(ids, *each.values(), strict=True):
    writer.writerow((id_, *('' if x is None else f'{x:.6f}' for x in scores)))
  files.write_atomically(pathlib.Path(workdir) / 'images.csv', out.getvalue())


def _cells(rows, header):
  """Returns all cells as text, header first, and which columns are numbers."""
  rows = [list(row) for row in rows]
  for row in rows:
    if len(row) != len(header):
      raise ValueError(
        f'a row has {len(row)} cells, the header {len(header)}: {row}'
      )
  right = [
    bool(rows)
    and all(row[i] is None or _is_number(row[i]) for row in rows)
    and any(row[i] is not None for row in rows)
    for i in range(len(header))
  ]
  texts = [[str(name) for name in header]]
  return texts + [[_text(cell) for cell in row] for row in rows], right


def _is_number(cell):
  simple = isinstance(cell, int | float | np.number)
  return simple and not isinstance(cell, bool)


def _text(cell):
  if cell is None:
    return '-'
  if isinstance(cell, float | np.floating):
    small = cell != 0 and abs(cell) < 0.001
    return (
      f'{cell:.3g}' if small else f'{cell:.{1 if abs(cell) >= 100 else 4}f}'
    )
  return str(cell)


def _plain(value, path):
  """Returns a value as JSON takes it; refuses what is not finite."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v, f'{path}/{k}') for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v, f'{path}/{i}') for i, v in enumerate(value)]
  if hasattr(value, 'tolist'):  # NumPy and JAX
    return _plain(value.tolist(), path)
  if isinstance(value, float):
    if not math.isfinite(value):
      raise ValueError(
        f'{path} is {value}: leave it out or give None where it is undefined'
      )
    return float(f'{value:.6g}')
  if value is None or isinstance(value, bool | int | str):
    return value
  raise ValueError(f'{path} is a {type(value).__name__}: give a number or text')


def _section(value, title=''):
  """Returns a dict as Markdown: with columns if it is a dict of dicts.

  What is a dict in a cell has a table of its own, below.
  """
  if not all(isinstance(v, dict) for v in value.values()):
    return markdown(value.items(), ('name', 'value'))
  columns = list(dict.fromkeys(k for v in value.values() for k in v))
  deep = [
    k
    for k in columns
    if any(isinstance(v.get(k), dict) for v in value.values())
  ]
  flat = [k for k in columns if k not in deep]
  parts = []
  if flat:
    rows = [[name, *map(v.get, flat)] for name, v in value.items()]
    parts.append(markdown(rows, ('', *flat)))
  for k in filter(deep.__contains__, columns):
    inner = {name: v[k] for name, v in value.items() if v.get(k)}
    if inner:
      head = f'{title}{k}'
      parts += [f'### {head}', _section(inner, f'{head}, ')]
  return '\n\n'.join(parts)
