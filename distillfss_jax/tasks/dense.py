"""Dense training: images whose every pixel has a label, in epochs.

A part of the training images may be held out to choose checkpoints by.
"""

import jax
import numpy as np

from distillfss_jax import datasets
from distillfss_jax.data import augment, core, mask_meaning, pipeline
from distillfss_jax.evaluators import metrics
from distillfss_jax.evaluators.base import Protocol
from distillfss_jax.evaluators.images import Images
from distillfss_jax.tasks import base
from distillfss_jax.types import Dense

COLUMNS = {
  'miou': 'mIoU',
  'miou_with_background': 'with background',
  'pixel_accuracy': 'pixel accuracy',
  'class_accuracy': 'class accuracy',
}
_SAYS = 'one confusion matrix over all images; mIoU over foreground classes'
PROTOCOLS = (
  Protocol('test', 'model', f"at the model's size, {_SAYS}", COLUMNS),
  Protocol('test_native', 'native', f"at the images' size, {_SAYS}", COLUMNS),
)
VALIDATION = Protocol(
  'validation',
  'model',
  f"training images held out, at the model's size, {_SAYS}",
  COLUMNS,
)


class Data(base.Data):
  """A dataset's training images, those held out of them, and its test images.

  Raises:
    ValueError: too few images, or devices that cannot share a batch evenly.
  """

  def __init__(self, config):
    dense = config.dense
    if dense.classes not in ('all', 'base'):
      raise ValueError(
        f'config.dense.classes is {dense.classes!r}; there are: all, base'
      )
    load = _base_classes if dense.classes == 'base' else datasets.load
    self.dataset = dataset = load(config.data.name, **config.data.args)
    base.check_shared(dense.batch_size, 'dense')
    self.recipe = augment.get(dense.recipe)
    images = len(dataset.train)
    if not 0 <= dense.held_out < 1:
      raise ValueError(
        f'dense.held_out is a share of the training images, 0 to below 1, got '
        f'{dense.held_out}'
      )
    # A fixed order, whatever the run's seed: runs are compared.
    order = np.random.RandomState(0).permutation(images)
    held = round(dense.held_out * images)
    self.held_out = core.Part(dataset.train, np.sort(order[:held]))
    self.train = core.Part(dataset.train, np.sort(order[held:]))
    if not len(self.train):
      raise ValueError(f'{dataset.name} has no images to train on')
    self.classes = dataset.classes
    self.ways, self.size = len(self.classes), len(dataset.test)
    self.per_epoch = len(self.train) / dense.batch_size

  def ids(self):
    parts = {
      'train': self.train,
      'held_out': self.held_out,
      'test': self.dataset.test,
    }
    found = {name: list(x.ids) for name, x in parts.items()}
    digests = [getattr(x, 'digests', None) for x in parts.values()]
    return {**found, 'digest': base.digest_of(found, digests)}


def _base_classes(name, **args):
  """A fold's base classes, everywhere; what the fold tests is background."""
  module = datasets.module(name)
  if not hasattr(module, 'pool'):
    raise ValueError(f'{name} has no folds, and so no base classes')
  train, test = (module.pool(part=x, **args) for x in ('train', 'test'))
  return core.Dataset(
    name,
    train.classes,
    mask_meaning.palette(len(train.classes)),
    core.Chosen(train.source, train.values),
    core.Chosen(test.source, train.values),
  )


class Task(base.Task):
  """See the module's docstring."""

  gives = Dense
  own = True

  def __init__(self, config, *args):
    super().__init__(config, *args)
    protocols = PROTOCOLS if config.eval.native else PROTOCOLS[:1]
    self.evaluator = self._evaluator(self.data.dataset.test, protocols)
    self.validator = None
    if len(self.data.held_out):
      self.validator = self._evaluator(self.data.held_out, (VALIDATION,))

  def _evaluator(self, source, protocols):
    config = self.config
    kinds = {'model': metrics.ModelSize, 'native': metrics.NativeSize}
    return Images(
      source,
      self.program.predict,
      [kinds[x.size](self.data.classes, x, dense=True) for x in protocols],
      image_size=config.data.image_size,
      batch_size=config.eval.batch_size,
      workers=config.data.workers,
    )

  def batches(self):
    config = self.config
    return pipeline.training_images(
      self.data.train,
      self.data.recipe,
      image_size=config.data.image_size,
      batch_size=config.dense.batch_size // jax.process_count(),
      seed=config.seed,
      workers=config.data.workers,
      shard=(jax.process_index(), jax.process_count()),
    )

  def as_batch(self, element):
    return Dense(element['images'], element['labels']), element['valid']

  def test(self, state, show=()):
    return self.evaluator.run(
      self.variables(state), self.program.roles, show=show
    )

  def validate(self, state):
    if self.validator is None:
      return self.test(state)
    return self.validator.run(self.variables(state), self.program.roles)

  def references(self, state):
    if not self.config.eval.untrained:
      return {}
    return {'untrained': self.untrained(state)}

  def show_begin(self):
    """Some images as the first steps see them."""
    batch = next(
      iter(
        pipeline.training_images(
          self.data.train,
          self.data.recipe,
          image_size=self.config.data.image_size,
          batch_size=min(10, len(self.data.train)),
          seed=self.config.seed,
        )
      )
    )
    self.show_support(
      batch['images'],
      batch['labels'],
      None,
      palette=self.data.dataset.palette,
    )

  def show_end(self, scored):
    dataset, indices = self.data.dataset, sorted(scored.shown)
    if not indices:
      return
    records = pipeline.load_images(
      dataset.test, indices, self.config.data.image_size
    )
    for i, index in enumerate(indices):
      self.show_answers(
        records.ids[i],
        records.images[i],
        records.labels[i],
        scored.shown[index],
        classes=dataset.classes,
        palette=dataset.palette,
      )
