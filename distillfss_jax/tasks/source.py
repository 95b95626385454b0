"""Training on a source: every step has new episodes of its base classes.

The test is a list of episodes of classes that no step has seen. Where a method
adapts to the classes of the test, `source.protocol` says what it sees of them.
"""

import dataclasses

import jax
import numpy as np

from distillfss_jax import datasets, files, parallel
from distillfss_jax.data import augment, core, episodes, pipeline
from distillfss_jax.evaluators import episodes as scoring
from distillfss_jax.evaluators.base import over_seeds, together
from distillfss_jax.tasks import base
from distillfss_jax.types import Episode
from distillfss_jax.workdir import pictures

_PALETTE = ((0, 0, 0), (230, 159, 0))

# What training and test have to do with each other.
PROTOCOLS = {
  'apart': '',
  'released': (
    'protocol released: shots to adapt by are drawn anew from all images that '
    'are tested, and checkpoints chosen by the test'
  ),
  'fixed': (
    'protocol fixed: each class has the same shots in training and in all '
    'episodes, and no image of their pixels is tested'
  ),
}
METRICS = ('class_miou', 'fb_iou', 'reference_batch')
CHOSEN_BY = ('test', 'leave_one_out')


class Data(base.Data):
  """Two pools of a dataset: of base classes, and of those that are tested.

  Raises:
    ValueError: the dataset has no episodes, or too few images for them, or
      the processes and devices cannot share a batch evenly.
  """

  ways = 1

  def __init__(self, config):
    source, name = config.source, config.data.name
    check_words(config)
    if source.protocol == 'apart' and not has_episodes(name):
      found = (x for x in datasets.names() if has_episodes(x))
      raise ValueError(
        f'{name} has no episodes to train on; these have: {", ".join(found)}'
      )
    base.check_shared(source.batch_size, 'source')
    self.recipes = [
      augment.get(x) for x in (source.recipe, source.support_recipe)
    ]
    args = config.data.args
    part, tested_part = source.parts
    self.train = pool_of(name, part, args)
    # What an image also shows matters to training alone.
    tested = {k: False if k == 'exclusive' else v for k, v in args.items()}
    if source.test_data:
      tested = {k: v for k, v in tested.items() if k == 'data_dir'}
    self.held_out = pool_of(source.test_data or name, tested_part, tested)
    self.places = scoring.places_of(source.test_recipe, exact=source.test_exact)
    known, classes = len(self.train.classes), config.model.fields.get('classes')
    if classes not in (None, 1 + known):
      raise ValueError(
        f'config.model.fields.classes={classes}: {name} has {known} base '
        f'classes here, {1 + known} with background'
      )
    shots = config.support.shots
    self.supports = self._fixed(config)
    self.draw = episodes.Random(
      self.train, shots, source.rule, self.supports, source.pairs
    )

    def listed(seed):
      return episodes.listed(
        self.held_out,
        shots=shots,
        rule=source.test_rule,
        count=source.tests,
        seed=seed,
        supports=self.supports,
      )

    seeds = tuple(source.test_seeds) or (source.test_seed,)
    self.tables = {seed: listed(seed) for seed in seeds}
    self.table = self.tables[seeds[0]]  # that is shown, and named in ids.json
    self.choosing = self.tables.get(source.test_seed)
    if self.choosing is None:
      self.choosing = listed(source.test_seed)
    self.general_tables = {
      seed: episodes.generalised(
        self.held_out, shots=shots, count=source.generalised, seed=seed
      )
      for seed in self.tables
      if source.generalised
    }
    self.classes, self.size = self.held_out.classes, source.tests
    self.per_epoch = len(self.draw) / source.batch_size
    self.left_out = None  # episodes of the shots alone
    if source.chosen_by == 'leave_one_out' and config.eval.keep_best:
      if self.supports is None:
        raise ValueError(
          "config.source.chosen_by='leave_one_out' leaves out shots that are "
          "always the same: take config.source.protocol='fixed'"
        )
      self.left_out = episodes.leave_one_out(self.supports)

  def _fixed(self, config):
    """The shots of each class, which are then no part of what is tested."""
    if config.source.protocol != 'fixed':
      return None
    if self.train.classes != self.held_out.classes:
      raise ValueError(
        "config.source.protocol='fixed' tests the classes that it adapts to; "
        f'source.parts={tuple(config.source.parts)} have others'
      )
    shots = config.support.shots
    found = episodes.supports(self.train, shots=shots, seed=config.support.seed)
    # One source for both, so that the numbers of images mean the same.
    source = core.Joined(self.train.source, self.held_out.source)
    told = core.contents(source)
    pairs = self.held_out.pairs + np.array([len(self.train.source), 0])
    self.held_out = core.without(
      dataclasses.replace(
        self.held_out, source=source, pairs=pairs.astype(np.int32)
      ),
      {told[i] for i in found.ravel()},
    )
    return found

  def ids(self):
    """The episodes that are tested; what is trained on is drawn."""
    named = episodes.by_name(self.held_out, self.table)
    trained = self.train.source.ids, self.train.pairs
    ids = {'test': named, 'digest': files.digest_of(*trained, named)}
    if self.supports is not None:
      ids['support'] = {
        name: [self.train.source.ids[i] for i in row]
        for name, row in zip(self.train.classes, self.supports, strict=True)
      }
    return ids


