"""Functions of arrays as StableHLO, one file for several platforms.

A file is a zip of `program`, what `jax.export` serialises (StableHLO with its
calling convention, the weights inside), and `record.json`.
"""

import functools
import io
import json
import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from distillfss_jax import files
from distillfss_jax.exporting import resizing

BATCH = 'batch'
PLATFORMS = ('cpu', 'cuda', 'tpu')


def save(
  path,
  function,
  inputs: dict,
  *,
  platforms=PLATFORMS,
  record: dict | None = None,
) -> int:
  """Writes a function; what it closes over goes into the file.

  Args:
    path: of the file.
    function: of arrays, by position.
    inputs: {name: (shape, dtype)}, in order; a size that is a name, such as
      `BATCH`, is free.
    platforms: that the file runs on, whichever are at hand here.
    record: {name: anything JSON takes}, kept in the file.

  Returns:
    The size of the file in bytes.

  Raises:
    ValueError: the function does not lower for a platform.
  """
  program = _exported(function, _shapes(inputs), platforms).serialize()
  made = io.BytesIO()
  with zipfile.ZipFile(made, 'w') as archive:
    archive.writestr('record.json', json.dumps(record or {}))
    archive.writestr('program', program)
  files.write_atomically(path, made.getvalue())
  return made.tell()


def save_segmenter(
  path,
  function,
  size: int,
  *,
  free_size: bool = True,
  platforms=PLATFORMS,
  record: dict | None = None,
) -> int:
  """Writes a segmenter, which takes and gives what one in ONNX does.

  JAX compiles it anew for each size of images.

  Args:
    path: of the file.
    function: uint8 images [b, size, size, 3] to logits [b, h, w, 1+n].
    size: height and width of the images it takes.
    free_size: whether the file resizes, as `onnx.lower_segmenter` says.
    platforms: see `save`, as the result and the errors.
    record: {name: anything JSON takes}, kept in the file.
  """
  sides = ('height', 'width') if free_size else (size, size)
  inputs = {'images': ((BATCH, *sides, 3), np.uint8)}
  if free_size:
    # A program of its own: the model must not get numbers of 64 bits.
    with jax.enable_x64(True):
      shrink = _exported(
        functools.partial(resizing.by_jax, size=size),
        _shapes(inputs),
        platforms,
      ).call

  def segment(images):
    logits = function(shrink(images) if free_size else images)
    logits = jax.image.resize(
      logits.astype(jnp.float32),
      (*images.shape[:3], logits.shape[-1]),
      'linear',
      antialias=False,
    )
    return logits.argmax(-1).astype(jnp.uint8), jax.nn.softmax(logits)

  record = {'size': None if free_size else size} | (record or {})
  return save(path, segment, inputs, platforms=platforms, record=record)


class Program:
  """A file of `save`, which JAX runs on whatever of its platforms is here.

  Attributes:
    record: what `save` was given to keep.
    platforms: that the file runs on.

  Raises:
    ValueError: the file is none of `save`.
    OSError: it cannot be read.
  """

  def __init__(self, path):
    try:
      with zipfile.ZipFile(io.BytesIO(pathlib.Path(path).read_bytes())) as file:
        self.record = json.loads(file.read('record.json'))
        self._exported = export.deserialize(bytearray(file.read('program')))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
      raise ValueError(
        f'{path} is no StableHLO file of distillfss_jax ({error})'
      ) from None
    self.platforms = self._exported.platforms
    self._call = jax.jit(self._exported.call)

  def __call__(self, *arrays: np.ndarray):
    """What the function returns, as JAX arrays."""
    return self._call(*arrays)


def lowers_for(function, arguments, platforms=PLATFORMS) -> None:
  """Checks that a function compiles as far as one can without the device.

  Args:
    function: jitted or not.
    arguments: of one call: arrays, or their shapes, in any structure.
    platforms: to lower it for.

  Raises:
    ValueError: it does not; by platform, and with JAX's reason.
  """
  for platform in platforms:
    _exported(function, arguments, [platform])


def _shapes(inputs):
  """What `jax.export` asks of the inputs, by their names of free sizes."""
  sizes = [x for shape, _ in inputs.values() for x in shape]
  names = sorted({x for x in sizes if isinstance(x, str)})
  symbols = export.symbolic_shape(', '.join(names)) if names else ()
  known = dict(zip(names, symbols, strict=True))
  return [
    jax.ShapeDtypeStruct([known.get(x, x) for x in shape], dtype)
    for shape, dtype in inputs.values()
  ]


def _exported(function, arguments, platforms):
  if not hasattr(function, 'trace'):  # not jitted
    function = jax.jit(function)
  try:
    return export.export(function, platforms=list(platforms))(*arguments)
  except Exception as error:  # of as many kinds as there are primitives
    raise ValueError(
      f'the function does not lower for {", ".join(platforms)}: {error}'
    ) from error
