"""Training on a source: every step has new episodes of its base classes.

The test is a list of episodes of classes that no step has seen.
"""

import jax
import numpy as np

from distillfss_jax import datasets, parallel
from distillfss_jax.data import augment, episodes, pipeline
from distillfss_jax.evaluators.base import over_seeds
from distillfss_jax.evaluators.episodes import Episodes
from distillfss_jax.tasks import base
from distillfss_jax.types import Episode
from distillfss_jax.workdir import pictures

_PALETTE = ((0, 0, 0), (230, 159, 0))


class Data(base.Data):
  """Two pools of a dataset: of base classes, and of those that are tested.

  Raises:
    ValueError: the dataset has no episodes, or too few images for them, or
      the processes and devices cannot share a batch evenly.
  """

  ways = 1

  def __init__(self, config):
    source, name = config.source, config.data.name
    module = datasets.module(name)
    if not hasattr(module, 'pool'):
      found = (x for x in datasets.names() if has_episodes(x))
      raise ValueError(
        f'{name} has no episodes to train on; these have: {", ".join(found)}'
      )
    base.check_shared(source.batch_size, 'source')
    self.recipes = [
      augment.get(x) for x in (source.recipe, source.support_recipe)
    ]
    self.train, self.held_out = (
      module.pool(part=part, **config.data.args) for part in ('train', 'test')
    )
    shots = config.support.shots
    self.draw = episodes.Random(self.train, shots, source.rule)
    self.tables = {
      seed: episodes.listed(
        self.held_out,
        shots=shots,
        rule=source.test_rule,
        count=source.tests,
        seed=seed,
      )
      for seed in (source.test_seed, *source.test_seeds)
    }
    self.table = self.tables[source.test_seed]
    self.classes, self.size = self.held_out.classes, source.tests
    self.per_epoch = len(self.draw) / source.batch_size

  def ids(self):
    """The episodes that are tested; what is trained on is drawn."""
    named = episodes.by_name(self.held_out, self.table)
    trained = self.train.source.ids, self.train.pairs
    return {'test': named, 'digest': base.digest_of(*trained, named)}


def has_episodes(name: str) -> bool:
  """Whether episodes can be drawn from a dataset."""
  return hasattr(datasets.module(name), 'pool')


class Task(base.Task):
  """See the module's docstring."""

  gives = Episode
  own = True

  def __init__(self, config, *args):
    super().__init__(config, *args)
    self.evaluators = {
      seed: Episodes(
        self.data.held_out,
        table,
        self.program.memorize,
        self.program.predict,
        image_size=config.data.image_size,
        batch_size=config.eval.batch_size,
        workers=config.data.workers,
      )
      for seed, table in self.data.tables.items()
    }

  def shared(self, state):
    """The labels that the records give the classes which are trained."""
    values = np.asarray(self.data.train.values, np.int32)
    made = self.program.shared(self.variables(state), values)
    return parallel.replicate(jax.device_get(made), self.mesh)

  def batches(self):
    config = self.config
    return pipeline.training_episodes(
      self.data.train,
      self.data.draw,
      *self.data.recipes,
      image_size=config.data.image_size,
      batch_size=config.source.batch_size // jax.process_count(),
      seed=config.seed,
      workers=config.data.workers,
      shard=(jax.process_index(), jax.process_count()),
    )

  def as_batch(self, element):
    batch = Episode(
      images=element['images'],
      labels=element['labels'],
      support_images=element['support_images'],
      support_labels=element['support_labels'],
      all_labels=element['all_labels'],
      way=element['class'],
    )
    return batch, element['valid']

  def test(self, state, show=()):
    variables, roles = self.variables(state), self.program.roles
    first, *others = self.evaluators
    found = {first: self.evaluators[first].run(variables, roles, show=show)}
    if not others:
      return found[first]
    found |= {x: self.evaluators[x].run(variables, roles) for x in others}
    return over_seeds(found)

  def validate(self, state):
    """On the way one seed must do."""
    first = next(iter(self.evaluators.values()))
    return first.run(self.variables(state), self.program.roles)

  def references(self, state):
    if not self.config.eval.untrained:
      return {}
    return {'untrained': self.untrained(state)}

  def show_begin(self):
    """Some episodes as the first steps see them, the query above its shot."""
    batch = next(
      iter(
        pipeline.training_episodes(
          self.data.train,
          self.data.draw,
          *self.data.recipes,
          image_size=self.config.data.image_size,
          batch_size=5,
          seed=self.config.seed,
        )
      )
    )
    names = [self.data.train.classes[c] for c in batch['class']]
    rows = [
      pictures.support_panel(
        batch['images'], batch['labels'], names=names, palette=_PALETTE
      ),
      pictures.support_panel(
        batch['support_images'][:, 0],
        batch['support_labels'][:, 0],
        names=['its first shot'] * len(names),
        palette=_PALETTE,
      ),
    ]
    self._write_picture(0, 'episodes', pictures.grid(rows))

  def show_end(self, scored):
    indices = sorted(scored.shown)
    if not indices:
      return
    recipe = augment.get('none')
    batch = next(
      iter(
        pipeline.listed_episodes(
          self.data.held_out,
          self.data.table[indices],
          recipe,
          recipe,
          image_size=self.config.data.image_size,
          batch_size=len(indices),
        )
      )
    )
    for i, index in enumerate(indices):
      name = self.data.classes[batch['class'][i]]
      shots = pictures.support_panel(
        batch['support_images'][i],
        batch['support_labels'][i],
        palette=_PALETTE,
      )
      self.show_answers(
        f'{index:04d} {name}',
        batch['images'][i],
        np.asarray(batch['labels'][i]),
        scored.shown[index],
        classes=(name,),
        palette=_PALETTE,
        below=(shots,),
      )
