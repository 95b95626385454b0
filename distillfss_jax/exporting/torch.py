"""Segmenters as files that PyTorch runs, with nothing of ours beside it.

A file is what `torch.export.save` writes: a graph of PyTorch's own operators,
the weights, and our record as an extra file. TorchScript would be the other
way, but PyTorch has deprecated it, while the programs of `torch.export` leave
batch, height and width free as well, move to other devices, and compile.

What is translated are the operators of our own ONNX graphs, each by a rule.
The common converter of ONNX files, onnx2torch, has none for loops, and takes
sizes for data, where those that depend on the batch have to stay symbols.

PyTorch is imported when it is asked for, and not before.
"""

import io
import json
import logging
import pathlib
import zipfile

import numpy as np

from distillfss_jax import files
from distillfss_jax.exporting import onnx, resizing
from distillfss_jax.exporting.graph import BATCH, TYPES, Graph

_RECORD = 'record.json'  # the extra file, by the name that PyTorch asks for


def needs():
  """Imports PyTorch.

  Raises:
    ValueError: it is not installed.
  """
  try:
    return __import__('torch')
  except ImportError as error:
    raise ValueError(
      "PyTorch's files need the package torch: pip install torch"
    ) from error


def save_segmenter(
  path,
  function,
  size: int,
  *,
  free_size: bool = True,
  record: dict | None = None,
) -> int:
  """Writes a segmenter, which takes and gives what one in ONNX does.

  Args:
    path: of the file.
    function: uint8 images [b, size, size, 3] to logits [b, h, w, 1+n].
    size: height and width of the images it takes.
    free_size: whether the file resizes, as `onnx.lower_segmenter` says.
    record: {name: anything JSON takes}, kept in the file.

  Returns:
    The size of the file in bytes.

  Raises:
    ValueError: PyTorch is missing, or a primitive or an operator has no rule.
  """
  torch = needs()
  shape = (BATCH, size, size, 3)
  answer = module(
    onnx.traced(function, {'images': (shape, np.uint8)}, ['logits'])
  )

  class Segmenting(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.answer = answer

    def forward(self, images):
      seen = resized(torch, images, size) if free_size else images
      (logits,) = self.answer(seen)
      logits = torch.nn.functional.interpolate(
        logits.permute(0, 3, 1, 2),
        size=images.shape[1:3],
        mode='bilinear',
        align_corners=False,
      )
      labels = logits.max(1).indices.to(torch.uint8)  # faster than argmax
      return labels, logits.softmax(1).permute(0, 2, 3, 1)

  names = ('batch', 'height', 'width') if free_size else ('batch',)
  free = {i: torch.export.Dim(x, min=1) for i, x in enumerate(names)}
  # No two sizes alike, so that each stays a symbol of its own.
  sides = (size + 1, size + 2) if free_size else (size, size)
  images = torch.zeros((3, *sides, 3), dtype=torch.uint8)
  try:
    program = torch.export.export(
      Segmenting().eval(), (images,), dynamic_shapes=(free,)
    )
  except ValueError:  # ours
    raise
  except Exception as error:  # of many kinds, which PyTorch does not name
    raise ValueError(
      f'PyTorch {torch.__version__} cannot export the model: {_first(error)}'
    ) from error
  for node in program.graph.nodes:  # a file does not tell where it was made
    node.meta.pop('stack_trace', None)
  record = {'kind': onnx.KIND, 'size': None if free_size else size} | (
    record or {}
  )
  made = io.BytesIO()
  torch.export.save(program, made, extra_files={_RECORD: json.dumps(record)})
  files.write_atomically(path, made.getvalue())
  return len(made.getvalue())


class Segmenter:
  """A file of `save_segmenter`, which PyTorch runs on the CPU.

  Attributes:
    record: what `save_segmenter` was given to keep.

  Raises:
    ValueError: PyTorch is missing, or the file is none of ours.
    OSError: it cannot be read.
  """

  def __init__(self, path):
    if not wrote(path):
      raise ValueError(
        f'{path} is no file for PyTorch that distillfss_jax exported'
      )
    self._torch, texts = needs(), {_RECORD: ''}
    data = io.BytesIO(pathlib.Path(path).read_bytes())
    log = logging.getLogger('torch.export')
    level = log.level
    log.setLevel(logging.CRITICAL)  # what it says of errors is raised as well
    try:
      program = self._torch.export.load(data, extra_files=texts)
      self._run = program.module()
      self.record = json.loads(texts[_RECORD])
    except Exception as error:  # of many kinds, which PyTorch does not name
      raise ValueError(
        f'PyTorch {self._torch.__version__} cannot load {path}: {_first(error)}'
      ) from None
    finally:
      log.setLevel(level)

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `onnx.Segmenter` gives for images uint8 [b, H, W, 3]."""
    images = onnx.fitting(images, self.record['size'])
    with self._torch.inference_mode():
      return tuple(x.numpy() for x in self._run(self._torch.tensor(images)))


def wrote(path) -> bool:
  """Whether a file is one of `save_segmenter`.

  Raises:
    OSError: it cannot be read.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      # PyTorch puts all it writes into a folder.
      return any(x.endswith(f'/{_RECORD}') for x in archive.namelist())
  except zipfile.BadZipFile:
    return False


def _first(error):
  """The line of an error that says what it is."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def module(graph: Graph):
  """A graph of ONNX's operators as a `torch.nn.Module`.

  Args:
    graph: what `onnx.traced` gives. Its inputs are taken by position.

  Returns:
    The module; it gives a tuple.

  Raises:
    ValueError: PyTorch is missing; when the module is called: an operator has
      no rule here.
  """
  torch = needs()

  class Module(torch.nn.Module):
    def __init__(self):
      super().__init__()
      for name in sorted(_tensors(graph) & set(graph.arrays)):
        self.register_buffer(name, torch.tensor(graph.arrays[name]))

    def forward(self, *given):
      known = dict(self.named_buffers())
      known |= zip((name for name, *_ in graph.inputs), given, strict=True)
      _run(torch, graph, graph.arrays, known)
      return tuple(known[name] for name, *_ in graph.outputs)

  return Module()


# Which inputs of an operator are numbers when the graph is made, not data.
_NUMBERS = {
  'CumSum': (1,), 'Expand': (1,), 'Pad': (1, 2, 3), 'ReduceMax': (1,),
  'ReduceMin': (1,), 'ReduceProd': (1,), 'ReduceSum': (1,), 'Reshape': (1,),
  'Slice': (1, 2, 3, 4), 'Tile': (1,),
}  # fmt: skip

# What sizes are made of, each of lists of numbers.
_SIZES = {
  'Concat': lambda *lists: [x for some in lists for x in some],
  'Identity': list,
  'Mul': lambda *lists: [x * y for x, y in zip(*lists, strict=True)],
}


def _tensors(graph):
  """The names that nodes take as data, those in bodies among them."""
  found = set()
  for node in graph.nodes:
    numbers = _NUMBERS.get(node.op, ())
    found |= {x for i, x in enumerate(node.inputs) if i not in numbers}
    for value in node.attributes.values():
      found |= _tensors(value) if isinstance(value, Graph) else set()
  return found


def _run(torch, graph, arrays, known):
  """Computes the nodes of a graph.

  Args:
    torch: the package.
    graph: a whole graph, or the body of a loop.
    arrays: the constants, by name.
    known: {name: tensor, or list of numbers where it is sizes}; it grows.
  """

  def tensor(name):
    value = known[name]
    if isinstance(value, list):
      numbers = [torch.full((), x, dtype=torch.int64) for x in value]
      return torch.stack(numbers)
    return value

  def numbers(name):
    if isinstance(known.get(name), list):
      return known[name]
    if name not in arrays:
      raise NotImplementedError('only the data say where')
    return arrays[name].tolist()

  for node in graph.nodes:
    try:
      if node.op == 'Shape':
        first, end = (node.attributes.get(x) for x in ('start', 'end'))
        made = list(tensor(node.inputs[0]).shape[first:end])
      elif node.op in _SIZES and any(
        isinstance(known.get(x), list) for x in node.inputs
      ):
        made = _SIZES[node.op](*map(numbers, node.inputs))
      elif node.op == 'Scan':
        values = [tensor(x) for x in node.inputs]
        made = _loop(torch, node, values, arrays, known)
      else:
        given = _NUMBERS.get(node.op, ())
        values = [
          numbers(x) if i in given else tensor(x)
          for i, x in enumerate(node.inputs)
        ]
        made = _RULES[node.op](torch, node.attributes, *values)
    except (KeyError, NotImplementedError) as error:
      raise ValueError(
        f'the operator {node.op!r} has no rule for PyTorch ({error})'
      ) from error
    if isinstance(made, tuple):
      known.update(zip(node.outputs, made, strict=True))
    else:
      known[node.outputs[0]] = made


def _loop(torch, node, values, arrays, known):
  """The outputs of a loop, whose steps are written out one by one."""
  count = node.attributes['num_scan_inputs']
  body = node.attributes['body']
  state, rows = values[:-count], values[-count:]
  steps = range(rows[0].shape[0])
  backwards = any(node.attributes.get('scan_input_directions', ()))
  names, made = [name for name, *_ in body.inputs], []
  for i in reversed(steps) if backwards else steps:
    here = (*state, *(x[i] for x in rows))
    inner = known | dict(zip(names, here, strict=True))
    _run(torch, body, arrays, inner)
    out = [inner[name] for name, *_ in body.outputs]
    state, made = out[: len(state)], [*made, out[len(state) :]]
  made = made[::-1] if backwards else made
  return (*state, *(torch.stack(x) for x in zip(*made, strict=True)))


def _plainly(name):
  """A rule that is one function of PyTorch."""
  return lambda torch, attributes, *values: getattr(torch, name)(*values)


def _best(name):
  return lambda torch, attributes, x: getattr(torch, name)(
    x, attributes['axis']
  )


def _cast(torch, attributes, x):
  (name,) = (name for name, to in TYPES.items() if to == attributes['to'])
  return x.to(getattr(torch, name))


def _divide(torch, attributes, x, y):
  whole = None if x.is_floating_point() else 'trunc'
  return torch.div(x, y, rounding_mode=whole)


def _expand(torch, attributes, x, sizes):
  # A symbol is not compared with 1: that would fix it.
  return x.expand([-1 if isinstance(n, int) and n == 1 else n for n in sizes])


def _slice(torch, attributes, x, starts, limits, axes, strides=None):
  cuts = [slice(None)] * x.ndim
  strides = strides or [1] * len(axes)
  for axis, *cut in zip(axes, starts, limits, strides, strict=True):
    cuts[axis] = slice(*cut)
  return x[tuple(cuts)]


def _pad(torch, attributes, x, pads, value, axes):
  sides = [(0, 0)] * x.ndim
  lows, highs = pads[: len(axes)], pads[len(axes) :]
  for axis, *both in zip(axes, lows, highs, strict=True):
    sides[axis] = tuple(both)
  return _padded(torch, x, sides, value)


def _padded(torch, x, sides, value):
  """Pads the last axes by (low, high) each; PyTorch lists the last first."""
  flat = [n for both in reversed(sides) for n in both]
  return torch.nn.functional.pad(x, flat, value=value) if any(flat) else x


def _sides(attributes):
  """The padding of a window by axis."""
  pads, rank = attributes.get('pads'), len(attributes['kernel_shape'])
  return list(zip(pads[:rank], pads[rank:], strict=True)) if pads else []


def _conv(torch, attributes, x, kernel):
  rank = len(attributes['kernel_shape'])
  sides = _sides(attributes) or [(0, 0)] * rank
  if any(low != high for low, high in sides):
    x, sides = _padded(torch, x, sides, 0), [(0, 0)] * rank
  return getattr(torch, f'conv{rank}d')(
    x,
    kernel,
    stride=attributes.get('strides', 1),
    padding=[low for low, _ in sides],
    dilation=attributes.get('dilations', 1),
    groups=attributes.get('group', 1),
  )


def _max_pool(torch, attributes, x):
  # PyTorch's own padding reaches no farther than half a window.
  x = _padded(torch, x, _sides(attributes), -np.inf)
  rank = len(attributes['kernel_shape'])
  return getattr(torch.nn.functional, f'max_pool{rank}d')(
    x,
    attributes['kernel_shape'],
    attributes['strides'],
    dilation=attributes['dilations'],
  )


def _product(torch, attributes, x, axes):
  for axis in sorted(axes, reverse=True):
    x = x.prod(axis, dtype=x.dtype)
  return x


def _cumsum(torch, attributes, x, axis):
  if attributes['reverse']:
    return x.flip(axis).cumsum(axis, dtype=x.dtype).flip(axis)
  return x.cumsum(axis, dtype=x.dtype)


def _gather(torch, attributes, x, indices):
  axis = attributes['axis']
  rows = x.index_select(axis, indices.flatten())
  shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
  return rows.reshape(shape)


def _gather_nd(torch, attributes, x, indices):
  paired = attributes['batch_dims']
  # Along paired axes each row of indices looks into its own part.
  ones = [1] * (indices.ndim - 1)
  places = [
    torch.arange(n).reshape([*ones[:axis], -1, *ones[axis + 1 :]])
    for axis, n in enumerate(x.shape[:paired])
  ]
  return x[(*places, *indices.unbind(-1))]


_RULES = {
  'Abs': _plainly('abs'),
  'Add': _plainly('add'),
  'And': _plainly('logical_and'),
  'ArgMax': _best('argmax'),
  'ArgMin': _best('argmin'),
  'BitwiseAnd': _plainly('bitwise_and'),
  'BitwiseNot': _plainly('bitwise_not'),
  'BitwiseOr': _plainly('bitwise_or'),
  'BitwiseXor': _plainly('bitwise_xor'),
  'Cast': _cast,
  'Ceil': _plainly('ceil'),
  'Concat': lambda torch, attributes, *values: torch.cat(
    values, attributes['axis']
  ),
  'Conv': _conv,
  'Cos': _plainly('cos'),
  'CumSum': _cumsum,
  'Div': _divide,
  'Equal': _plainly('eq'),
  'Erf': _plainly('erf'),
  'Exp': _plainly('exp'),
  'Expand': _expand,
  'Floor': _plainly('floor'),
  'Gather': _gather,
  'GatherND': _gather_nd,
  'Greater': _plainly('gt'),
  'GreaterOrEqual': _plainly('ge'),
  'Identity': lambda torch, attributes, x: x,
  'Less': _plainly('lt'),
  'LessOrEqual': _plainly('le'),
  'Log': _plainly('log'),
  'MatMul': _plainly('matmul'),
  'Max': _plainly('maximum'),
  'MaxPool': _max_pool,
  'Min': _plainly('minimum'),
  'Mod': _plainly('fmod'),
  'Mul': _plainly('mul'),
  'Neg': _plainly('neg'),
  'Not': _plainly('logical_not'),
  'Or': _plainly('logical_or'),
  'Pad': _pad,
  'Pow': _plainly('pow'),
  'Reciprocal': _plainly('reciprocal'),
  'ReduceMax': lambda torch, attributes, x, axes: x.amax(axes),
  'ReduceMin': lambda torch, attributes, x, axes: x.amin(axes),
  'ReduceProd': _product,
  'ReduceSum': lambda torch, attributes, x, axes: x.sum(axes, dtype=x.dtype),
  'Relu': _plainly('relu'),
  'Reshape': lambda torch, attributes, x, sizes: x.reshape(sizes),
  'Sigmoid': _plainly('sigmoid'),
  'Sign': _plainly('sign'),
  'Sin': _plainly('sin'),
  'Slice': _slice,
  'Sqrt': _plainly('sqrt'),
  'Sub': _plainly('sub'),
  'Tanh': _plainly('tanh'),
  'Tile': lambda torch, attributes, x, times: x.repeat(times),
  'Transpose': lambda torch, attributes, x: x.permute(attributes['perm']),
  'Where': _plainly('where'),
  'Xor': _plainly('logical_xor'),
}


def resized(torch, images, size):
  """Images uint8 [b, size, size, 3], the bytes of Pillow's BILINEAR.

  Args:
    torch: the package.
    images: its tensor, uint8 [b, H, W, 3].
    size: height and width of the result.
  """
  for _ in range(2):
    images = _resized_rows(torch, images.permute(2, 0, 1, 3), size)
  return images.permute(2, 0, 1, 3)


def _resized_rows(torch, x, size):
  """uint8 [size, ...] made of the rows x [n, ...] of four axes."""
  n, real = x.shape[0], torch.float64
  step = torch.full((), n, dtype=real) / size
  reach = step.clamp(min=1)
  middles = (torch.arange(size, dtype=real)[:, None] + 0.5) * step
  first = (middles - reach + 0.5).floor().clamp(min=0)
  # What `reach` is at most, as a size.
  count = 2 * torch.sym_max(-(-n // size), 1) + 1
  places = first + torch.arange(count, dtype=real)  # [size, taps]
  apart = (places + 0.5 - middles).abs()
  weights = (1 - apart / reach).relu() * (places < n)
  weights = weights / weights.sum(1, keepdim=True)
  weights = (weights * resizing.UNIT + 0.5).floor()
  # Sums of rows with weights, of which none but those named are looked at:
  # whole numbers, of which real ones of 64 bits hold all that occur.
  sums = torch.nn.functional.embedding_bag(
    places.clamp(max=n - 1).long().flatten(),
    x.flatten(1).to(real),
    torch.arange(size) * count,
    mode='sum',
    per_sample_weights=weights.flatten(),
  )
  sums = (sums + resizing.UNIT // 2) / resizing.UNIT
  return sums.floor().to(torch.uint8).reshape(size, *x.shape[1:])
