"""How far a score depends on the support that was drawn, and on the seed.

    python -m launch.variance configs/nucleus.py --draws 5 --seeds 3
    python -m launch.variance configs/kvasir.py --set shots=25 --via print
    python -m launch.variance configs/demo.py --draws 2 --seeds 2 --set smoke

One cell is run with every pair of D support draws (support.rule=random,
support.seed = 0 .. D-1) and S seeds (0 .. S-1), through launch.sweep; then the
scores y[d,s] are taken apart. Runs that exist are not repeated.

Over what is there, all deviations being sample ones (divisor n - 1):

    all runs       std of all y[d,s]
    over draws     std over d of m[d], the mean of y[d,s] over s
    over seeds     mean over d of the std of y[d,s] over s

The first two of these hold some of each other. The components are apart: for
y[d,s] = mean + draw[d] + seed[s] + rest[d,s], a two-way layout with one value
per cell, the mean squares

    MD = S sum_d (m[d] - m)^2 / (D - 1)
    MS = D sum_s (m[s] - m)^2 / (S - 1)
    MR = sum_ds (y[d,s] - m[d] - m[s] + m)^2 / ((D - 1) (S - 1))

give the unbiased estimates of the variances: draw (MD - MR) / S, seed
(MS - MR) / D, rest MR. A negative one is set to 0, and said so. They need a
full table: where runs are missing, the draws or the seeds that lack some are
left out of these three, whichever leaves more. Their roots are shown.

This is not the original's `variance.py`, which measures gaps between domains
on the features of an ImageNet encoder.
"""

import argparse
import contextlib
import dataclasses
import shlex
import sys

import numpy as np

from distillfss_jax import files
from launch import results, sweep, tables
from launch.plan import Run
from launch.plan import plan as plan_runs


@dataclasses.dataclass(frozen=True)
class Spread:
  """What a table of scores says; None where there are too few of them.

  draw, seed, rest: standard deviations of the components. clipped: those whose
  estimated variance was negative. of: the (draws, seeds) they were taken from.
  """

  mean: float
  std: float | None
  over_draws: float | None
  over_seeds: float | None
  draw: float | None = None
  seed: float | None = None
  rest: float | None = None
  clipped: tuple[str, ...] = ()
  of: tuple[int, int] = (0, 0)


def spread(table: np.ndarray) -> Spread:
  """Takes a table [draws, seeds] apart; NaN where a run is missing.

  Raises:
    ValueError: all runs are missing.
  """
  table = np.asarray(table, float)
  there = table[~np.isnan(table)]
  if not there.size:
    raise ValueError('no run of the table has finished')
  within = [row[~np.isnan(row)] for row in table]
  means = [row.mean() for row in within if row.size]
  stds = [row.std(ddof=1) for row in within if row.size > 1]
  return Spread(
    mean=there.mean(),
    std=_std(there),
    over_draws=_std(means),
    over_seeds=np.mean(stds) if stds else None,
    **_components(_full(table)),
  )


def _std(values):
  return np.std(values, ddof=1) if len(values) > 1 else None


def _full(table):
  """The larger of: the rows without a hole, the columns without one."""
  # What was never run at all is no hole of what was.
  there = ~np.isnan(table)
  table = table[there.any(1)][:, there.any(0)]
  holes = np.isnan(table)
  rows, columns = table[~holes.any(1)], table[:, ~holes.any(0)]
  return max(rows, columns, key=lambda x: (min(x.shape) > 1, x.size))


def _components(table):
  draws, seeds = table.shape
  if min(draws, seeds) < 2:
    return {}
  mean = table.mean()
  by_draw = table.mean(1, keepdims=True)
  by_seed = table.mean(0, keepdims=True)
  of_draws = seeds * ((by_draw - mean) ** 2).sum() / (draws - 1)
  of_seeds = draws * ((by_seed - mean) ** 2).sum() / (seeds - 1)
  rest = ((table - by_draw - by_seed + mean) ** 2).sum()
  rest /= (draws - 1) * (seeds - 1)
  found = {'draw': (of_draws - rest) / seeds, 'seed': (of_seeds - rest) / draws}
  # Exact zeros come out as roundings of either sign.
  least = -1e-20 * (table**2).max()
  return {
    **{name: float(max(v, 0)) ** 0.5 for name, v in found.items()},
    'rest': float(rest) ** 0.5,
    'clipped': tuple(name for name, v in found.items() if v < least),
    'of': (draws, seeds),
  }


# The runs.


