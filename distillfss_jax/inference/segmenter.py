"""A trained segmenter: images of any size in, labels and probabilities out.

An image is seen whole, shrunk to the model's size as in training and testing,
and the answer stretched back; or through windows of the size that the images
of the support had, which overlap and are blended. Either way it comes in bands
of rows, so that memory does not grow with the image.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from distillfss_jax.data import download, transforms

OVERLAP = 0.25  # of a window, with its neighbour
_LEAST, _MOST = 8, 8192  # pixels of a window's sides
_BAND = 256  # rows of an image that is seen whole


@dataclasses.dataclass(frozen=True)
class Band:
  """Rows of an answer.

  top: the first of them.
  probabilities: float32 [1+n, rows, W], background first.
  """

  top: int
  probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class Segmenter:
  """What `distillfss_jax.load` gives; see `predict`.

  Attributes:
    answer: uint8 images [b, S, S, 3] to logits [b, h, w, 1+n], or to anything
      whose softmax is the same; NumPy's or JAX's.
    size: S, pixels.
    classes: names of labels 1..n.
    palette: the colours of labels 0..n, (r, g, b) each.
    seen: rows and columns of a usual image of the support.
    digest: of the weights; two segmenters that share it answer alike.
    batch_size: windows of an image that are answered at once.
  """

  answer: Callable
  size: int
  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  seen: tuple[int, int]
  digest: str
  batch_size: int = 1

  def predict(self, image, *, scale: float | None = None) -> np.ndarray:
    """The labels of an image, uint8 [H, W]: 0 is background, 1..n classes.

    Args:
      image: uint8 [H, W, 3] or [H, W], a Pillow image, or the path of a file,
        which is turned as its EXIF orientation says. Any size.
      scale: None sees it whole, as the run's test did. A number sees it
        through windows, for objects so many times as large, in pixels, as
        those in the images of the support; 1 for as large.

    Raises:
      ValueError: it is no image, or the scale no size.
      OSError: the file cannot be read.
    """
    image = as_image(image)
    labels = np.empty(image.shape[:2], np.uint8)
    for band in self.bands(image, scale=scale):
      rows = band.probabilities.argmax(0)
      labels[band.top : band.top + len(rows)] = rows
    return labels

  def probabilities(self, image, *, scale: float | None = None) -> np.ndarray:
    """The probabilities of all labels, float32 [H, W, 1+n], background first.

    How sure it is of its labels, the confidence, is the largest: `.max(-1)`.
    Arguments and errors are those of `predict`.
    """
    image = as_image(image)
    made = np.empty((*image.shape[:2], 1 + len(self.classes)), np.float32)
    for band in self.bands(image, scale=scale):
      rows = np.moveaxis(band.probabilities, 0, -1)
      made[band.top : band.top + len(rows)] = rows
    return made

  def window(self, scale: float) -> tuple[int, int]:
    """Rows and columns of the windows for objects of a scale."""
    if not 0 < scale < math.inf:
      raise ValueError(f'--scale {scale:g} must be a number above 0')
    height, width = (round(side * scale) for side in self.seen)
    if min(height, width) < _LEAST or max(height, width) > _MOST:
      raise ValueError(
        f'--scale {scale:g} would make windows of {width}x{height} pixels, at '
        f'1 they are {self.seen[1]}x{self.seen[0]}: {_LEAST}x{_LEAST} is the '
        f'least, {_MOST}x{_MOST} the most'
      )
    return height, width

  def bands(
    self, image: np.ndarray, *, scale: float | None = None
  ) -> Iterator[Band]:
    """The answer for an image, from the top down.

    Args:
      image: uint8 [H, W, 3].
      scale: see `predict`.
    """
    if scale is None:
      return self._whole(image)
    return self._windows(image, self.window(scale))

  def _whole(self, image):
    height, width = image.shape[:2]
    [logits] = self._answers([image])
    wide = _stretched(logits, 2, width)
    for top in range(0, height, _BAND):
      rows = range(top, min(height, top + _BAND))
      yield Band(top, _softmax(_stretched(wide, 1, height, rows)))

  def _windows(self, image, window):
    height, width = image.shape[:2]
    down, across = window
    # What an image lacks to a window is itself in a mirror: the window keeps
    # its size, and objects theirs.
    image = _mirrored(image, window)
    tops, lefts = (
      _starts(most, side)
      for most, side in zip(image.shape, window, strict=False)
    )
    weight = _ramp(down)[:, None] * _ramp(across)
    sums = np.zeros((1 + len(self.classes), down, image.shape[1]), np.float32)
    total = np.zeros(sums.shape[1:], np.float32)
    for top, following in zip(tops, [*tops[1:], image.shape[0]], strict=True):
      parts = [image[top : top + down, x : x + across] for x in lefts]
      for left, logits in zip(lefts, self._answers(parts), strict=True):
        wide = _stretched(logits, 2, across)
        place = slice(left, left + across)
        sums[..., place] += weight * _softmax(_stretched(wide, 1, down))
        total[..., place] += weight
      # The windows below begin at `following`: what lies above is done.
      done = following - top
      made = sums[:, :done] / total[:done]
      if top < height:
        yield Band(top, made[:, : height - top, :width])
      for array in (sums, total):
        kept = array[..., done:, :].copy()
        array[..., : kept.shape[-2], :] = kept
        array[..., kept.shape[-2] :, :] = 0

  def _answers(self, parts):
    """Yields the logits [1+n, h, w] of parts of an image."""
    for first in range(0, len(parts), self.batch_size):
      some = parts[first : first + self.batch_size]
      # One shape, however many there are: it compiles once, and what comes of
      # an image does not depend on how many are left.
      batch = np.zeros((self.batch_size, self.size, self.size, 3), np.uint8)
      for row, part in zip(batch, some, strict=False):
        row[:] = transforms.resize_image(np.ascontiguousarray(part), self.size)
      answers = np.asarray(self.answer(batch), np.float32)
      for answer in answers[: len(some)]:
        yield np.ascontiguousarray(np.moveaxis(answer, -1, 0))


def as_image(image) -> np.ndarray:
  """An array, a Pillow image or a file as uint8 [H, W, 3].

  Raises:
    ValueError: it is none.
    OSError: the file cannot be read.
  """
  if isinstance(image, str | os.PathLike):
    with open(image, 'rb') as file:
      return download.photo(file.read(), str(image))[0]
  if isinstance(image, Image.Image):
    if image.mode[0] in 'IF':
      # Pillow would clip the values to 255: a white image, without a word.
      raise ValueError(
        f'the image has more than 8 bits a pixel (mode {image.mode}): give it '
        'as uint8'
      )
    image = image.convert('RGB')
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
    raise ValueError(
      f'an image is uint8 [H, W, 3] or [H, W], this is {image.dtype} '
      f'{list(image.shape)}'
    )
  if image.ndim == 2:
    image = image[..., None].repeat(3, 2)
  if image.shape[2] != 3:
    raise ValueError(
      f'an image has 3 channels, red, green and blue, this {image.shape[2]}'
    )
  return image


def _stretched(logits, axis, size, only=None):
  """Interpolates [c, h, w] along an axis, by half pixels, without antialias.

  Args:
    logits: float32.
    axis: 1 or 2.
    size: of the whole result along it.
    only: a range of places in the result; None for all.
  """
  n = logits.shape[axis]
  only = range(size) if only is None else only
  places = (np.arange(only.start, only.stop) + 0.5) * (n / size) - 0.5
  places = np.clip(places, 0, n - 1)
  low = places.astype(np.int64)
  share = (places - low).astype(np.float32).reshape(-1, *(1,) * (2 - axis))
  first = logits.take(low, axis)
  return first * (1 - share) + logits.take(np.minimum(low + 1, n - 1), axis) * (
    share
  )


def _softmax(logits):
  """Over the first axis."""
  made = np.exp(logits - logits.max(0))
  made /= made.sum(0)
  return made


def _mirrored(image, window):
  """An image that is at least a window large."""
  lacking = [
    (0, max(0, side - n)) for n, side in zip(image.shape, window, strict=False)
  ]
  return np.pad(image, [*lacking, (0, 0)], 'symmetric')


def _starts(length, window):
  """Where windows begin: evenly spaced, each overlaps its neighbours."""
  step = max(1, int(window * (1 - OVERLAP)))
  count = 1 + -(-(length - window) // step)
  return np.linspace(0, length - window, count).round().astype(int).tolist()


def _ramp(window):
  """The weights of a window's pixels along a side, least at its ends."""
  place = np.arange(window) + 0.5
  far = np.minimum(place, window - place)
  return np.minimum(1, far / (OVERLAP * window)).astype(np.float32)
