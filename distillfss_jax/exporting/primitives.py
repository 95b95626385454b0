"""JAX's primitives in ONNX's operators: how a jaxpr becomes nodes."""

import functools
import math
import pathlib

import numpy as np

from distillfss_jax.exporting import moves, products
from distillfss_jax.exporting.graph import Graph, Value, constant, tensor
from distillfss_jax.exporting.moves import (
  joined,
  reshaped,
  shape_of,
  sizes_of,
  sliced,
)

# A constant is computed now if it takes at most this many bytes more than what
# it is computed from: runtimes do the rest when they load the file.
GROWTH = 1 << 16
UNROLLED = 4  # loops of so few steps are written out


def inline(graph: Graph, jaxpr, consts, inputs, callers=()) -> list[Value]:
  """Adds the nodes of a jaxpr.

  Args:
    graph: where they go.
    jaxpr: an open jaxpr.
    consts: values of its constvars.
    inputs: values of its invars.
    callers: the equations that it is called by, the nearest first.

  Returns:
    The values of its outputs.

  Raises:
    ValueError: a primitive that has no rule here, by its name and place.
  """
  known = dict(zip(jaxpr.constvars, consts, strict=True))
  known |= dict(zip(jaxpr.invars, inputs, strict=True))

  def read(x):
    # What a function closes over may stand in its equations, or beside them.
    literal = hasattr(x, 'val')
    return constant(np.asarray(x.val, x.aval.dtype)) if literal else known[x]

  for eqn in jaxpr.eqns:
    values = [read(x) for x in eqn.invars]
    for var, value in zip(
      eqn.outvars, _lowered(graph, eqn, values, callers), strict=True
    ):
      known[var] = value
  return [read(x) for x in jaxpr.outvars]


def _lowered(graph, eqn, values, callers):
  """The outputs of one equation."""
  name = eqn.primitive.name
  if name in CALLS:
    jaxpr, consts = called(eqn.params[CALLS[name]])
    return inline(graph, jaxpr, consts, values, (eqn, *callers))
  if all(x.constant for x in values) and name != 'dim_as_value':
    folded = _folded(eqn, values, always=name not in RULES)
    if folded is not None:
      return folded
  if name not in RULES:
    raise _lacking(eqn, callers)
  try:
    out = RULES[name](graph, eqn, *values)
  except NotImplementedError as error:
    raise _lacking(eqn, callers, f' where {error}') from None
  return out if isinstance(out, list) else [out]


def called(jaxpr):
  """A jaxpr, closed or not, and the values of its constants."""
  arrays = getattr(jaxpr, 'consts', ())
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return jaxpr, [
    constant(np.asarray(x, var.aval.dtype))
    for x, var in zip(arrays, jaxpr.constvars, strict=True)
  ]


def _folded(eqn, values, always):
  """The outputs as constants, or None where that would bloat the file."""
  shapes = [shape_of(x) for x in eqn.outvars]
  if any(size < 0 for shape in shapes for size in shape):
    return None
  if eqn.primitive.name in _ELEMENTWISE:
    # What is to be repeated is computed once.
    rank = len(shapes[0])
    values = [
      x if len(x.shape) == rank else constant(x.source.reshape((1,) * rank))
      for x in values
    ]
    held = np.broadcast_shapes(*(x.held for x in values))
    arrays = [np.broadcast_to(x.source, held) for x in values]
    sizes = [held] * len(shapes)
  else:
    arrays = [x.array() for x in values]
    sizes = shapes
  grown = sum(
    math.prod(size) * x.aval.dtype.itemsize
    for size, x in zip(sizes, eqn.outvars, strict=True)
  ) - sum(x.source.nbytes for x in values)
  if grown > GROWTH and not always:
    return None
  out = eqn.primitive.bind(*arrays, **eqn.params)
  out = out if eqn.primitive.multiple_results else [out]
  return [
    constant(np.asarray(x), shape) for x, shape in zip(out, shapes, strict=True)
  ]


def _lacking(eqn, callers, where=''):
  """The error of what has no rule; it says where in the program it stands."""
  place = 'a place that JAX did not note'
  for caller in (*callers[::-1], eqn):  # the innermost that is not a library's
    trace = caller.source_info.traceback
    for frame in trace.frames[::-1] if trace else ():
      if not {'jax', 'flax'} & set(pathlib.Path(frame.file_name).parts):
        place = f'{frame.file_name}:{frame.line_num} ({frame.function_name})'
  return ValueError(
    f'the primitive {eqn.primitive.name!r} has no rule for ONNX{where}; it '
    f'stands in {place}'
  )


# Operators that do one thing to each element.


def _plainly(op):
  """A rule that is one operator."""

  def rule(graph, eqn, *values):
    if wide := eqn.params.get('out_dtype'):
      values = [graph.cast(x, wide) for x in values]
    return graph.elementwise(op, *values, dtype=eqn.outvars[0].aval.dtype)

  return rule


