"""Scores a few-shot segmenter on episodes, knowing it by two calls.

What is counted of an episode is a `Metric`: which labels it holds answers to,
which answers those are, and at which size.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillfss_jax import parallel
from distillfss_jax.data import augment, core, pipeline
from distillfss_jax.evaluators import base
from distillfss_jax.evaluators.metrics import (
  argmax,
  count_native,
  pictured,
  stretched,
)
from distillfss_jax.ops import metrics, resize
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.types import VOID, Array, Support
from distillfss_jax.workdir import writer

SURE = 0.9  # probability above which a class is found in the generalised test

_SAYS = (
  'episodes of one class each, {}; a class is scored over all its episodes '
  'together, mIoU is the mean over classes, FB-IoU that over background and '
  'foreground of all episodes'
)
_AT = {'model': "at the model's size", 'native': "at the queries' own sizes"}
PROTOCOLS = {
  size: base.Protocol(name, size, _SAYS.format(_AT[size]))
  for name, size in (('test', 'model'), ('test_native', 'native'))
}
_GENERAL = {
  'miou': 'mIoU of all',
  'base_miou': 'mIoU of base',
  'novel_miou': 'mIoU of novel',
  'fb_iou': 'FB-IoU',
}


@dataclasses.dataclass(frozen=True)
class Metric:
  """What is counted of an episode, and the scores that come of it.

  protocol: what it is called.
  truth: int32 [n, 256], for each class that episodes ask for, labels of the
    records to those that answers are held to.
  classes: of these, background included.
  answers: {role: logits by role [b, H, W, .] -> labels [b, H, W]}; the logits
    that a function reads are those of `needs`.
  needs: roles that a system is asked for.
  scores: int64 [n, classes, classes], pixels by the class of the episode, the
    label and the prediction -> numbers by name.
  places: where a query's pixels lie in the logits, for its own size; see
    `metrics.stretched`. None scores at the model's.
  counted_as: the list of episodes [e, 2+s] -> [e], the class that each is
    counted under; its own by default.
  """

  protocol: base.Protocol
  truth: np.ndarray
  classes: int
  answers: Mapping[str, Callable[[Mapping[str, Array]], Array]]
  needs: tuple[str, ...]
  scores: Callable[[np.ndarray], dict]
  places: Callable | None = None
  counted_as: Callable[[np.ndarray], np.ndarray] = lambda table: table[:, 0]

  def count(self, logits: Mapping[str, Array], batch: dict) -> dict[str, Array]:
    """{role: int32 [b, classes, classes]} of a batch of episodes."""
    table = jnp.asarray(self.truth)[batch['class']]
    return {
      role: self._count_one(
        answer, {x: logits[x] for x in self.needs}, batch, table
      )
      for role, answer in self.answers.items()
    }

  def _count_one(self, answer, logits, batch, table):
    lookup = jax.vmap(lambda table, labels: table[labels])
    if self.places is None:
      labels, found = lookup(table, batch['all_labels']), answer(logits)
      return jax.vmap(lambda x, y: metrics.count(x, y, self.classes))(
        labels, found
      )

    def one(x):  # an episode; all at once would take the memory of all
      logits, size, labels, table = jax.tree.map(lambda y: y[None], x)
      return count_native(
        logits,
        size,
        lookup(table, labels),
        self.classes,
        places=self.places,
        answer=answer,
      )

    return jax.lax.map(
      one, (logits, batch['sizes'], batch['native_labels'], table)
    )


def truth_of(values: Sequence[int]) -> np.ndarray:
  """int32 [256]: the labels of records as 1, 2, ...; others as background."""
  table = np.zeros(256, np.int32)
  table[VOID] = VOID
  table[np.asarray(values, int)] = np.arange(1, 1 + len(values))
  return table


def scores(counts: np.ndarray, classes: Sequence[str]) -> dict:
  """Numbers by name, of int64 [n, 2, 2]: pixels by (class, label, prediction).

  A class is scored over all its episodes together; one without a pixel to
  score is None, and no part of the mean. 'fb_iou' and the others are over all
  episodes of all classes.
  """
  # Parity: to the originals a class without an episode is a 0 in the mean.
  each = [Confusion(x).iou_or_none()[1] for x in counts]
  whole = Confusion(counts.sum(0)).scores(('foreground',))
  return {
    'miou': _mean(each),
    **{
      name: whole[name]
      for name in ('fb_iou', 'accuracy', 'f1', 'precision', 'recall')
    },
    'iou': dict(zip(classes, each, strict=True)),
  }


def of_class(
  pool: core.Pool,
  roles: Sequence[str],
  *,
  size: str = 'model',
  places: Callable = stretched,
) -> Metric:
  """How well the class of an episode is found.

  Args:
    pool: what the episodes were drawn from.
    roles: of the answers, of two channels.
    size: 'model' or 'native'.
    places: for 'native', see `Metric`.
  """
  roles = tuple(roles)
  return Metric(
    PROTOCOLS[size],
    np.stack([truth_of([value]) for value in pool.values]),
    2,
    {role: functools.partial(_of_role, role) for role in roles},
    roles,
    lambda counts: scores(counts, pool.classes),
    places if size == 'native' else None,
  )


def of_batches(
  pool: core.Pool, roles: Sequence[str], *, batch: int, classes: int = 0
) -> Metric:
  """What the released code of SSP and IFA counts: it depends on the batch.

  Args:
    pool: what the episodes were drawn from.
    roles: of the answers, of two channels.
    batch: episodes that it takes at once.
    classes: rows of its matrix; 0 for as many as the pool has classes.
  """
  # Parity: it takes all episodes of a batch for the class of the first. With
  # classes in turn and a batch that is a multiple of their number, that is
  # always the same one: what comes out is FB-IoU.
  metric = of_class(pool, roles)
  rows = classes or len(pool.classes)

  def first(table):
    return table[np.arange(len(table)) // batch * batch, 0]

  return dataclasses.replace(
    metric,
    protocol=base.Protocol(
      'reference_batch',
      'model',
      f'as the released code of IFA counts in batches of {batch}, '
      f'{_AT["model"]}: all episodes of a batch as the class of its first, the '
      'mean over background and classes; no number to compare with others',
      {'as_released': 'IoU as released'},
    ),
    scores=lambda counts: {'as_released': released_mean(counts, rows)},
    counted_as=first,
  )


def released_mean(counts: np.ndarray, classes: int) -> float | None:
  """The mean of IoU that the released code of SSP and IFA takes.

  Args:
    counts: int64 [n, 2, 2], pixels by (class they are counted as, label,
      prediction).
    classes: rows and columns of its matrix. Class i is its label i + 1, the
      last of which lies outside; 1 is the IoU of foreground alone.
  """
  whole = counts.sum(0)
  if classes == 1:
    return Confusion(whole).iou_or_none()[1]
  matrix = np.zeros((classes, classes), np.int64)
  matrix[0, 0] = whole[0, 0]
  for label, ((_, wrong), (missed, right)) in enumerate(counts, 1):
    if label < classes:
      matrix[0, label] += wrong
      matrix[label, 0] += missed
      matrix[label, label] += right
    else:  # it looks for them one row further
      matrix[1, 0] += wrong
  return _mean(Confusion(matrix).iou_or_none())


def of_base(
  pool: core.Pool, known: core.Pool, *, places: Callable | None = None
) -> Metric:
  """How well a base learner finds its classes in the queries of episodes.

  Args:
    pool: what the episodes were drawn from; its classes are background.
    known: whose classes are the base classes.
    places: see `Metric`.
  """
  size = 'native' if places else 'model'
  return Metric(
    base.Protocol(
      'test_base',
      size,
      'all base classes in the queries of the episodes, one confusion matrix, '
      f'{_AT[size]}; mIoU is the mean over those that are there',
    ),
    np.stack([truth_of(known.values)] * len(pool.values)),
    1 + len(known.values),
    {'base': functools.partial(_of_role, 'base')},
    ('base',),
    lambda counts: Confusion(counts.sum(0)).scores(known.classes),
    places,
  )


def generalised(
  pool: core.Pool, known: core.Pool, *, places: Callable | None = None
) -> Metric:
  """Base classes and the episode's class, found in one answer (BAM).

  Args:
    pool: what the episodes were drawn from; its classes are none of these.
    known: whose classes are the base classes.
    places: see `Metric`.
  """
  count = len(known.values)
  truth = np.stack([truth_of(known.values)] * len(pool.values))
  truth[np.arange(len(pool.values)), pool.values] = count + 1
  size = 'native' if places else 'model'
  return Metric(
    base.Protocol(
      'generalised',
      size,
      'episodes of any query and one novel class, found beside all base '
      f'classes, {_AT[size]}; where both claim a pixel, the role names which '
      'wins',
      _GENERAL,
    ),
    truth,
    count + 2,
    {
      f'{first} first': functools.partial(fuse, first)
      for first in ('final', 'base')
    },
    ('final', 'base'),
    lambda counts: generalised_scores(counts, known.classes, pool.classes),
    places,
  )


def fuse(first: str, logits: Mapping[str, Array]) -> Array:
  """One label map of two answers: base classes 1..n, the episode's n + 1.

  Args:
    first: whose foreground counts where both have some: 'final' or 'base'.
    logits: 'final' [..., 2] of its class, 'base' [..., 1+n].
  """
  known, own = argmax(logits['base']), logits['base'].shape[-1]
  sure = jax.nn.softmax(logits['final'])[..., 1] > SURE
  taken = sure if first == 'final' else sure & (known == 0)
  return jnp.where(taken, own, known)


def generalised_scores(
  counts: np.ndarray, known: Sequence[str], asked: Sequence[str]
) -> dict:
  """Numbers by name of the generalised test.

  A base class is scored over all episodes, an episode's over its own; FB-IoU is
  that of background, and of the sums over all other labels.

  Args:
    counts: int64 [n, 2+k, 2+k], pixels by the episode's class, the label and
      the prediction; the last label is the episode's class.
    known: names of the k base classes.
    asked: names of the n classes of episodes.
  """
  whole = Confusion(counts.sum(0))
  of_base = whole.iou_or_none()[1:-1]
  of_asked = [Confusion(x).iou_or_none()[-1] for x in counts]
  hits = np.diag(whole.counts)
  unions = whole.counts.sum(0) + whole.counts.sum(1) - hits
  foreground = hits[1:].sum() / unions[1:].sum() if unions[1:].sum() else None
  return {
    'miou': _mean([*of_base, *of_asked]),
    'base_miou': _mean(of_base),
    'novel_miou': _mean(of_asked),
    'fb_iou': _mean([whole.iou_or_none()[0], foreground]),
    'iou': dict(zip((*known, *asked), (*of_base, *of_asked), strict=True)),
  }


def fitted(shape: tuple[int, int], sizes: Array, canvas: tuple[int, int]):
  """`metrics.stretched` of images that lie in the corner of a square.

  The inverse of `augment.fit`.
  """
  longest = sizes.max(-1)
  return tuple(
    jax.vmap(
      lambda size, longest, i=i, n=n: resize.taps(
        augment.fitted(size, longest, shape[i]), size, n
      )
    )(sizes[:, i], longest)
    for i, n in enumerate(canvas)
  )


# Parity: the originals lay corners on corners when they bring logits to an
# image's size, though the image was resized by half pixels before.
def corners(shape: tuple[int, int], sizes: Array, canvas: tuple[int, int]):
  """`metrics.stretched`, with corners on corners: HDMNet's."""
  return tuple(
    jax.vmap(
      lambda size, i=i, n=n: resize.taps(shape[i], size, n, align_corners=True)
    )(sizes[:, i])
    for i, n in enumerate(canvas)
  )


