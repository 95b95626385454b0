"""Soft maps of a foreground at the images' own sizes, image by image.

Polyp-PVT's inference: the foreground's logit (less that of the background) is
stretched to the image, goes through a sigmoid, and is stretched again to 0..1;
what is scored is the map of 8 bits that would be a file. The numbers are those
of `ops/saliency.py`: means over the images of each test set, then, over the
sets, means weighted by their images.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distillfss_jax import files, parallel
from distillfss_jax.data import download
from distillfss_jax.evaluators import base, metrics
from distillfss_jax.ops import resize, saliency
from distillfss_jax.types import VOID, Array

COLUMNS = {
  'meanDic': 'mean Dice',
  'meanIoU': 'mean IoU',
  'wFm': 'weighted F',
  'Sm': 'S-measure',
  'meanEm': 'mean E',
  'maxEm': 'max E',
  'mae': 'MAE',
  'soft_dice': 'soft Dice',
}
# The names that evaluators of this field give to `saliency.CURVES`.
_SHORT = ('Dic', 'IoU', 'Sen', 'Spe', 'Em')
_CURVES = (
  *(f'mean{x}' for x in _SHORT),
  *(f'max{x}' for x in _SHORT),
)
_NUMBERS = ('Sm', 'wFm', 'mae', 'dic05', 'soft_dice')
_SAYS = (
  "soft maps of 8 bits at the images' sizes, over 256 thresholds; means over "
  'images'
)
_SOFT = (
  "soft maps at the images' sizes, cut at no threshold; the mean over images"
)
_AHEAD = 4  # images that wait for a thread, of each


class Saliency(base.Beside):
  """Scores maps one by one while the next ones are predicted.

  Args:
    source: of records, the test part of a dataset with one class.
    name: of the protocol.
    sets: {name of a test set: indices into the source}; {} for one set.
    folder: where saliency.csv goes, a line for each image; None for nowhere.
    masks: also write the maps there, as masks/<set>/<id>.png: those of the
      first role.
    soft: only the Dice of maps that nobody cut, by which checkpoints are
      chosen: all else waits for the processor.
    more: what the protocol says besides.
  """

  def __init__(
    self,
    source: Sequence,
    name: str,
    *,
    sets: Mapping[str, Sequence[int]] | None = None,
    folder: str | os.PathLike | None = None,
    masks: bool = False,
    soft: bool = False,
    more: str = '',
  ):
    self._ids, self._soft = source.ids, soft
    self._sets = {k: np.asarray(v, int) for k, v in (sets or {}).items()}
    self._set_of = dict.fromkeys(range(len(self._ids)), '')
    for set_, indices in self._sets.items():
      self._set_of |= dict.fromkeys(indices.tolist(), set_)
    self._folder = pathlib.Path(folder) if folder is not None else None
    self._masks = masks and folder is not None
    columns = {'soft_dice': COLUMNS['soft_dice']} if soft else dict(COLUMNS)
    says = (_SOFT if soft else _SAYS) + more
    self._protocol = base.Protocol(name, 'native', says, columns)

  def begin(self, roles):
    """Forgets what an earlier test found."""
    n, self._roles = len(self._ids), tuple(roles)
    self._numbers = {x: np.zeros((n, len(_NUMBERS))) for x in roles}
    # By image: a set's curve is the mean of its images' curves.
    shape = 0 if self._soft else n, len(_SHORT), len(saliency.THRESHOLDS)
    self._curves = {x: np.zeros(shape) for x in roles}
    self._odd = np.zeros((n, 2), int)  # pixels of void, and of the class
    self._waiting = collections.deque()
    workers = min(8, os.cpu_count() or 1)
    self._most = _AHEAD * workers
    self._pool = concurrent.futures.ThreadPoolExecutor(workers)

  def take(self, logits, on_device, batch):
    """Scores the maps of a batch."""
    for role, x in logits.items():
      levels, sums = maps(x, on_device['sizes'], on_device['native_labels'])
      sums = np.asarray(sums, np.float64)
      # What is only summed need not leave the device.
      levels = None if self._soft else np.asarray(levels)
      for row, index in enumerate(batch['index']):
        if not batch['valid'][row]:
          continue
        rows, columns = batch['sizes'][row]
        truth = batch['native_labels'][row, :rows, :columns]
        self._odd[index] = (truth == VOID).sum(), (truth == 1).sum()
        self._numbers[role][index, -1] = saliency.soft_dice(*sums[row])
        if self._soft:
          continue
        # Copies: the whole batch would wait for its last image.
        job = functools.partial(
          self._one,
          role,
          int(index),
          levels[row, :rows, :columns].copy(),
          truth == 1,
        )
        self._waiting.append(self._pool.submit(job))
        if len(self._waiting) > self._most:
          self._waiting.popleft().result()

  def _one(self, role, index, levels, mask):
    """Scores an image, in a thread."""
    found = saliency.score(levels, mask)
    self._curves[role][index] = found.curves
    self._numbers[role][index, :-1] = (
      found.s_measure, found.weighted_f, found.mae, found.dice_at_half,
    )  # fmt: skip
    if self._masks and role == self._roles[0]:
      path = self._folder / 'masks' / self._path(index)
      files.write_atomically(path, download.png(levels))

  def _path(self, index):
    """Where the map of an image goes: <set>/<id>.png."""
    set_ = self._set_of[index]
    name = f'{self._ids[index].removeprefix(f"{set_}/")}.png'
    parts = (x for x in name.split('/') if x not in ('', '.', '..'))
    return pathlib.Path(set_ or 'test', *parts)

  def scored(self, seconds):
    """Scores by set, and over the sets; all processes must ask."""
    while self._waiting:
      self._waiting.popleft().result()
    self._pool.shutdown()
    # What another process saw is 0 here.
    numbers, curves, odd = jax.tree.map(
      lambda x: parallel.gather(x).sum(0) if x.size else x,
      (self._numbers, self._curves, self._odd),
    )
    if self._folder is not None and jax.process_index() == 0:
      self._write(numbers, curves)
    whole = np.arange(len(self._ids))
    found = {
      set_: base.Scored(
        {
          self._protocol.name: {
            role: self._means(numbers[role], curves[role], indices)
            for role in self._roles
          }
        },
        (self._protocol,),
        {},
        len(indices),
        seconds * len(indices) / len(whole),
        tuple(self._notes(odd[indices], set_)),
      )
      for set_, indices in (self._sets or {'': whole}).items()
    }
    # One set is the whole.
    if len(found) == 1:
      return next(iter(found.values()))
    whole, *others = (made := base.over_sets(found)).protocols
    says = f'{whole.says}; the mean of {len(found)} test sets by their images'
    whole = dataclasses.replace(whole, says=says)
    return dataclasses.replace(made, protocols=(whole, *others))

  def _means(self, numbers, curves, indices):
    means = dict(zip(_NUMBERS, numbers[indices].mean(0), strict=True))
    if self._soft:
      return {'soft_dice': float(means['soft_dice'])}
    means |= dict(zip(_CURVES, _ends(curves[indices].mean(0)), strict=True))
    return {k: float(v) for k, v in means.items()}

  def _notes(self, odd, set_):
    of = f' of {set_}' if set_ else ''
    void, empty = (odd[:, 0] > 0).sum(), (odd[:, 1] == 0).sum()
    if void:
      yield (
        f'{self._protocol.name}: {void} test images{of} have void, which '
        'counts as background'
      )
    if empty:
      yield (
        f'{self._protocol.name}: {empty} test images{of} have no foreground: '
        'their Dice and IoU are 0, whatever is predicted'
      )

  def _write(self, numbers, curves):
    """Writes saliency.csv, a line for each role and image."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow(('role', 'set', 'id', *_NUMBERS, *_CURVES))
    for role in self._roles:
      for i, id_ in enumerate(self._ids):
        values = [*numbers[role][i], *_ends(curves[role][i])]
        writer.writerow(
          (role, self._set_of[i], id_, *(f'{x:.6f}' for x in values))
        )
    files.write_atomically(self._folder / 'saliency.csv', out.getvalue())


