"""Scores a system on a test set, image by image, knowing it by `predict`."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distillfss_jax import parallel
from distillfss_jax.data import pipeline
from distillfss_jax.evaluators import base, metrics
from distillfss_jax.workdir import writer


class Images(base.Evaluator):
  """Counts every pixel of a test set once.

  Args:
    source: of records: the test part of a dataset.
    predict: variables, memory, images [B, S, S, 3], roles -> {role:
      Prediction}.
    found: the metrics.
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
    """See `Evaluator`; what is found `beside` comes after its own scores."""
    begin = time.monotonic()
    progress = writer.Progress(self._mine, noun=self._noun)
    mesh, roles = self._mesh, tuple(roles)
    variables = parallel.replicate(parallel.local(variables), mesh)
    memory = parallel.replicate(parallel.local(memory), mesh)
    total, shown, done = None, {}, 0
    for one in beside:
      one.begin(roles)
    for batch in self._batches:
      on_device = parallel.share(
        {k: v for k, v in batch.items() if k not in ('valid', 'index')}, mesh
      )
      answers = self._predict(variables, memory, on_device['images'], roles)
      logits = {role: answer.logits for role, answer in answers.items()}
      counts = self._count(logits, on_device)
      total = metrics.total([counts] if total is None else [total, counts])
      for one in beside:
        one.take(logits, on_device, batch)
      for row, index in enumerate(batch['index']):
        if batch['valid'][row] and int(index) in show:
          shown[int(index)] = {
            role: np.asarray(metrics.pictured(logits[role][row]))
            for role in roles
          }
      done += int(batch['valid'].sum())
      progress.update(done)
    total = jax.tree.map(lambda x: parallel.gather(x).sum(0), total)
    if jax.process_count() > 1 and show:
      shown = parallel.gather_maps(
        shown, roles, show, (2, self._size, self._size)
      )
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
      ),
      *more,
    )

  def _counts(self, logits, batch):
    """{role: {name of a metric: counts}}."""
    return {
      role: {m.protocol.name: m.count(x, batch) for m in self._metrics}
      for role, x in logits.items()
    }


class ShortSide(Images):
  """The same of images whose shorter side is S, and whose aspect is kept.

  Nothing is padded, for a network sees the border of what it is given: a batch
  is of one shape, and each shape is a program of its own. How many those are,
  the data say: one for Cityscapes or CamVid, hundreds for photographs.
  """

  def _read(self, source, **how):
    del how['native']
    return pipeline.short_side_batches(source, **how, devices=self._mesh.size)