def check_words(config):
  """Raises ValueError for a choice of `config.source` that there is not."""
  for key, known in (
    ('protocol', tuple(PROTOCOLS)),
    ('metric', METRICS),
    ('chosen_by', CHOSEN_BY),
  ):
    if config.source[key] not in known:
      raise ValueError(
        f'config.source.{key} is {config.source[key]!r}; there are: '
        f'{", ".join(known)}'
      )
  parts = tuple(config.source.parts)
  same = len(set(parts)) == 1 and not config.source.test_data
  if config.source.protocol == 'apart' and same:
    raise ValueError(
      f'config.source.parts={parts} trains on what is tested: say so with '
      "config.source.protocol='released', or take 'fixed'"
    )
  metric, batch = config.source.metric, config.source.reference_batch
  if metric == 'reference_batch' and not batch:
    raise ValueError(
      "config.source.metric='reference_batch' needs "
      'config.source.reference_batch, how many episodes count together'
    )


def pool_of(name: str, part: str, args) -> core.Pool:
  """What episodes of a dataset are drawn from; of any dataset its classes."""
  if has_episodes(name):
    return datasets.module(name).pool(part=part, **args)
  return core.pool_of(datasets.load(name, **args), part)


def has_episodes(name: str) -> bool:
  """Whether episodes can be drawn from a dataset."""
  return hasattr(datasets.module(name), 'pool')


class Task(base.Task):
  """See the module's docstring."""

  gives = Episode
  own = True

  def __init__(self, config, *args):
    super().__init__(config, *args)
    data = self.data
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
    found = self._found(pool, places)
    if has_base:
      found.append(scoring.of_base(pool, known, places=places))
    self.evaluators = self._each(data.tables, found)
    general = [scoring.generalised(pool, known, places=places)]
    self.general = self._each(data.general_tables, general)
    # On the way one seed must do, or the shots alone.
    first = self.evaluators.get(config.source.test_seed)
    self.chooser = first or self._each({0: data.choosing}, found)[0]
    if data.left_out is not None:
      [metric] = self._found(known, None)[:1]
      protocol = dataclasses.replace(
        metric.protocol,
        name='leave_one_out',
        says='each shot in turn as the query of the others of its class',
      )
      found = [dataclasses.replace(metric, protocol=protocol)]
      tables = {0: data.left_out}
      [self.chooser] = self._each(tables, found, known).values()

  def _found(self, pool, places):
    """What is counted of an episode's class, the metric that chooses first."""
    source, roles = self.config.source, self.program.roles
    found = [scoring.of_class(pool, roles)]
    if places:
      found.append(scoring.of_class(pool, roles, size='native', places=places))
    if source.metric == 'fb_iou':
      found = [_first_column(metric, 'fb_iou') for metric in found]
    if source.reference_batch:
      released = scoring.of_batches(
        pool,
        roles,
        batch=source.reference_batch,
        classes=source.reference_classes,
      )
      first = source.metric == 'reference_batch'
      found = [released, *found] if first else [*found, released]
    return [_saying(x, PROTOCOLS[source.protocol]) for x in found]

  def _each(self, tables, found, pool=None):
    """An evaluator for each list of episodes, by its seed."""
    config = self.config
    return {
      seed: scoring.Episodes(
        self.data.held_out if pool is None else pool,
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
    return self.chooser.run(self.variables(state), self.program.roles)

  def references(self, state):
    found, config = {}, self.config
    if config.eval.untrained:
      found['untrained'] = self.untrained(state)
    if config.source.prior:
      roles = ('prior',)
      metric = scoring.of_class(self.data.held_out, roles)
      [evaluator] = self._each({0: self.data.table}, [metric]).values()
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


def _first_column(metric, name):
  """A metric whose tables, and choices, have another column first."""
  columns = metric.protocol.columns
  columns = {name: columns[name], **columns}
  protocol = dataclasses.replace(metric.protocol, columns=columns)
  return dataclasses.replace(metric, protocol=protocol)


def _saying(metric, more):
  """A metric whose protocol says more."""
  if not more:
    return metric
  says = f'{metric.protocol.says}; {more}'
  protocol = dataclasses.replace(metric.protocol, says=says)
  return dataclasses.replace(metric, protocol=protocol)