def _logically(op):
  """A rule that is one operator for truth and another for bits."""

  def rule(graph, eqn, *values):
    kind = op if values[0].dtype == bool else f'Bitwise{op}'
    return graph.elementwise(kind, *values)

  return rule


def _same(graph, eqn, *values):
  return list(values)


def _sub(graph, eqn, x, y):
  if y.constant and y.dtype.kind == 'f':
    # The same number, and one that runtimes take into convolutions.
    y = constant(-y.source, y.shape)
    return graph.elementwise('Add', x, y)
  return graph.elementwise('Sub', x, y)


def _max(graph, eqn, *values):
  for x, y in (values, values[::-1]):
    if y.constant and x.dtype.kind == 'f' and not np.any(y.source):
      return graph.elementwise('Relu', x)
  return graph.elementwise('Max', *values)


def _rem(graph, eqn, *values):
  return graph.elementwise('Mod', *values, fmod=1)


def _ne(graph, eqn, *values):
  return graph.elementwise(
    'Not', graph.elementwise('Equal', *values, dtype=bool)
  )


def _rsqrt(graph, eqn, x):
  return graph.elementwise('Reciprocal', graph.elementwise('Sqrt', x))


def _erfc(graph, eqn, x):
  one = constant(np.ones((), x.dtype))
  return graph.elementwise('Sub', one, graph.elementwise('Erf', x))


def _square(graph, eqn, x):
  return graph.elementwise('Mul', x, x)


def _integer_pow(graph, eqn, x):
  return graph.elementwise(
    'Pow', x, constant(np.array(eqn.params['y'], x.dtype))
  )


def _cast(graph, eqn, x):
  return graph.cast(x, eqn.outvars[0].aval.dtype)


def _clamp(graph, eqn, low, x, high):
  return graph.elementwise('Min', graph.elementwise('Max', x, low), high)


def _select(graph, eqn, which, *cases):
  out = cases[0]
  for i, case in enumerate(cases[1:], 1):
    here = which
    if which.dtype != bool:
      here = graph.elementwise(
        'Equal', which, constant(np.array(i, which.dtype)), dtype=bool
      )
    out = graph.elementwise('Where', here, case, out, dtype=out.dtype)
  return out


def _size_of_batch(graph, eqn):
  """A size that depends on the batch, as a number."""
  (size,) = sizes_of((eqn.params['dim'],))
  name = graph.restored(graph.sizes((size,)), (1,), ())
  return graph.cast(tensor(name, (), np.int64), eqn.outvars[0].aval.dtype)


# Operators that sum up.


def _reduce(op):
  def rule(graph, eqn, x):
    return _reduced(graph, op, x, eqn.params['axes'])

  return rule


def _reduced(graph, op, x, axes):
  kind = x.dtype
  if kind.kind == 'b':
    x = graph.cast(x, np.int32)
  x = graph.full(x, axes)
  at = graph.integers(*sorted(x.order.index(axis) for axis in axes))
  name = graph.emit(f'Reduce{op}', graph.named(x), at, keepdims=0)
  out = _without(x, name, axes)
  return graph.cast(out, kind)


def _without(x, name, axes):
  """The value of a node that leaves axes out."""
  kept = [axis for axis in range(len(x.shape)) if axis not in axes]
  return Value(
    name,
    tuple(x.shape[axis] for axis in kept),
    x.dtype,
    tuple(kept.index(axis) for axis in x.order if axis in kept),
    tuple(x.held[axis] for axis in kept),
  )


def _arg(op):
  def rule(graph, eqn, x):
    (axis,) = eqn.params['axes']
    if x.dtype == bool:
      x = graph.cast(x, np.int32)
    x = graph.full(x, (axis,))
    name = graph.emit(op, graph.named(x), axis=x.order.index(axis), keepdims=0)
    out = _without(x, name, (axis,))
    out = Value(out.source, out.shape, np.dtype('int64'), out.order, out.held)
    return graph.cast(out, eqn.params['index_dtype'])

  return rule


def _cumsum(graph, eqn, x):
  axis = eqn.params['axis']
  x = graph.full(x, (axis,))
  name = graph.emit(
    'CumSum',
    graph.named(x),
    graph.weight(np.array(x.order.index(axis), np.int64)),
    reverse=int(eqn.params['reverse']),
  )
  return Value(name, x.shape, x.dtype, x.order, x.held)


# Loops.


