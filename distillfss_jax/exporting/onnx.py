"""Functions of arrays as ONNX files, and what runs those."""

import json
import logging
import pathlib
import tempfile

import jax
import numpy as np
from jax import export

from distillfss_jax import files
from distillfss_jax.exporting import graph as graphs
from distillfss_jax.exporting import primitives, resizing
from distillfss_jax.exporting.graph import BATCH, Graph, needs, tensor
from distillfss_jax.ops import platform

KIND = 'distillfss_jax segmenter 1'  # in the record of a file that is ours


def lower(function, inputs: dict, outputs, record: dict | None = None):
  """A function as an ONNX model; what it closes over becomes weights.

  Args:
    function: see `traced`, as `inputs` and `outputs`.
    inputs: {name: (shape, dtype)}.
    outputs: names of the results.
    record: {name: anything JSON takes}, kept in the file; see `Program`.

  Returns:
    An `onnx.ModelProto`, checked.

  Raises:
    ValueError: a package is missing, a primitive has no rule, or one file
      cannot hold the weights.
  """
  return _checked(graphs.finished(traced(function, inputs, outputs), record))


def traced(function, inputs: dict, outputs) -> Graph:
  """A function as a graph of ONNX's operators, for which no package is needed.

  Args:
    function: of arrays, by position; returns an array or a tuple of arrays.
    inputs: {name: (shape, dtype)}, in the function's order. A first size of
      `BATCH` is free: the file takes any.
    outputs: names of the results, in order.

  Raises:
    ValueError: a primitive has no rule.
  """
  made, values = Graph(), []
  for name, (shape, dtype) in inputs.items():
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # as JAX reads it
    made.input(name, dtype, shape)
    sizes = [-1 if size == BATCH else size for size in shape]
    values.append(tensor(name, sizes, dtype))
    if made.batch is None and -1 in sizes:
      made.batch = made.emit('Shape', name, start=0, end=1)
  results = _inlined(made, function, values)
  for name, value in zip(outputs, results, strict=True):
    value = made.plain(value)
    sizes = [size if size > 0 else _called(size) for size in value.shape]
    made.output(made.named(value), name, value.dtype, sizes)
  return made


def lower_segmenter(
  function, size: int, *, free_size: bool = True, record: dict | None = None
):
  """A segmenter for images as they come, as an ONNX model.

  The file takes `images` uint8 [b, H, W, 3] and gives `labels` uint8 [b, H, W]
  and `probabilities` float32 [b, H, W, 1+n] of each pixel.

  Args:
    function: uint8 images [b, size, size, 3] to logits [b, h, w, 1+n].
    size: height and width of the images it takes.
    free_size: whether the file resizes: images as Pillow's BILINEAR does, and
      logits without antialias, by half pixels. Otherwise it takes only images
      of `size`.
    record: see `lower`.

  Raises:
    ValueError: as `lower`.
  """
  made = Graph()
  sides = ['height', 'width'] if free_size else [size, size]
  images = made.input('images', np.uint8, [BATCH, *sides, 3])
  made.batch = made.emit('Shape', images, start=0, end=1)
  if free_size:
    images = resizing.resized(made, images, size)
  images = tensor(images, (-1, size, size, 3), np.uint8)
  (logits,) = _inlined(made, function, [images])
  classes = logits.shape[-1]
  logits = made.named(made.arranged(made.full(logits), (0, 3, 1, 2)))
  if free_size:
    shape = made.emit('Shape', 'images', start=1, end=3)
  else:
    shape = made.integers(size, size)
  # ONNX's linear interpolation by half pixels is that of `ops.resize.bilinear`.
  logits = made.emit(
    'Resize', logits, '', '',
    made.emit('Concat', made.batch, made.integers(classes), shape, axis=0),
    mode='linear', coordinate_transformation_mode='half_pixel',
  )  # fmt: skip
  labels = made.emit('ArgMax', logits, axis=1, keepdims=0)
  labels = made.emit('Cast', labels, to=graphs.type_of(np.uint8))
  shares = made.emit('Softmax', logits, axis=1)
  shares = made.emit('Transpose', shares, perm=(0, 2, 3, 1))
  made.output(labels, 'labels', np.uint8, [BATCH, *sides])
  made.output(shares, 'probabilities', np.float32, [BATCH, *sides, classes])
  record = {'kind': KIND, 'size': None if free_size else size} | (record or {})
  return _checked(graphs.finished(made, record))


def save(model, path) -> int:
  """Writes a model whole or not at all; returns its size in bytes."""
  data = model.SerializeToString()
  files.write_atomically(path, data)
  return len(data)


