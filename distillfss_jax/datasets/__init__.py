"""The datasets, a file each.

A dataset's file has `load(**kwargs) -> Dataset`; one that lies on disk also has
`prepare(raw, data_dir, ...)`, which turns its owners' download into ArrayRecord
once. One that episodes can be drawn from has `pool(part=..., ...) -> Pool`.
"""

import importlib
import pkgutil


def names():
  """Lists the datasets that exist."""
  return tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))


def module(name):
  """Imports the file of a dataset; ValueError lists those that exist."""
  if name not in names():
    raise ValueError(f'no dataset {name!r}; there are: {", ".join(names())}')
  return importlib.import_module(f'{__name__}.{name}')


def load(name, /, **kwargs):
  """Loads a dataset by the name of its file."""
  return module(name).load(**kwargs)
