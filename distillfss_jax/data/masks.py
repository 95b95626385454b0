"""Objects as label tools write them: outlines and run lengths, to pixels."""

import threading
import warnings

import numpy as np
from PIL import Image, ImageDraw


class Painter:
  """Turns COCO's segmentations into pixels; may be shared by threads.

  Polygons are painted by pycocotools, as all do who use COCO. It is not among
  the requirements: who has no such masks needs none.
  """

  def __init__(self, name):
    """Takes the name of the file that needs it; ValueError without it."""
    try:
      from pycocotools import mask
    except ImportError as error:
      raise ValueError(
        f'{name} needs pycocotools: pip install pycocotools'
      ) from error
    self._mask, self._lock = mask, threading.Lock()

  def paint(self, form, size):
    """One instance as bool [H, W].

    Args:
      form: a list of polygons [x, y, x, y, ...] of three points or more, or a
        dict with 'size' and 'counts', a list of run lengths or COCO's text.
      size: (H, W).

    Raises:
      ValueError: it is none of these, or of another size.
    """
    if isinstance(form, dict):
      return _runs(form, size)
    if not isinstance(form, list | tuple) or not len(form):
      raise ValueError('it has no polygon and no run lengths')
    polygons = [_coordinates(polygon, size) for polygon in form]
    try:
      # What is caught is the same for all threads: one at a time.
      with self._lock, warnings.catch_warnings():
        # Its array type does not know the arguments of NumPy 2.
        warnings.simplefilter('ignore', DeprecationWarning)
        packed = self._mask.frPyObjects(polygons, *size)
        return self._mask.decode(self._mask.merge(packed)).astype(bool)
    except Exception as error:  # pycocotools raises Exception itself
      raise ValueError(f'{error}') from error


def fill(polygon, size):
  """One outline as bool [H, W], its border included, as LabelMe paints it.

  Args:
    polygon: coordinates x, y, x, y, ... of three points or more, in pixels.
    size: (H, W).

  Raises:
    ValueError: it is no outline.
  """
  points = _coordinates(polygon, size)
  canvas = Image.new('1', size[::-1])
  ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
  return np.array(canvas)


def _coordinates(polygon, size):
  """Checks an outline; pycocotools would crash or fill the memory with some."""
  try:
    points = np.array(polygon, np.float64).ravel()
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError('a polygon must be a list of numbers') from error
  # pycocotools would take two points for a box.
  if points.size < 6 or points.size % 2:
    raise ValueError('a polygon needs three points or more')
  height, width = size
  for name, values, most in zip(
    'xy', (points[::2], points[1::2]), (width, height), strict=True
  ):
    odd = values[~((values >= -most) & (values <= 2 * most))]
    if odd.size:  # also where it is no number
      raise ValueError(
        f'a polygon has {name} = {odd[0]:g}, far outside its image of '
        f'{width}x{height}'
      )
  return points.tolist()


def _runs(form, size):
  """Run lengths, down the columns, as bool [H, W]."""
  height, width = size
  if not {'size', 'counts'} <= form.keys():
    raise ValueError('run lengths need size and counts')
  said, counts = form['size'], form['counts']
  if not isinstance(said, list | tuple) or list(said) != [height, width]:
    raise ValueError(f'its size is {said!r:.40}, not {[height, width]}')
  if isinstance(counts, str | bytes):
    counts = _unpacked(counts, height * width)
  elif not isinstance(counts, list | tuple) or not all(
    type(x) is int and x >= 0 for x in counts
  ):
    raise ValueError('its counts are no list of run lengths, and no text')
  if sum(counts) != height * width:
    raise ValueError('its counts are of another number of pixels')
  inside = np.arange(len(counts)) % 2 == 1
  return np.repeat(inside, counts).reshape(width, height).T


def _unpacked(text, most):
  """The run lengths in COCO's text.

  A number takes one to seven letters of 5 bits each, the low ones first; from
  the fourth number on it is the difference to the one two before.
  """
  try:
    letters = text.encode('ascii') if isinstance(text, str) else text
  except UnicodeEncodeError as error:
    raise ValueError('its counts are no text of run lengths') from error
  counts, number, bits = [], 0, 0
  for letter in letters:
    value = letter - 48
    if not 0 <= value < 64 or bits > 30:
      raise ValueError('its counts are no text of run lengths')
    number |= (value & 31) << bits
    bits += 5
    if value & 32:
      continue
    if value & 16:
      number -= 1 << bits
    if len(counts) > 2:
      number += counts[-2]
    if not 0 <= number <= most:
      raise ValueError('its counts are of another number of pixels')
    counts.append(number)
    number, bits = 0, 0
  if bits:
    raise ValueError('its counts end within a number')
  return counts
