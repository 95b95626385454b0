"""Rows of scores, and their formats: text, Markdown, CSV, LaTeX, a plot."""

import csv
import dataclasses
import decimal
import html
import io
import re
import statistics

from launch.results import Run

TITLES = {'miou': 'mIoU', 'fb_iou': 'FB-IoU', 'f1': 'F1'}


ON_TESTS = '§'
ON_TESTS_SAYS = (
  f'{ON_TESTS} the test images chose the checkpoint: better than it would be '
  'on new images'
)


@dataclasses.dataclass(frozen=True)
class Cell:
  """Scores in 0..1 of runs that differ in nothing but their draws."""

  runs: list[Run]
  scores: list[float]

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
    mark = f' {ON_TESTS}' if any(run.on_tests for run in self.runs) else ''
    return f'{tenths(self.mean)}{spread} (n={len(self.scores)}){mark}'

  def columns(self) -> tuple:
    """The last ones of the CSV."""
    std = '' if self.std is None else f'{self.std:.4f}'
    seeds, drawn = zip(*(run.draw for run in self.runs), strict=True)
    seeds, drawn = (' '.join(map(str, x)) for x in (seeds, drawn))
    folders = ';'.join(str(run.folder) for run in self.runs)
    mean = f'{self.mean:.4f}'
    return len(self.runs), mean, std, seeds, drawn, folders, '', '', ''


@dataclasses.dataclass(frozen=True)
class Published:
  """A number of the paper, in per cent, with its marks and its source."""

  score: float
  marks: str
  source: str

  def __str__(self):
    return f'{tenths(self.score)}{self.marks}'

  def columns(self) -> tuple:
    """The last ones of the CSV."""
    return 0, '', '', '', '', '', self.score, self.marks, self.source


@dataclasses.dataclass(frozen=True)
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

  @property
  def label(self) -> tuple[str, str, str, str]:
    """What stands before the cells."""
    return self.dataset, self.method, self.backbone, self.settings


@dataclasses.dataclass(frozen=True)
class Report:
  """What is shown, in whatever form."""

  title: str
  rows: list[Row]
  notes: list[str]
  missing: list[tuple[str, str]]  # what, and the command or nothing
  unfinished: list[Run]

  def table(self) -> tuple[list[str], list[list[str]], int]:
    """Header, cells, and how many columns are text."""
    split = any(row.settings for row in self.rows)
    left = 4 if split else 3
    columns = sorted({shots for row in self.rows for shots in row.cells})
    header = ['dataset', 'method', 'backbone', 'settings'][:left]
    header += [f'{shots} shots' if shots else 'all images' for shots in columns]
    lines = [
      [text or '-' for text in row.label[:left]]
      + [str(row.cells.get(shots, '-')) for shots in columns]
      for row in self.rows
    ]
    return header, lines, left


def tenths(value: float) -> str:
  """With one decimal; a half goes up, as people round."""
  # 15.95 is stored as a little less, and would be shown as 15.9.
  number = decimal.Decimal(f'{value:.6f}')
  return str(number.quantize(decimal.Decimal('0.1'), decimal.ROUND_HALF_UP))


def aligned(header: list[str], lines: list[list[str]], left: int) -> str:
  """A table for the terminal; columns from `left` on to the right."""
  # report.table sets texts to the left, and takes a second to import.
  widths = [max(map(len, x)) for x in zip(header, *lines, strict=True)]
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


CSV = (
  'dataset', 'method', 'backbone', 'settings', 'shots', 'n', 'mean', 'std',
  'seeds', 'support_seeds', 'folders', 'paper', 'paper_marks', 'paper_from',
)  # fmt: skip