def _scan(graph, eqn, *values):
  params = eqn.params
  length, consts, carry = (
    params[key] for key in ('length', 'num_consts', 'num_carry')
  )
  if not isinstance(length, int):
    raise NotImplementedError(f'the loop has {length} steps')
  jaxpr, known = called(params['jaxpr'])
  run = functools.partial(inline, jaxpr=jaxpr, consts=known, callers=(eqn,))
  fixed, state = values[:consts], values[consts : consts + carry]
  rows = values[consts + carry :]
  shapes = [shape_of(var) for var in eqn.outvars]
  if length <= UNROLLED:
    return _unrolled(
      graph, run, fixed, state, rows, length, params['reverse'], shapes
    )
  inner = Graph(graph)
  starts = [graph.plain(x) for x in state]
  # ONNX counts steps by what a loop goes through.
  rows = [graph.plain(x) for x in rows] or [constant(np.zeros(length, bool))]
  inputs = []
  for value, cut in [(x, 0) for x in starts] + [(x, 1) for x in rows]:
    shape = value.shape[cut:]
    name = inner.input('step', value.dtype, _known(shape))
    inputs.append(tensor(name, shape, value.dtype))
  inputs = inputs[: len(state) + len(values[consts + carry :])]
  for out in run(inner, inputs=[*fixed, *inputs]):
    out = inner.plain(out)
    inner.output(inner.named(out), 'out', out.dtype, _known(out.shape))
  backwards = {}
  if params['reverse']:
    backwards['scan_input_directions'] = [1] * len(rows)
    if len(shapes) > carry:
      backwards['scan_output_directions'] = [1] * (len(shapes) - carry)
  names = graph.emit(
    'Scan',
    *(graph.named(x) for x in (*starts, *rows)),
    outputs=len(shapes),
    body=inner,
    num_scan_inputs=len(rows),
    **backwards,
  )
  names = (names,) if len(shapes) == 1 else names
  return [
    tensor(name, shape, var.aval.dtype)
    for name, shape, var in zip(names, shapes, eqn.outvars, strict=True)
  ]


def _known(shape):
  """Sizes as ONNX notes them, None for those of the batch."""
  return [size if size > 0 else None for size in shape]


def _unrolled(graph, run, fixed, state, rows, length, reverse, shapes):
  carry, made = len(state), []
  for i in reversed(range(length)) if reverse else range(length):
    here = [_row(graph, x, i) for x in rows]
    out = run(graph, inputs=[*fixed, *state, *here])
    state = out[:carry]
    made.append(out[carry:])
  made = made[::-1] if reverse else made
  stacked = []
  for shape, parts in zip(shapes[carry:], zip(*made, strict=True), strict=True):
    parts = [reshaped(graph, x, (1, *shape[1:])) for x in parts]
    stacked.append(joined(graph, parts, 0, shape))
  return [*state, *stacked]


def _row(graph, x, i):
  """X[i]."""
  if x.constant:
    i = 0 if x.held[0] == 1 else i
    return constant(x.source[i], x.shape[1:])
  x = sliced(graph, x, (1, *x.shape[1:]), [(0, i, i + 1, 1)])
  return reshaped(graph, x, x.shape[1:])


# Calls that do nothing but call, and where what they call stands.
CALLS = {
  'checkpoint': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'jit': 'jaxpr',
  'remat2': 'jaxpr',
}

_ELEMENTWISE = {
  'abs': _plainly('Abs'),
  'add': _plainly('Add'),
  'and': _logically('And'),
  'ceil': _plainly('Ceil'),
  'clamp': _clamp,
  'convert_element_type': _cast,
  'cos': _plainly('Cos'),
  'div': _plainly('Div'),
  'eq': _plainly('Equal'),
  'erf': _plainly('Erf'),
  'erfc': _erfc,
  'exp': _plainly('Exp'),
  'floor': _plainly('Floor'),
  'ge': _plainly('GreaterOrEqual'),
  'gt': _plainly('Greater'),
  'integer_pow': _integer_pow,
  'le': _plainly('LessOrEqual'),
  'log': _plainly('Log'),
  'logistic': _plainly('Sigmoid'),
  'lt': _plainly('Less'),
  'max': _max,
  'min': _plainly('Min'),
  'mul': _plainly('Mul'),
  'ne': _ne,
  'neg': _plainly('Neg'),
  'not': _logically('Not'),
  'or': _logically('Or'),
  'pow': _plainly('Pow'),
  'rem': _rem,
  'rsqrt': _rsqrt,
  'select_n': _select,
  'sign': _plainly('Sign'),
  'sin': _plainly('Sin'),
  'sqrt': _plainly('Sqrt'),
  'square': _square,
  'sub': _sub,
  'tanh': _plainly('Tanh'),
  'xor': _logically('Xor'),
}

# Each is called with the graph, the equation and the values of its inputs; it
# returns the output's value, or a list of them.
RULES = {
  **_ELEMENTWISE,
  **moves.RULES,
  **products.RULES,
  'argmax': _arg('ArgMax'),
  'argmin': _arg('ArgMin'),
  'copy': _same,
  'dim_as_value': _size_of_batch,
  'cumsum': _cumsum,
  'optimization_barrier': _same,
  'reduce_and': _reduce('Min'),
  'reduce_max': _reduce('Max'),
  'reduce_min': _reduce('Min'),
  'reduce_or': _reduce('Max'),
  'reduce_prod': _reduce('Prod'),
  'reduce_sum': _reduce('Sum'),
  'scan': _scan,
  'stop_gradient': _same,
}
