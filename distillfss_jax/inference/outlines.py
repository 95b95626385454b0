"""Label maps as outlines: connected parts, traced along the pixels' edges.

A part is what hangs together over the sides of pixels. Its outline has corners
of pixels as points, (0, 0) being the upper left one of the image, and the part
on its right hand as one sees it: its outer ring runs clockwise on the screen,
its holes the other way round. Nothing is smoothed: the outlines, or run lengths
or a small mask where a format has no word for holes, give back every pixel.
"""

import base64
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import ndimage

from distillfss_jax.data import download, masks


@dataclasses.dataclass(frozen=True)
class Part:
  """A connected part of a class.

  label: its class, 1..n.
  top, left: where its box begins.
  mask: bool [h, w], what of the box it is.
  """

  label: int
  top: int
  left: int
  mask: np.ndarray

  @property
  def area(self) -> int:
    """Its pixels."""
    return int(np.count_nonzero(self.mask))

  def rings(self) -> list[np.ndarray]:
    """Its outlines, int [p, 2] of x and y, the outer one first."""
    found = _rings(self.mask)
    found.sort(key=signed_area, reverse=True)
    return [ring + (self.left, self.top) for ring in found]


def parts(labels: np.ndarray, classes: int) -> Iterator[Part]:
  """The connected parts of a label map, by class, from the top down.

  Args:
    labels: integers [H, W], 0 background.
    classes: n; other labels have no parts.
  """
  for label in range(1, 1 + classes):
    numbers, _ = ndimage.label(labels == label)
    for number, box in enumerate(ndimage.find_objects(numbers), 1):
      rows, columns = box
      yield Part(label, rows.start, columns.start, numbers[box] == number)


def signed_area(ring: np.ndarray) -> float:
  """The area within a ring, positive where it runs clockwise on the screen."""
  x, y = ring.T.astype(float)
  return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _rings(mask):
  """The rings around the pixels of a mask that hangs together."""
  # A corner is where a row's and a column's line of edges both turn. Along any
  # line of the grid corners come in pairs, an edge from each first to its
  # second.
  padded = np.pad(mask, 1).astype(np.int8)
  upper, lower = padded[:-1], padded[1:]
  odd = (upper[:, :-1] ^ upper[:, 1:] ^ lower[:, :-1] ^ lower[:, 1:]) == 1
  # Where two pixels touch by their corners alone, two rings touch. The pixels
  # hang together elsewhere, so that each ring turns around one of the two that
  # are not of the part, and none meets itself.
  falls = (upper[:, :-1] & lower[:, 1:]) > (upper[:, 1:] | lower[:, :-1])
  rises = (upper[:, 1:] & lower[:, :-1]) > (upper[:, :-1] | lower[:, 1:])
  y, x = np.nonzero(odd)
  twice = np.argwhere(falls | rises)
  y = np.concatenate([y, np.repeat(twice[:, 0], 2)])
  x = np.concatenate([x, np.repeat(twice[:, 1], 2)])
  # Of a double corner the first copy goes on to the left, the second to the
  # right; up and down are crossed where the pixels fall to the right.
  copy = np.zeros(len(y), int)
  copy[len(y) - 2 * len(twice) :] = np.tile([0, 1], len(twice))
  crossed = np.zeros(len(y), bool)
  crossed[len(y) - 2 * len(twice) :] = np.repeat(falls[tuple(twice.T)], 2)
  across = _paired(np.lexsort((copy, x, y)))
  down = _paired(np.lexsort((np.where(crossed, 1 - copy, copy), y, x)))
  points, left = np.stack([x, y], 1), np.ones(len(y), bool)
  found = []
  for start in range(len(y)):
    if not left[start]:
      continue
    ring, here = [], start
    while left[here]:
      there = across[here]
      left[[here, there]] = False
      ring += [here, there]
      here = down[there]
    ring = points[ring]
    # Its first edge runs along a row: the part must lie below it if it runs to
    # the right, above it otherwise.
    (x0, y0), (x1, _) = ring[:2]
    below = mask[y0, min(x0, x1)] if y0 < len(mask) else False
    found.append(ring if below == (x1 > x0) else ring[::-1])
  return found


def _paired(order):
  """The partner of each, of those that follow each other in an order."""
  partner = np.empty(len(order), int)
  partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
  return partner


# ------------------------------------------------------------------------ COCO


