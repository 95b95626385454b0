"""Masks as COCO writes them, polygons and run lengths, by pycocotools."""

import threading
import warnings

import numpy as np


class Painter:
  """Turns a segmentation into pixels; may be shared by threads.

  pycocotools is not among the requirements: who has no such masks needs none.
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
    if not form:
      raise ValueError('it has no polygon and no run lengths')
    try:
      if not isinstance(form, dict):
        # pycocotools would take two points for a box.
        if any(np.size(x) < 6 or np.size(x) % 2 for x in form):
          raise ValueError('a polygon needs three points or more')
        form = self._mask.merge(self._mask.frPyObjects(form, *size))
      elif list(form['size']) != list(size):
        raise ValueError(f'its size is {form["size"]}, not {list(size)}')
      elif isinstance(form['counts'], list):
        if sum(form['counts']) != size[0] * size[1]:
          raise ValueError('its counts are of another number of pixels')
        form = self._mask.frPyObjects(form, *size)
      # What is caught is the same for all threads: one at a time.
      with self._lock, warnings.catch_warnings():
        # Its array type does not know the arguments of NumPy 2.
        warnings.simplefilter('ignore', DeprecationWarning)
        return self._mask.decode(form).astype(bool)
    except Exception as error:  # pycocotools raises Exception itself
      raise ValueError(f'{error}') from error
