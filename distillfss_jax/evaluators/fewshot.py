"""Scores a system on a test set, knowing it by `predict` alone."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillfss_jax import parallel
from distillfss_jax.data import core, pipeline
from distillfss_jax.ops import metrics, resize
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.workdir import writer

BAND = 256  # rows at once, of scoring at the images' own sizes


@dataclasses.dataclass(frozen=True)
class Scored:
  """What an evaluation found.

  confusions: {role: {'test': ..., 'test_native': ...}}, at the model's size
    and, if asked for, at the images' own.
  shown: {test index: {role: uint8 label map at the model's size}}, of the
    images asked for.
  seconds: how long it took.
  images: how many were scored.
  """

  confusions: dict[str, dict[str, Confusion]]
  shown: dict[int, dict[str, np.ndarray]]
  seconds: float
  images: int

  def scores(self, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{'test': {role: scores}, 'test_native': {role: scores}}."""
    found = {}
    for role, sizes in self.confusions.items():
      for size, confusion in sizes.items():
        found.setdefault(size, {})[role] = confusion.scores(tuple(classes))
    return found


class FewShot:
  """Counts every pixel of a test set once.

  Args:
    dataset: its test images.
    predict: variables, memory, images [B, S, S, 3], roles -> {role:
      Prediction}.
    image_size: S.
    batch_size: images at once, over the devices of this process.
    native: also score at the images' own sizes.
    workers: processes that decode images.
  """

  # Parity: the reference scores at the model's size, with labels shrunk to the
  # nearest pixel. Native scoring stretches the logits instead.

  def __init__(
    self,
    dataset: core.Dataset,
    predict: Callable,
    *,
    image_size: int,
    batch_size: int,
    native: bool,
    workers: int = 0,
  ):
    self._over = parallel.mesh(local=True)
    devices = self._over.size
    self._batches = pipeline.test_batches(
      dataset,
      image_size=image_size,
      batch_size=-(-batch_size // devices) * devices,
      native=native,
      workers=workers,
      shard=(jax.process_index(), jax.process_count()),
    )
    self._mine = len(
      range(jax.process_index(), len(dataset.test), jax.process_count())
    )
    self._predict, self._native, self._size = predict, native, image_size
    self._total, self._classes = len(dataset.test), 1 + len(dataset.classes)
    self._count = jax.jit(_count, static_argnums=2)

  def run(
    self,
    variables: Mapping[str, jax.Array],
    memory: Any,
    roles: Sequence[str],
    *,
    show: Sequence[int] = (),
  ) -> Scored:
    """Scores `roles` of a system, showing how far it is."""
    begin = time.monotonic()
    progress = writer.Progress(self._mine, noun='test image')
    over = self._over
    variables = parallel.replicate(parallel.local(variables), over)
    memory = parallel.replicate(parallel.local(memory), over)
    sizes = ('test', 'test_native') if self._native else ('test',)
    confusions = {
      role: {size: Confusion.empty(self._classes) for size in sizes}
      for role in roles
    }
    shown, done = {}, 0
    for batch in self._batches:
      on_device = parallel.share(
        {k: v for k, v in batch.items() if k not in ('valid', 'index')}, over
      )
      answers = self._predict(
        variables, memory, on_device['images'], tuple(roles)
      )
      logits = {role: answer.logits for role, answer in answers.items()}
      counts, maps = self._count(logits, on_device, self._classes)
      for role in roles:
        for size in sizes:
          confusions[role][size].add(counts[role][size])
      for row, index in enumerate(batch['index']):
        if batch['valid'][row] and int(index) in show:
          shown[int(index)] = {
            role: np.asarray(maps[role][row]) for role in roles
          }
      done += int(batch['valid'].sum())
      progress.update(done)
    for of_role in confusions.values():
      for confusion in of_role.values():
        confusion.counts = parallel.gather(confusion.counts).sum(0)
    if jax.process_count() > 1 and show:
      shown = parallel.gather_maps(shown, roles, show, self._size)
    return Scored(confusions, shown, time.monotonic() - begin, self._total)


def _count(logits, batch, classes):
  """Pixel counts of each role, void and padding left out, and label maps."""
  counts, maps = {}, {}
  for role, x in logits.items():
    maps[role] = x.argmax(-1).astype('uint8')
    labels = batch['labels'].astype('int32')
    counts[role] = {'test': metrics.count(labels, maps[role], classes)}
    if 'native_labels' in batch:
      counts[role]['test_native'] = _count_native(
        x, batch['sizes'], batch['native_labels'], classes
      )
  return counts, maps


def _count_native(logits, sizes, labels, classes):
  """Pixel counts [classes, classes] at the images' own sizes.

  Stretched logits of a large image take gigabytes, so they are made and
  forgotten a band of rows at a time.

  Args:
    logits: [b, h, w, classes].
    sizes: [b, 2] int32, rows and columns of each image.
    labels: [b, H, W] of one canvas for all, void where an image has ended.
    classes: background counts.
  """
  height, width = labels.shape[1:]
  band = math.gcd(BAND, height)
  taps = jax.vmap(resize.taps, (None, 0, None))
  rows = taps(logits.shape[1], sizes[:, 0], height)
  columns = taps(logits.shape[2], sizes[:, 1], width)
  lerp = jax.vmap(resize.lerp, (0, 0, None))
  wide = lerp(logits, columns, 1)  # [b, h, W, classes]

  def add(i, counts):
    mine, truth = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, i * band, band, 1),
      (rows, labels),
    )
    answer = lerp(wide, mine, 0).argmax(-1)
    return counts + metrics.count(truth, answer, classes)

  # Where all images have ended there is nothing to count.
  bands = -(-sizes[:, 0].max() // band)
  nothing = jnp.zeros((classes, classes), jnp.int32)
  return jax.lax.fori_loop(0, bands, add, nothing)