def coco(
  named: Iterator[tuple[str, np.ndarray]], classes: Sequence[str]
) -> dict:
  """Images as COCO's JSON: polygons, or run lengths where a part has holes.

  Args:
    named: (file name, labels [H, W]) of each image.
    classes: names of labels 1..n, which are the ids of the categories.
  """
  images, annotations = [], []
  for number, (name, labels) in enumerate(named, 1):
    height, width = labels.shape
    images.append(
      {'id': number, 'file_name': name, 'height': height, 'width': width}
    )
    for part in parts(labels, len(classes)):
      rows, columns = part.mask.shape
      annotations.append(
        {
          'id': 1 + len(annotations),
          'image_id': number,
          'category_id': part.label,
          'segmentation': _segmentation(part, labels.shape),
          'area': part.area,
          'bbox': [part.left, part.top, columns, rows],
          'iscrowd': 0,
        }
      )
  return {
    'images': images,
    'annotations': annotations,
    'categories': [
      {'id': number, 'name': name} for number, name in enumerate(classes, 1)
    ],
  }


def _segmentation(part, size):
  rings = part.rings()
  if len(rings) == 1:
    return [rings[0].ravel().tolist()]
  height, width = size
  # Run lengths go down the columns: those of the box, and zeros around them.
  columns = np.zeros((part.mask.shape[1], height), bool)
  columns[:, part.top : part.top + part.mask.shape[0]] = part.mask.T
  flat = columns.ravel()
  turns = np.flatnonzero(flat[1:] != flat[:-1]) + 1
  turns = turns + part.left * height
  if flat[0]:
    turns = np.insert(turns, 0, part.left * height)
  ends = np.concatenate([[0], turns, [height * width]])
  after = part.left * height + flat.size
  if flat[-1] and after < height * width:
    ends = np.insert(ends, -1, after)
  return {'size': [height, width], 'counts': np.diff(ends).tolist()}


# --------------------------------------------------------------------- GeoJSON


def geojson(
  labels: np.ndarray,
  classes: Sequence[str],
  palette: Sequence[Sequence[int]],
) -> dict:
  """A label map as GeoJSON, in pixels, as QuPath reads it.

  Args:
    labels: [H, W].
    classes: names of labels 1..n.
    palette: colours of labels 0..n.
  """
  return {
    'type': 'FeatureCollection',
    'features': [
      {
        'type': 'Feature',
        'id': str(number),
        'geometry': {
          'type': 'Polygon',
          'coordinates': [
            np.concatenate([ring, ring[:1]]).tolist() for ring in part.rings()
          ],
        },
        'properties': {
          'objectType': 'annotation',
          'classification': {
            'name': classes[part.label - 1],
            'color': list(palette[part.label]),
          },
        },
      }
      for number, part in enumerate(parts(labels, len(classes)), 1)
    ],
  }


# --------------------------------------------------------------------- LabelMe


def labelme(labels: np.ndarray, classes: Sequence[str], path: str) -> dict:
  """A label map as LabelMe's JSON.

  A part is a polygon through the middles of its outermost pixels, as LabelMe
  paints it; where that would not give it back, as where it has a hole, a mask.

  Args:
    labels: [H, W].
    classes: names of labels 1..n.
    path: of the image, as seen from the file's folder.
  """
  height, width = labels.shape
  return {
    'version': '5.5.0',
    'flags': {},
    'shapes': [
      {
        'label': classes[part.label - 1],
        'group_id': None,
        'description': '',
        'flags': {},
        **_shape(part),
      }
      for part in parts(labels, len(classes))
    ],
    'imagePath': path,
    'imageData': None,
    'imageHeight': height,
    'imageWidth': width,
  }


def _shape(part):
  corner = np.array([part.left, part.top])
  points = _middles(part.rings()[0] - corner)
  if np.array_equal(masks.fill(points, part.mask.shape), part.mask):
    points = (points + corner).tolist()
    return {'shape_type': 'polygon', 'points': points, 'mask': None}
  end = corner + part.mask.shape[::-1] - 1
  drawn = base64.b64encode(download.png(part.mask.astype(np.uint8) * 255))
  return {
    'shape_type': 'mask',
    'points': [corner.tolist(), end.tolist()],
    'mask': drawn.decode(),
  }


def _middles(ring):
  """A ring of corners as one of the pixels within, three or more."""
  ahead = np.sign(np.roll(ring, -1, 0) - ring)
  # On the right hand, as y grows downwards.
  inside = np.stack([-ahead[:, 1], ahead[:, 0]], 1)
  first = (2 * ring + ahead + inside - 1) // 2  # of the edge that begins here
  last = (2 * np.roll(ring, -1, 0) - ahead + inside - 1) // 2
  points = np.stack([first, last], 1).reshape(-1, 2)
  points = points[(points != np.roll(points, 1, 0)).any(1)]
  if not len(points):
    points = first[:1]
  return np.concatenate([points, *[points[-1:]] * max(0, 3 - len(points))])


def text(made: dict) -> str:
  """JSON on one line, as short as it gets."""
  return json.dumps(made, separators=(',', ':')) + os.linesep
