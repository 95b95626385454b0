"""What an evaluation is: a protocol with a name, and the scores it found.

An evaluation owns its metric: which classes count and how, at which size, what
0/0 is. results.json, the tables and TensorBoard show whatever it declares.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

# What tables and TensorBoard show of scores from one confusion matrix.
COLUMNS = {
  'miou': 'mIoU',
  'fb_iou': 'FB-IoU',
  'f1': 'F1',
  'precision': 'precision',
  'recall': 'recall',
}

Scores = dict[str, dict[str, Any]]  # {role: numbers by name, nested}


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How the numbers of an evaluation were made, and how to read them.

  name: its key in results.json, such as 'test'.
  size: what it scores at: 'model' or 'native'.
  says: the protocol, in a line for people.
  columns: {name of a number: heading}; the first is the one that counts.
  """

  name: str
  size: str
  says: str
  columns: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: dict(COLUMNS)
  )


@dataclasses.dataclass(frozen=True)
class Scored:
  """What an evaluator found.

  scores: {name of a protocol: {role: numbers}}.
  protocols: those of the scores, in their order.
  shown: {test: {role: uint8 [2, S, S], labels and confidence as
    `metrics.pictured` gives them}}, of those asked for and as many of the
    lowest score.
  images: how many were scored. seconds: how long it took.
  notes: what a reader of the scores has to know, in sentences.
  each: {role: mean IoU of each test image at the model's size, NaN where it is
    not defined}; {} where tests are no images.
  """

  scores: dict[str, Scores]
  protocols: tuple[Protocol, ...]
  shown: dict[int, dict[str, np.ndarray]]
  images: int
  seconds: float
  notes: tuple[str, ...] = ()
  each: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def rows(self) -> list[tuple[Protocol, str, dict]]:
    """(protocol, role, numbers) of all."""
    return [
      (protocol, role, numbers)
      for protocol in self.protocols
      for role, numbers in self.scores[protocol.name].items()
    ]


class Evaluator(abc.ABC):
  """Scores what a system predicts on a test set."""

  @abc.abstractmethod
  def run(
    self,
    variables: Mapping[str, jax.Array],
    roles: Sequence[str],
    *,
    memory: Any = None,
    show: Sequence[int] = (),
  ) -> Scored:
    """Scores `roles` of a system, showing how far it is."""


class Beside(abc.ABC):
  """What is found of a test set image by image, beside counts of pixels.

  It sees what an evaluator has predicted, so that nothing is predicted twice.
  """

  @abc.abstractmethod
  def begin(self, roles: Sequence[str]) -> None:
    """A test of these roles begins."""

  @abc.abstractmethod
  def take(
    self,
    logits: Mapping[str, jax.Array],
    on_device: Mapping[str, jax.Array],
    batch: Mapping[str, np.ndarray],
  ) -> None:
    """Sees a batch.

    Args:
      logits: {role: [b, S, S, classes]}, background first.
      on_device: as `pipeline.test_batches` gives it, with native labels.
      batch: the same on the host, with 'valid' and 'index'.
    """

  @abc.abstractmethod
  def scored(self, seconds: float) -> Scored:
    """What was found of all; `seconds` is how long the test took."""


def over_seeds(found: Mapping[Any, Scored]) -> Scored:
  """Several evaluations of the same protocols as one: means, deviations.

  Args:
    found: {seed: what was found}; the pictures are those of the first.

  Returns:
    Every number is its mean; under 'deviation' stand the standard deviations
    (of a sample) of the numbers that are no dictionaries, under 'seeds' all.
  """
  each = list(found.values())
  first = each[0]

  def merged(numbers):
    mean = _mean(numbers)
    flat = [
      {k: v for k, v in x.items() if isinstance(v, int | float)}
      for x in numbers
    ]
    spread = {
      name: float(np.std([x[name] for x in flat], ddof=1))
      for name in flat[0]
      if len(flat) > 1 and all(name in x for x in flat)
    }
    seeds = {str(seed): x for seed, x in zip(found, flat, strict=True)}
    return {**mean, 'deviation': spread, 'seeds': seeds}

  scores = {
    name: {role: merged([x.scores[name][role] for x in each]) for role in roles}
    for name, roles in first.scores.items()
  }
  return dataclasses.replace(
    first,
    scores=scores,
    images=sum(x.images for x in each),
    seconds=sum(x.seconds for x in each),
    notes=_all_notes(each),
  )


def together(*found: Scored) -> Scored:
  """Evaluations of different protocols as one; the pictures of the first."""
  return Scored(
    {name: x for one in found for name, x in one.scores.items()},
    tuple(protocol for one in found for protocol in one.protocols),
    found[0].shown,
    sum(x.images for x in found),
    sum(x.seconds for x in found),
    _all_notes(found),
    found[0].each,
  )


def joined(first: Scored, *others: Scored) -> Scored:
  """Evaluations of the same images as one, which are counted once."""
  if not others:
    return first
  return dataclasses.replace(
    together(first, *others), images=first.images, seconds=first.seconds
  )


def _all_notes(each):
  """The notes of several evaluations, each once."""
  return tuple(dict.fromkeys(note for x in each for note in x.notes))


def _mean(values):
  """The mean of numbers, or of dicts of them; None where one is None."""
  if isinstance(values[0], Mapping):
    return {k: _mean([x.get(k) for x in values]) for k in values[0]}
  if any(not isinstance(x, int | float) for x in values):
    return None
  return float(np.mean(values))


def over_sets(found: Mapping[str, Scored]) -> Scored:
  """Evaluations of several test sets as one, with their mean by images.

  Args:
    found: {name of a test set: what was found}.

  Returns:
    The protocols of a set get its name, as in 'test/CVC-300'; those of the
    whole keep theirs and hold the means of the numbers that are no
    dictionaries, weighted by the images of the sets.
  """
  first, total = next(iter(found.values())), {}
  weights = np.array([x.images for x in found.values()], float)
  protocols = list(first.protocols)
  for name, roles in first.scores.items():
    total[name] = {
      role: {
        k: float(
          np.average([x.scores[name][role][k] for x in found.values()],
                     weights=weights)
        )
        for k, v in numbers.items()
        if isinstance(v, int | float)
      }
      for role, numbers in roles.items()
    }  # fmt: skip
  for set_name, scored in found.items():
    for protocol in scored.protocols:
      name = f'{protocol.name}/{set_name}'
      protocols.append(dataclasses.replace(protocol, name=name))
      total[name] = scored.scores[protocol.name]
  return Scored(
    total,
    tuple(protocols),
    first.shown,
    sum(x.images for x in found.values()),
    sum(x.seconds for x in found.values()),
    _all_notes(found.values()),
  )
