"""What the commands around a trained segmenter share."""

import pathlib
import sys

import jax
from absl import flags

from distillfss_jax import parallel


def place(device: str | None, source: str) -> None:
  """Chooses where JAX computes, and where it keeps compiled programs.

  Args:
    device: a platform of JAX, or None for its choice.
    source: a run's folder, beside which they are kept, or a file.

  Raises:
    ValueError: there is no such device.
  """
  if device:
    jax.config.update('jax_platforms', device)
  try:
    jax.devices()
  except RuntimeError as error:
    reason = str(error).strip().splitlines()[0]
    raise ValueError(f'--device {device}: {reason}') from error
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    parallel.keep_programs(path.resolve().parent)


def parse(argv: list[str]) -> list[str]:
  """Parses flags; whatever is wrong with them is one line on the terminal."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, ValueError) as error:
    sys.exit(f'error: {" ".join(str(error).split())}')
