"""Training on a source: every step has new episodes of its base classes.

The test is a list of episodes of classes that no step has seen.
"""

import jax
import numpy as np

from distillfss_jax import datasets, parallel
from distillfss_jax.data import augment, episodes, pipeline
from distillfss_jax.evaluators import episodes as scoring
from distillfss_jax.evaluators.base import over_seeds, together
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
    args = config.data.args
    self.train = module.pool(part='train', **args)
    # What an image also shows matters to training alone.
    tested = {k: False if k == 'exclusive' else v for k, v in args.items()}
    self.held_out = module.pool(part='test', **tested)
    self.places = scoring.places_of(source.test_recipe, exact=source.test_exact)
    known, classes = len(self.train.classes), config.model.fields.get('classes')
    if classes not in (None, 1 + known):
      raise ValueError(
        f'config.model.fields.classes={classes}: {name} has {known} base '
        f'classes here, {1 + known} with background'
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
    self.general_tables = {
      seed: episodes.generalised(
        self.held_out, shots=shots, count=source.generalised, seed=seed
      )
      for seed in self.tables
      if source.generalised
    }
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
    data, roles = self.data, self.program.roles
    has_base = 'base' in self.program.beside
    if config.source.generalised and not has_base:
      raise ValueError(
        f'config.source.generalised={config.source.generalised}: system '
        f'{config.system!r} has no base learner to be tested beside; set it to '
        '0'
      )
    if config.source.prior and 'prior' not in self.program.beside:
      raise ValueError(
        f'config.source.prior=True: system {config.system!r} has no prior '
        'mask; set it to False'
      )
    pool, known = data.held_out, data.train
    places = data.places if config.eval.native else None
    found = [scoring.of_class(pool, roles)]
    if places:
      found.append(scoring.of_class(pool, roles, size='native', places=places))
    if has_base:
      found.append(scoring.of_base(pool, known, places=places))
    self.evaluators = self._each(data.tables, found)
    general = [scoring.generalised(pool, known, places=places)]
    self.general = self._each(data.general_tables, general)

  def _each(self, tables, found):
    """An evaluator for each list of episodes, by its seed."""
    config = self.config
    return {
      seed: scoring.Episodes(
        self.data.held_out,
        table,
        self.program.memorize,
        self.program.predict,
        found,
        image_size=config.data.image_size,
        batch_size=config.eval.batch_size,
        recipe=config.source.test_recipe,
        workers=config.data.workers,
      )
      for seed, table in tables.items()
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

    def scored(evaluators, **more):
      first, *others = evaluators
      found = {first: evaluators[first].run(variables, roles, **more)}
      found |= {x: evaluators[x].run(variables, roles) for x in others}
      return over_seeds(found) if others else found[first]

    found = scored(self.evaluators, show=show)
    return together(found, scored(self.general)) if self.general else found

  def validate(self, state):
    """On the way one seed must do."""
    first = next(iter(self.evaluators.values()))
    return first.run(self.variables(state), self.program.roles)

  def references(self, state):
    found, config = {}, self.config
    if config.eval.untrained:
      found['untrained'] = self.untrained(state)
    if config.source.prior:
      roles = ('prior',)
      metric = scoring.of_class(self.data.held_out, roles)
      tables = {config.source.test_seed: self.data.table}
      [evaluator] = self._each(tables, [metric]).values()
      scored = evaluator.run(self.variables(state), roles)
      found['prior'] = scored.scores[metric.protocol.name]['prior']
    return found

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
    recipe = augment.get(self.config.source.test_recipe)
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