# Parity: nor does BAM take back that sides were cut to multiples of 8, so that
# what it says of an image is up to 7 pixels of its size too large.
def canvas_corners(
  shape: tuple[int, int], sizes: Array, canvas: tuple[int, int]
):
  """`fitted`, with the corners of the whole square on each other: BAM's."""
  longest = jnp.broadcast_to(sizes.max(-1, keepdims=True), sizes.shape)
  return corners(shape, longest, canvas)


def places_of(recipe: str, *, exact: bool) -> Callable:
  """Where pixels of images that a recipe resized lie; see `Metric.places`.

  Args:
    recipe: of `augment.RECIPES`, that draws nothing.
    exact: whether to undo just what the recipe did, not what the originals of
      BAM and HDMNet do.

  Raises:
    ValueError: a recipe that crops or turns cannot be undone.
  """
  kinds = {
    'none': (stretched, stretched),
    'stretch': (corners, stretched),
    'fit': (canvas_corners, fitted),
  }
  if recipe not in kinds:
    raise ValueError(
      f'config.source.test_recipe={recipe!r} is not one of {", ".join(kinds)}'
    )
  return kinds[recipe][exact]


class Episodes(base.Evaluator):
  """Counts every pixel of the queries of a list of episodes.

  Args:
    pool: what the episodes were drawn from.
    table: int32 [e, 2+s], from `episodes.listed`.
    memorize: variables, Support -> memory.
    predict: variables, memory, images [B, S, S, 3], roles -> {role:
      Prediction}.
    found: what is counted.
    image_size: S.
    batch_size: episodes at once, over the devices of this process.
    recipe: name of that which resizes images, see `augment.py`.
    workers: processes that decode images.
  """

  def __init__(
    self,
    pool: core.Pool,
    table: np.ndarray,
    memorize: Callable,
    predict: Callable,
    found: Sequence[Metric],
    *,
    image_size: int,
    batch_size: int,
    recipe: str = 'none',
    workers: int = 0,
  ):
    self._mesh = parallel.mesh(local=True)
    devices, resized = self._mesh.size, augment.get(recipe)
    self._metrics = tuple(found)
    self._batches = pipeline.listed_episodes(
      pool,
      table,
      resized,
      resized,
      image_size=image_size,
      batch_size=-(-batch_size // devices) * devices,
      native=any(x.places for x in self._metrics),
      workers=workers,
      shard=(jax.process_index(), jax.process_count()),
    )
    self._pool, self._table, self._size = pool, np.asarray(table), image_size
    self._memorize, self._predict = memorize, predict
    self._count = jax.jit(
      lambda logits, batch: [x.count(logits, batch) for x in self._metrics]
    )

  def run(
    self,
    variables: Mapping[str, jax.Array],
    roles: Sequence[str],
    *,
    memory: Any = None,
    show: Sequence[int] = (),
  ) -> base.Scored:
    del memory  # each episode has a support of its own
    begin = time.monotonic()
    mine = len(self._table[jax.process_index() :: jax.process_count()])
    progress = writer.Progress(mine, noun='episode')
    variables = parallel.replicate(parallel.local(variables), self._mesh)
    needed = tuple(
      dict.fromkeys((*roles, *(x for m in self._metrics for x in m.needs)))
    )
    n = len(self._pool.classes)
    counts = [
      {
        role: np.zeros((n, m.classes, m.classes), np.int64)
        for role in m.answers
      }
      for m in self._metrics
    ]
    groups = [np.asarray(m.counted_as(self._table)) for m in self._metrics]
    shown, done = {}, 0
    place = jax.process_index()
    for batch in self._batches:
      logits = self._answers(variables, batch, needed)
      labels = {
        k: batch[k]
        for k in ('class', 'all_labels', 'native_labels', 'sizes')
        if k in batch
      }
      found = jax.device_get(self._count(logits, labels))
      # Process p reads the episodes p, p + processes, ...
      # What pads the last batch has no pixel to count.
      places = place + jax.process_count() * np.arange(len(batch['valid']))
      places = np.minimum(places, len(self._table) - 1)
      for total, of_metric, group in zip(counts, found, groups, strict=True):
        for role, x in of_metric.items():
          np.add.at(total[role], group[places], x.astype(np.int64))
      for row, valid in enumerate(batch['valid']):
        if valid and place in show:
          shown[place] = {
            role: np.asarray(pictured(logits[role][row])) for role in roles
          }
        place += jax.process_count()
      done += int(batch['valid'].sum())
      progress.update(done)
    counts = jax.tree.map(lambda x: parallel.gather(x).sum(0), counts)
    if jax.process_count() > 1 and show:
      shown = parallel.gather_maps(
        shown, roles, show, (2, self._size, self._size)
      )
    return base.Scored(
      {
        m.protocol.name: {role: m.scores(x) for role, x in total.items()}
        for m, total in zip(self._metrics, counts, strict=True)
      },
      tuple(m.protocol for m in self._metrics),
      shown,
      len(self._table),
      time.monotonic() - begin,
    )

  def _answers(self, variables, batch, roles):
    """{role: logits [B, S, S, .]}; padding is void, so nothing counts it."""
    masks = (batch['support_labels'] == 1)[..., None].astype(np.float32)
    present = np.ones((*masks.shape[:2], 1), bool)
    support, images = parallel.share(
      (Support(batch['support_images'], masks, present), batch['images']),
      self._mesh,
    )
    memory = self._memorize(variables, support)
    answers = self._predict(variables, memory, images, roles)
    return {role: x.logits for role, x in answers.items()}


def _of_role(role, logits):
  return argmax(logits[role])


def _mean(values):
  """The mean of those that are numbers; None where none is."""
  known = [x for x in values if x is not None]
  return float(np.mean(known)) if known else None