@dataclasses.dataclass(frozen=True)
class Grid:
  """Runs by (draw, seed), as they are or will be."""

  runs: dict[tuple[int, int], Run]
  argv: list[str]  # of the sweep that makes them
  shared: str

  @property
  def folder(self):
    """The sweep's."""
    return next(iter(self.runs.values())).folder.parent

  @property
  def shape(self) -> tuple[int, int]:
    """Draws and seeds."""
    return tuple(1 + max(index) for index in zip(*self.runs, strict=True))


def plan(config: str, draws: int, seeds: int, shared, root: str) -> Grid:
  """The runs that are wanted, checked against the config.

  Args:
    config: a file, without arguments.
    draws, seeds: how many.
    shared: what all cells share, as --set of the sweep.
    root: the folder of all sweeps.

  Raises:
    ValueError: the config does not take it.
  """
  seed = _seed_key(config, shared, root)
  items = [
    'config.support.rule=random', f'config.support.seed=0:{draws}',
    f'{seed}=0:{seeds}',
  ]  # fmt: skip
  found = plan_runs(config, items, shared, root)
  runs = {
    (int(run.cell['config.support.seed']), int(run.cell[seed])): run
    for run in found
  }
  argv = [config, '--grid', *items, '--root', str(root)]
  argv += ['--set', *shared] if shared else []
  return Grid(runs, argv, ' '.join(shared))


def _seed_key(config, shared, root):
  """How a config is given its seed: not all have an argument for it."""
  try:
    plan_runs(config, ['seed=0'], shared, root)
  except ValueError as error:
    if "no config argument 'seed'" in str(error):
      return 'config.seed'
    raise
  return 'seed'


@dataclasses.dataclass(frozen=True)
class Scores:
  """What the runs say so far, in per cent; NaN in `table` where one lacks."""

  table: np.ndarray
  role: str
  missing: dict[tuple[int, int], str]  # why, by (draw, seed)
  support: dict[int, list[str]]  # the ids that were drawn


def read(grid: Grid, size: str, metric: str) -> Scores:
  """Reads the scores that there are: of the student, if there is one."""
  table = np.full(grid.shape, np.nan)
  missing, support, role = {}, {}, ''
  for place, run in grid.runs.items():
    try:
      found = _scores(run, place, size, metric)
    except (OSError, ValueError) as error:
      missing[place] = str(error)
      continue
    role = 'student' if 'student' in found else next(iter(found))
    table[place] = 100 * found[role]
    with contextlib.suppress(OSError, ValueError):  # it is no score
      ids = files.read_json(run.folder / 'ids.json').get('support')
      if isinstance(ids, list):
        support.setdefault(place[0], list(map(str, ids)))
  return Scores(table, role, missing, support)


def _scores(run, place, size, metric):
  if not run.finished:
    begun = (run.folder / 'config.json').exists()
    raise ValueError('unfinished' if begun else 'not run')
  loaded = results.load(run.folder)
  keys = 'support.rule', 'support.seed', 'seed'
  drawn = tuple(loaded.config[key] for key in keys)
  if drawn != ('random', *place):
    raise ValueError(
      f'{run.folder} holds a run of (rule, support seed, seed) {drawn}'
    )
  return results.scores(loaded, size, metric)


# Showing.


def report(grid: Grid, found: Scores, size: str, metric: str) -> str:
  """The table, the deviations and the draws, for the terminal."""
  table = found.table
  draws, seeds = table.shape
  apart = spread(table)
  parts = [
    f'{size} {tables.TITLES.get(metric, metric)} of the {found.role} in per '
    f'cent, {grid.argv[0]}{grid.shared and " " + grid.shared}: {draws} draws x '
    f'{seeds} seeds, {(~np.isnan(table)).sum()} of {table.size} runs',
    '',
    tables.aligned(
      ['support seed', *(f'seed {s}' for s in range(seeds)), 'mean'],
      [
        [str(d), *map(_text, row), _text(_mean(row))]
        for d, row in enumerate(table)
      ],
      0,
    ),
    '',
    *_lines(apart, draws, seeds),
    '',
    *_extremes(found),
  ]
  if found.missing:
    parts += ['', f'missing: {len(found.missing)} of {table.size} runs']
  for place, why in found.missing.items():
    run = grid.runs[place]
    parts += [
      f'support seed {place[0]}, seed {place[1]}: {why}',
      f'  {shlex.join(run.command)}',
    ]
  return '\n'.join(parts)


def _text(value):
  return '-' if value is None or np.isnan(value) else tables.tenths(value)


def _mean(row):
  there = row[~np.isnan(row)]
  return there.mean() if there.size else None