def as_csv(report: Report) -> str:
  """A line per cell, in per cent; the paper's have no runs."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(CSV)
  for row in report.rows:
    for shots, cell in row.cells.items():
      writer.writerow([*row.label, shots, *cell.columns()])
  return out.getvalue()


LATEX = str.maketrans({
  '\\': r'\textbackslash{}', '&': r'\&', '%': r'\%', '$': r'\$', '#': r'\#',
  '_': r'\_', '{': r'\{', '}': r'\}', '~': r'\textasciitilde{}',
  '^': r'\textasciicircum{}', '±': r'$\pm$', '†': r'$^\dagger$',
  '‡': r'$^\ddagger$', '§': r'\S{}', '<': r'$<$', '>': r'$>$', '|': r'$|$',
})  # fmt: skip


def latex(report: Report) -> str:
  """The table for a paper that uses booktabs."""
  header, lines, left = report.table()
  columns = 'l' * left + 'r' * (len(header) - left)
  first, *rest = (
    ' & '.join(text.translate(LATEX) for text in line) + r' \\'
    for line in (header, *lines)
  )
  parts = [rf'\begin{{tabular}}{{{columns}}}', r'\toprule', first, r'\midrule']
  parts += [*rest, r'\bottomrule', r'\end{tabular}']
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
    axes.set_title(dataset)
    _draw(axes, [row for row in report.rows if row.dataset == dataset])
  notes = [x for x in report.notes if x[0] in f'*†‡{ON_TESTS}']
  return png(figure, '\n'.join([report.title, *notes]))


def _draw(axes, rows):
  colours = {}
  for row in rows:
    _line(axes, row, colours)
  ticks = sorted({shots for row in rows for shots in row.cells})
  if all(ticks):
    axes.set_xscale('log')
  axes.set_xticks(ticks, [str(x or 'all') for x in ticks])
  axes.minorticks_off()
  axes.set_xlabel('shots')
  axes.set_ylabel('per cent')
  axes.grid(color='0.9')
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=7, loc=(1.01, 0.1))


def _line(axes, row, colours):
  """A line; the paper's takes the colour of ours, and is grey without."""
  name = ' '.join(filter(None, row.label[1:]))
  shots, cells = list(row.cells), row.cells.values()
  if row.paper:
    mine = colours.get((row.method.removesuffix(', paper'), row.backbone))
    marker = '.' if mine else 'ox+*sd|_^v'[len(axes.lines) % 10]
    axes.plot(
      shots, [x.score for x in cells], '--', marker=marker,
      color=mine or '0.7', label=name, linewidth=1, zorder=1,
    )  # fmt: skip
    return
  place = len(axes.containers)
  colours[row.method, row.backbone] = f'C{place % 10}'
  axes.errorbar(
    shots, [x.mean for x in cells], [x.std or 0 for x in cells],
    marker='osD^v<>'[place % 7], color=f'C{place % 10}', capsize=3, label=name,
  )  # fmt: skip


def png(figure, title: str) -> bytes:
  """A figure of matplotlib below its title, as a file's content."""
  figure.suptitle(title, fontsize=8, wrap=True)
  out = io.BytesIO()
  figure.savefig(out, format='png')
  return out.getvalue()


def page(report: Report) -> str:
  """The report for a browser, in one file: what sorts, the plot, and links."""
  from distillfss_jax.workdir import report as pages  # slow to import

  header, lines, _ = report.table()
  parts = [f'<p>{html.escape(report.title)}</p>', pages.table(header, lines)]
  parts += [f'<p>{html.escape(note)}</p>' for note in report.notes]
  parts.append(pages.picture(plot(report)))
  runs = [
    run
    for row in report.rows
    if not row.paper
    for cell in row.cells.values()
    for run in cell.runs
  ]
  # A run's folder holds its own page, where this version has made it.
  for title, some in (
    ('Runs', {run.folder: run for run in runs}.values()),
    ('Unfinished', report.unfinished),
  ):
    if some:
      parts += [f'<h2>{title}</h2>', '<ul>', *map(_linked, some), '</ul>']
  if report.missing:
    parts += ['<h2>Missing</h2>', '<pre>']
    for what, line in report.missing:
      parts += [html.escape(x) for x in (f'# {what}', line) if x]
    parts.append('</pre>')
  return pages.page('A sweep', parts)


def _linked(run):
  name, place = html.escape(str(run.folder)), run.folder.resolve()
  if (place / 'report.html').is_file():
    name = f'<a href="{(place / "report.html").as_uri()}">{name}</a>'
  return f'<li>{name}</li>'


FORMATS = {
  'terminal': ('', terminal),
  'markdown': ('table.md', markdown),
  'csv': ('table.csv', as_csv),
  'latex': ('table.tex', latex),
  'plot': ('scores.png', plot),
  'html': ('report.html', page),
}
