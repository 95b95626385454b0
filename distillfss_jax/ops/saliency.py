"""What a soft map of a foreground is worth, by the field's evaluators.

Fan et al., "Structure-measure", ICCV 2017; Fan et al., "Enhanced-alignment
measure", IJCAI 2018; Margolin et al., "How to evaluate foreground maps?", CVPR
2014; as PraNet and those after it use them on polyps. Maps have 8 bits, as the
files have that are compared: level j stands for j / 255. All of it is NumPy on
the host, in float64.
"""

import dataclasses

import numpy as np
import scipy.ndimage

LEVELS = np.arange(256) / 255
# Parity: levels lie at the thresholds, so that the last bit of a threshold
# decides. These are the evaluator's own; (255 - k) / 255 would move the means
# over thresholds by 5e-4.
THRESHOLDS = np.linspace(1, 0, 256)
# The least level that is foreground at each threshold.
_LEAST = np.searchsorted(LEVELS, THRESHOLDS)
CURVES = ('dice', 'iou', 'sensitivity', 'specificity', 'e_measure')
_HALF = int(np.searchsorted(LEVELS, 0.5))
_EPS = np.finfo(float).eps
# Of the weighted F-measure: how far errors spread, in pixels.
_SPREAD, _SIGMA = 3, 5.0


@dataclasses.dataclass(frozen=True)
class Found:
  """Scores of one image.

  curves: float64 [5, 256], by `CURVES` and `THRESHOLDS`.
  s_measure, weighted_f, mae, dice_at_half: numbers.
  """

  curves: np.ndarray
  s_measure: float
  weighted_f: float
  mae: float
  dice_at_half: float


def score(levels: np.ndarray, mask: np.ndarray) -> Found:
  """All scores of a map.

  Args:
    levels: uint8 [H, W].
    mask: bool [H, W]. Where it is empty, all but the S-measure, the E-measure
      and the mean error are 0.
  """
  inside, outside = (
    np.bincount(levels[x], minlength=256) for x in (mask, ~mask)
  )
  dice = (
    2
    * inside[_HALF:].sum()
    / max(inside.sum() + (inside + outside)[_HALF:].sum(), 1)
  )
  error = (inside * (1 - LEVELS) + outside * LEVELS).sum() / levels.size
  return Found(
    curves(inside, outside),
    s_measure(levels, mask, inside, outside),
    weighted_f(levels, mask),
    float(error),
    float(dice),
  )


