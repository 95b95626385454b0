"""Which images of a folder to annotate, when only a few can be.

Those that stand for the others: each image is a point of frozen features, and
the chosen ones are the centres that leave the images nearest to one of them.
No label is read.
"""

import numpy as np


def pooled(maps: np.ndarray) -> np.ndarray:
  """Maps [N, h, w, c] to mean and deviation of each channel, [N, 2c]."""
  x = np.asarray(maps, np.float64)
  return np.concatenate([x.mean((1, 2)), x.std((1, 2))], 1)


def describe(parts: list[np.ndarray]) -> np.ndarray:
  """Images as points.

  Args:
    parts: of maps of several strides what `pooled` gives, [N, 2c] each.

  Returns:
    [N, d] float64; each feature has deviation 1, and each map the same weight
    whatever its channels.
  """
  points = []
  for part in parts:
    part = (part - part.mean(0)) / np.maximum(part.std(0), 1e-6)
    points.append(part / np.sqrt(part.shape[1]))
  return np.concatenate(points, 1)


def rank(points: np.ndarray, count: int) -> np.ndarray:
  """The `count` images that together lie nearest to all, the best first.

  Greedy k-medians: each is the image that most lowers the mean distance from
  an image to the nearest chosen one, so that the first k of more are the k of
  fewer. Its gain is within 1 - 1/e of the best choice's (Nemhauser et al.
  1978). The farthest-first rule for k-centres (Gonzalez 1985) would choose
  outliers, which stand for nothing but themselves.

  Args:
    points: [N, d], as `describe` gives them.
    count: how many to choose.

  Returns:
    int64 [count], indices; of equals the earlier image.

  It takes 4 bytes for each pair of images: 1.6 GB for 20,000.

  Raises:
    ValueError: there are not so many images.
  """
  points = np.asarray(points, np.float32)
  n = len(points)
  if not 1 <= count <= n:
    raise ValueError(f'{count} images asked for, out of {n}')
  distance = _distances(points)
  # Before any is chosen, all images are as far as the worst choice leaves them.
  nearest = np.full(n, distance.max())
  chosen = []
  for _ in range(count):
    left = np.array([np.minimum(row, nearest).mean() for row in distance])
    left[chosen] = np.inf
    chosen.append(int(left.argmin()))
    nearest = np.minimum(nearest, distance[chosen[-1]])
  return np.array(chosen)


def _distances(points):
  square = (points**2).sum(1)
  between = points @ points.T
  between *= -2
  between += square
  between += square[:, None]
  np.maximum(between, 0, out=between)
  return np.sqrt(between, out=between)
