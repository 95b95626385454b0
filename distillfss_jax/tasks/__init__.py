"""What runs are about: adaptation to a support set, or training on a source."""

import importlib
import pkgutil


def names() -> tuple[str, ...]:
  """The tasks that exist, by file."""
  found = {module.name for module in pkgutil.iter_modules(__path__)}
  return tuple(sorted(found - {'base'}))


def build(config):
  """The task of a config.

  Raises:
    ValueError: there is no such task, or the config does not fit its data.
  """
  if config.task not in names():
    raise ValueError(
      f'no task {config.task!r}; there are: {", ".join(names())}'
    )
  return importlib.import_module(f'{__name__}.{config.task}').Task(config)