def curves(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
  """[5, 256] by `CURVES` and `THRESHOLDS`, from two histograms [256].

  Args:
    inside: pixels of the mask at each level. outside: the other ones.
  """
  hits, wrong = (
    np.cumsum(x[::-1])[::-1][_LEAST].astype(float) for x in (inside, outside)
  )
  there, rest = float(inside.sum()), float(outside.sum())
  missed, right = there - hits, rest - wrong
  # Parity: without a hit all are 0, specificity too.
  found = [
    _ratio(2 * hits, there + hits + wrong),
    _ratio(hits, there + wrong),
    _ratio(hits, there),
    np.where(hits > 0, _ratio(right, rest), 0),
    _e_measure(hits, wrong, missed, right),
  ]
  return np.stack(found)


def _ratio(x, y):
  x, y = np.broadcast_arrays(np.asarray(x, float), y)
  return np.divide(x, y, out=np.zeros_like(x), where=y > 0)


def _e_measure(hits, wrong, missed, right):
  """[256]; pixels of a binary map and a mask are of four kinds, no more."""
  pixels = (hits + wrong + missed + right)[0]
  there, marked = (hits + missed)[0], hits + wrong
  if there == 0:
    return (pixels - marked) / (pixels - 1 + _EPS)
  if there == pixels:
    return marked / (pixels - 1 + _EPS)
  total = np.zeros(len(hits))
  for count, is_marked, is_there in (
    (hits, 1, 1), (wrong, 1, 0), (missed, 0, 1), (right, 0, 0),
  ):  # fmt: skip
    x, y = is_marked - marked / pixels, is_there - there / pixels
    alike = 2 * x * y / (x**2 + y**2 + _EPS)
    total += count * (alike + 1) ** 2 / 4
  return total / (pixels - 1 + _EPS)


def s_measure(levels, mask, inside, outside) -> float:
  """Half of the objects' likeness, half of the regions'.

  Args:
    levels, mask: as of `score`. inside, outside: as of `curves`.
  """
  share = mask.mean()
  mean = ((inside + outside) * LEVELS).sum() / levels.size
  if share == 0:
    return float(1 - mean)
  if share == 1:
    return float(mean)
  objects = share * _of_object(inside, LEVELS)
  objects += (1 - share) * _of_object(outside, 1 - LEVELS)
  return float(max(0.5 * objects + 0.5 * _of_regions(levels, mask), 0))


def _of_object(counts, values):
  """How bright and even the map is in a region, from a histogram [256]."""
  # Parity: of the population; the original in MATLAB divides by n - 1.
  mean = (counts * values).sum() / counts.sum()
  spread = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
  return 2 * mean / (mean**2 + 1 + spread + _EPS)


def _of_regions(levels, mask):
  """The likeness of four parts that meet in the mask's centroid."""
  row, column = (int(np.round(x.mean())) for x in np.nonzero(mask))
  total = 0.0
  for rows in (slice(None, row), slice(row, None)):
    for columns in (slice(None, column), slice(column, None)):
      part = mask[rows, columns]
      # Parity: a part without a pixel makes the original's score no number.
      if part.size:
        total += part.size * _alike(LEVELS[levels[rows, columns]], part)
  return total / mask.size


def _alike(x, y):
  """Structural likeness of a map [h, w] and a mask."""
  n = x.size - 1 + _EPS
  mean_x, mean_y = x.mean(), y.mean()
  dx, dy = x - mean_x, y - mean_y
  alpha = 4 * mean_x * mean_y * (dx * dy).sum() / n
  beta = (mean_x**2 + mean_y**2) * ((dx**2).sum() / n + (dy**2).sum() / n)
  if alpha != 0:
    return alpha / (beta + _EPS)
  return 1.0 if beta == 0 else 0.0


def weighted_f(levels, mask) -> float:
  """The F-measure whose errors weigh more where they are far, and spread.

  Args:
    levels, mask: as of `score`.
  """
  if not mask.any():
    return 0.0
  error = np.abs(LEVELS[levels] - mask)
  far = scipy.ndimage.distance_transform_edt(~mask)
  # Errors spread by a few pixels, and count so in the foreground alone: that is
  # all of the image that has to be seen.
  box = tuple(
    slice(max(x.min() - _SPREAD, 0), x.max() + _SPREAD + 1)
    for x in np.nonzero(mask)
  )
  part, near = mask[box], error[box]
  rows, columns = scipy.ndimage.distance_transform_edt(
    ~part, return_distances=False, return_indices=True
  )
  taps = np.exp(-(np.arange(-_SPREAD, _SPREAD + 1) ** 2) / (2 * _SIGMA**2))
  taps /= taps.sum()
  spread = near[rows, columns]
  for axis in (0, 1):
    # Parity: the border goes on; the original in MATLAB pads with zeros.
    spread = scipy.ndimage.convolve1d(spread, taps, axis, mode='nearest')
  inside = np.minimum(spread[part], near[part])
  outside = error[~mask] * (2 - np.exp(np.log(0.5) / 5 * far[~mask]))
  hits = mask.sum() - inside.sum()
  recall = 1 - inside.mean()
  precision = hits / (hits + outside.sum() + _EPS)
  return float(2 * recall * precision / (recall + precision + _EPS))


def soft_dice(shared, marked, there):
  """The Dice of a map that nobody cut at a threshold, to four decimals.

  Args:
    shared: the sum of the map over the mask. marked: over the image.
    there: the mask's pixels.
  """
  return np.round((2 * shared + 1) / (marked + there + 1), 4)
