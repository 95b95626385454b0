"""CIRKD: how pixels of different images relate (2204.06986).

Besides KD, three distributions of the teacher's features are imitated: of a
pixel over all pixels of another image of the batch, and over pixels and over
means of regions that queues remember, class by class. Features are the pooled
map of ASPP, after its ReLU, of length 1.

Parity: of an image, the original puts pixels into a class's queue that lie
anywhere in it. `released=False` takes those of the class.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers
from distillfss_jax.distillers import base
from distillfss_jax.ops import resize, together
from distillfss_jax.types import VOID

FEATURE = 'aspp'
_LARGEST = 256  # side of features that are compared; larger ones are averaged
_POOL = 4
_NEW = 16  # pixels of a class that an image adds at most


class Queue(nnx.Variable):
  """What the distiller remembers."""


class CIRKD(base.Distiller):
  """The terms 'logits', 'batch', 'pixels' and 'regions'.

  Args:
    teacher: the network that is imitated.
    student: the one that learns.
    logits: weight of KD.
    batch: weight of the relations within the batch.
    pixels: weight of those to the remembered pixels.
    regions: weight of those to the remembered regions.
    temperature: of the relations.
    queued_pixels: length of a class's queue.
    queued_regions: length of a class's queue of regions.
    drawn_pixels: of all queues, in a step.
    drawn_regions: of all queues of regions.
    released: see the module's docstring.
    rngs: of the initialisation.
  """

  reads = ('logits', 'features')

  def __init__(
    self,
    teacher,
    student,
    *,
    logits=1.0,
    batch=1.0,
    pixels=0.1,
    regions=0.1,
    temperature=0.1,
    queued_pixels=20000,
    queued_regions=2000,
    drawn_pixels=4096,
    drawn_regions=1024,
    released=True,
    rngs,
  ):
    base.check('cirkd', teacher, student, features=(FEATURE,))
    inputs, outputs = (
      base.channels(x, (FEATURE,))[FEATURE] for x in (student, teacher)
    )
    self.weights = (logits, batch, pixels, regions)
    self.temperature, self.released = temperature, released
    self.classes = classes = teacher.classes
    self.drawn = (
      min(drawn_pixels // classes + 1, queued_pixels),
      min(drawn_regions // classes + 1, queued_regions),
    )
    self.project1 = layers.Conv(inputs, outputs, 1, rngs=rngs)
    self.norm = layers.BatchNorm(outputs)
    self.project2 = layers.Conv(outputs, outputs, 1, rngs=rngs)
    for name, length in (
      ('pixels', queued_pixels), ('regions', queued_regions),
    ):  # fmt: skip
      first = layers.normal(rngs, (classes, length, outputs))
      setattr(self, name, Queue(base.unit(first)))
      setattr(self, f'{name}_at', Queue(jnp.zeros(classes, jnp.int32)))

  def __call__(self, taught, learnt, labels, items, teacher):
    t = base.unit(nnx.relu(taught.features[FEATURE]).astype(jnp.float32))
    raw = nnx.relu(learnt.features[FEATURE]).astype(jnp.float32)
    raw = base.alike(raw, t)
    within = within_batch(t, base.unit(raw), items, self.temperature)
    x = self.norm.train(self.project1(raw), items.valid, items.axis)
    s = base.unit(self.project2(nnx.relu(x)))
    # Labels at the features' size, as the original shrinks them.
    size = t.shape[1:3]
    small = resize.nearest(labels[..., None], size)[..., 0]
    logits, batch, pixels, regions = self.weights
    key = _key_of_step(items)
    keys = jax.random.split(key, 3)
    terms = {
      'logits': logits * base.kl(taught.logits, learnt.logits),
      'batch': batch * within,
      'pixels': pixels
      * self._to_queue(t, s, small, self.pixels, self.drawn[0], keys[0], items),
      'regions': regions
      * self._to_queue(
        t, s, small, self.regions, self.drawn[1], keys[1], items
      ),
    }
    self._remember(*_of_all(items, t, small, items.valid), keys[2])
    return base.Terms(terms)

  def _to_queue(self, t, s, labels, queue, count, key, items):
    """KL of distributions over some of a queue, mean over known pixels."""
    length = queue.shape[1]
    index = jax.random.permutation(key, length)[:count]
    drawn = queue[...][:, index].reshape(-1, queue.shape[2])
    logits = [x @ drawn.T / self.temperature for x in (t, s)]
    each = _kl(*logits) * (labels != VOID)
    known = (labels != VOID).sum((1, 2)).astype(jnp.float32)
    total = together.total(each.sum((1, 2)), items)
    mean = total / jnp.maximum(together.total(known, items), 1)
    return base.of_batch(mean, items)

  def _remember(self, t, labels, valid, key):
    """Puts regions and pixels of all images into the queues."""
    b, h, w, c = t.shape
    flat, labels = t.reshape(b, h * w, c), labels.reshape(b, h * w)
    of_class = labels[..., None] == jnp.arange(self.classes)
    of_class &= valid[:, None, None]
    counts = of_class.sum(1)  # [b, classes]
    sums = jnp.einsum('bpk,bpc->bkc', of_class.astype(t.dtype), flat)
    means = base.unit(sums / jnp.maximum(counts, 1)[..., None])
    _put(self.regions, self.regions_at, means[:, None], (counts > 0)[:, None])
    order = jax.random.uniform(key, (b, self.classes, h * w))
    if not self.released:
      order = jnp.where(of_class.swapaxes(1, 2), order, 2.0)
    new = min(_NEW, h * w)
    _, places = jax.lax.top_k(-order, new)  # [b, classes, new]
    chosen = jax.vmap(lambda x, i: x[i])(flat, places)  # [b, classes, new, c]
    there = jnp.arange(new) < counts[..., None]
    _put(
      self.pixels, self.pixels_at, chosen.swapaxes(1, 2), there.swapaxes(1, 2)
    )


def _of_all(items, *arrays):
  """Arrays of this device's items as those of all devices."""
  return tuple(
    jax.lax.stop_gradient(together.everywhere(x, items)) for x in arrays
  )


