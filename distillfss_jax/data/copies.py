"""Near-copies: test images that show what a training image shows.

One scene under several exposures, slices of one patient or frames of one film
are other pixels, and yet a score over them says little of new images. Exact
copies are left out when a dataset is prepared; these are found and said.
"""

import collections

import numpy as np
from scipy import ndimage

_CELLS = 24  # an image is looked at as so many cells, each way
_NEIGHBOURS = 7  # cells that the light of one is compared with
# Found on 392 magnetic tiles under several exposures: of tiles that have
# another exposure 9 in 10 are found; of 664 nuclei one pair, a real one.
_ALIKE = 0.8
_ALIKE_WITH_ONE_MASK = 0.4
_BLOCK = 256  # test images that are compared at a time


def look(pixels):
  """What an image looks like, whatever its size, light and contrast.

  Each of 24x24 cells against the cells around it, in units of how much those
  vary: a perceptual hash that keeps the strength. The scalar product of two
  is their likeness, -1 to 1.

  Args:
    pixels: uint8 [H, W, 3].

  Returns:
    float16 [576] of norm 1, or zeros where the image is blank.
  """
  # Some dozens of pixels each way are enough for a cell.
  step = max(1, min(pixels.shape[:2]) // (_CELLS * 32))
  pixels = pixels[::step, ::step]
  rows, columns = (
    np.linspace(0, n, _CELLS, endpoint=False).astype(int)
    for n in pixels.shape[:2]
  )
  cells = np.zeros((_CELLS, _CELLS))
  ends = [*rows[1:], pixels.shape[0]]
  for i, (top, end) in enumerate(zip(rows, ends, strict=True)):
    band = pixels[top : max(end, top + 1)]
    light = band.mean((0, 2), dtype=np.float32)
    wide = np.diff([*columns, len(light)]).clip(1)
    cells[i] = np.add.reduceat(light, columns) / wide
  if cells.std() < 1:
    return np.zeros(_CELLS**2, np.float16)
  own = cells - ndimage.uniform_filter(cells, _NEIGHBOURS)
  vary = ndimage.uniform_filter(own**2, _NEIGHBOURS).clip(min=0)
  own /= np.sqrt(vary) + 1
  own = (own - own.mean()).ravel()
  return (own / max(np.linalg.norm(own), 1e-6)).astype(np.float16)


def near(splits):
  """Finds the test images that are near-copies of a training image.

  They are very much alike, or alike and have the same mask.

  Args:
    splits: dict of split name -> list of `builder.Checked`; those whose names
      begin with 'test' are for testing.

  Returns:
    list of [test id, training id, likeness], most alike first.
  """
  tests, trains = [], []
  for name, checked in splits.items():
    (tests if name.startswith('test') else trains).extend(checked)
  if not tests or not trains:
    return []
  with_mask = collections.defaultdict(list)
  for i, one in enumerate(trains):
    if one.mask:
      with_mask[one.mask].append(i)
  seen = np.stack([one.look for one in trains]).astype(np.float32)
  found = []
  for first in range(0, len(tests), _BLOCK):
    block = tests[first : first + _BLOCK]
    alike = np.stack([one.look for one in block]).astype(np.float32) @ seen.T
    for one, row in zip(block, alike, strict=True):
      best = int(row.argmax())
      if row[best] < _ALIKE:
        same = with_mask.get(one.mask, [best])
        best = max(same, key=lambda i: row[i])
        if not one.mask or one.mask != trains[best].mask:
          continue
        if row[best] < _ALIKE_WITH_ONE_MASK:
          continue
      found.append([one.id, trains[best].id, round(float(row[best]), 3)])
  return sorted(found, key=lambda x: (-x[2], x[0]))
