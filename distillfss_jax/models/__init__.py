"""The methods, each as encode, memorize, correlate, decode."""

import importlib
import pkgutil

from flax import nnx

from distillfss_jax import backbones

_NO_MODELS = ('base', 'core', 'distilled')  # what models share; students


def names() -> tuple[str, ...]:
  """The models that exist, by file."""
  found = {module.name for module in pkgutil.iter_modules(__path__)}
  return tuple(sorted(found.difference(_NO_MODELS)))


def build(config, image_size: int, rngs: nnx.Rngs, **known: int) -> nnx.Module:
  """The model of a config.

  A model's file has `build(config, image_size, rngs)`, and perhaps `classes`.

  Args:
    config: `config.model`: name, fields (for the model's constructor), backbone
      (name and fields) and dtype.
    image_size: height and width of the images, in pixels.
    rngs: of the initialisation.
    **known: what a system knows of its model: `classes`, background included.

  Raises:
    ValueError: a name does not exist, or fields do not fit.
  """
  if config.name not in names():
    raise ValueError(
      f'config.model.name is {config.name!r}; there are: {", ".join(names())}'
    )
  if config.dtype not in ('float32', 'bfloat16'):
    raise ValueError(
      f'config.model.dtype is {config.dtype!r}; there are: float32, bfloat16'
    )
  module = importlib.import_module(f'{__name__}.{config.name}')
  try:
    return module.build(config, image_size, rngs, **known)
  except TypeError as error:
    if 'unexpected keyword argument' not in str(error):
      raise
    raise ValueError(
      f'config.model.fields or .backbone.fields of {config.name}: {error}'
    ) from error


def build_backbone(config, image_size: int, rngs: nnx.Rngs) -> nnx.Module:
  """The backbone of a model's config."""
  return backbones.build(
    config.backbone.name,
    image_size=image_size,
    rngs=rngs,
    **config.backbone.fields,
  )
