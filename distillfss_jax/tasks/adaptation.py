"""Adaptation: a system learns from a support set, and is scored on a test set.

The support set is on the device from the start; a step is a table of indices
into it.
"""

import dataclasses

import jax
import numpy as np

from distillfss_jax import datasets, parallel, train_step
from distillfss_jax.data import core, pipeline
from distillfss_jax.data import support as support_lib
from distillfss_jax.evaluators import brightness, fewshot
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.systems.base import masks_of
from distillfss_jax.tasks import base
from distillfss_jax.types import Support
from distillfss_jax.workdir import pictures


@dataclasses.dataclass(frozen=True)
class Data:
  """A dataset and the support drawn from it."""

  dataset: core.Dataset
  support: pipeline.SupportSet
  present: np.ndarray  # [M, n] bool


def load_data(config) -> Data:
  """The dataset of a config and its support set, checked against each other."""
  dataset = datasets.load(config.data.name, **config.data.args)
  indices, ids = support_lib.choose(
    dataset, config.support.shots, config.support.seed, config.support.rule
  )
  support = pipeline.load_support(dataset, indices, config.data.image_size)
  ways = len(dataset.classes)
  present = np.stack(
    [(support.labels == way).any((1, 2)) for way in range(1, ways + 1)], -1
  )
  for way, name in enumerate(dataset.classes):
    if not present[:, way].any():
      raise ValueError(
        f'class {name!r} has no pixel left in the support {list(ids)} at '
        f'data.image_size={config.data.image_size}: take larger images, more '
        'shots or another support.seed'
      )
  return Data(dataset, support, present)


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

  streaming = False

  def __init__(self, config):
    super().__init__(config)
    self.data = load_data(config)
    self.tables = episode_tables(config, self.data.present)
    self.classes = self.data.dataset.classes
    self.ways = len(self.classes)
    self.size = len(self.data.dataset.test)

  def connect(self, *args):
    super().connect(*args)
    config = self.config
    self.evaluator = fewshot.FewShot(
      self.data.dataset,
      self.compiled.predict,
      image_size=config.data.image_size,
      batch_size=config.eval.batch_size,
      native=config.eval.native,
      workers=config.data.workers,
    )

  def steps(self):
    return pipeline.step_tables(
      self.tables, steps=self.config.steps, per_dispatch=1
    )

  def begin(self, state):
    support = self.data.support
    self._bank = parallel.replicate(
      jax.device_get(
        self.compiled.bank(
          parallel.local(train_step.variables(state)),
          support.images,
          support.labels.astype(np.int32),
        )
      ),
      self.over,
    )

  def arguments(self, taken, size):
    tables = np.concatenate([x['table'] for x in taken])
    valid = np.concatenate([x['valid'] for x in taken])
    missing, more = size - len(taken), -tables.shape[1] % self.compiled.episodes
    tables = np.pad(tables, ((0, missing), (0, more), (0, 0)))
    return self._bank, tables, np.pad(valid, ((0, missing), (0, more)))

  def test(self, state, show=()):
    variables = parallel.local(train_step.variables(state))
    roles = self.compiled.roles
    memory = self._memory(variables) if 'teacher' in roles else None
    return self.evaluator.run(variables, memory, roles, show=show)

  def _memory(self, variables):
    support = self.data.support
    labels = support.labels.astype(np.int32)
    return self.compiled.memorize(
      variables,
      Support(
        images=support.images[None],
        masks=masks_of(labels, self.ways)[None],
        present=self.data.present[None],
      ),
    )

  def references(self, state):
    config, data, found = self.config, self.data, {}
    if config.eval.untrained:
      found['untrained'] = self.test(state).scores(self.classes)['test']
    if config.eval.brightness:
      confusion = brightness.score(
        data.dataset, data.support, image_size=config.data.image_size
      )
      found['brightness'] = confusion.scores(self.classes)
    return found

  def ids(self):
    return {
      'support': list(self.data.support.ids),
      'test': list(self.data.dataset.test.ids),
    }

  def show_begin(self):
    support, dataset = self.data.support, self.data.dataset
    picture = pictures.support_panel(
      support.images,
      support.labels,
      names=[id_[:12] for id_ in support.ids],
      palette=dataset.palette,
    )
    pictures.save(self.workdir / 'panels' / 'support.png', picture)
    self.out.write_images(0, {'support': picture[None]})

  def show_end(self, scored):
    dataset = self.data.dataset
    indices = tuple(sorted(scored.shown))
    if not indices:
      return
    records = pipeline.load_support(
      dataclasses.replace(dataset, train=dataset.test),
      indices,
      self.config.data.image_size,
    )
    pictures = []
    classes = 1 + len(dataset.classes)
    for i, index in enumerate(indices):
      truth, answers = records.labels[i], {}
      for role in ('teacher', 'student'):
        if role in scored.shown[index]:
          label = scored.shown[index][role]
          answers[role] = label, _iou(truth, label, classes)
      pictures.append(
        pictures.query_panel(
          records.images[i],
          truth,
          answers,
          name=records.ids[i][:12],
          palette=dataset.palette,
        )
      )
      pictures.save(
        self.workdir / 'panels' / f'test_{index:04d}.png', pictures[-1]
      )
    for index, picture in zip(indices, pictures, strict=True):
      self.out.write_images(
        self.config.steps, {f'test/{index:04d}': picture[None]}
      )


def _iou(truth, label, classes):
  confusion = Confusion.empty(classes)
  index = truth.astype(int) * classes + label
  index = index[truth < classes]
  confusion.add(
    np.bincount(index, minlength=classes**2).reshape(classes, classes)
  )
  return confusion.miou