def _ends(curves):
  """[10]: the means of curves [5, 256] over thresholds, and their maxima."""
  return np.concatenate([curves.mean(-1), curves.max(-1)])


@jax.jit
def maps(logits: Array, sizes: Array, labels: Array) -> tuple[Array, Array]:
  """Maps of 8 bits at the images' own sizes.

  Args:
    logits: [b, h, w, 2], background first.
    sizes: [b, 2] int32, rows and columns of each image.
    labels: [b, H, W] of one canvas for all.

  Returns:
    levels uint8 [b, H, W], 0 beyond an image; sums [b, 3] of the map before it
    is rounded, over the foreground and over the image, and of the foreground.
  """
  x = (logits[..., 1:] - logits[..., :1]).astype(jnp.float32)
  canvas = labels.shape[1:]
  rows, columns = metrics.stretched(x.shape[1:3], sizes, canvas)
  lerp = jax.vmap(resize.lerp, (0, 0, None))
  x = jax.nn.sigmoid(lerp(lerp(x, columns, 1), rows, 0)[..., 0])
  inside = (jnp.arange(canvas[0]) < sizes[:, :1])[:, :, None] & (
    jnp.arange(canvas[1]) < sizes[:, 1:]
  )[:, None]
  # Parity: so each image has a pixel of 1, whether or not it shows anything.
  low = jnp.where(inside, x, jnp.inf).min((1, 2), keepdims=True)
  high = jnp.where(inside, x, -jnp.inf).max((1, 2), keepdims=True)
  x = jnp.where(inside, (x - low) / (high - low + 1e-8), 0)
  there = labels == 1
  sums = [(x * there).sum((1, 2)), x.sum((1, 2)), there.sum((1, 2))]
  # To even, as the original rounds.
  return jnp.round(255 * x).astype(jnp.uint8), jnp.stack(sums, 1)
