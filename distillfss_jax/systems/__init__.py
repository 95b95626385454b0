"""What is trained: models with their loss."""

import importlib
import pkgutil

import jax
from flax import nnx

from distillfss_jax import backbones, optim, params
from distillfss_jax.models import dcama


def names() -> tuple[str, ...]:
  """The systems that exist, by file."""
  found = {module.name for module in pkgutil.iter_modules(__path__)}
  return tuple(sorted(found - {'base'}))


def build(config, ways: int):
  """A config's system without numbers, and a function that makes them.

  Args:
    config: see `configs/common.py`.
    ways: number of foreground classes.

  Returns:
    The system as an abstract NNX module, the set of its trainable paths, and a
    function without arguments that gives {path: array}, drawn from the seed.

  Raises:
    ValueError: a name in the config does not exist, or fields do not fit.
  """
  if config.system not in names():
    raise ValueError(
      f'no system {config.system!r}; there are: {", ".join(names())}'
    )
  module = importlib.import_module(f'{__name__}.{config.system}')
  model = config.model

  def make(rngs, backbone_trains):
    backbone = backbones.build(
      model.backbone.name,
      image_size=config.data.image_size,
      rngs=rngs,
      **model.backbone.fields,
    )
    teacher = dcama.DCAMA(
      backbone,
      heads=model.heads,
      dropout=model.dropout,
      positional=model.positional,
      concat_support=model.concat_support,
      voting=model.voting or None,
      mix_size=model.mix_size or None,
      dtype=model.dtype,
      rngs=rngs,
    )
    return module.build(config, teacher, ways, backbone_trains, rngs)

  def abstract(backbone_trains):
    return nnx.eval_shape(lambda: make(nnx.Rngs(0), backbone_trains))

  system = abstract(False)
  paths = params.shapes(nnx.state(system, nnx.Param))
  moved = optim.trainable(config.optim.trainable, paths)
  if any(path.startswith('teacher/backbone/') for path in moved):
    system = abstract(True)

  def draw():
    rngs = nnx.Rngs(config.seed)
    return params.flatten(make(rngs, system.backbone_trains))

  return system, moved, jax.jit(draw)
