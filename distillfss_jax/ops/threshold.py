"""Otsu's threshold: a grey image in two, without being told anything."""

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])  # of RGB, ITU-R BT.601
_LEVELS = 256


def brightness(image: np.ndarray) -> np.ndarray:
  """The luminance of uint8 [..., 3], as uint8."""
  return np.rint(image @ LUMA).astype(np.uint8)


def otsu(grey: np.ndarray) -> float:
  """The threshold between whose sides the variance is largest (Otsu 1979).

  256 levels are tried, from the darkest value there is to the lightest: an
  image that is dark as a whole is cut as finely as any other.

  Args:
    grey: values of any shape and range.

  Returns:
    A threshold; what is above it is the lighter side.
  """
  counts, edges = np.histogram(grey, _LEVELS, (grey.min(), grey.max()))
  middle = (edges[1:] + edges[:-1]) / 2
  share = counts / counts.sum()
  below = share.cumsum()
  mean = (share * middle).cumsum()
  spread = below * (1 - below)
  between = np.divide(
    (mean[-1] * below - mean) ** 2,
    spread,
    out=np.zeros(_LEVELS),
    where=spread > 0,
  )
  return float(middle[between.argmax()])


def minority(grey: np.ndarray) -> np.ndarray:
  """Which pixels lie on the smaller side of Otsu's threshold, bool."""
  lighter = grey > otsu(grey)
  return ~lighter if lighter.mean() > 0.5 else lighter
