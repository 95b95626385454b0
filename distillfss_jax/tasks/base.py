"""What the training loop does not know: a run's data, tests and pictures."""

import abc
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from distillfss_jax import train_step
from distillfss_jax.types import TrainState


class Task(abc.ABC):
  """One kind of run.

  It is made from the config alone, before there is a folder, so that what does
  not fit is said then; `connect` gives it the rest.

  Attributes:
    ways: foreground classes of the system.
    classes: names of those that are scored.
    streaming: whether every step has images of its own.
    size: how many there are to test on.
  """

  ways: int
  classes: tuple[str, ...]
  streaming: bool
  size: int

  def __init__(self, config):
    self.config = config

  def connect(
    self,
    compiled: train_step.Program,
    over: jax.sharding.Mesh,
    workdir: pathlib.Path,
    out: Any,
  ) -> None:
    """Gives the compiled parts, the devices, the run's folder and writer."""
    self.compiled, self.over = compiled, over
    self.workdir, self.out = workdir, out

  @abc.abstractmethod
  def steps(self):
    """A grain IterDataset: what each step is made of."""

  @abc.abstractmethod
  def begin(self, state: TrainState) -> None:
    """Makes what all steps share."""

  @abc.abstractmethod
  def arguments(self, taken: Sequence[Any], size: int) -> tuple:
    """Bank, tables and valid of a dispatch of `taken`, padded to `size`."""

  @abc.abstractmethod
  def test(self, state: TrainState, show: Sequence[int] = ()):
    """Scores the system; `show` are the tests to keep label maps of.

    The answer has `scores(classes)`, {'test': {role: scores}, ...}, `shown`,
    `images` and `seconds`.
    """

  def references(self, state: TrainState) -> dict:
    """Scores of what the run starts from, where the config asks for them."""
    del state
    return {}

  @abc.abstractmethod
  def ids(self) -> dict:
    """What the run reads, for its folder."""

  @abc.abstractmethod
  def show_begin(self) -> None:
    """Writes pictures of what the run starts from."""

  @abc.abstractmethod
  def show_end(self, scored) -> None:
    """Writes pictures of what came of it."""

  def to_show(self) -> list[int]:
    """Which tests to show: some, evenly spaced."""
    count = min(self.config.eval.panels, self.size)
    if not count:
      return []
    return [int(i) for i in np.linspace(0, self.size - 1, count)]
