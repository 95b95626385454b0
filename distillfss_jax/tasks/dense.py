"""Dense training: images whose every pixel has a label, in epochs.

Checkpoints are chosen on training images that are held out, or on the images
that the dataset keeps for it; as the originals do it, on the test images.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from distillfss_jax import datasets, files, parallel
from distillfss_jax.data import augment, core, mask_meaning, pipeline
from distillfss_jax.evaluators import metrics
from distillfss_jax.evaluators.base import Beside, Protocol, joined
from distillfss_jax.evaluators.images import Images, ShortSide
from distillfss_jax.evaluators.saliency import Saliency
from distillfss_jax.tasks import base
from distillfss_jax.types import SOFT, VOID, Dense
from distillfss_jax.workdir import writer

COLUMNS = {
  'miou': 'mIoU',
  'miou_with_background': 'with background',
  'pixel_accuracy': 'pixel accuracy',
  'class_accuracy': 'class accuracy',
  'frequency_weighted_iou': 'weighted IoU',
}
SELECTS = ('validation', 'test')
_SAYS = 'one confusion matrix over all images; mIoU over foreground classes'
# How images are resized, by `Protocol.size`.
_SIZES = {
  'model': "at the model's size",
  'native': "at the images' size",
  'short_side': "with the shorter side at the model's size",
}


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
    self.soft = augment.is_soft(dense.recipe)
    wanted = 'loss' in config and 'soft' in config.loss and config.loss.soft
    if self.soft != bool(wanted):
      raise ValueError(
        f'config.dense.recipe={dense.recipe!r} gives '
        f'{"soft" if self.soft else "whole"} labels, and config.loss.soft is '
        f'{bool(wanted)}: change one of them'
      )
    images = len(dataset.train)
    if not 0 <= dense.held_out < 1:
      raise ValueError(
        f'dense.held_out is a share of the training images, 0 to below 1, got '
        f'{dense.held_out}'
      )
    if dense.select not in SELECTS:
      raise ValueError(
        f'config.dense.select is {dense.select!r}; there are: '
        f'{", ".join(SELECTS)}'
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
    self.validation, self._kept = None, None
    if dense.select == 'validation':
      if not len(self.held_out):
        self._kept = dataset.validation
      self.validation = self._kept or self.held_out or None
    _check_tests(config, self)

  def ids(self):
    parts = {
      'train': self.train,
      'held_out': self.held_out,
      'test': self.dataset.test,
      **({'validation': self._kept} if self._kept else {}),
    }
    found = {name: list(x.ids) for name, x in parts.items()}
    digests = [getattr(x, 'digests', None) for x in parts.values()]
    return {
      **found,
      'sizes': _few(self.train.sizes),
      'classes': list(self.classes),
      'palette': [[int(x) for x in row] for row in self.dataset.palette],
      'digest': files.digest_of(found, digests),
    }


def _few(sizes):
  """Some of many images' rows and columns, evenly spaced."""
  step = max(len(sizes) // 32, 1)
  return [[int(x) for x in row] for row in sizes[::step]]


def _check_tests(config, data):
  """Raises ValueError where a config asks for what cannot be tested."""
  options = config.eval
  chooses = options.keep_best and (options.every or options.epochs)
  if chooses and data.validation is None and config.dense.select != 'test':
    raise ValueError(
      f'config.eval.keep_best chooses among checkpoints, and '
      f'{data.dataset.name} keeps no images for that: hold some out of '
      'training with config.dense.held_out=0.1, or choose on the test images, '
      'as the originals do, with config.dense.select=test'
    )
  if options.saliency and data.ways != 1:
    raise ValueError(
      'config.eval.saliency scores maps of one foreground, and '
      f'{data.dataset.name} has {data.ways} classes'
    )
  if options.masks and not options.saliency:
    raise ValueError(
      'config.eval.masks writes the maps that config.eval.saliency scores: set '
      'both'
    )


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


@dataclasses.dataclass(frozen=True)
class _Tests:
  """How a part of a dataset is tested.

  name: of its protocols. square, short: evaluators, the second perhaps None.
  more: what the protocols say besides.
  """

  source: Sequence
  name: str
  square: Images
  short: ShortSide | None
  more: str

  def maps(self, **how) -> Beside:
    """What scores soft maps beside `square`; see `Saliency`."""
    return Saliency(self.source, f'{self.name}_saliency', more=self.more, **how)


class Task(base.Task):
  """See the module's docstring."""

  gives = Dense
  own = True

  def __init__(self, config, *args):
    super().__init__(config, *args)
    self._taught = None  # answers of a teacher that is asked once
    sizes = ['model', 'native'] if config.eval.native else ['model']
    chosen = config.dense.select == 'test' and config.eval.keep_best
    self._tests = self._tests_of(
      self.data.dataset.test,
      'test',
      sizes,
      '; checkpoints were chosen on these images' if chosen else '',
    )
    self._checks = self._tests
    if self.data.validation is not None:
      self._checks = self._tests_of(
        self.data.validation,
        'validation',
        ['model'],
        '; images that no step has trained on, to choose checkpoints by',
      )

  def _tests_of(self, source, name, sizes, more):
    config = self.config
    kinds = {'native': metrics.NativeSize}
    how = {
      'image_size': config.data.image_size,
      'batch_size': config.eval.batch_size,
      'workers': config.data.workers,
    }

    def found(size):
      end = '' if size == 'model' else f'_{size}'
      says = f'{_SIZES[size]}, {_SAYS}{more}'
      return kinds.get(size, metrics.ModelSize)(
        self.data.classes,
        Protocol(f'{name}{end}', size, says, COLUMNS),
        dense=True,
      )

    predict, short = self.program.predict, None
    if config.eval.short_side:
      short = ShortSide(source, predict, [found('short_side')], **how)
    square = Images(
      source,
      predict,
      [found(x) for x in sizes],
      native=config.eval.saliency,
      **how,
    )
    return _Tests(source, name, square, short, more)

  def batches(self):
    processes = jax.process_count()
    return self._read(
      self.config.dense.batch_size // processes,
      shard=(jax.process_index(), processes),
      workers=self.config.data.workers,
    )

  def _read(self, batch_size, **how):
    return pipeline.training_images(
      self.data.train,
      self.data.recipe,
      image_size=self.config.data.image_size,
      batch_size=batch_size,
      seed=self.config.seed,
      **how,
    )

  def shared(self, state):
    """Nothing; but a teacher that can be asked once for all is asked here."""
    config, data, m = self.config, self.data, len(self.data.train)
    again = self.steps * config.dense.batch_size > m
    fixed = augment.is_fixed(config.dense.recipe)
    if self.program.teach is None or not (again and fixed):
      return ()
    side = config.data.image_size
    shapes = jax.eval_shape(
      self.program.teach,
      self.variables(state),
      jax.ShapeDtypeStruct((m, side, side, 3), np.uint8),
    )
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    fits = size <= config.teacher.keep_gb * 1e9
    logging.info(
      "the teacher's answers to %d images are %.2f GB, and "
      'config.teacher.keep_gb is %g: %s',
      len(data.train),
      size / 1e9,
      config.teacher.keep_gb,
      'they are kept' if fits else 'it is asked at each step',
    )
    if fits:
      self._taught = self._ask(state, shapes)
    return ()

  def _ask(self, state, shapes):
    """What the teacher says of all training images, arrays of the host.

    Each process asks for all of them: it does not know which it will read.
    """
    mesh, m = parallel.mesh(local=True), len(self.data.train)
    variables = parallel.replicate(self.variables(state), mesh)
    kept = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
    progress = writer.Progress(m, noun='taught image')
    done = 0
    for batch in self._read(self.config.dense.batch_size, shard=(0, 1)):
      images, at = parallel.share(batch['images'], mesh), batch['index']
      said = self.program.teach(variables, images)
      jax.tree.map(lambda x, some, at=at: x.__setitem__(at, some), kept, said)
      done += len(at)
      progress.update(min(done, m))
      if done >= m:  # an epoch has each image once
        return kept

  def as_batch(self, element):
    batch = Dense(element['images'], element['labels'])
    if self._taught is not None:
      at = element['index']
      batch = batch.replace(taught=jax.tree.map(lambda x: x[at], self._taught))
    return batch, element['valid']

  def test(self, state, show=()):
    """All evaluations; what is written of single images lies in the folder."""
    return self._test(state, show, folder=self.workdir)

  def _test(self, state, show=(), folder=None):
    tests, options = self._tests, self.config.eval
    maps = []
    if options.saliency:
      maps.append(
        tests.maps(
          sets=self.data.dataset.sets, folder=folder, masks=options.masks
        )
      )
    of = self.variables(state), self.program.roles
    found = [tests.square.run(*of, show=show, beside=maps)]
    if tests.short is not None:
      found.append(tests.short.run(*of))
    return joined(*found)

  def validate(self, state):
    """The evaluation that chooses comes first, and little beside it.

    That is the Dice of soft maps where those are tested, mean IoU at the short
    side where that is, or mean IoU at the model's size.
    """
    tests = self._checks
    of = self.variables(state), self.program.roles
    if self.config.eval.saliency:
      scored = tests.square.run(*of, beside=[tests.maps(soft=True)])
      *others, last = scored.protocols
      return dataclasses.replace(scored, protocols=(last, *others))
    return (tests.short or tests.square).run(*of)

  def references(self, state):
    if not self.config.eval.untrained:
      return {}
    scored = self._test(state)
    return {'untrained': scored.scores[scored.protocols[0].name]}

  def show_begin(self):
    """Some images as the first steps see them."""
    batch = next(iter(self._read(min(10, len(self.data.train)))))
    labels = batch['labels']
    if self.data.soft:
      labels = np.where(labels == VOID, VOID, labels > SOFT // 2)
    self.show_support(
      batch['images'],
      labels,
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
