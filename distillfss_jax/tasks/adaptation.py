"""Adaptation: a system learns from a support set, and is scored on a test set.

The support set is on the device from the start; a step is a table of indices
into it.
"""

import dataclasses

import jax
import numpy as np
from absl import logging

from distillfss_jax import datasets, files, parallel
from distillfss_jax.data import download, pipeline, transforms
from distillfss_jax.data import support as support_lib
from distillfss_jax.datasets import folder
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
MOST_UNLABELLED = 2000 * 384**2  # pixels; with their labels they take 3 GB


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
    if which := config.support.get('unlabelled', ''):
      self.unlabelled = unlabelled_images(
        which, dataset, indices, config.data.image_size
      )
      self.tables = support_lib.half_of_others(
        len(indices),
        len(self.unlabelled.images),
        draws=config.episodes.draws,
        seed=config.seed,
      )

  def ids(self):
    tested, more, digested = self.dataset.test, {}, ()
    if self.unlabelled is not None:
      more = {'unlabelled': list(self.unlabelled.ids)}
      digested = (self.unlabelled.images,)
    return {
      **more,
      'support': list(self.support.ids),
      'test': list(tested.ids),
      'sizes': self.sizes.tolist(),
      'classes': list(self.classes),
      'palette': [[int(x) for x in row] for row in self.dataset.palette],
      'digest': files.digest_of(
        self.support.images,
        self.support.labels,
        tested.ids,
        getattr(tested, 'digests', None),
        *digested,
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


def unlabelled_images(which: str, dataset, support, image_size: int):
  """Images to learn from that nobody annotated, as a SupportSet without labels.

  Args:
    which: 'train', the training images that are no part of the support; or a
      folder or zip of images.
    dataset: a `core.Dataset`.
    support: indices into its training part.
    image_size: S.

  Raises:
    ValueError: there are none.
    OSError: the folder cannot be read.
  """
  if which == 'train':
    indices = np.setdiff1d(np.arange(len(dataset.train)), support)
    if not len(indices):
      raise ValueError(
        f"support.unlabelled='train': all {len(support)} training images of "
        f'{dataset.name} are in the support; name a folder of images'
      )
    found = pipeline.load_images(
      dataset.train, _some(indices, which, image_size), image_size
    )
    return dataclasses.replace(found, labels=None)
  with download.Files(which, 'support.unlabelled is a folder') as found:
    names = _some(folder.images_of(found), which, image_size)
    images, bad = download.photos(
      found, names, lambda image: transforms.resize_image(image, image_size)
    )
  if not images:
    raise ValueError(
      f'support.unlabelled={which!r} has no image that can be read'
      + (f' ({download.few(bad, 3)})' if bad else '')
    )
  if bad:
    logging.warning('%s: left out, unreadable: %s', which, download.few(bad))
  return pipeline.SupportSet(np.stack(list(images.values())), None, (*images,))


def _some(items, which, image_size):
  """As many as fit into memory, from all parts of them."""
  most = max(1, MOST_UNLABELLED // image_size**2)
  if len(items) <= most:
    return items
  logging.warning(
    'support.unlabelled=%s: %d of its %d images are taken, evenly',
    which,
    most,
    len(items),
  )
  places = np.linspace(0, len(items) - 1, most).round().astype(int)
  return [items[i] for i in places]


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
    data, images = self.data, self.data.support.images
    more = ()
    if data.shares is not None:
      images = np.concatenate([images, data.unlabelled.images])
      more = (data.shares,)
    labels = data.support.labels.astype(np.int32)
    bank = self.program.shared(self.variables(state), images, labels, *more)
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
