"""Scores a few-shot segmenter on episodes, knowing it by two calls."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distillfss_jax import parallel
from distillfss_jax.data import augment, core, pipeline
from distillfss_jax.evaluators import base
from distillfss_jax.ops import metrics
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.types import Support
from distillfss_jax.workdir import writer

PROTOCOL = base.Protocol(
  'test',
  'model',
  'episodes of one class each; a class is scored over all its episodes '
  'together, mIoU is the mean over classes, FB-IoU that over background and '
  'foreground of all episodes',
)


def scores(counts: np.ndarray, classes: Sequence[str]) -> dict:
  """Numbers by name, of int64 [n, 2, 2]: pixels by (class, label, prediction).

  A class is scored over all its episodes together; one without a pixel to
  score is None, and no part of the mean. 'fb_iou' and the others are over all
  episodes of all classes.
  """
  each = [Confusion(x).iou_or_none()[1] for x in counts]
  known = [x for x in each if x is not None]
  whole = Confusion(counts.sum(0)).scores(('foreground',))
  return {
    'miou': float(np.mean(known)) if known else None,
    **{
      name: whole[name]
      for name in ('fb_iou', 'accuracy', 'f1', 'precision', 'recall')
    },
    'iou': dict(zip(classes, each, strict=True)),
  }


class Episodes(base.Evaluator):
  """Counts every pixel of the queries of a list of episodes.

  Args:
    pool: what the episodes were drawn from.
    table: int32 [e, 2+s], from `episodes.listed`.
    memorize: variables, Support -> memory.
    predict: variables, memory, images [B, S, S, 3], roles -> {role:
      Prediction}.
    image_size: S.
    batch_size: episodes at once, over the devices of this process.
    workers: processes that decode images.
  """

  def __init__(
    self,
    pool: core.Pool,
    table: np.ndarray,
    memorize: Callable,
    predict: Callable,
    *,
    image_size: int,
    batch_size: int,
    workers: int = 0,
  ):
    self._mesh = parallel.mesh(local=True)
    devices, recipe = self._mesh.size, augment.get('none')
    self._batches = pipeline.listed_episodes(
      pool,
      table,
      recipe,
      recipe,
      image_size=image_size,
      batch_size=-(-batch_size // devices) * devices,
      workers=workers,
      shard=(jax.process_index(), jax.process_count()),
    )
    self._pool, self._table, self._size = pool, np.asarray(table), image_size
    self._memorize, self._predict = memorize, predict
    self._count = jax.jit(jax.vmap(lambda x, y: metrics.count(x, y, 2)))

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
    classes = len(self._pool.classes)
    counts = {role: np.zeros((classes, 2, 2), np.int64) for role in roles}
    shown, done = {}, 0
    place = jax.process_index()
    for batch in self._batches:
      answers = self._answers(variables, batch, roles)
      for role in roles:
        found = self._count(batch['labels'], answers[role])
        np.add.at(counts[role], batch['class'], np.asarray(found, np.int64))
      for row, valid in enumerate(batch['valid']):
        # Process p reads the episodes p, p + processes, ...
        if valid and place in show:
          shown[place] = {
            role: np.asarray(answers[role][row], np.uint8) for role in roles
          }
        place += jax.process_count()
      done += int(batch['valid'].sum())
      progress.update(done)
    counts = {role: parallel.gather(x).sum(0) for role, x in counts.items()}
    if jax.process_count() > 1 and show:
      shown = parallel.gather_maps(shown, roles, show, self._size)
    found = {role: scores(x, self._pool.classes) for role, x in counts.items()}
    return base.Scored(
      {PROTOCOL.name: found},
      (PROTOCOL,),
      shown,
      len(self._table),
      time.monotonic() - begin,
    )

  def _answers(self, variables, batch, roles):
    """{role: label maps [B, S, S]}; padding is void, so nothing counts it."""
    masks = (batch['support_labels'] == 1)[..., None].astype(np.float32)
    present = np.ones((*masks.shape[:2], 1), bool)
    support, images = parallel.share(
      (Support(batch['support_images'], masks, present), batch['images']),
      self._mesh,
    )
    memory = self._memorize(variables, support)
    answers = self._predict(variables, memory, images, tuple(roles))
    return {role: x.logits.argmax(-1) for role, x in answers.items()}
