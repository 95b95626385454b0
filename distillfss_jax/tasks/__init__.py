"""What runs are about: adapting to a support set, a source, dense labels."""

import importlib
import pkgutil


def names() -> tuple[str, ...]:
  """The tasks that exist, by file."""
  found = {module.name for module in pkgutil.iter_modules(__path__)}
  return tuple(sorted(found - {'base'}))


def load(config):
  """The data of a config's task, and the class of the task itself.

  Raises:
    ValueError: there is no such task, or the config does not fit its data.
  """
  if config.task not in names():
    raise ValueError(
      f'no task {config.task!r}; there are: {", ".join(names())}'
    )
  module = importlib.import_module(f'{__name__}.{config.task}')
  return module.Data(config), module.Task
