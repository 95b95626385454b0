"""Fine-tuning: a segmenter of fixed classes learns from a few annotated images.

A step takes views of them (`ops/views.py`): windows, turned, scaled and in
other colours, drawn on the device. The backbone keeps its ImageNet weights
unless `optim.trainable` says otherwise, and its statistics always. At test time
an image is read once, and no support is needed. The network is a U-Net's
(1505.04597), its loss cross-entropy and Dice (1606.04797).

What a view looks like is `views.look`, the one choice that depends on the
domain; `held_out.py` makes it where it is 'auto'.
"""

import dataclasses

import flax
import jax
import jax.numpy as jnp

from distillfss_jax import models
from distillfss_jax.models import base as model_base
from distillfss_jax.ops import losses, polarity, together, views
from distillfss_jax.pretrained import weights
from distillfss_jax.systems import base
from distillfss_jax.types import VOID, Array, Losses, Prediction, Table

# Half of the views keep their colours: held-out annotated images of nuclei and
# of streets are then read better than if none or all of them did.
_MILD = views.Appearance(recoloured=0.0, inverted=0.0, permuted=0.0, kept=0.5)
_PLACES = 1024  # places of objects to aim at, of an image


@dataclasses.dataclass(frozen=True)
class Look:
  """How images are read, in training and at test time.

  polar: in polar form (`ops/polarity.py`) in place of their colours.
  appearance: how the colours of views change.
  """

  polar: bool
  appearance: views.Appearance


# From what sees most to what is blind to most.
LOOKS = {
  'colour': Look(False, _MILD),  # colours tell the classes
  'recolour': Look(False, views.Appearance()),  # stains and lamps differ
  # Light and dark may change places, too. That views change in contrast though
  # the polar form evens it out helps with dim, unevenly lit or noisy images.
  'polarity': Look(True, _MILD),
}


@flax.struct.dataclass
class Annotated:
  """The annotated images on the device, and after them those that are not.

  atlas: see `views.atlas`.
  labels: [M, H, W] int32; or uint8 [M, H, W, 1+n], shares in 255ths.
  places [M, k, 2]: places of objects, see `views.places_of`.
  """

  atlas: Array
  labels: Array
  places: Array


class FineTune(base.System):
  """A segmenter by cross-entropy and Dice loss.

  Args:
    model: images to logits, with `encode` and `decode`; see `models/unet.py`.
    ways: foreground classes.
    look: how images are read.
    size: side of a view, in pixels.
    geometry: where views lie.
    temperature: what logits are divided by at test time (1706.04599), so that
      probabilities say how often a pixel is right; labels stay as they are.
  """

  takes, roles, coupled = Table, ('student',), True

  def __init__(
    self, model, ways, *, look: Look, size: int, geometry, temperature=1.0
  ):
    self.model, self.ways, self.look = model, ways, look
    self.size, self.geometry = size, geometry
    self.temperature = temperature

  def sets(self):
    return {
      'backbone': (r'model/backbone/.*',),
      'decoder': (r'model/(?!backbone/).*',),
    }

  def sources(self, config):
    """`model.init` fills the network, `model.backbone.init` its backbone."""
    backbone = weights.Part('model/backbone/', self.model.backbone)
    return (
      weights.Source(
        'model.init', config.model.init, (weights.Part('model/', self.model),)
      ),
      weights.Source(
        'model.backbone.init', config.model.backbone.init, (backbone,)
      ),
    )

  def shared(
    self, images: Array, labels: Array, shares: Array | None = None
  ) -> Annotated:
    """The images as views are drawn of them.

    Args:
      images: uint8 [M, H, W, 3].
      labels: [M, H, W] int32 of the first, the annotated ones, if there are
        shares, and of all otherwise.
      shares: uint8 [U, H, W, 1+n] of the other ones, in 255ths.
    """

    def kept(image):
      if self.look.polar:
        # Before a view is cut out: a part may have its objects as larger side.
        grey = polarity.polar(image[None].astype(jnp.float32) / 255)
        image = jnp.round(255 * grey[0]).astype(jnp.uint8)
      return views.atlas(image[None])[0]

    if shares is not None:
      own = 255 * (labels[..., None] == jnp.arange(1 + self.ways))
      shares = jnp.concatenate([own.astype(jnp.uint8), shares])
      labels = jnp.where(shares.any(-1), shares.argmax(-1), VOID)
    places = views.places_of(jax.random.key(0), labels, self.ways, _PLACES)
    atlas = jax.lax.map(kept, images)
    return Annotated(atlas, labels if shares is None else shares, places)

  def losses(self, shared, batch, items):
    keys = items.keys
    seen, labels = jax.vmap(
      lambda key, which: views.draw(
        key,
        shared.atlas,
        shared.labels,
        which[None],
        self.size,
        self.geometry,
        self.look.appearance,
        shared.places,
      )
    )(keys, batch.rows[:, 0])
    seen, labels = seen[:, 0], labels[:, 0]
    soft = labels.ndim == 4
    labels = labels / 255 if soft else labels.astype(jnp.int32)
    logits = self._logits(
      seen, lambda norm, x: norm.train(x, items.valid, items.axis)
    )
    parts = {
      'cross_entropy': together.mean_of_all(
        *losses.cross_entropy(logits, labels), items
      ),
      'dice': losses.dice(logits, labels),
    }
    if soft:
      labels = jnp.where(labels.any(-1), labels.argmax(-1), VOID)
    counts = base.confusion(labels, Prediction(logits))
    return Losses(sum(parts.values()), parts, {'train_miou/student': counts})

  def predict(self, images, memory, roles):
    seen = images.astype(jnp.float32) / 255
    if self.look.polar:
      seen = polarity.polar(seen)
    logits = self._logits(seen) / self.temperature
    return {role: Prediction(logits) for role in roles}

  def _logits(self, seen, *normalise):
    """Of images in [0, 1], at their size."""
    maps = self.model.encode(model_base.centred(seen, self.model.backbone))
    return self.model.decode(maps, seen.shape[1:3], *normalise)


def build(config, ways, rngs):
  """The system of a config, with a model of its own.

  Raises:
    ValueError: there is no such look.
  """
  known = config.views
  if known.look not in LOOKS:
    raise ValueError(
      f'config.views.look is {known.look!r}; there are: {", ".join(LOOKS)}, '
      'and auto'
    )
  model = models.build(
    config.model, config.data.image_size, rngs, classes=1 + ways
  )
  return FineTune(
    model,
    ways,
    look=LOOKS[known.look],
    size=known.size,
    geometry=views.Geometry(sides=tuple(known.sides)),
    temperature=known.temperature,
  )
