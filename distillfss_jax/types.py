"""The nouns that cross module borders, and the legend of shape letters.

  b  items of a batch         s  shots              n  ways (no background)
  H  W  pixels                h  w  feature grid    c  channels
  q  query tokens (h*w)       k  support tokens     a  attention heads
  d  size of a head           l  blocks of a stage  m  maps of a level

A *pyramid* is a tuple of four arrays, one per backbone stage, each the stacked
block outputs of that stage, [b, l, h, w, c]: strides 4, 8, 16, 32 for the
backbones of the papers. Labels are integer maps: 0 is background, 1..n are the
ways, 255 is void. A mask is binary. Support sets are padded and masked, never
indexed away: an absent shot has `present` False.

A *batch* is any pytree of arrays with a leading axis of items. Three are used:
`Table` (adaptation), `Episode` (training on a source) and `Dense`.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp

Array = jax.Array
Pyramid = tuple[Array, Array, Array, Array]

VOID = 255  # label of pixels that neither train nor score
SOFT = 254  # of a soft label, a share of label 1: the whole
AXIS = 'data'  # of the mesh: the devices that share a batch


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
class Table:
  """Episodes of an adaptation: rows of indices into what all steps share.

  rows [b, 1+s] int32: the query, then its shots.
  """

  rows: Array


@flax.struct.dataclass
class Episode:
  """Episodes of a source, each of one class.

  images [b, H, W, 3] uint8. labels [b, H, W] uint8: 1 the class, 0, or void.
  support_images [b, s, H, W, 3], support_labels [b, s, H, W]: of its shots.
  all_labels [b, H, W] uint8: labels of the query as the records have them.
  way [b] int32: which class of the source it is, from 0.
  """

  images: Array
  labels: Array
  support_images: Array
  support_labels: Array
  all_labels: Array
  way: Array

  @property
  def support(self) -> Support:
    """The shots as a `Support` of one way; void is no part of a mask."""
    masks = (self.support_labels == 1)[..., None]
    return Support(
      self.support_images, masks.astype(jnp.float32), masks.any((2, 3))
    )


@flax.struct.dataclass
class Dense:
  """Images with a label for every pixel.

  images [b, H, W, 3] uint8, labels [b, H, W] uint8: 0..n, or void; where they
  are soft, 0..SOFT, or void.
  taught: what the system's `teach` has said of the images; () where it has to
    ask at each step.
  """

  images: Array
  labels: Array
  taught: Any = ()


@flax.struct.dataclass
class Items:
  """What a loss knows of its batch besides the arrays.

  keys [b]: a JAX key of each item. It depends on the seed, the step and the
    item's place in the whole batch, never on the number of devices.
  valid [b] bool: whether there is such an item; the others are padding.
  axis: name of the mesh axis whose devices share the batch, or None.
  update: which of the system's `updates` this is.
  places [b] int32: the item's place in the whole batch, -1 of padding; None
    where devices hold the items in their order.
  """

  keys: Array
  valid: Array
  axis: str | None = flax.struct.field(pytree_node=False, default=None)
  update: Any = flax.struct.field(pytree_node=False, default=None)
  places: Array | None = None


@flax.struct.dataclass
class Losses:
  """What a system says of a batch.

  each [b]: what is minimised, of each item.
  parts: {name: [b]}, for the log, which shows their means.
  counts: {name: [b, c, c] int32}, pixels by (label, prediction), for the log,
    which shows their mean IoU.
  """

  each: Array
  parts: dict[str, Array]
  counts: dict[str, Array]


@flax.struct.dataclass
class Prediction:
  """What a segmenter says of a query.

  logits [b, H, W, 1+n]: channel 0 is background.
  coarse: per level, [b, n, h, w, m], in the pyramid's order.
  """

  logits: Array
  coarse: tuple[Array, ...] = ()


@flax.struct.dataclass
class Answer:
  """What a dense segmenter says of images, and what distillers compare.

  logits [b, H, W, 1+n]: channel 0 is background.
  features: {name: [b, h, w, c]}, maps on the way, before their activation.
  attended: {name: [b, h, w, c]}, maps weighted by attention to themselves.
  sides: [b, H, W, m], binary logits of several heads; None if there is one.
  """

  logits: Array
  features: dict[str, Array] = flax.struct.field(default_factory=dict)
  attended: dict[str, Array] = flax.struct.field(default_factory=dict)
  sides: Array | None = None


@flax.struct.dataclass
class TrainState:
  """Everything a killed run needs to go on; parameters by their path.

  step: int32 scalar, steps done.
  params: what the optimiser moves; frozen: the other parameters.
  buffers: module state that is no parameter (running statistics, queues).
  opt_state: of `params`.
  """

  step: Array
  params: dict[str, Array]
  frozen: dict[str, Array]
  buffers: dict[str, Array]
  opt_state: Any

  @property
  def variables(self) -> dict[str, Array]:
    """All variables of the modules, by path."""
    return {**self.params, **self.frozen, **self.buffers}
