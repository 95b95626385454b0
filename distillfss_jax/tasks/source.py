"""Training on a source: every step has new episodes of its base classes.

The test is a list of episodes of classes that no step has seen.
"""

import jax
import numpy as np

from distillfss_jax import datasets, parallel, train_step
from distillfss_jax.data import augment, episodes, pipeline
from distillfss_jax.evaluators import episodic
from distillfss_jax.systems.base import Bank
from distillfss_jax.tasks import base
from distillfss_jax.workdir import pictures

_PALETTE = ((0, 0, 0), (230, 159, 0))


class Task(base.Task):
  """See the module's docstring.

  Raises:
    ValueError: the dataset has no episodes, or too few images for them, or
      the processes and devices cannot share a batch evenly.
  """

  streaming = True
  ways = 1

  def __init__(self, config):
    super().__init__(config)
    source, name = config.source, config.data.name
    module = datasets.module(name)
    if not hasattr(module, 'pool'):
      found = (
        x for x in datasets.names() if hasattr(datasets.module(x), 'pool')
      )
      raise ValueError(
        f'{name} has no episodes to train on; these have: {", ".join(found)}'
      )
    if config.system != 'episodic':
      raise ValueError(
        f"task 'source' trains system 'episodic', not {config.system!r}"
      )
    if source.batch_size % jax.device_count():
      raise ValueError(
        f'source.batch_size={source.batch_size} is no multiple of the '
        f'{jax.device_count()} devices'
      )
    self.recipes = [
      augment.get(x) for x in (source.recipe, source.support_recipe)
    ]
    self.train, self.held_out = (
      module.pool(part=part, **config.data.args) for part in ('train', 'test')
    )
    shots = config.support.shots
    self.draw = episodes.Random(self.train, shots, source.rule)
    self.table = episodes.listed(
      self.held_out,
      shots=shots,
      rule=source.test_rule,
      count=source.tests,
      seed=source.test_seed,
    )
    self.classes, self.size = self.held_out.classes, source.tests

  def connect(self, *args):
    super().connect(*args)
    config = self.config
    self.evaluator = episodic.Episodic(
      self.held_out,
      self.table,
      self.compiled.memorize,
      self.compiled.predict,
      image_size=config.data.image_size,
      batch_size=config.eval.batch_size,
      workers=config.data.workers,
    )

  def steps(self):
    config = self.config
    return pipeline.training_episodes(
      self.train,
      self.draw,
      *self.recipes,
      image_size=config.data.image_size,
      batch_size=config.source.batch_size // jax.process_count(),
      seed=config.seed,
      workers=config.data.workers,
      shard=(jax.process_index(), jax.process_count()),
    )

  def begin(self, state):
    """All that steps share is the state."""

  def arguments(self, taken, size):
    missing = size - len(taken)

    def stacked(query, shots):
      """The query and its shots of all episodes, [t, b * (1+s), ...]."""
      x = np.stack(
        [np.concatenate([x[query][:, None], x[shots]], 1) for x in taken]
      )
      x = x.reshape(len(taken), -1, *x.shape[3:])
      return np.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))

    images = stacked('images', 'support_images')
    labels = stacked('labels', 'support_labels')
    present = (labels == 1).any((2, 3))[..., None]
    bank = parallel.share_steps(
      Bank(images, labels, present, None, {}), self.over
    )
    table, valid = self._places()
    return (
      bank,
      np.broadcast_to(table, (size, *table.shape)),
      np.broadcast_to(valid, (size, *valid.shape)),
    )

  def _places(self):
    """Where each episode's images lie in a step: [e, 1+s], and [e] True.

    Row i is episode i of the global batch, whoever read it, so that the number
    of processes changes neither its randomness nor the order of sums.
    """
    count, processes = self.config.source.batch_size, jax.process_count()
    i, width = np.arange(count), 1 + self.config.support.shots
    row = (i % processes) * (count // processes) + i // processes
    table = row[:, None] * width + np.arange(width)
    more = -count % self.compiled.episodes
    table = np.pad(table.astype(np.int32), ((0, more), (0, 0)))
    return table, np.arange(len(table)) < count

  def test(self, state, show=()):
    variables = parallel.local(train_step.variables(state))
    return self.evaluator.run(variables, self.compiled.roles, show=show)

  def references(self, state):
    if not self.config.eval.untrained:
      return {}
    return {'untrained': self.test(state).scores(self.classes)['test']}

  def ids(self):
    """The episodes that are tested; what is trained on is drawn."""
    return {'test': episodes.by_name(self.held_out, self.table)}

  def show_begin(self):
    """Some episodes as the first steps see them, the query above its shot."""
    batch = next(
      iter(
        pipeline.training_episodes(
          self.train,
          self.draw,
          *self.recipes,
          image_size=self.config.data.image_size,
          batch_size=5,
          seed=self.config.seed,
        )
      )
    )
    names = [self.train.classes[c] for c in batch['class']]
    picture = pictures.grid(
      [
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
    )
    pictures.save(self.workdir / 'panels' / 'episodes.png', picture)
    self.out.write_images(0, {'episodes': picture[None]})

  def show_end(self, scored):
    indices = sorted(scored.shown)
    if not indices:
      return
    recipe = augment.get('none')
    batch = next(
      iter(
        pipeline.listed_episodes(
          self.held_out,
          self.table[indices],
          recipe,
          recipe,
          image_size=self.config.data.image_size,
          batch_size=len(indices),
        )
      )
    )
    for i, index in enumerate(indices):
      truth = batch['labels'][i]
      answers = {
        role: (label, _iou(truth, label))
        for role, label in scored.shown[index].items()
      }
      shots = pictures.support_panel(
        batch['support_images'][i], batch['support_labels'][i],
        palette=_PALETTE,
      )  # fmt: skip
      query = pictures.query_panel(
        batch['images'][i],
        truth,
        answers,
        name=self.classes[batch['class'][i]],
        palette=_PALETTE,
      )
      picture = pictures.grid([query, shots])
      pictures.save(self.workdir / 'panels' / f'test_{index:04d}.png', picture)
      self.out.write_images(
        self.config.steps, {f'test/{index:04d}': picture[None]}
      )


def _iou(truth, label):
  """IoU of the class of an episode; None where neither has it."""
  scored = truth != 255
  union = (((truth == 1) | (label == 1)) & scored).sum()
  hits = ((truth == 1) & (label == 1) & scored).sum()
  return float(hits / union) if union else None
