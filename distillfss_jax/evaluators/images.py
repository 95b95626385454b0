"""Scores a system on a test set, image by image, knowing it by `predict`."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distillfss_jax import parallel
from distillfss_jax.data import pipeline
from distillfss_jax.evaluators import base, metrics
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.workdir import writer


class Images(base.Evaluator):
  """Counts every pixel of a test set once.

  Args:
    source: of records: the test part of a dataset.
    predict: variables, memory, images [B, S, S, 3], roles -> {role:
      Prediction}.
    found: the metrics, the first at the model's size.
    image_size: S.
    batch_size: images at once, over the devices of this process.
    native: whether something beside the metrics reads labels of the images'
      own sizes.
    workers: processes that decode images.
    noun: what is counted on the terminal.
  """

  def __init__(
    self,
    source: Sequence,
    predict: Callable,
    found: Sequence[metrics.Metric],
    *,
    image_size: int,
    batch_size: int,
    native: bool = False,
    workers: int = 0,
    noun: str = 'test image',
  ):
    self._mesh = parallel.mesh(local=True)
    devices = self._mesh.size
    self._metrics, self._noun = tuple(found), noun
    native = native or any(x.protocol.size == 'native' for x in found)
    self._batches = self._read(
      source,
      image_size=image_size,
      batch_size=-(-batch_size // devices) * devices,
      workers=workers,
      shard=(jax.process_index(), jax.process_count()),
      native=native,
    )
    self._mine = len(
      range(jax.process_index(), len(source), jax.process_count())
    )
    self._predict, self._size, self._images = predict, image_size, len(source)
    self._count = jax.jit(self._counts)

  def _read(self, source, **how):
    """The batches, as `pipeline.test_batches` takes its arguments."""
    return pipeline.test_batches(source, **how)

  def run(
    self,
    variables: Mapping[str, jax.Array],
    roles: Sequence[str],
    *,
    memory: Any = None,
    show: Sequence[int] = (),
    beside: Sequence[base.Beside] = (),
  ) -> base.Scored:
    """See `Evaluator`; what is found `beside` comes after its own scores.

    Beside the tests of `show`, as many of the lowest score are shown, by the
    first role.
    """
    begin = time.monotonic()
    progress = writer.Progress(self._mine, noun=self._noun)
    mesh, roles = self._mesh, tuple(roles)
    variables = parallel.replicate(parallel.local(variables), mesh)
    memory = parallel.replicate(parallel.local(memory), mesh)
    total, shown, done = None, {}, 0
    each = {role: np.zeros(self._images) for role in roles}
    for one in beside:
      one.begin(roles)
    for batch in self._batches:
      on_device = parallel.share(
        {k: v for k, v in batch.items() if k not in ('valid', 'index')}, mesh
      )
      answers = self._predict(variables, memory, on_device['images'], roles)
      logits = {role: answer.logits for role, answer in answers.items()}
      counts, of_images = self._count(logits, on_device)
      total = metrics.total([counts] if total is None else [total, counts])
      for one in beside:
        one.take(logits, on_device, batch)
      for role, x in jax.device_get(of_images).items():
        for row, index in _valid(batch):
          miou = Confusion(x[row].astype(np.int64)).miou
          each[role][index] = np.nan if miou is None else miou
      for row, index in _valid(batch):
        worst = _worst(each[roles[0]], [*shown, index], len(show))
        if index in show or index in worst:
          shown[index] = {
            role: np.asarray(metrics.pictured(logits[role][row]))
            for role in roles
          }
        for other in shown.keys() - worst - set(show):
          del shown[other]
      done += int(batch['valid'].sum())
      progress.update(done)
    total = jax.tree.map(lambda x: parallel.gather(x).sum(0), total)
    each = {role: parallel.gather(x).sum(0) for role, x in each.items()}
    if jax.process_count() > 1 and show:
      worst = _worst(each[roles[0]], range(self._images), len(show))
      wanted = sorted({*show, *worst})
      size = (2, self._size, self._size)
      shown = parallel.gather_maps(shown, roles, wanted, size)
    scores = {
      x.protocol.name: {
        role: x.scores(total[role][x.protocol.name]) for role in roles
      }
      for x in self._metrics
    }
    notes = [
      note
      for x in self._metrics
      for role in roles
      for note in x.notes(role, total[role][x.protocol.name])
    ]
    more = [one.scored(time.monotonic() - begin) for one in beside]
    return base.joined(
      base.Scored(
        scores,
        tuple(x.protocol for x in self._metrics),
        shown,
        self._images,
        time.monotonic() - begin,
        tuple(dict.fromkeys(notes)),
        each,
      ),
      *more,
    )

  def _counts(self, logits, batch):
    """{role: {name of a metric: counts}}, and {role: counts of each image}."""
    first, *others = self._metrics
    each = {role: first.count_each(x, batch) for role, x in logits.items()}
    counts = {
      role: {
        first.protocol.name: each[role].sum(0),
        **{m.protocol.name: m.count(x, batch) for m in others},
      }
      for role, x in logits.items()
    }
    return counts, each


def _valid(batch):
  """(row, index) of the images of a batch that are no padding."""
  for row, index in enumerate(batch['index']):
    if batch['valid'][row]:
      yield row, int(index)


def _worst(scores, among, count):
  """The indices of the lowest scores; what has none is none of them."""
  known = [i for i in among if np.isfinite(scores[i])]
  return set(sorted(known, key=lambda i: (scores[i], i))[:count])


class ShortSide(Images):
  """The same of images whose shorter side is S, and whose aspect is kept.

  Nothing is padded, for a network sees the border of what it is given: a batch
  is of one shape, and each shape is a program of its own. How many those are,
  the data say: one for Cityscapes or CamVid, hundreds for photographs.
  """

  def _read(self, source, **how):
    del how['native']
    return pipeline.short_side_batches(source, **how, devices=self._mesh.size)