def _lines(apart, draws, seeds):
  lines = [
    ['mean', _text(apart.mean)],
    ['deviation over all runs', _text(apart.std)],
    ['over support draws (of their means over seeds)', _text(apart.over_draws)],
    ['over seeds (within a draw, mean over draws)', _text(apart.over_seeds)],
    ['component: support draw', _text(apart.draw)],
    ['component: seed', _text(apart.seed)],
    ['component: rest', _text(apart.rest)],
  ]
  yield tables.aligned(['', 'per cent'], lines, 1)
  for name in apart.clipped:
    yield f'the variance of the {name} was estimated negative: shown as 0'
  if apart.rest is None:
    yield 'components need two draws and two seeds without a hole'
  elif apart.of != (draws, seeds):
    yield f'components are of the {apart.of[0]} draws x {apart.of[1]} seeds ' \
      'that are complete'  # fmt: skip


def _extremes(found):
  """The best and the worst draw, and what was drawn."""
  means = {d: _mean(row) for d, row in enumerate(found.table)}
  means = {d: mean for d, mean in means.items() if mean is not None}
  best, worst = max(means, key=means.get), min(means, key=means.get)
  if means[best] == means[worst]:
    yield f'no draw is better than another: {_text(means[best])}'
    return
  for name, draw in {'best': best, 'worst': worst}.items():
    ids = ' '.join(found.support.get(draw, ['(no ids.json)']))
    yield f'{name} draw: support seed {draw}, {_text(means[draw])}: {ids}'


def plot(found: Scores, title: str) -> bytes:
  """A PNG: a strip of runs per draw, its mean as a bar, the mean of all."""
  from matplotlib.figure import Figure  # slow to import, seldom needed

  draws, seeds = found.table.shape
  figure = Figure(
    figsize=(max(5, 1.5 + 0.6 * draws), 4), dpi=110, layout='constrained'
  )
  axes = figure.subplots()
  for seed in range(seeds):
    aside = 0.4 * ((seed + 0.5) / seeds - 0.5)
    axes.plot(
      np.arange(draws) + aside, found.table[:, seed], 'o', markersize=5,
      label=f'seed {seed}',
    )  # fmt: skip
  for draw, row in enumerate(found.table):
    if (mean := _mean(row)) is not None:
      axes.plot([draw - 0.3, draw + 0.3], [mean, mean], color='0.3')
  axes.axhline(np.nanmean(found.table), color='0.6', linestyle='--', zorder=0)
  axes.set_xticks(range(draws))
  axes.set_xlabel('support seed')
  axes.set_ylabel('per cent')
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(
    frameon=False, fontsize=7, loc='upper left', bbox_to_anchor=(1, 1)
  )
  return tables.png(figure, title)


def _parse(argv):
  parser = sweep.Parser(
    prog='python -m launch.variance', description=__doc__, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  add = parser.add_argument
  add('config', help='a file of configs, without arguments')
  add('--draws', type=sweep.positive, default=5, help='support draws')
  add('--seeds', type=sweep.positive, default=3)
  add('--set', nargs='+', action='extend', default=[], metavar='KEY[=VALUE]',
      help='the same for every run: shots=5 config.steps=4')  # fmt: skip
  add('--root', default='runs', help='where the folder of the sweep is')
  add('--via', choices=('local', 'print'), default='local',
      help='print shows the commands, and reports what is there')  # fmt: skip
  add('--jobs', type=sweep.positive, help='runs at a time')
  add('--metric', default='miou')
  add('--size', default='test', choices=('test', 'test_native'))
  flags = parser.parse_args(argv)
  if flags.draws * flags.seeds < 2:
    parser.error('one draw of one seed has no spread; give more --draws')
  return flags


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code, that of the sweep."""
  flags = _parse(argv)
  grid = plan(flags.config, flags.draws, flags.seeds, flags.set, flags.root)
  jobs = ['--jobs', str(flags.jobs)] if flags.jobs else []
  argv = [*grid.argv, '--via', flags.via, *jobs]
  code = sweep.sweep(sweep.parser().parse_args(argv))
  found = read(grid, flags.size, flags.metric)
  if np.isnan(found.table).all():
    why = next(iter(found.missing.values()))
    print(f'nothing to report: no run has a score ({why})', file=sys.stderr)
    return code
  text = report(grid, found, flags.size, flags.metric)
  picture = grid.folder / 'variance.png'
  files.write_atomically(picture, plot(found, text.partition('\n')[0]))
  print(f'\n{text}\n\npicture: {picture}')
  return code


if __name__ == '__main__':
  try:
    sys.exit(main())
  except (ValueError, OSError) as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:  # before anything ran
    sys.exit(130)
