"""What people look at: overlays, panels, curves, tables, results.

Pictures are uint8 arrays [H, W, 3] throughout, so they go to a PNG file
(`save`), to TensorBoard, or into a bigger picture alike.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distillfss_jax.types import VOID

# Colours by label: background, then the seven of Okabe and Ito (2008), then
# Paul Tol's muted and light schemes, all made for colour-blind readers.
PALETTE = (
  (0, 0, 0),
  (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
  (0, 114, 178), (213, 94, 0), (204, 121, 167),
  (51, 34, 136), (17, 119, 51), (136, 34, 85), (68, 170, 153),
  (153, 153, 51), (170, 68, 153), (204, 102, 119), (221, 204, 119),
  (153, 221, 255), (187, 204, 51), (238, 136, 102), (255, 170, 187),
  (119, 170, 221),
)  # fmt: skip


_PAPER, _INK, _FAINT = (255, 255, 255), (28, 28, 32), (105, 105, 115)


_GAP = 10  # pixels between and around pictures


def overlay(
  image: np.ndarray,
  label: np.ndarray,
  palette: Sequence[Sequence[int]] = PALETTE,
  alpha: float = 0.45,
  line: int | None = None,
) -> np.ndarray:
  """Returns the image with its regions tinted and outlined.

  Background stays as it is; void is hatched in grey.

  Args:
    image: uint8 [H, W, 3].
    label: integers [H, W]: 0 background, 1.. classes, 255 void.
    palette: a colour (r, g, b) in 0..255 per label.
    alpha: strength of the tint, 0 to 1; outlines are always full.
    line: width of the outlines, pixels; by default it suits the image's size.

  Raises:
    ValueError: shapes differ, or a label has no colour.
  """
  image, label = np.asarray(image), np.asarray(label)
  if image.dtype != np.uint8 or image.shape != (*label.shape, 3):
    raise ValueError(
      f'expected a uint8 image of shape [H, W, 3] and a label [H, W], got '
      f'{image.dtype} {list(image.shape)} and {list(label.shape)}'
    )
  void = label == VOID
  region = (label != 0) & ~void
  highest = int(label[region].max(initial=0))
  if highest >= len(palette):
    raise ValueError(
      f'label {highest} has no colour: the palette has {len(palette)}'
    )
  colours = np.asarray(palette, np.uint8)[np.where(void, 0, label)]
  tint = colours.astype(np.float32)
  strength = np.where(region, np.float32(alpha), 0)
  height, width = label.shape
  line = line or outline(height, width)
  rows, columns = np.indices(label.shape)
  stripes = (rows + columns) // (2 * line) % 2
  tint[void] = np.where(stripes, 200, 90)[void][:, None]
  strength[void] = 0.6
  result = image + strength[..., None] * (tint - image)
  edges = region & _differs(label, line)
  result[edges] = colours[edges]
  return np.rint(result).astype(np.uint8)


def outline(height: int, width: int) -> int:
  """The width of outlines in pictures of a size, in pixels."""
  return max(1, round(min(height, width) / 120))


def panel(
  columns: Sequence[tuple[str, np.ndarray]], *, height: int = 256
) -> np.ndarray:
  """Returns a row of pictures of one height, each under its caption.

  Args:
    columns: (caption, uint8 [H, W, 3]) pairs; the lines of a caption after
      its first are set smaller. Long lines are wrapped, never cut.
    height: of the pictures, pixels; they keep their proportions.
  """
  if not columns:
    raise ValueError('a panel needs at least one picture')
  pictures = [_scaled(picture, height) for _, picture in columns]
  captions = [
    _caption(title, picture.width)
    for (title, _), picture in zip(columns, pictures, strict=True)
  ]
  top = max(caption.height for caption in captions)
  sheet = Image.new(
    'RGB',
    (sum(x.width + _GAP for x in pictures) + _GAP, top + height + 2 * _GAP),
    _PAPER,
  )
  left = _GAP
  for caption, picture in zip(captions, pictures, strict=True):
    sheet.paste(caption, (left, _GAP // 2))
    sheet.paste(picture, (left, _GAP + top))
    left += picture.width + _GAP
  return np.asarray(sheet)


def grid(rows: Sequence[np.ndarray]) -> np.ndarray:
  """Returns pictures below each other, flush left on white."""
  if not rows:
    raise ValueError('a grid needs at least one row')
  width = max(row.shape[1] for row in rows)
  return np.concatenate(
    [
      np.pad(
        row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255
      )
      for row in rows
    ]
  )


def support_panel(
  images: Sequence[np.ndarray],
  labels: Sequence[np.ndarray],
  *,
  names: Sequence[str] | None = None,
  palette: Sequence[Sequence[int]] = PALETTE,
  per_row: int = 5,
  height: int = 192,
) -> np.ndarray:
  """Returns a support set: its images with what was annotated in them.

  Args:
    images: the shots, uint8 [H, W, 3] each.
    labels: their labels, [H, W] each.
    names: captions, such as the ids; the default counts the shots.
    palette: see `overlay`.
    per_row: shots side by side.
    height: of a shot, pixels.
  """
  names = names or [f'shot {i + 1}' for i in range(len(images))]
  shots = [
    (name, overlay(image, label, palette))
    for name, image, label in zip(names, images, labels, strict=True)
  ]
  return grid(
    [
      panel(shots[i : i + per_row], height=height)
      for i in range(0, len(shots), per_row)
    ]
  )


def query_panel(
  image: np.ndarray,
  truth: np.ndarray,
  predictions: Mapping[str, tuple[np.ndarray, float | None]],
  *,
  name: str = 'test image',
  palette: Sequence[Sequence[int]] = PALETTE,
  height: int = 256,
) -> np.ndarray:
  """Returns image | truth | each prediction, with the IoU of each.

  Args:
    image: uint8 [H, W, 3].
    truth: label [H, W].
    predictions: such as {'teacher': (label, iou), 'student': (label, iou)};
      an IoU in 0..1, or None where it is not defined.
    name: caption of the image, such as its id.
    palette: see `overlay`.
    height: of a picture, pixels.
  """
  columns = [(name, image), ('truth', overlay(image, truth, palette))]
  for title, (label, iou) in predictions.items():
    score = '' if iou is None or math.isnan(iou) else f'\nIoU {iou:.3f}'
    columns.append((title + score, overlay(image, label, palette)))
  return panel(columns, height=height)


def legend(
  names: Sequence[str],
  palette: Sequence[Sequence[int]] = PALETTE,
  *,
  width: int = 800,
) -> np.ndarray:
  """Returns a strip of swatches with the names of classes 1.., wrapped."""
  font, box = _font(16), 16
  places, left, top = [], _GAP, _GAP
  for name in names:
    wide = box + 6 + math.ceil(font.getlength(name)) + 2 * _GAP
    if left > _GAP and left + wide > width:
      left, top = _GAP, top + box + _GAP
    places.append((left, top))
    left += wide
    width = max(width, wide + _GAP)
  sheet = Image.new('RGB', (width, top + box + _GAP), _PAPER)
  draw = ImageDraw.Draw(sheet)
  for name, colour, (x, y) in zip(names, palette[1:], places, strict=False):
    draw.rectangle((x, y, x + box - 1, y + box - 1), fill=tuple(colour))
    draw.text((x + box + 6, y + box / 2), name, _INK, font, anchor='lm')
  return np.asarray(sheet)


def histogram(
  sizes: np.ndarray, counts: Mapping[str, int], *, width: int = 800
) -> np.ndarray:
  """Returns two plots: how large images are, and how many have each class.

  Args:
    sizes: [N, 2] rows and columns.
    counts: {class: images that have it}.
    width: of the picture, pixels.
  """
  from matplotlib.figure import Figure

  height = max(220, 60 + 18 * len(counts))
  figure = Figure(
    figsize=(width / 100, height / 100), dpi=100, layout='constrained'
  )
  left, right = figure.subplots(1, 2)
  sides = np.sqrt(np.prod(np.asarray(sizes, float), -1))
  left.hist(sides, bins=24, color='0.45')
  left.set_title('images by size (root of their pixels)', size=10)
  right.barh([*counts], [*counts.values()], color='0.45')
  right.invert_yaxis()
  right.set_title('images with each class', size=10)
  for plot in (left, right):
    plot.spines[['top', 'right']].set_visible(False)
    plot.tick_params(labelsize=9)
  return _drawn(figure)


def reliability(found: Mapping[str, Mapping]) -> np.ndarray:
  """Returns plots of how often a pixel is right over how sure a model is.

  Args:
    found: {role: {'foreground' and 'all': {'confidence', 'accuracy', 'share':
      lists over bins}, 'ece', 'ece_foreground'}}.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 4 * len(found)), dpi=100, layout='constrained')
  rows = figure.subplots(len(found), 2, squeeze=False)
  for plots, (role, numbers) in zip(rows, found.items(), strict=True):
    for plot, kind, key in (
      (plots[0], 'foreground', 'ece_foreground'),
      (plots[1], 'all', 'ece'),
    ):
      bins, error = numbers[kind], numbers[key]
      plot.plot([0, 1], [0, 1], color='0.7', linewidth=1)
      plot.plot(
        bins['confidence'], bins['accuracy'], 'o-', color='0.2', markersize=4
      )
      plot.bar(bins['confidence'], bins['share'], 0.04, color='0.85', zorder=0)
      said = '-' if error is None else f'{error:.3f}'
      plot.set_title(f'{role}, {kind} pixels: ECE {said}', size=10)
      plot.set_xlabel('largest probability (bars: share of pixels)')
      plot.set_ylabel('right')
      plot.set_xlim(0, 1)
      plot.set_ylim(0, 1)
      plot.spines[['top', 'right']].set_visible(False)
      plot.tick_params(labelsize=9)
  return _drawn(figure)