class Program:
  """An ONNX model that onnxruntime runs on the CPU.

  Args:
    model: a path, or what `lower` returns.
    threads: to compute with; None for one per core.

  Attributes:
    record: what `lower` was given to keep.
    inputs: names, in order.
    outputs: names, in order.

  Raises:
    ValueError: a package is missing, or the file is not an ONNX model.
    OSError: the file cannot be read.
  """

  def __init__(self, model, *, threads: int | None = None):
    runtime = needs('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; warnings are of no use to a user
    options.intra_op_num_threads = threads or 0
    where = model if isinstance(model, str | pathlib.Path) else 'the model'
    data = (
      pathlib.Path(model).read_bytes()
      if where is model
      else model.SerializeToString()
    )
    try:
      self._session = runtime.InferenceSession(
        data, options, providers=['CPUExecutionProvider']
      )
    except Exception as error:  # of many kinds, which onnxruntime does not name
      reason = str(error).strip().splitlines()[0]
      raise ValueError(
        f'{where} is no ONNX model that onnxruntime can run: {reason}'
      ) from None
    texts = self._session.get_modelmeta().custom_metadata_map
    self.record = {name: _json(text) for name, text in texts.items()}
    self.inputs = [x.name for x in self._session.get_inputs()]
    self.outputs = [x.name for x in self._session.get_outputs()]

  def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
    """The outputs of inputs in order."""
    given = dict(zip(self.inputs, map(np.asarray, arrays), strict=True))
    return self._session.run(None, given)


class Segmenter(Program):
  """A file of `lower_segmenter`; see `Program`.

  Raises:
    ValueError: as `Program`, or the file is of another kind.
  """

  def __init__(self, model, *, threads: int | None = None):
    super().__init__(model, threads=threads)
    if self.record.get('kind') != KIND:
      raise ValueError(
        f'{model if isinstance(model, str | pathlib.Path) else "the model"} is '
        'an ONNX model, but not one that distillfss_jax exported as a segmenter'
      )

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels [b, H, W] uint8 and probabilities [b, H, W, 1+n] of images.

    Args:
      images: uint8 [b, H, W, 3], RGB.

    Raises:
      ValueError: images of another type, or of a size the file does not take.
    """
    images = fitting(images, self.record['size'])
    return tuple(super().__call__(images))


def fitting(images, size: int | None) -> np.ndarray:
  """Images as an array, if a segmenter's file takes them.

  Args:
    images: uint8 [b, H, W, 3].
    size: what H and W must be; None for any.

  Raises:
    ValueError: they are of another type or size.
  """
  images = np.asarray(images)
  fits = images.dtype == np.uint8 and images.shape[3:] == (3,)
  if fits and size:
    fits = images.shape[1:3] == (size, size)
  if not fits:
    raise ValueError(
      f'images are {images.dtype} {images.shape}; this file takes uint8 '
      f'[b, H, W, 3] with H and W {size or "any"}'
    )
  return images


def quantise(path, out) -> int:
  """Writes an ONNX file with its weights as 8-bit integers.

  Matrix products and convolutions with constant weights are computed in
  integers, their inputs scaled by the range that each call finds; no data are
  needed. What it costs in accuracy is for `difference` to say.

  Returns:
    The size of the new file in bytes.

  Raises:
    ValueError: a package is missing.
  """
  onnx, tools = needs('onnx'), needs('onnxruntime.quantization')
  log = logging.getLogger()
  level = log.level
  with tempfile.TemporaryDirectory() as folder:
    made = pathlib.Path(folder) / 'quantised.onnx'
    log.setLevel(logging.ERROR)  # it warns of all that it leaves as it is
    try:
      tools.quantize_dynamic(path, made, weight_type=tools.QuantType.QUInt8)
    finally:
      log.setLevel(level)
    model = onnx.load(made)
  del model.metadata_props[:]
  model.metadata_props.extend(onnx.load(path).metadata_props)
  return save(model, out)


def difference(first, second) -> dict[str, float]:
  """How far two answers (labels, probabilities) are apart.

  Returns:
    equal_labels: the share of pixels whose labels are equal.
    probabilities: the largest difference of any probability.
  """
  return {
    'equal_labels': float(np.mean(first[0] == second[0])),
    'probabilities': float(np.abs(first[1] - second[1]).max()),
  }


def _json(text):
  try:
    return json.loads(text)
  except ValueError:  # of another program's file
    return text


def _checked(model):
  needs('onnx').checker.check_model(model, full_check=True)
  return model


def _inlined(made, function, values):
  """The values of a function's results, traced for a batch that is free."""
  # A batch of two or more, for code that asks whether it is one: what holds
  # for any such number holds for one, whose sizes are no special case.
  (symbol,) = export.symbolic_shape(BATCH, constraints=[f'{BATCH} >= 2'])
  shapes = [
    jax.ShapeDtypeStruct(
      [size if size > 0 else -size * symbol for size in value.shape],
      value.dtype,
    )
    for value in values
  ]
  try:
    # Convolutions stay convolutions: what runs the file has forms of its own.
    with platform.made_for('cuda'):
      closed = jax.make_jaxpr(function)(*shapes)
  except Exception as error:  # JAX has many for what asks for the batch
    raise ValueError(
      f'the function cannot be traced for a batch of any size: {error}'
    ) from error
  return primitives.inline(made, *primitives.called(closed), values)


def _called(size):
  """The name of a size that the batch decides."""
  return BATCH if size == -1 else f'{-size}*{BATCH}'
