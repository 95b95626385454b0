"""The nouns that cross module borders, and the legend of shape letters.

  b  episodes in a batch      s  shots              n  ways (no background)
  H  W  pixels                h  w  feature grid    c  channels
  q  query tokens (h*w)       k  support tokens     a  attention heads
  d  size of a head           l  blocks of a stage  m  maps of a level

A *pyramid* is a tuple of four arrays, one per backbone stage, each the stacked
block outputs of that stage, [b, l, h, w, c]: strides 4, 8, 16, 32 for the
backbones of the papers. Labels are integer maps: 0 is background, 1..n are the
ways, 255 is void. A mask is binary. Support sets are padded and masked, never
indexed away: an absent shot has `present` False.
"""

from typing import Any

import flax
import jax

Array = jax.Array
Pyramid = tuple[Array, Array, Array, Array]

VOID = 255  # label of pixels that neither train nor score


@flax.struct.dataclass
class Support:
  """Annotated images a class is defined by.

  images [b, s, H, W, 3]: uint8, or float32 already normalised.
  masks [b, s, H, W, n] in {0, 1}, float32; may differ from images in H, W.
  present [b, s, n] bool: whether shot s is an example of way n.
  """

  images: Array
  masks: Array
  present: Array


@flax.struct.dataclass
class Prediction:
  """What a segmenter says of a query.

  logits [b, H, W, 1+n]: channel 0 is background.
  coarse: per level, [b, n, h, w, m], in the pyramid's order.
  """

  logits: Array
  coarse: tuple[Array, ...]


@flax.struct.dataclass
class TrainState:
  """Everything a killed run needs to go on; parameters by their path.

  step: int32 scalar, optimiser steps done.
  params: what the optimiser moves; frozen: the other parameters.
  rest: module state that is no parameter (BatchNorm's statistics).
  opt_state: of `params`.
  """

  step: Array
  params: dict[str, Array]
  frozen: dict[str, Array]
  rest: dict[str, Array]
  opt_state: Any
