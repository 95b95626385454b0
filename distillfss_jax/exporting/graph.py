"""An ONNX graph in the making, whose arrays lie as is cheapest.

JAX's convolutions here have their channels last, ONNX's have them first. So a
`Value` says in which order its axes lie: a transpose only changes that, and
nodes that move data arise where an operator needs another order, or at the
end. For the same reason an array that is only to be repeated along an axis has
one element there until someone needs all of them.
"""

import dataclasses
import hashlib
import json
import math

import numpy as np

# What the files ask of their readers: onnxruntime 1.14 (2023) and later.
OPSET, IR_VERSION = 18, 8
LARGEST = 2**31 - 2**20  # bytes of a file: Protocol Buffers end at 2 GiB

# ONNX's numbers of the types that the files here hold.
TYPES = {
  'float32': 1, 'uint8': 2, 'int8': 3, 'int32': 6, 'int64': 7, 'bool': 9,
  'float64': 11, 'uint32': 12, 'uint64': 13,
}  # fmt: skip

BATCH = 'batch'  # the name of the size that is free


def needs(module: str):
  """Imports a module of requirements-export.txt.

  Raises:
    ValueError: it is not installed.
  """
  try:
    # `fromlist` makes __import__ return the module itself, not its package.
    return __import__(module, fromlist=['_'])
  except ImportError as error:
    raise ValueError(
      f'ONNX needs the package {module.split(".")[0]}: '
      'pip install -r requirements-export.txt'
    ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """An array of the program.

  Sizes are numbers, or -k for k times the batch, which only the user knows.

  Attributes:
    source: a tensor's name in the graph, or the array itself where it is
      constant; that has its axes in the program's order.
    shape: as the program sees it.
    dtype: numpy's.
    order: the stored axis i is the program's axis order[i].
    held: the sizes stored, by the program's axes: 1 where the array is to be
      repeated to the size in `shape`.
  """

  source: str | np.ndarray
  shape: tuple[int, ...]
  dtype: np.dtype
  order: tuple[int, ...]
  held: tuple[int, ...]

  @property
  def constant(self) -> bool:
    """Whether the array is known now."""
    return not isinstance(self.source, str)

  @property
  def stored(self) -> tuple[int, ...]:
    """The sizes in the order they are stored in."""
    return tuple(self.held[axis] for axis in self.order)

  def array(self) -> np.ndarray:
    """The whole array of a constant (a view, where it is repeated)."""
    return np.broadcast_to(self.source, self.shape)


def tensor(source: str, shape, dtype, order=None) -> Value:
  """A value computed by the graph, stored in full."""
  shape = tuple(shape)
  order = tuple(range(len(shape))) if order is None else tuple(order)
  return Value(source, shape, np.dtype(dtype), order, shape)


def constant(array, shape=None) -> Value:
  """A value known now; `shape` is what it is to be repeated to."""
  array = np.asarray(array)
  shape = array.shape if shape is None else tuple(shape)
  order = tuple(range(array.ndim))
  return Value(array, shape, array.dtype, order, array.shape)


@dataclasses.dataclass(frozen=True)
class Node:
  """One operation; attributes may hold graphs."""

  op: str
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  attributes: dict


class Graph:
  """Nodes, in the order they run in.

  Args:
    outer: the graph that this one is the body of; it sees its tensors.

  Attributes:
    batch: name of the tensor [1] int64 that holds the free size.
  """

  def __init__(self, outer: 'Graph | None' = None):
    self.nodes, self.outer = [], outer
    self.inputs, self.outputs = [], []
    self._made = {}
    self._depth = 0 if outer is None else outer._depth + 1
    self._root = self if outer is None else outer._root
    if outer is None:
      self.arrays, self._names, self._count = {}, {}, 0
      self._homes = {}
      self.batch = None

  def input(self, stem: str, dtype, sizes) -> str:
    """Adds an input; sizes may be names, or None for what is not known."""
    name = stem if self.outer is None else self.fresh(stem)
    self.inputs.append((name, np.dtype(dtype), list(sizes)))
    self._root._homes[name] = self
    return name

  def output(self, name: str, stem: str, dtype, sizes) -> None:
    """Makes a tensor an output, under a name of its own."""
    called = stem if self.outer is None else self.fresh(stem)
    self.nodes.append(Node('Identity', (name,), (called,), {}))
    self.outputs.append((called, np.dtype(dtype), list(sizes)))

  def fresh(self, stem: str) -> str:
    """A name that nothing has yet."""
    self._root._count += 1
    return f'{stem.lower()}_{self._root._count}'

  def emit(self, op: str, *inputs: str, outputs: int = 1, **attributes):
    """Adds a node; what was computed before is not computed again.

    In a body, what does not depend on the step is computed outside.

    Returns:
      The output's name, or a tuple of names if there is more than one.
    """
    homes = self._root._homes
    home = max(
      (homes.get(name, self._root) for name in inputs),
      key=lambda graph: graph._depth,
      default=self._root,
    )
    if any(isinstance(value, Graph) for value in attributes.values()):
      home = self  # where all is known that a body may look at
    key = (op, inputs, outputs, repr(sorted(attributes.items())))
    if key not in home._made:
      names = tuple(self.fresh(op) for _ in range(outputs))
      home.nodes.append(Node(op, inputs, names, attributes))
      homes.update(dict.fromkeys(names, home))
      home._made[key] = names[0] if outputs == 1 else names
    return home._made[key]

  def weight(self, array: np.ndarray) -> str:
    """The name of a constant tensor; equal ones are stored once."""
    root, array = self._root, np.asarray(array, order='C')
    key = (
      array.dtype.str,
      array.shape,
      hashlib.sha256(array.data if array.size else b'').digest(),
    )
    if key not in root._names:
      root._names[key] = self.fresh('weight')
      root.arrays[root._names[key]] = array
    return root._names[key]

  def integers(self, *numbers: int) -> str:
    """The name of a constant int64 vector."""
    return self.weight(np.array(numbers, np.int64))

  def named(self, value: Value) -> str:
    """The name of the tensor that holds a value, in its order."""
    if value.constant:
      return self.weight(value.source.transpose(value.order))
    return value.source

  def sizes(self, sizes) -> str:
    """The name of an int64 vector of sizes, the batch's among them."""
    if all(size > 0 for size in sizes):
      return self.integers(*sizes)
    parts = []
    for size in sizes:
      if size > 0:
        parts.append(self.integers(size))
      elif size == -1:
        parts.append(self._root.batch)
      else:
        parts.append(self.emit('Mul', self._root.batch, self.integers(-size)))
    return parts[0] if len(parts) == 1 else self.emit('Concat', *parts, axis=0)

  def laid(self, value: Value, sizes) -> str:
    """The name of a value whose stored sizes are taken for others."""
    if value.constant and min(sizes, default=1) > 0:
      return self.weight(value.source.transpose(value.order).reshape(sizes))
    return self.restored(self.named(value), value.stored, sizes)

  def restored(self, name: str, before, after) -> str:
    """Reinterprets a tensor's stored sizes; data stay where they are."""
    if tuple(before) == tuple(after):
      return name
    # ONNX works out the one size that is not known.
    after = (max(size, -1) for size in after)
    return self.emit('Reshape', name, self.integers(*after))

  def lies(self, value: Value, order) -> bool:
    """Whether a value can be had in an order without moving data."""
    long = [axis for axis in value.order if value.held[axis] != 1]
    return value.constant or long == [
      axis for axis in order if value.held[axis] != 1
    ]

  def arranged(self, value: Value, order) -> Value:
    """The value with its axes stored in an order."""
    order = tuple(order)
    if value.constant or value.order == order:
      return dataclasses.replace(value, order=order)
    moved = dataclasses.replace(value, order=order)
    if self.lies(value, order):
      name = self.restored(value.source, value.stored, moved.stored)
    else:
      turn = tuple(value.order.index(axis) for axis in order)
      name = self.emit('Transpose', value.source, perm=turn)
    return dataclasses.replace(moved, source=name)

  def full(self, value: Value, axes=None) -> Value:
    """The value with nothing left to be repeated (along the axes given)."""
    axes = range(len(value.shape)) if axes is None else axes
    held = list(value.held)
    for axis in axes:
      held[axis] = value.shape[axis]
    held = tuple(held)
    if held == value.held:
      return value
    if value.constant and min(held) > 0:
      return dataclasses.replace(
        value, source=np.broadcast_to(value.source, held), held=held
      )
    # A 1 leaves a size as it is, so that the batch is asked for only here.
    wanted = [
      1 if held[axis] == value.held[axis] else held[axis]
      for axis in value.order
    ]
    name = self.emit('Expand', self.named(value), self.sizes(wanted))
    return dataclasses.replace(value, source=name, held=held)

  def plain(self, value: Value) -> Value:
    """The value in full and stored as the program sees it."""
    value = self.full(value)
    return self.arranged(value, range(len(value.shape)))

  def prevailing(self, values) -> tuple[int, ...]:
    """The order that most of the data of several values lie in already."""
    best = max(
      values,
      key=lambda x: (not x.constant, math.prod(abs(size) for size in x.held)),
    )
    return best.order

  def elementwise(self, op: str, *values: Value, dtype=None, **attributes):
    """An operator that repeats its operands as numpy does."""
    rank = max(len(value.shape) for value in values)
    values = [
      value if len(value.shape) == rank else self._raised(value, rank)
      for value in values
    ]
    order = self.prevailing(values)
    shape = _common(value.shape for value in values)
    held = _common(value.held for value in values)
    names = []
    for value in values:
      if value.constant and value.source.size == 1:
        # Runtimes know their patterns by scalars.
        names.append(self.weight(value.source.reshape(())))
      else:
        names.append(self.named(self.arranged(value, order)))
    name = self.emit(op, *names, **attributes)
    dtype = values[0].dtype if dtype is None else np.dtype(dtype)
    return Value(name, shape, dtype, order, held)

  def cast(self, value: Value, dtype) -> Value:
    """The value as another type."""
    dtype = np.dtype(dtype)
    if value.dtype == dtype:
      return value
    if value.constant:
      return dataclasses.replace(
        value, source=value.source.astype(dtype), dtype=dtype
      )
    name = self.emit('Cast', value.source, to=type_of(dtype))
    return dataclasses.replace(value, source=name, dtype=dtype)

  def _raised(self, value, rank):
    """A scalar as an array with axes of one."""
    ones = (1,) * rank
    if value.constant:
      return constant(value.source.reshape(ones))
    return tensor(self.restored(value.source, (), ones), ones, value.dtype)


def _common(shapes):
  """The sizes that arrays have when each repeats what it has one of."""
  axes = zip(*shapes, strict=True)
  return tuple(next((x for x in sizes if x != 1), 1) for sizes in axes)


def type_of(dtype) -> int:
  """ONNX's number of a numpy type.

  Raises:
    ValueError: a type that the files here do not hold.
  """
  name = np.dtype(dtype).name
  if name not in TYPES:
    raise ValueError(
      f'ONNX files here hold no {name}: build the model with dtype float32'
    )
  return TYPES[name]


def finished(graph: Graph, record: dict | None = None):
  """The graph as an `onnx.ModelProto`, without what nobody reads.

  Args:
    graph: its `inputs` and `outputs` are (name, dtype, sizes or names).
    record: {name: anything that JSON takes}, which the file keeps.

  Raises:
    ValueError: the weights exceed what one file can hold, or a package is
      missing.
  """
  onnx = needs('onnx')
  used = {name for name, _, _ in graph.outputs}
  nodes = _needed(graph.nodes, used)
  arrays = {k: x for k, x in graph.arrays.items() if k in used}
  total = sum(x.nbytes for x in arrays.values())
  if total > LARGEST:
    raise ValueError(
      f'the weights take {total / 2**30:.1f} GiB and one ONNX file holds 2: '
      'export StableHLO, or a smaller model'
    )
  model = onnx.helper.make_model(
    onnx.helper.make_graph(
      [_node(onnx, x) for x in nodes],
      'distillfss_jax',
      [
        onnx.helper.make_tensor_value_info(x, type_of(t), s)
        for x, t, s in graph.inputs
      ],
      [
        onnx.helper.make_tensor_value_info(x, type_of(t), s)
        for x, t, s in graph.outputs
      ],
      [onnx.numpy_helper.from_array(x, name) for name, x in arrays.items()],
    ),
    producer_name='distillfss_jax',
    ir_version=IR_VERSION,
    opset_imports=[onnx.helper.make_opsetid('', OPSET)],
  )
  onnx.helper.set_model_props(
    model, {name: json.dumps(value) for name, value in (record or {}).items()}
  )
  return model


def _needed(nodes, used):
  """The nodes that `used` names need, in order; their inputs join `used`."""
  kept = []
  for node in reversed(nodes):
    if used.isdisjoint(node.outputs):
      continue
    attributes = {}
    for key, value in node.attributes.items():
      if isinstance(value, Graph):
        used.update(name for name, _, _ in value.outputs)
        value.nodes = _needed(value.nodes, used)
      attributes[key] = value
    used.update(node.inputs)
    kept.append(dataclasses.replace(node, attributes=attributes))
  return kept[::-1]


def _node(onnx, node):
  attributes = {
    key: _body(onnx, value) if isinstance(value, Graph) else value
    for key, value in node.attributes.items()
  }
  return onnx.helper.make_node(
    node.op, node.inputs, node.outputs, node.outputs[0], **attributes
  )


def _body(onnx, graph):
  return onnx.helper.make_graph(
    [_node(onnx, x) for x in graph.nodes],
    graph.outer.fresh('body'),
    *(
      [onnx.helper.make_tensor_value_info(x, type_of(t), s) for x, t, s in some]
      for some in (graph.inputs, graph.outputs)
    ),
  )
