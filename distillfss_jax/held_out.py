"""Choices that a config leaves open, made on annotated images.

The annotated images are cut in two. What learns from one part is scored on the
other: as those images are, and in other colours and polarities, for the images
to come may differ from the few that there are. Few images tell little apart:
of all choices within one standard error of the best, that is taken which is
blind to most (the rule of Breiman et al., 1984, section 3.4.3): it has least
to fear from what the few do not show. The held-out images also tell how sure
the model may be: by which temperature its logits are divided. No test image is
looked at.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from distillfss_jax import config as configs
from distillfss_jax import files, parallel, train_step
from distillfss_jax.ops import views
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.systems import finetune
from distillfss_jax.types import VOID
from distillfss_jax.workdir import writer

LOOK, TEMPERATURE = configs.CHOSEN
STEPS = 100  # of a try
_EVERY = 3  # row and column whose pixel says how sure a model is
_VIEWS = 'as they are', 'recoloured'
RECOLOURED = 3  # times that a held-out image is scored in other colours
# Every one of them is in other colours.
_OTHER = dataclasses.replace(views.Appearance(), recoloured=0.5, inverted=1.0)


def decide(config, data, workdir: pathlib.Path):
  """The config without open choices; a run's folder keeps those it made.

  Args:
    config: of the run.
    data: of its task: `support` and `ways`.
    workdir: the run's folder; `held_out.json` there tells the scores.
  """
  values = configs.flat(config)
  asked = [k for k, x in configs.CHOSEN.items() if values.get(k, '') == x]
  if not asked:
    return config
  looks = tuple(finetune.LOOKS) if LOOK in asked else (values[LOOK],)
  saved = workdir / 'config.json'
  if saved.exists():
    known = configs.saved(saved)
    return _with(config, {key: known[key] for key in asked})
  scores, temperature = {}, 1.0
  if len(data.support.images) < 2:
    look = looks[-1]  # nothing to choose by
    logging.warning(
      'config.%s: one annotated image cannot be held out; %s is taken',
      ' and config.'.join(asked),
      {LOOK: look, TEMPERATURE: temperature},
    )
  else:
    total = 2 * STEPS * len(looks)
    progress = writer.Progress(total, noun='held-out step')
    for i, x in enumerate(looks):
      scores[x] = score(
        _with(config, {LOOK: x, TEMPERATURE: 1.0}),
        data.support,
        data.ways,
        lambda done, i=i: progress.update(2 * STEPS * i + done),
      )
    best = max(scores.values(), key=lambda x: x['mean'])
    least = best['mean'] - best['error']
    near = [i for i, x in enumerate(scores.values()) if x['mean'] >= least]
    # Floats need not agree on all machines of a run.
    look = looks[int(parallel.gather(np.int32(near[-1]))[0])]
    temperature = float(parallel.gather(scores[look]['temperature'])[0])
  choice = {LOOK: look, TEMPERATURE: temperature}
  choice = {key: choice[key] for key in asked}
  if scores and jax.process_index() == 0:
    print(f'mIoU of held-out annotated images by {LOOK}:\n{_table(scores)}')
    if LOOK in asked:
      print(
        f'{LOOK}: {look}, the last that is no more than one standard error '
        'below the best',
        flush=True,
      )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomically(
      workdir / 'held_out.json',
      json.dumps({'choice': choice, 'scores': scores}, indent=2) + '\n',
    )
  return _with(config, choice)


def score(
  config, support, ways: int, tell: Callable[[int], Any] = lambda done: None
) -> dict[str, float]:
  """Mean IoU on annotated images that were held out.

  Args:
    config: without open choices, of a system that takes rows of one image.
    support: images [M, S, S, 3] and labels [M, S, S], M of 2 or more.
    ways: foreground classes.
    tell: is told how many of 2 * `STEPS` steps are done.

  Returns:
    Means over the images: 'as they are', 'recoloured', and the 'mean' of both
    with its standard 'error'; and the 'temperature' that their probabilities
    ask for.
  """
  config = _with(config, {'steps': STEPS, 'epochs': 0.0})
  # Each process by itself, on one device: it is little work.
  mesh = jax.sharding.Mesh(jax.local_devices()[:1], (parallel.AXIS,))
  program = train_step.build(config, ways, mesh, steps=STEPS)
  initial = program.load(program.draw())
  count = len(support.images)
  kept = count - count // 2
  order = np.concatenate([np.arange(count)[::2], np.arange(count)[1::2]])
  found, said = [], []
  for number, half in enumerate((order, order[::-1])):
    variables = train_step.learn(
      program,
      mesh,
      initial,
      support.images[half[:kept]],
      support.labels[half[:kept]],
      views=config.episodes.draws or kept,
      steps=STEPS,
      seed=config.seed,
      tell=lambda done, number=number: tell(number * STEPS + done),
    )
    for i in half[kept:]:
      of_image = {name: Confusion.empty(1 + ways) for name in _VIEWS}
      for name, seen in _held_out_views(config.seed, support.images[i], int(i)):
        answer = program.predict(variables, None, seen[None], program.roles)
        logits = np.asarray(answer[program.roles[0]].logits[0], np.float32)
        label = logits.argmax(-1)
        counts = Confusion.of(support.labels[i], label, 1 + ways).counts
        of_image[name].add(counts)
        said.append(_some_pixels(logits, support.labels[i]))
      found.append([x.miou for x in of_image.values()])
  found = np.array(found, np.float64)
  found = found[np.isfinite(found).all(1)]  # an image may show no class
  if not len(found):
    found = np.zeros((1, len(_VIEWS)))  # nothing to choose by
  scores = dict(zip(_VIEWS, found.mean(0).tolist(), strict=True))
  means = found.mean(1)
  pixels = (np.concatenate(x) for x in zip(*said, strict=True))
  error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
  return {
    **scores,
    'mean': float(means.mean()),
    'error': float(error),
    'temperature': fitted_temperature(*pixels),
  }


def _some_pixels(logits, labels):
  """Logits [k, classes] and labels [k] of every few pixels, void left out."""
  logits, labels = (x[::_EVERY, ::_EVERY] for x in (logits, labels))
  some = labels != VOID
  return logits[some], labels[some].astype(int)


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """What logits are divided by for their least cross-entropy (1706.04599).

  Args:
    logits: [k, classes].
    labels: [k].

  Returns:
    Of the numbers from 1/8 to 8 that are a twelfth of an octave apart.
  """
  if not len(labels):
    return 1.0
  logits = logits - logits.max(-1, keepdims=True)
  own = np.take_along_axis(logits, labels[:, None], 1)[:, 0]

  def cross_entropy(t):
    return np.mean(np.log(np.exp(logits / t).sum(-1)) - own / t)

  return float(min(2.0 ** np.linspace(-3, 3, 73), key=cross_entropy))


def _held_out_views(seed, image, number):
  """An image, and the same in other colours: (name, uint8 [S, S, 3])."""
  yield 'as they are', image
  for i in range(RECOLOURED):
    key = jax.random.fold_in(jax.random.key(seed), number * RECOLOURED + i)
    yield 'recoloured', np.asarray(_recoloured(key, image))


@jax.jit
def _recoloured(key, image):
  seen = views.recolour(key, image.astype(jnp.float32) / 255, _OTHER)
  return jnp.round(255 * seen).astype(jnp.uint8)


def _with(config, values):
  """A copy of a config with other values."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict(values)
  return config


def _table(scores):
  columns = list(next(iter(scores.values())))
  wide = max(map(len, scores))
  rows = [' ' * wide + ''.join(f'  {x:>11}' for x in columns)]
  rows += [
    f'{name:{wide}}' + ''.join(f'  {x[c]:11.4f}' for c in columns)
    for name, x in scores.items()
  ]
  return '\n'.join(rows)
