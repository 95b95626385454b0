"""What a dense student learns from its teacher's answer, beside labels."""

import importlib
import pkgutil

from flax import nnx

_NO_DISTILLERS = ('base',)  # what distillers share


def names() -> tuple[str, ...]:
  """The distillers that exist, by file."""
  found = {module.name for module in pkgutil.iter_modules(__path__)}
  return tuple(sorted(found.difference(_NO_DISTILLERS)))


def build(config, teacher: nnx.Module, student: nnx.Module, rngs: nnx.Rngs):
  """The distiller of a config, for a teacher and a student.

  A distiller's file has `build(teacher, student, rngs, **fields)`.

  Args:
    config: `config.distiller`: name, and fields for the constructor.
    teacher: a `models.base.DenseSegmenter`.
    student: another.
    rngs: of the initialisation.

  Raises:
    ValueError: there is no such distiller, its fields do not fit, or a model
      lacks what it compares.
  """
  if config.name not in names():
    raise ValueError(
      f'config.distiller.name is {config.name!r}; there are: none, '
      f'{", ".join(names())}'
    )
  module = importlib.import_module(f'{__name__}.{config.name}')
  try:
    return module.build(teacher, student, rngs, **config.fields)
  except TypeError as error:
    if 'unexpected keyword argument' not in str(error):
      raise
    raise ValueError(
      f'config.distiller.fields of {config.name}: {error}'
    ) from error
