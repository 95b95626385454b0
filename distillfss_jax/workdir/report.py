"""A run as one page for a browser, which needs nothing but its file.

Pictures lie within the page, tables sort by a click on a heading, and a test
image shows what is laid over it as strongly as its slider says.
"""

import base64
import dataclasses
import html
import io
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from distillfss_jax import files
from distillfss_jax.types import VOID

_STEPS = 16  # of confidence: few, so that pictures of it are small

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; padding: 0 1em;
  max-width: 1100px; color: #1c1c20; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; margin: .6em 0; display: block;
  overflow-x: auto; }
th, td { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
th { cursor: pointer; vertical-align: bottom; } th:hover { background: #eee; }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
pre { background: #f4f4f6; padding: .8em; white-space: pre-wrap; }
img { max-width: 100%; } p.says { color: #69696f; }
.shown { display: inline-block; margin: 0 1em 1.5em 0; vertical-align: top;
  width: 320px; overflow-wrap: anywhere; } .shown label { white-space: nowrap; }
.layers { position: relative; } .layers img { display: block; width: 100%;
  image-rendering: pixelated; } [type=range] { width: 100%; margin: 0; }
.layers .over { position: absolute; inset: 0; }
.swatch { display: inline-block; width: .9em; height: .9em;
  margin-right: .3em; }
.scale { display: inline-block; width: 9em; height: .9em; margin: 0 .4em;
  vertical-align: middle; }
"""

_SCRIPT = """
for (const head of document.querySelectorAll('th')) head.onclick = () => {
  const body = head.closest('table').tBodies[0], at = head.cellIndex;
  const up = head.getAttribute('aria-sort') !== 'ascending';
  for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  // A score may be followed by its deviation; an id such as 1e5f is no number.
  const number = text =>
    /^-?\\d+(\\.\\d+)?(?![\\w.])/.test(text) ? parseFloat(text) : NaN;
  const rows = [...body.rows].sort((a, b) => {
    const [s, t] = [a, b].map(row => row.cells[at].textContent);
    const x = number(s), y = number(t);
    // What has no score comes last, either way.
    if (isNaN(x) !== isNaN(y)) return isNaN(x) - isNaN(y);
    const order = isNaN(x) ? s.localeCompare(t) : x - y;
    return up ? order : -order;
  });
  body.append(...rows);
};
for (const shown of document.querySelectorAll('.shown')) {
  const show = () => {
    const role = shown.querySelector('input:checked').value;
    for (const over of shown.querySelectorAll('.over'))
      over.style.opacity = over.dataset.role === role
        ? shown.querySelector('[type=range]').value / 100 : 0;
  };
  for (const input of shown.querySelectorAll('input')) input.oninput = show;
  show();
}
"""


@dataclasses.dataclass(frozen=True)
class Answered:
  """A test image, and what was said of it.

  name: its id. image: uint8 [H, W, 3].
  labels: {'truth' or a role: label map [H, W]}.
  scores: {role: mean IoU, None where it is not defined}.
  classes: names of labels 1..n. palette: colours of labels 0..n.
  confidence: {role: uint8 [H, W], the probability of its label in 0..255}.
  """

  name: str
  image: np.ndarray
  labels: Mapping[str, np.ndarray]
  scores: Mapping[str, float | None]
  classes: Sequence[str]
  palette: Sequence[Sequence[int]]
  confidence: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def judged(self) -> str:
    """The role that matters: the student if there is one."""
    return 'student' if 'student' in self.scores else next(iter(self.scores))

  @property
  def least(self) -> float:
    """The lowest confidence that there can be."""
    return 1 / (1 + len(self.classes))


def page(title: str, parts: Iterable[str]) -> str:
  """A whole page; `parts` are of HTML."""
  return '\n'.join(
    [
      '<!DOCTYPE html>',
      '<html lang="en"><head><meta charset="utf-8">',
      f'<title>{html.escape(title)}</title>',
      # Nothing is asked of anyone, not even the icon of the page.
      '<link rel="icon" href="data:,">',
      f'<style>{_STYLE}</style></head><body>',
      f'<h1>{html.escape(title)}</h1>',
      *parts,
      f'<script>{_SCRIPT}</script></body></html>\n',
    ]
  )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A table that sorts; cells are texts, numbers or None."""

  def cell(value):
    if isinstance(value, str):
      return f'<td>{html.escape(value or "-")}</td>'
    text = '-' if value is None else str(value)
    text = f'{value:.4f}' if isinstance(value, float) else text
    return f'<td class="n">{text}</td>'

  head = ''.join(f'<th>{html.escape(x)}</th>' for x in header)
  body = '\n'.join(f'<tr>{"".join(map(cell, row))}</tr>' for row in rows)
  return f'<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def picture(data: bytes, kind: str = 'png', more: str = '') -> str:
  """A picture within the page, of a file's bytes."""
  text = base64.b64encode(data).decode()
  return f'<img {more}src="data:image/{kind};base64,{text}">'


def write(
  workdir: str | os.PathLike,
  results: Mapping[str, Any],
  answers: Sequence[Answered],
  *,
  each: tuple[Sequence[str], Mapping[str, Sequence]] = ((), {}),
  command: str = '',
) -> None:
  """Writes report.html of a run that has ended.

  Args:
    workdir: the run's folder; its pictures are taken from panels/.
    results: what will stand in results.json.
    answers: of some test images.
    each: ids of all test images, and {role: mean IoU of each, or None}.
    command: that made the run.
  """
  workdir = pathlib.Path(workdir)
  parts = [
    f'<p>{html.escape(workdir.resolve().name)}: {results["steps"]} steps, '
    f'{results["test_images"]} test images</p>'
  ]
  if command:
    parts.append(f'<pre>{html.escape(command)}</pre>')
  parts += _scores(results)
  for title, name in (
    ('Support', 'support'),
    ('Episodes', 'episodes'),
    ('Curves', 'curves'),
    ('Confidence', 'reliability'),
  ):
    path = workdir / 'panels' / f'{name}.png'
    if path.exists():
      parts += [f'<h2>{title}</h2>', picture(path.read_bytes())]
  if answers:
    parts += _gallery(answers, bool(each[1]))
  ids, scores = each
  if scores:
    parts += _every(ids, scores)
  parts += ['<h2>Versions</h2>']
  versions = {**results['versions'], 'device': results['device']}
  parts.append(table(('what', 'version'), versions.items()))
  seconds = results['seconds'].items()
  parts.append(table(('part', 'seconds'), [(k, float(v)) for k, v in seconds]))
  files.write_atomically(
    workdir / 'report.html', page(str(results['name']), parts)
  )


def _scores(results):
  """The scores of every evaluation, with its protocol, and per class."""
  for name, evaluation in results['evaluations'].items():
    yield f'<h2>{html.escape(name)}</h2>'
    yield f'<p class="says">{html.escape(evaluation["says"])}</p>'
    columns, roles = evaluation['columns'], results.get(name, {})
    rows = [[role, *map(x.get, columns)] for role, x in roles.items()]
    if name == next(iter(results['evaluations'])):
      rows += _references(results['references'], columns)
    yield table(('', *columns.values()), rows)
    each = [
      (role, kind, values)
      for role, numbers in roles.items()
      for kind, values in numbers.items()
      if kind == 'iou' or kind.endswith('_per_class')
    ]
    known = dict.fromkeys(x for _, _, values in each for x in values)
    named = {'iou': 'IoU', **columns}
    kinds = [kind.removesuffix('_per_class') for _, kind, _ in each]
    heads = [
      f'{role} {named.get(kind, kind)}'
      for (role, *_), kind in zip(each, kinds, strict=True)
    ]
    if known:
      yield table(
        ('class', *heads),
        [[name, *(x.get(name) for *_, x in each)] for name in known],
      )
  for note in results['notes']:
    yield f'<p>{html.escape(note)}</p>'


def _references(references, columns):
  for name, numbers in references.items():
    if name == 'untrained':
      for role, found in numbers.items():
        yield [f'untrained {role}', *map(found.get, columns)]
    else:
      yield [name, *map(numbers.get, columns)]


def _last_if_none(score):
  return 2.0 if score is None else score


def _every(ids, scores):
  """A table of all test images, the lowest score of the first role first."""
  rows = sorted(
    zip(ids, *scores.values(), strict=True),
    key=lambda row: _last_if_none(row[1]),
  )
  yield '<h2>All test images</h2>'
  yield '<p class="says">at the model\'s size; the same is in images.csv</p>'
  yield table(('image', *(f'{role} mIoU' for role in scores)), rows)


def _gallery(answers, all_known):
  """Test images, those with the lowest score first: the student's, if any."""
  answers = sorted(
    answers, key=lambda answer: _last_if_none(answer.scores[answer.judged])
  )
  roles = list(answers[0].scores)
  yield '<h2>Test images, worst first</h2>'
  yield (
    f'<p class="says">{len(answers)} of the tests, evenly spaced'
    f'{" or of the lowest score" * all_known}: config.eval.panels says how '
    'many</p>'
  )
  yield table(
    ('image', *(f'{role} mIoU' for role in roles)),
    [[x.name, *map(x.scores.get, roles)] for x in answers],
  )
  if len({tuple(x.classes) for x in answers}) == 1:
    yield _legend(answers[0])
  if answers[0].confidence:
    yield _scale(answers[0].judged, min(x.least for x in answers))
  for number, answer in enumerate(answers):
    yield _shown(answer, number)


def _legend(answer):
  swatches = (
    f'<span class="swatch" style="background:rgb{tuple(map(int, colour))}">'
    f'</span>{html.escape(name)}'
    for name, colour in zip(answer.classes, answer.palette[1:], strict=False)
  )
  return f'<p>{"&emsp;".join(swatches)}</p>'


def _scale(role, least):
  """The legend of confidence."""
  colours = ', '.join(f'rgb{tuple(map(int, x))}' for x in _scale_colours())
  return (
    f'<p>confidence of the {html.escape(role)}: {least:.2f}'
    '<span class="scale" style="background:linear-gradient('
    f'to right, {colours})"></span>1</p>'
  )


def _scale_colours():
  """uint8 [_STEPS, 3], from the lowest confidence to the highest."""
  from matplotlib import colormaps  # slow to import, seldom needed

  return colormaps['viridis'](np.linspace(0, 1, _STEPS), bytes=True)[:, :3]


def _layers(answer):
  """(name, what its button says, PNG) of what lies over an image."""
  for role, labels in answer.labels.items():
    score = answer.scores.get(role)
    said = role if score is None else f'{role} {score:.3f}'
    yield role, said, _layer(labels, answer.palette)
  role = answer.judged
  if role in answer.confidence:
    made = _confidence(answer.confidence[role], answer.least)
    yield 'confidence', 'confidence', made


def _shown(answer, number):
  """One image, its layers, and what chooses among them."""
  layers, buttons = [], []
  for role, said, data in _layers(answer):
    over = f'class="over" data-role="{html.escape(role)}" '
    layers.append(picture(data, 'png', over))
    buttons.append(
      f'<label><input type="radio" name="r{number}" '
      f'value="{html.escape(role)}"{" checked" * (not buttons)}>'
      f'{html.escape(said)}</label>'
    )
  return (
    f'<div class="shown"><b>{html.escape(answer.name)}</b>'
    f'<div class="layers">{picture(_jpeg(answer.image), "jpeg")}'
    f'{"".join(layers)}</div>{" ".join(buttons)}'
    '<input type="range" min="0" max="100" value="60"></div>'
  )


def _jpeg(image):
  made = io.BytesIO()
  Image.fromarray(image).save(made, 'JPEG', quality=88)
  return made.getvalue()


def _layer(labels, palette):
  """A label map as a PNG through which one sees the background."""
  drawn = Image.fromarray(np.asarray(labels, np.uint8), 'P')
  colours = np.full((256, 3), 128, np.uint8)
  colours[: len(palette)] = palette
  colours[VOID] = 128
  drawn.putpalette(colours.ravel().tolist())
  made = io.BytesIO()
  drawn.save(made, 'PNG', transparency=0)
  return made.getvalue()


def _confidence(sure, least):
  """Confidence uint8 [H, W], `least` or more, as a PNG in colours."""
  share = (np.asarray(sure, np.float32) / 255 - least) / (1 - least)
  step = np.rint(np.clip(share, 0, 1) * (_STEPS - 1)).astype(np.uint8)
  drawn = Image.fromarray(step, 'P')
  drawn.putpalette(_scale_colours().ravel().tolist())
  made = io.BytesIO()
  drawn.save(made, 'PNG', optimize=True)
  return made.getvalue()
