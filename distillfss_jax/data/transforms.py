"""Resizing of images and labels, as the reference's loader does it.

Below that, the resizes of the other sources' loaders (see `augment`).
"""

import numpy as np
from PIL import Image


def resize_image(image, size):
  """Resizes to size x size without keeping the aspect; antialiased bilinear.

  Args:
    image: uint8 [H, W, 3].
    size: side of the result in pixels.

  Returns:
    uint8 [size, size, 3], the bytes of Pillow's BILINEAR.
  """
  resized = Image.fromarray(image).resize((size, size), Image.BILINEAR)
  return np.asarray(resized)


def resize_label(label, size):
  """Resizes to size x size by nearest neighbour; makes no new label values.

  Parity: pixel i of the result is pixel floor(i * in / out), without a shift by
  half a pixel, and in float32: torch's mode='nearest' to the last rounding.

  Args:
    label: integers [H, W].
    size: side of the result in pixels.

  Returns:
    [size, size] of the same type.
  """
  return sample_label(label, (size, size))


def sample_label(label, shape, steps=None):
  """Resizes to any shape by nearest neighbour, by the rule of `resize_label`.

  Args:
    label: integers [H, W].
    shape: (rows, columns) of the result.
    steps: how far apart neighbours of the result lie in the label, (down,
      right); None for (H / rows, W / columns).

  Returns:
    [rows, columns] of the same type.
  """
  steps = steps or (None, None)
  rows = _nearest(label.shape[0], shape[0], steps[0])
  columns = _nearest(label.shape[1], shape[1], steps[1])
  return label[rows[:, None], columns]


def sample_image(image, shape, steps=None):
  """Resizes to any shape, bilinear without antialias: OpenCV's INTER_LINEAR.

  Pixels are points in the middle of their squares; beyond the outermost ones
  the image stays as it is there.

  Args:
    image: uint8 [H, W, 3].
    shape: (rows, columns) of the result.
    steps: as in `sample_label`.

  Returns:
    uint8 [rows, columns, 3], rounded to the nearest.
  """
  steps = steps or (None, None)
  above, below, down = _between(image.shape[0], shape[0], steps[0])
  left, right, across = _between(image.shape[1], shape[1], steps[1])
  down = down[:, None]

  def one(plane):
    # Written in place: fresh arrays of this size cost more than the sums.
    rows, other = plane.take(above, axis=0), plane.take(below, axis=0)
    other -= rows
    other *= down
    rows += other
    made, other = rows.take(left, axis=1), rows.take(right, axis=1)
    other -= made
    other *= across
    made += other
    return made

  return by_plane(one, image, shape)


def by_plane(function, image, shape):
  """Applies a function of float32 [H, W] to each colour; uint8 [*shape, 3].

  One colour at a time stays in the processor's cache: several times faster than
  all three at once. The function's values lie in 0..255.
  """
  made = np.empty((*shape, 3), np.uint8)
  for colour in range(3):
    plane = function(image[..., colour].astype(np.float32))
    np.add(plane, 0.5, out=made[..., colour], casting='unsafe')
  return made


def resize_label_bilinear(label, size):
  """Resizes to size x size; each pixel gets the label that weighs most there.

  The weights are Pillow's antialiased BILINEAR of each label's mask, those that
  `resize_image` uses. With labels 0 and 1: where the resized mask is at least a
  half.

  Args:
    label: uint8 [H, W].
    size: side of the result in pixels.

  Returns:
    uint8 [size, size].
  """
  made = np.zeros((size, size), np.uint8)
  most = made
  for value in np.flatnonzero(np.bincount(label.ravel())):
    mask = Image.fromarray((label == value).astype(np.uint8) * 255)
    weight = np.asarray(mask.resize((size, size), Image.BILINEAR))
    made = np.where(weight >= most, np.uint8(value), made)
    most = np.maximum(weight, most)
  return made


def _nearest(length, size, step=None):
  scale = np.float32(length) / np.float32(size)
  scale = scale if step is None else np.float32(step)
  source = np.floor(np.arange(size, dtype=np.float32) * scale)
  return np.minimum(source.astype(np.int64), length - 1)


def _between(length, size, step):
  """The two pixels that each result lies between, and the second's weight."""
  step = length / size if step is None else step
  source = (np.arange(size) + 0.5) * step - 0.5
  source = np.clip(source, 0, length - 1)
  first = source.astype(np.int64)
  weight = (source - first).astype(np.float32)
  return first, np.minimum(first + 1, length - 1), weight
