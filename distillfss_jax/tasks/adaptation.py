"""Adaptation: a system learns from a support set, and is scored on a test set.

The support set is on the device from the start; a step is a table of indices
into it.
"""

import jax
import numpy as np

from distillfss_jax import datasets, parallel
from distillfss_jax.data import pipeline
from distillfss_jax.data import support as support_lib
from distillfss_jax.evaluators import brightness, images, metrics, otsu
from distillfss_jax.evaluators.base import Protocol
from distillfss_jax.systems.base import masks_of
from distillfss_jax.tasks import base
from distillfss_jax.types import Support, Table
from distillfss_jax.workdir import pictures

PROTOCOLS = (
  Protocol(
    'test',
    'model',
    "at the model's size, labels shrunk to it; mIoU is the mean over "
    'foreground classes',
  ),
  Protocol(
    'test_native',
    'native',
    "at each image's own size, logits stretched to it; mIoU is the mean over "
    'foreground classes',
  ),
)


CALIBRATION = 'test_confidence'


class Data(base.Data):
  """A dataset and the support drawn from it.

  Raises:
    ValueError: the support does not show every class.
  """

  per_epoch = 1.0  # a step is a sweep over the support

  def __init__(self, config):
    self.dataset = dataset = datasets.load(config.data.name, **config.data.args)
    indices, ids = support_lib.choose(
      dataset,
      config.support.shots,
      config.support.seed,
      config.support.rule,
      config.support.ids,
    )
    self.support = pipeline.load_images(
      dataset.train, indices, config.data.image_size
    )
    self.sizes = np.asarray(dataset.train.sizes)[indices]
    self.classes = dataset.classes
    self.ways, self.size = len(self.classes), len(dataset.test)
    self.present = np.stack(
      [
        (self.support.labels == way).any((1, 2))
        for way in range(1, self.ways + 1)
      ],
      -1,
    )
    for way, name in enumerate(self.classes):
      if not self.present[:, way].any():
        raise ValueError(_without(name, way, dataset, ids, config))
    self.tables = episode_tables(config, self.present)

  def ids(self):
    tested = self.dataset.test
    return {
      'support': list(self.support.ids),
      'test': list(tested.ids),
      'sizes': self.sizes.tolist(),
      'classes': list(self.classes),
      'palette': [[int(x) for x in row] for row in self.dataset.palette],
      'digest': base.digest_of(
        self.support.images,
        self.support.labels,
        tested.ids,
        getattr(tested, 'digests', None),
      ),
    }


def _without(name, way, dataset, ids, config):
  """What to do about a class that the support does not show."""
  having = int(np.asarray(dataset.train.present)[:, way].sum())
  if not having:
    return (
      f'no training image of {dataset.name} shows the class {name!r}: nothing '
      'can be learnt of it. Annotate some, or take the class out (of '
      'classes.txt, for a folder of yours) and prepare the dataset again'
    )
  return (
    f'class {name!r} has no pixel left in the support {list(ids)} at '
    f'data.image_size={config.data.image_size}, {having} training images show '
    'it: take larger images, more shots, another support.seed, or '
    "support.rule='per_class'"
  )


def episode_tables(config, present: np.ndarray):
  """What gives the (table, valid) of a step: the episodes of a config."""
  episodes = config.episodes
  return support_lib.episode_tables(
    present,
    kind=episodes.kind,
    subsample=episodes.subsample or None,
    seed=config.seed,
    draws=episodes.draws or None,
  )


class Task(base.Task):
  """See the module's docstring."""

  gives = Table
  own = False

  def __init__(self, config, *args):
    super().__init__(config, *args)
    protocols = PROTOCOLS if config.eval.native else PROTOCOLS[:1]
    kinds = {'model': metrics.ModelSize, 'native': metrics.NativeSize}
    more = [metrics.Calibration(CALIBRATION)] if config.eval.calibration else []
    self.evaluator = images.Images(
      self.data.dataset.test,
      self.program.predict,
      [*(kinds[x.size](self.data.classes, x) for x in protocols), *more],
      image_size=config.data.image_size,
      batch_size=config.eval.batch_size,
      workers=config.data.workers,
    )

  def batches(self):
    return pipeline.step_tables(self.data.tables, steps=self.steps)

  def as_batch(self, element):
    return Table(element['table']), element['valid']

  def shared(self, state):
    support = self.data.support
    bank = self.program.shared(
      self.variables(state), support.images, support.labels.astype(np.int32)
    )
    return parallel.replicate(jax.device_get(bank), self.mesh)

  def test(self, state, show=()):
    variables, roles = self.variables(state), self.program.roles
    memory = self._memory(variables) if 'teacher' in roles else None
    return self.evaluator.run(variables, roles, memory=memory, show=show)

  def _memory(self, variables):
    support = self.data.support
    labels = support.labels.astype(np.int32)
    return self.program.memorize(
      variables,
      Support(
        images=support.images[None],
        masks=masks_of(labels, self.data.ways)[None],
        present=self.data.present[None],
      ),
    )

  def references(self, state):
    config, data, found = self.config, self.data, {}
    if config.eval.untrained:
      found['untrained'] = self.untrained(state)
    if config.eval.brightness:
      confusion = brightness.score(
        data.dataset, data.support, image_size=config.data.image_size
      )
      found['brightness'] = confusion.scores(data.classes)
      confusion = otsu.score(
        data.dataset, data.support, image_size=config.data.image_size
      )
      found['otsu'] = confusion.scores(data.classes)
    return found

  def show_begin(self):
    support = self.data.support
    self.show_support(
      support.images,
      support.labels,
      list(support.ids),
      palette=self.data.dataset.palette,
    )

  def show_end(self, scored):
    dataset, indices = self.data.dataset, sorted(scored.shown)
    if CALIBRATION in scored.scores:
      picture = pictures.reliability(scored.scores[CALIBRATION])
      self._write_picture(self.steps, 'reliability', picture)
    if not indices:
      return
    records = pipeline.load_images(
      dataset.test, indices, self.config.data.image_size
    )
    for i, index in enumerate(indices):
      found = scored.shown[index]
      self.show_answers(
        records.ids[i],
        records.images[i],
        records.labels[i],
        {role: found[role] for role in ('teacher', 'student') if role in found},
        classes=dataset.classes,
        palette=dataset.palette,
      )
