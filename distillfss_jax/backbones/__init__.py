"""Image encoders: images to a four-stage pyramid."""

import importlib
import inspect
import pkgutil

from flax import nnx


def variants() -> dict:
  """Every backbone by name: the `variants` tables of all files here."""
  found = {}
  files = (module.name for module in pkgutil.iter_modules(__path__))
  for name in sorted(set(files) - {'base'}):
    found |= importlib.import_module(f'{__name__}.{name}').variants
  return found


def build(name: str, *, image_size: int, rngs: nnx.Rngs, **fields):
  """A backbone for square images of a size; `fields` go to its constructor.

  Raises:
    ValueError: there is no such backbone, or it does not take that size.
  """
  known = variants()
  if name not in known:
    raise ValueError(
      f'no backbone {name!r}; there are: {", ".join(sorted(known))}'
    )
  variant = known[name]
  # NNX hides a module's own signature; that of its __init__ stays.
  if 'image_size' in inspect.signature(variant.func.__init__).parameters:
    fields = {'image_size': image_size} | fields
  return variant(rngs=rngs, **fields)
