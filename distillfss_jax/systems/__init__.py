"""What is trained: models with their loss."""

import importlib
import pkgutil

from flax import nnx

from distillfss_jax import optim, params

_NO_SYSTEMS = ('adapted', 'base', 'meta')  # what systems share


def names() -> tuple[str, ...]:
  """The systems that exist, by file."""
  found = {module.name for module in pkgutil.iter_modules(__path__)}
  return tuple(sorted(found.difference(_NO_SYSTEMS)))


def build(config, ways: int):
  """A config's system without numbers, and a function that makes them.

  A system's file has `build(config, ways, rngs)`, which makes its models, too.

  Args:
    config: see `configs/common.py`.
    ways: number of foreground classes.

  Returns:
    The system as an abstract NNX module that knows what `trains`, and a
    function without arguments that gives {path: array}, drawn from the seed.

  Raises:
    ValueError: a name in the config does not exist, or fields do not fit.
  """
  if config.system not in names():
    raise ValueError(
      f'no system {config.system!r}; there are: {", ".join(names())}'
    )
  module = importlib.import_module(f'{__name__}.{config.system}')
  system = nnx.eval_shape(lambda: module.build(config, ways, nnx.Rngs(0)))
  paths = params.shapes(nnx.state(system, nnx.Param))
  system.trains = frozenset(
    optim.trainable(config.optim.trainable, paths, system.sets())
  )

  # Not one program: compiling all generators of a model together takes minutes.
  def draw():
    return params.flatten(module.build(config, ways, nnx.Rngs(config.seed)))

  return system, draw
