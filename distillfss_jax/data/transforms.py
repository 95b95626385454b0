"""Resizing of images and labels, as the reference's loader does it."""

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
  rows, columns = (_nearest(length, size) for length in label.shape)
  return label[rows[:, None], columns]


def _nearest(length, size):
  scale = np.float32(length) / np.float32(size)
  source = np.floor(np.arange(size, dtype=np.float32) * scale)
  return np.minimum(source.astype(np.int64), length - 1)