def _drawn(figure):
  """A figure's pixels, uint8 [H, W, 3]."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(path: str | os.PathLike, picture: np.ndarray) -> None:
  """Writes a uint8 [H, W, 3] picture; the suffix of `path` is the format."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(picture).save(path)


def curves(metrics: str | os.PathLike, out: str | os.PathLike) -> None:
  """Draws the curves of a run's metrics.jsonl into a PNG.

  One plot for the losses and their parts, one for the speed, and one per
  prefix of the other metrics ('test/miou' and 'test/f1' share one).

  Args:
    metrics: lines of {"step": 1, "time": 0.0, name: value or null, ...}.
    out: the PNG.

  Raises:
    ValueError: no line holds a metric.
  """
  from matplotlib.figure import Figure  # slow to import, seldom needed
  from matplotlib.ticker import MaxNLocator

  groups = {}
  for name, points in _series(metrics).items():
    groups.setdefault(_group(name), {})[name] = np.array(points).T
  if not groups:
    raise ValueError(f'{metrics} holds no metrics to draw')
  first = [group for group in ('loss', 'speed') if group in groups]
  order = first[:1] + sorted(groups.keys() - set(first)) + first[1:]
  across = min(len(order), 3)
  down = -(-len(order) // across)
  figure = Figure(
    figsize=(5.2 * across, 3.6 * down), dpi=110, layout='constrained'
  )
  plots = np.ravel(figure.subplots(down, across, squeeze=False))
  for plot in plots[len(order) :]:
    plot.set_axis_off()
  for plot, group in zip(plots, order, strict=False):
    lines = sorted(groups[group].items(), key=lambda item: len(item[0]))
    for i, (name, (steps, values)) in enumerate(lines):
      colour = np.array(PALETTE[1 + (i + 4) % 20]) / 255
      few = len(steps) <= 40
      smooth = _smooth(values)
      if not few:
        plot.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
      plot.plot(
        steps,
        values if few else smooth,
        color=colour,
        linewidth=1.8,
        marker='o' if few else None,
        markersize=3.5,
        label=name.removeprefix(f'{group}/'),
      )
    values = np.concatenate([v for _, v in groups[group].values()])
    if group == 'loss' and values.min() > 0 and np.ptp(np.log10(values)) > 1.5:
      plot.set_yscale('log')
    plot.set_title({'speed': 'steps per second'}.get(group, group), size=12)
    plot.set_xlabel('step')
    plot.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    plot.grid(color='0.9', linewidth=0.8)
    plot.set_axisbelow(True)
    plot.spines[['top', 'right']].set_visible(False)
    if group == 'speed':
      plot.set_ylim(0, None)
    elif len(lines) > 1 or lines[0][0] != group:
      plot.legend(frameon=False, fontsize=9)
  pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(out, format='png')


def _differs(label, distance):
  """Returns where a 4-neighbour up to `distance` away has another label."""
  height, width = label.shape
  padded = np.pad(label, distance, mode='edge')
  differs = np.zeros(label.shape, bool)
  for d in range(1, distance + 1):
    for y, x in ((d, 0), (-d, 0), (0, d), (0, -d)):
      shifted = padded[
        distance + y : distance + y + height,
        distance + x : distance + x + width,
      ]
      differs |= shifted != label
  return differs


def _font(size):
  return ImageFont.load_default(size)


def _scaled(picture, height):
  picture = Image.fromarray(np.asarray(picture))
  width = max(1, round(picture.width * height / picture.height))
  # Enlarged pixels stay squares, so that outlines stay crisp.
  grows = height >= 2 * picture.height
  kind = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
  return picture.resize((width, height), kind)


def _caption(title, width):
  """Returns a caption as a picture of the given width, centred."""
  lines = []
  for i, text in enumerate(title.split('\n')):
    size, colour = (18, _INK) if i == 0 else (15, _FAINT)
    words = text.split()
    while size > 8 and any(_font(size).getlength(w) > width for w in words):
      size -= 1
    font = _font(size)
    lines += [(line, font, colour) for line in _wrapped(words, font, width)]
  heights = [sum(font.getmetrics()) + 1 for _, font, _ in lines]
  sheet = Image.new('RGB', (width, max(1, sum(heights))), _PAPER)
  draw = ImageDraw.Draw(sheet)
  top = 0
  for (text, font, colour), height in zip(lines, heights, strict=True):
    draw.text((width / 2, top), text, colour, font, anchor='ma')
    top += height
  return sheet


def _wrapped(words, font, width):
  """Yields lines of words no wider than `width`; breaks words if it must."""
  line = ''
  for word in words:
    joined = f'{line} {word}'.strip()
    if font.getlength(joined) <= width:
      line = joined
      continue
    if line:
      yield line
    line = word
    while font.getlength(line) > width and len(line) > 1:
      fits = next(
        n for n in range(len(line) - 1, 0, -1)
        if n == 1 or font.getlength(line[:n]) <= width
      )  # fmt: skip
      yield line[:fits]
      line = line[fits:]
  if line:
    yield line


def _series(path):
  """Returns {name: [(step, value), ...]} of a metrics.jsonl, without nulls."""
  series = {}
  for line in pathlib.Path(path).read_text().splitlines(keepends=True):
    if not line.endswith('\n'):
      continue  # a killed run broke off here
    row = json.loads(line)
    for name, value in row.items():
      if name not in ('step', 'time') and value is not None:
        series.setdefault(name, []).append((row['step'], value))
  return series


def _group(name):
  if 'loss' in name:
    return 'loss'
  if ('steps' in name and 'sec' in name) or name == 'steps/s':
    return 'speed'
  return name.split('/')[0]


def _smooth(values):
  """Returns a centred moving average over a fortieth of the run."""
  window = max(3, len(values) // 40) | 1
  padded = np.pad(values, window // 2, mode='edge')
  return np.convolve(padded, np.ones(window) / window, mode='valid')
