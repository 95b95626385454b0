"""Where labels or values of a mask meet: most of a mask is far from there."""

import numpy as np

_PART = 1 << 20  # pixels that are looked at at a time
NEXT = ((0, 1), (1, 0), (1, 1), (1, -1))  # and back: the eight around a pixel
WIDE = (*NEXT[:2], (0, 2), (2, 0), (2, 2), (2, -2))  # two pixels far


def met(values, steps):
  """Yields the pixels that differ from one around them, in parts.

  Args:
    values: integers [H, W].
    steps: (rows, columns) to look at, and the opposite of each.

  Yields:
    (values [k], those around each [2 * steps, k]).
  """
  reach = max(max(map(abs, step)) for step in steps)
  both = (*steps, *((-y, -x) for y, x in steps))
  height, width = values.shape
  rows = max(1, _PART // width)
  for top in range(0, height, rows):
    end = min(top + rows, height)
    first, last = max(0, top - reach), min(height, end + reach)
    beyond = (first - (top - reach), end + reach - last)
    part = np.pad(values[first:last], (beyond, (reach, reach)), mode='edge')
    around = [
      part[reach + y : reach + y + end - top, reach + x : reach + x + width]
      for y, x in both
    ]
    here = part[reach : reach + end - top, reach : reach + width]
    differs = np.zeros(here.shape, bool)
    for there in around:
      differs |= here != there
    if differs.any():
      yield here[differs], np.stack([there[differs] for there in around])
