"""Datasets, support sets, episodes and the grain pipelines that feed them."""

import importlib


def __getattr__(name):
  """The datasets, which lay here once: scripts of then still find them."""
  datasets = importlib.import_module('distillfss_jax.datasets')
  if not name.startswith('_') and name in datasets.names():
    return datasets.module(name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
