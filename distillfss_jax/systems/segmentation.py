"""A dense network learns from labels, and from a teacher if there is one.

AttnFD (2403.05451), KDAS (2312.08555), the distillers that they are compared
with, their teachers, and plain students are all this system: what differs is
the models, the loss of the labels and the distiller. BatchNorm sees the whole
batch, over all devices.

    student, teacher   images -> answers
    labels             student's answer, labels -> loss
    distiller          both answers -> terms, which are added
"""

import functools
import pathlib

import jax
import jax.numpy as jnp

from distillfss_jax import distillers, layers, models
from distillfss_jax.models import base as model_base
from distillfss_jax.ops import losses, resize, together
from distillfss_jax.pretrained import weights
from distillfss_jax.systems import base
from distillfss_jax.types import (
  SOFT,
  VOID,
  Answer,
  Array,
  Dense,
  Losses,
  Prediction,
)

LABEL_LOSSES = ('cross_entropy', 'focal', 'structure')
STATISTICS = ('batch', 'running')
RANDOM = 'random'  # in place of a teacher's weights


class Segmentation(base.System):
  """See the module's docstring.

  Args:
    model: the network that learns.
    ways: foreground classes.
    teacher: a frozen network, or None.
    distiller: what is learnt of it, or None.
    loss: `config.loss`.
    statistics: of `STATISTICS`, what the teacher's batch norms go by.
    noise: whether the teacher's dropout acts.
    sizes: sides of images, one for each update of a batch; () for their own.
  """

  takes, coupled = Dense, True

  def __init__(
    self, model, ways, *, teacher, distiller, loss, statistics, noise, sizes
  ):
    self.model, self.ways = model, ways
    self.teacher, self.distiller = teacher, distiller
    self.roles = ('student',) if teacher is None else ('student', 'teacher')
    self.loss = loss.to_dict()
    self.statistics, self.noise = statistics, noise
    self.updates = tuple(sizes) or (None,)
    # Norms of a batch, or dropout, make it another answer at each step.
    self.teaches = teacher is not None and not noise and statistics == 'running'

  def sets(self):
    """All but the teacher's is the student's; and the model's own sets."""
    mine = {
      name: tuple(f'model/{regex}' for regex in regexes)
      for name, regexes in self.model.sets().items()
    }
    return {'student': (r'(?!teacher/).*',), 'model': ('model/.*',), **mine}

  def sources(self, config):
    """`model.init`, `model.backbone.init`, and `teacher.init`."""
    model = config.model
    found = [
      weights.Source('model.init', model.init, _parts('model/', self.model)),
      weights.Source(
        'model.backbone.init',
        model.backbone.init,
        (weights.Part('model/backbone/', self.model.backbone),),
      ),
    ]
    if self.teacher is not None:
      init = config.teacher.init
      if not init:
        raise ValueError(
          f'config.distiller.name={config.distiller.name!r} learns from a '
          'teacher: give teacher=<run or file> after the colon, or '
          f'--config.teacher.init; {RANDOM!r} is one that knows nothing'
        )
      init = '' if init == RANDOM else init
      is_run = bool(init) and pathlib.Path(init).expanduser().is_dir()
      found.append(
        weights.Source(
          'teacher.init',
          init,
          _parts('teacher/', self.teacher),
          theirs='model/' if is_run else '',
          same=('data.name',),
        )
      )
    return tuple(found)

  def losses(self, shared, batch, items):
    images, labels = batch.images.astype(jnp.float32), batch.labels
    masks = labels = labels.astype(jnp.int32)
    if self.loss['soft']:
      masks = jnp.where(labels == VOID, 0, labels) / SOFT
      labels = jnp.where(labels == VOID, VOID, (masks > 0.5).astype(jnp.int32))
    elif self.loss['name'] == 'structure':
      masks = (labels == 1).astype(jnp.float32)
    images = _sized(images, items.update)
    if items.update is not None:
      # Parity: soft masks are resized like images.
      if masks is not labels:
        masks = _sized(masks[..., None], items.update)[..., 0]
      size = (items.update, items.update)
      labels = resize.nearest(labels[..., None], size)[..., 0]

    def by_batch(norm, x, **how):
      return norm.train(x, items.valid, items.axis, **how)

    learnt = self._answer(self.model, images, items.keys, by_batch)
    each = {
      'labels': self.loss['labels'] * self._labels(learnt, labels, masks, items)
    }
    seen = {}
    if self.distiller is not None:
      if batch.taught:
        taught = batch.taught[self.updates.index(items.update)]
      else:
        taught = self._taught(images, items, by_batch)
      terms = self.distiller(taught, learnt, labels, items, self.teacher)
      each |= terms.added
      seen = terms.seen
    counts = base.confusion(labels, Prediction(learnt.logits))
    return Losses(
      sum(each.values()), {**each, **seen}, {'train_miou/student': counts}
    )

  def _answer(self, model, images, *how):
    """A model's answer to images in 0..255, as its backbone expects them."""
    keys, normalise = how
    x = model_base.centred(images / 255, model.backbone)
    return model.answer(x, keys=keys, normalise=normalise)

  def teach(self, images):
    """The teacher's answers, one for each update; see `System.teaches`."""
    images = images.astype(jnp.float32)
    return tuple(
      self._taught(_sized(images, update)) for update in self.updates
    )

  def _taught(self, images, items=None, by_batch=None) -> Answer:
    """The teacher's answer; what its norms have seen stays as it is."""
    # Parity: the original's running statistics drift, but nothing reads them.
    normalise, keys = layers.by_running, None
    if self.statistics == 'batch':
      normalise = functools.partial(by_batch, moves=False)
    if self.noise:
      keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(items.keys)
    answer = self._answer(self.teacher, images, keys, normalise)
    return jax.lax.stop_gradient(self.distiller.read(answer))

  def _labels(self, answer: Answer, labels: Array, masks: Array, items):
    """[b], what labels say."""
    loss = self.loss
    if loss['name'] == 'structure':
      heads = answer.sides
      if heads is None:
        heads = (answer.logits[..., 1] - answer.logits[..., 0])[..., None]
      each = sum(
        losses.structure(heads[..., i], masks, weighted=loss['weighted'])
        for i in range(heads.shape[-1])
      )
    else:
      each = together.mean_of_all(
        *losses.cross_entropy(answer.logits, labels), items
      )
      if loss['name'] == 'focal':
        # Parity: the original discounts the mean of a batch, not pixels.
        mean = together.total(each, items) / together.count(items)
        sure = 1 - jnp.exp(-mean)
        each = jnp.broadcast_to(0.5 * sure**2 * mean, each.shape)
    if loss['divided']:
      # Parity: AttnFD divides the mean by the batch once more.
      each = each / together.count(items)
    return each

  def predict(self, images, memory, roles):
    nets = {'student': self.model, 'teacher': self.teacher}
    return {
      role: Prediction(nets[role].answer(images).logits) for role in roles
    }