def _put(queue, at, new, there):
  """Puts new [b, m, classes, c], where they are there, into the queues."""
  classes, length, c = queue.shape
  new = new.reshape(-1, classes, c).swapaxes(0, 1)
  there = there.reshape(-1, classes).T  # [classes, b * m]
  rank = there.cumsum(1) - 1
  place = (at[...][:, None] + rank) % length
  place = jnp.where(there, place, length)  # beyond the end: dropped
  # The newest wins where more come than a queue holds.
  stays = rank >= there.sum(1, keepdims=True) - length
  place = jnp.where(stays, place, length)
  queue[...] = jax.vmap(lambda q, i, x: q.at[i].set(x, mode='drop'))(
    queue[...], place, new
  )
  at[...] = (at[...] + there.sum(1)) % length


def _kl(t, s):
  """KL of softmaxes over the last axis."""
  t, s = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
  return (jnp.exp(t) * (t - s)).sum(-1)


def within_batch(t, s, items, temperature):
  """Relations of an image's pixels to those of each image of the batch, [b].

  t, s [b, h, w, c] are of length 1. Images are compared one after the other:
  a relation has as many numbers as both have pixels together.
  """
  if max(t.shape[1:3]) >= _LARGEST:
    t, s = (base.unit(_averaged(x)) for x in (t, s))
  b = t.shape[0]
  t, s = (x.reshape(b, -1, x.shape[-1]) for x in (t, s))
  others = [together.everywhere(x, items) for x in (t, s)]
  valid = together.everywhere(items.valid, items)

  @jax.checkpoint
  def add(total, other):
    t_other, s_other, there = other
    logits = [
      jnp.einsum('bpc,qc->bpq', x, y) / temperature
      for x, y in ((t, t_other), (s, s_other))
    ]
    return total + jnp.where(there, _kl(*logits).mean(1), 0), None

  total, _ = jax.lax.scan(add, jnp.zeros(b), (*others, valid))
  return total / together.count(items)


def _averaged(x):
  h, w = (n // _POOL * _POOL for n in x.shape[1:3])
  x = x[:, :h, :w].reshape(
    x.shape[0], h // _POOL, _POOL, w // _POOL, _POOL, x.shape[-1]
  )
  return x.mean((2, 4))


def _key_of_step(items):
  """A key that all devices share: that of the batch's first item."""
  data = together.everywhere(jax.random.key_data(items.keys), items)
  return jax.random.wrap_key_data(data[0])


def build(teacher, student, rngs, **fields):
  """See `distillers.build`."""
  return CIRKD(teacher, student, rngs=rngs, **fields)
