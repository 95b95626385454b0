"""What the training loop does not know: a run's data, tests and pictures.

Data are read from the config alone, before there is a folder, so that what
does not fit is said then; a task is made of them and of what was compiled.
"""

import abc
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from distillfss_jax import parallel
from distillfss_jax.evaluators.base import Scored
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.train_step import Program
from distillfss_jax.types import TrainState
from distillfss_jax.workdir import pictures, report


class Data(abc.ABC):
  """What a config reads, checked against each other.

  Attributes:
    ways: foreground classes of the system.
    classes: names of those that are scored.
    per_epoch: steps of an epoch.
    size: how many there are to test on.
    unlabelled: images that nobody annotated, to learn from too; None for none.
    shares: what is taken for their labels, see `unlabelled.answer`.
  """

  unlabelled, shares = None, None
  ways: int
  classes: tuple[str, ...]
  per_epoch: float
  size: int

  @abc.abstractmethod
  def ids(self) -> dict:
    """What the run reads, for its folder: names, and a 'digest' of it all."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a task lives: the compiled parts, the devices, the run's folder."""

  program: Program
  mesh: jax.sharding.Mesh
  workdir: pathlib.Path
  out: Any  # the metric writer


class Task(abc.ABC):
  """One kind of run.

  Attributes:
    gives: the type of its batches.
    own: whether each process reads a part of each batch; else all read all.
    steps: of the whole run.
    answers: what `show_answers` has shown, for the report.
  """

  gives: type
  own: bool

  def __init__(self, config, data: Data, place: Place, steps: int):
    self.config, self.data, self.steps = config, data, steps
    self.program, self.mesh = place.program, place.mesh
    self.workdir, self.out = place.workdir, place.out
    self.answers = []

  @abc.abstractmethod
  def batches(self) -> Iterable:
    """A grain IterDataset: what each step is made of."""

  @abc.abstractmethod
  def as_batch(self, element: Any) -> tuple[Any, np.ndarray]:
    """Of an element of `batches`: the batch, and [b] bool what counts."""

  def shared(self, state: TrainState) -> Any:
    """What all steps read, on all devices; made before the first batch is."""
    del state
    return ()

  @abc.abstractmethod
  def test(self, state: TrainState, show: Sequence[int] = ()) -> Scored:
    """Scores the system; `show` are the tests to keep answers of."""

  def validate(self, state: TrainState) -> Scored:
    """Scores it on the way, where checkpoints are chosen; here the test."""
    return self.test(state)

  def references(self, state: TrainState) -> dict:
    """Scores of what the run starts from, where the config asks for them."""
    del state
    return {}

  @abc.abstractmethod
  def show_begin(self) -> None:
    """Writes pictures of what the run starts from."""

  @abc.abstractmethod
  def show_end(self, scored: Scored) -> None:
    """Writes pictures of what came of it."""

  def show_support(self, images, labels, names, **how) -> None:
    """Writes the annotated images that a run starts from, with a legend."""
    rows = [
      pictures.legend(self.data.classes, how['palette']),
      pictures.support_panel(images, labels, names=names, **how),
    ]
    self._write_picture(0, 'support', pictures.grid(rows))

  def show_answers(
    self, name: str, image, truth, answers, *, classes, palette, below=()
  ) -> None:
    """Writes what was predicted of an image, beside the truth.

    Args:
      name: its id.
      image: uint8 [H, W, 3].
      truth: labels [H, W].
      answers: {role: uint8 [2, H, W], labels and confidence}, as
        `Scored.shown` has them.
      classes: names of labels 1..n.
      palette: of labels 0..n.
      below: more pictures.
    """
    labels = {role: label for role, (label, _) in answers.items()}
    scored = {
      role: (label, Confusion.of(truth, label, 1 + len(classes)).miou)
      for role, label in labels.items()
    }
    panel = pictures.query_panel(
      image, truth, scored, name=name, palette=palette
    )
    self.answers.append(
      report.Answered(
        name,
        image,
        {'truth': truth, **labels},
        {role: score for role, (_, score) in scored.items()},
        classes,
        palette,
        {role: sure for role, (_, sure) in answers.items()},
      )
    )
    rows = [pictures.legend(classes, palette), panel, *below]
    self._write_picture(self.steps, f'test/{name}', pictures.grid(rows))

  def _write_picture(self, step, tag, picture):
    name = re.sub(r'[^\w.-]+', '_', tag)
    pictures.save(self.workdir / 'panels' / f'{name}.png', picture)
    self.out.write_images(step, {tag: picture[None]})

  def to_show(self) -> list[int]:
    """Which tests to show: some, evenly spaced."""
    count = min(self.config.eval.panels, self.data.size)
    if not count:
      return []
    return [int(i) for i in np.linspace(0, self.data.size - 1, count)]

  def variables(self, state: TrainState) -> dict[str, jax.Array]:
    """The process-local copy of all variables."""
    return parallel.local(state.variables)

  def untrained(self, state: TrainState) -> dict:
    """Scores of the initial model, for `references`."""
    scored = self.test(state)
    return scored.scores[scored.protocols[0].name]


def check_shared(batch_size: int, key: str) -> None:
  """Raises ValueError where devices cannot share a batch evenly."""
  if batch_size < 1 or batch_size % jax.device_count():
    raise ValueError(
      f'{key}.batch_size={batch_size} is no multiple of the '
      f'{jax.device_count()} devices'
    )