def _sized(images, side):
  """Images of an update; None for their own size."""
  if side is None:
    return images
  # Parity: corners are aligned.
  return resize.bilinear(images, (side, side))


def _parts(path, model):
  """A model, and what of it a file may lack."""
  more = (
    weights.Part(f'{path}{name}/', getattr(model, name), optional=True)
    for name in model.optional
  )
  return (weights.Part(path, model), *more)


def build(config, ways, rngs):
  """The system of a config, with models of its own.

  Raises:
    ValueError: a name that does not exist, or models that do not fit.
  """
  loss, size = config.loss, config.data.image_size
  if loss.name not in LABEL_LOSSES:
    raise ValueError(
      f'config.loss.name is {loss.name!r}; there are: {", ".join(LABEL_LOSSES)}'
    )
  binary = loss.name == 'structure' or loss.soft
  if binary and ways != 1:
    raise ValueError(
      f'config.loss.name={loss.name!r} and soft={loss.soft} are for one class, '
      f'and the data have {ways}'
    )
  if loss.soft and loss.name != 'structure':
    raise ValueError(
      f'config.loss.soft needs config.loss.name=structure, not {loss.name!r}'
    )
  model = models.build(config.model, size, rngs, classes=1 + ways)
  sizes = tuple(
    max(round(size * x / model.multiple), 1) * model.multiple
    for x in loss.sizes
  )
  teacher = distiller = None
  if config.distiller.name != 'none':
    known = config.teacher
    if known.statistics not in STATISTICS:
      raise ValueError(
        f'config.teacher.statistics is {known.statistics!r}; there are: '
        f'{", ".join(STATISTICS)}'
      )
    teacher = models.build(known, size, rngs, classes=1 + ways)
    distiller = distillers.build(config.distiller, teacher, model, rngs)
  return Segmentation(
    model,
    ways,
    teacher=teacher,
    distiller=distiller,
    loss=loss,
    statistics=config.teacher.statistics,
    noise=config.teacher.noise,
    sizes=sizes,
  )
