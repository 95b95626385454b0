"""Images without labels: what a first network says of them teaches a second.

The first learns from the annotated images alone. Its answers for the others,
the mean over an image and its three mirror images, are soft labels. It is
self-training as in 1911.04252: the second begins anew, and sees strongly
changed views. No label of such an image is read.
"""

import io
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from distillfss_jax import files, parallel, train_step
from distillfss_jax.workdir import writer

FILE = 'unlabelled.npz'
_TOGETHER = 4  # images that are answered at once


def answer(
  config, data, steps: int, workdir: pathlib.Path
) -> np.ndarray | None:
  """Soft labels of `data.unlabelled`, uint8 [u, S, S, 1+n] in 255ths.

  They are kept in the run's folder, so that a run that goes on learns what it
  has learnt before. None if there are no such images, or nothing is learnt.

  Args:
    config: of the run, without open choices.
    data: of its task: `support`, `unlabelled` and `ways`.
    steps: of the run. Half of its views are of annotated images: the first
      network sees as many.
    workdir: the run's folder.
  """
  if data.unlabelled is None or not steps:
    return None
  path = workdir / FILE
  shape = (*data.unlabelled.images.shape[:3], 1 + data.ways)
  digest = _digest(config, data, steps)
  kept = _read(path, shape, digest) if path.exists() else None
  # Each process has made or read its own; floats need not agree everywhere.
  return parallel.of_first(
    _answered(config, data, steps, path, shape, digest)
    if kept is None
    else kept
  )


def _digest(config, data, steps):
  """Of all that the soft labels follow from."""
  said = [config[key].to_json() for key in ('model', 'optim', 'views')]
  return files.digest_of(
    data.support.images,
    data.support.labels,
    data.unlabelled.images,
    [*said, str((config.seed, config.episodes.draws, steps))],
  )


def _answered(config, data, steps, path, shape, digest):
  """Soft labels, made anew and kept."""
  steps = -(-steps // 2)
  steps += -steps % train_step.TOGETHER
  config = config.copy_and_resolve_references()
  config.steps, config.epochs, config.views.temperature = steps, 0.0, 1.0
  mesh = jax.sharding.Mesh(jax.local_devices()[:1], (parallel.AXIS,))
  program = train_step.build(config, data.ways, mesh, steps=steps)
  images = data.unlabelled.images
  progress = writer.Progress(steps, noun='step without unlabelled images')
  variables = train_step.learn(
    program,
    mesh,
    program.load(program.draw()),
    data.support.images,
    data.support.labels,
    views=config.episodes.draws,
    steps=steps,
    seed=config.seed,
    tell=progress.update,
  )
  progress = writer.Progress(len(images), noun='unlabelled image')
  shares = np.empty(shape, np.uint8)
  for first in range(0, len(images), _TOGETHER):
    some = images[first : first + _TOGETHER]
    # One shape, so that it is compiled once.
    batch = np.zeros((_TOGETHER, *images.shape[1:]), np.uint8)
    batch[: len(some)] = some
    made = _shares(program, variables, batch)
    shares[first : first + len(some)] = np.asarray(made)[: len(some)]
    progress.update(first + len(some))
  if jax.process_index() == 0:
    stored = io.BytesIO()
    np.savez_compressed(stored, shares=shares, digest=digest)
    with files.writing(path.parent):
      files.write_atomically(path, stored.getvalue())
  logging.info('%s: soft labels of %d images', path, len(images))
  return shares


def _read(path, shape, digest):
  """What the run has kept; None where it follows from something else.

  Raises:
    ValueError: it is damaged.
  """
  try:
    found = np.load(io.BytesIO(path.read_bytes()))
    # Another config's run may have been stopped before it claimed the folder.
    if 'digest' in found and str(found['digest']) != digest:
      return None
    shares = found['shares']
    if shares.shape != shape or shares.dtype != np.uint8:
      raise ValueError(f'{shares.dtype} {shares.shape} in place of {shape}')
    return shares
  except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} is damaged ({error}): give another --workdir'
    ) from error


def _shares(program, variables, batch):
  """Mean answers for images [b, S, S, 3] and their mirror images, in 255ths."""
  [role] = program.roles
  total = 0.0
  for axes in ((), (1,), (2,), (1, 2)):
    seen = np.flip(batch, axes)
    logits = program.predict(variables, None, seen, program.roles)[role].logits
    total += jnp.flip(jax.nn.softmax(logits.astype(jnp.float32)), axes)
  return jnp.round(255 / 4 * total).astype(jnp.uint8)
