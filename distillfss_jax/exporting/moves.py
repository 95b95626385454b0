"""Primitives that move data, or only say where they lie."""

import math

import numpy as np
from jax import export

from distillfss_jax.exporting.graph import (
  BATCH,
  Graph,
  Value,
  constant,
  tensor,
)


def shape_of(var) -> tuple[int, ...]:
  """The sizes of a jaxpr's variable, as `Value` has them."""
  return sizes_of(var.aval.shape)


def sizes_of(sizes) -> tuple[int, ...]:
  """JAX's sizes as `Value` has them: -k for k times the batch."""
  return tuple(map(_size, sizes))


def _size(size):
  if isinstance(size, int | np.integer):
    return int(size)
  (symbol,) = export.symbolic_shape(BATCH, scope=size.scope)
  times = size // symbol
  if not isinstance(times, int) or times * symbol != size:
    raise NotImplementedError(f'a size is {size}, no multiple of the batch')
  return -times


def _transpose(graph, eqn, x):
  return _turned(x, eqn.params['permutation'])


def _turned(x, turn):
  return Value(
    x.source.transpose(turn) if x.constant else x.source,
    tuple(x.shape[axis] for axis in turn),
    x.dtype,
    tuple(turn.index(axis) for axis in x.order),
    tuple(x.held[axis] for axis in turn),
  )


def _broadcast(graph, eqn, x):
  """New axes hold one element, to be repeated."""
  shape, axes = shape_of(eqn.outvars[0]), eqn.params['broadcast_dimensions']
  held = [1] * len(shape)
  for old, new in enumerate(axes):
    held[new] = x.held[old]
  if x.constant:
    return constant(x.source.reshape(held), shape)
  order = _with_new_axes([axes[axis] for axis in x.order], len(shape))
  after = [held[axis] for axis in order]
  name = graph.restored(x.source, x.stored, after)
  return Value(name, shape, x.dtype, order, tuple(held))


def _with_new_axes(order, rank):
  """The order with axes of one put behind their neighbours of before."""
  order = list(order)
  for axis in range(rank):
    if axis not in order:
      order.insert(order.index(axis - 1) + 1 if axis else 0, axis)
  return tuple(order)


def _reshape(graph, eqn, x):
  if eqn.params['dimensions'] is not None:
    x = _turned(x, eqn.params['dimensions'])
  return reshaped(graph, x, shape_of(eqn.outvars[0]))


def _squeeze(graph, eqn, x):
  return reshaped(graph, x, shape_of(eqn.outvars[0]))


def reshaped(graph: Graph, x: Value, shape: tuple[int, ...]) -> Value:
  """Splits and merges axes, in the order they are stored in where it can be."""
  groups = _groups(x.shape, shape)
  long = [axis for axis in x.order if x.shape[axis] != 1]
  whole = all(
    x.held[axis] == x.shape[axis]
    for olds, news in groups if (len(olds), len(news)) != (1, 1)
    for axis in olds
  )  # fmt: skip
  if not whole:
    return reshaped(graph, graph.full(x), shape)
  apart = any(
    long[long.index(olds[0]) :][: len(olds)] != olds for olds, _ in groups
  )
  if apart and not x.constant:
    return reshaped(graph, graph.arranged(x, range(len(x.shape))), shape)
  held, order = [1] * len(shape), []
  for olds, news in sorted(groups, key=lambda group: long.index(group[0][0])):
    order += news
    for axis in news:
      held[axis] = shape[axis]
    if len(olds) == len(news) == 1:
      held[news[0]] = x.held[olds[0]]
  if x.constant:
    return constant(x.source.reshape(held), shape)
  order = _with_new_axes(order, len(shape))
  after = [held[axis] for axis in order]
  name = graph.restored(x.source, x.stored, after)
  return Value(name, shape, x.dtype, order, tuple(held))


def _groups(before, after):
  """Which axes become which: the finest cuts; axes of one are left out."""
  olds = [axis for axis, size in enumerate(before) if size != 1]
  news = [axis for axis, size in enumerate(after) if size != 1]
  groups = []
  while olds:
    left, right = [olds.pop(0)], [news.pop(0)]
    while True:
      x = math.prod(before[axis] for axis in left)
      y = math.prod(after[axis] for axis in right)
      if x == y:
        break
      # Of equal ones the side that has no batch (yet) goes on.
      if abs(x) < abs(y) or (abs(x) == abs(y) and x > 0):
        left.append(olds.pop(0))
      else:
        right.append(news.pop(0))
    groups.append((left, right))
  return groups


def _slice(graph, eqn, x):
  shape = shape_of(eqn.outvars[0])
  strides = eqn.params['strides'] or (1,) * len(shape)
  cuts = [
    (axis, start, limit, stride)
    for axis, (start, limit, stride) in enumerate(
      zip(
        eqn.params['start_indices'], eqn.params['limit_indices'], strides,
        strict=True,
      )
    )
    if shape[axis] != x.shape[axis] or stride != 1
  ]  # fmt: skip
  return sliced(graph, x, shape, cuts)


def sliced(graph, x, shape, cuts):
  """Cuts (axis, start, limit, stride)."""
  held = [
    1 if size == 1 else new for size, new in zip(x.held, shape, strict=True)
  ]
  cuts = [cut for cut in cuts if x.held[cut[0]] != 1]
  moved = Value(x.source, shape, x.dtype, x.order, tuple(held))
  if not cuts:
    return moved
  axes, starts, limits, strides = zip(*cuts, strict=True)
  if any(x.shape[axis] < 0 for axis in axes):
    raise NotImplementedError('the batch is cut')
  name = graph.emit(
    'Slice',
    graph.named(x),
    graph.integers(*starts),
    graph.integers(*limits),
    graph.integers(*(x.order.index(axis) for axis in axes)),
    graph.integers(*strides),
  )
  return Value(name, shape, x.dtype, x.order, tuple(held))


def _split(graph, eqn, x):
  axis, start, out = eqn.params['axis'], 0, []
  for var, size in zip(eqn.outvars, eqn.params['sizes'], strict=True):
    cut = (axis, start, start + int(size), 1)
    out.append(sliced(graph, x, shape_of(var), [cut]))
    start += int(size)
  return out


def _dynamic_slice(graph, eqn, x, *starts):
  shape = shape_of(eqn.outvars[0])
  cut = [a for a in range(len(shape)) if shape[a] != x.shape[a]]
  x = graph.full(x, cut)
  begins, ends = [], []
  for axis in cut:
    # As JAX has it, a slice that would reach beyond the end starts earlier.
    kind = starts[axis].dtype
    start = graph.elementwise('Max', starts[axis], constant(np.zeros((), kind)))
    last = np.array(x.shape[axis] - shape[axis], kind)
    start = graph.cast(
      graph.elementwise('Min', start, constant(last)), np.int64
    )
    begin = graph.restored(start.source, (), (1,))
    begins.append(begin)
    ends.append(graph.emit('Add', begin, graph.integers(shape[axis])))
  if not cut:
    return x
  name = graph.emit(
    'Slice',
    graph.named(x),
    graph.emit('Concat', *begins, axis=0),
    graph.emit('Concat', *ends, axis=0),
    graph.integers(*(x.order.index(axis) for axis in cut)),
  )
  held = tuple(shape[a] if a in cut else size for a, size in enumerate(x.held))
  return Value(name, shape, x.dtype, x.order, held)


def _concatenate(graph, eqn, *values):
  return joined(
    graph, values, eqn.params['dimension'], shape_of(eqn.outvars[0])
  )


def joined(graph, values, axis, shape):
  """Several values, one after the other along an axis."""
  values = [graph.full(x) for x in values]
  order = graph.prevailing(values)
  names = [graph.named(graph.arranged(x, order)) for x in values]
  name = graph.emit('Concat', *names, axis=order.index(axis))
  return tensor(name, shape, values[0].dtype, order)


def _stack(graph, eqn, *values):
  axis, shape = eqn.params['axis'], shape_of(eqn.outvars[0])
  one = (*shape[:axis], 1, *shape[axis + 1 :])
  values = [reshaped(graph, x, one) for x in values]
  return joined(graph, values, axis, shape)


def _tile(graph, eqn, x):
  shape, times = shape_of(eqn.outvars[0]), eqn.params['reps']
  x = graph.full(x)
  repeats = graph.integers(*(times[axis] for axis in x.order))
  name = graph.emit('Tile', graph.named(x), repeats)
  return tensor(name, shape, x.dtype, x.order)


def _pad(graph, eqn, x, value):
  return padded(
    graph, x, value, eqn.params['padding_config'], shape_of(eqn.outvars[0])
  )


def padded(graph, x, value, config, shape):
  """Pads (low, high, between) each axis; less than nothing is cut."""
  config = [tuple(map(int, sides)) for sides in config]
  busy = [axis for axis, sides in enumerate(config) if any(sides)]
  if any(x.shape[axis] < 0 for axis in busy):
    raise NotImplementedError('the batch is padded')
  x, value = graph.full(x, busy), graph.named(value)
  sizes = list(x.shape)
  for axis in busy:
    between, n = config[axis][2], x.shape[axis]
    if between and n > 1:
      # Each element gets a row of its own, whose rest is the padding.
      at, stored = x.order.index(axis), x.stored
      rows = (*stored[: at + 1], 1, *stored[at + 1 :])
      name = graph.restored(graph.named(x), stored, rows)
      name = graph.emit(
        'Pad', name, graph.integers(0, between), value,
        graph.integers(at + 1),
      )  # fmt: skip
      long = n * (between + 1)
      rows = (*rows[: at + 1], between + 1, *rows[at + 2 :])
      merged = (*stored[:at], long, *stored[at + 1 :])
      name = graph.restored(name, rows, merged)
      sizes[axis] = long
      held = (*x.held[:axis], long, *x.held[axis + 1 :])
      x = Value(name, tuple(sizes), x.dtype, x.order, held)
      sizes[axis] = long - between
      x = sliced(graph, x, tuple(sizes), [(axis, 0, long - between, 1)])
  cuts = []
  for axis in busy:
    low, high, _ = config[axis]
    if low < 0 or high < 0:
      cuts.append((axis, max(-low, 0), sizes[axis] + min(high, 0), 1))
      sizes[axis] += min(low, 0) + min(high, 0)
  # A cut that leaves nothing of the array is none that occurs.
  x = sliced(graph, x, tuple(sizes), cuts)
  grown = [axis for axis in busy if max(config[axis][:2]) > 0]
  if not grown:
    return x
  name = graph.emit(
    'Pad',
    graph.named(x),
    graph.integers(
      *(max(config[axis][0], 0) for axis in grown),
      *(max(config[axis][1], 0) for axis in grown),
    ),
    value,
    graph.integers(*(x.order.index(axis) for axis in grown)),
  )
  held = tuple(
    shape[axis] if axis in grown else size for axis, size in enumerate(x.held)
  )
  return Value(name, shape, x.dtype, x.order, held)


def _gather(graph, eqn, x, indices):
  """Whole rows of some axes, which indices pick from the others."""
  numbers, sizes = eqn.params['dimension_numbers'], eqn.params['slice_sizes']
  shape = shape_of(eqn.outvars[0])
  picked, paired = numbers.start_index_map, numbers.operand_batching_dims
  rest = [a for a in range(len(x.shape)) if a not in (*picked, *paired)]
  if indices.constant and indices.source.ndim == 1:
    return _window(graph, x, picked, indices.array(), sizes, shape)
  block = sizes_of(sizes)
  if set(numbers.collapsed_slice_dims) != set(picked) or any(
    block[axis] != x.shape[axis] for axis in rest
  ):
    raise NotImplementedError('windows are gathered, not whole rows')
  batch_axes = [a for a in range(len(shape)) if a not in numbers.offset_dims]
  if indices.constant and len(picked) == len(batch_axes) and not paired:
    steps = _steps(indices.array())
    if steps is not None:
      places = dict(zip(rest, numbers.offset_dims, strict=True))
      places |= dict(zip(picked, batch_axes, strict=True))
      return _stepped(graph, x, dict(zip(picked, steps, strict=True)), places)
  # Indices [paired..., free..., picked]; the result is paired, free, rest.
  free = [
    axis for axis in range(len(indices.shape) - 1)
    if axis not in numbers.start_indices_batching_dims
  ]  # fmt: skip
  ahead = (*numbers.start_indices_batching_dims, *free)
  indices, valid = _inside(graph, eqn, x, indices, picked)
  x, indices = graph.full(x), graph.full(indices)
  if len(picked) == 1 and not paired:
    at = x.order.index(picked[0])
    indices = graph.arranged(indices, range(len(indices.shape)))
    stored = indices.stored
    name = graph.restored(graph.named(indices), stored, stored[:-1])
    name = graph.emit('Gather', graph.named(x), name, axis=at)
    others = iter(
      numbers.offset_dims[rest.index(axis)] for axis in x.order if axis in rest
    )
    order = [next(others) for _ in range(at)]
    order += [*batch_axes, *others]
  else:
    x = graph.arranged(x, (*paired, *picked, *rest))
    indices = graph.arranged(indices, (*ahead, len(indices.shape) - 1))
    indices = graph.cast(indices, np.int64)
    name = graph.emit(
      'GatherND', graph.named(x), graph.named(indices), batch_dims=len(paired)
    )
    order = [batch_axes[axis] for axis in ahead] + list(numbers.offset_dims)
  out = tensor(name, shape, x.dtype, order)
  if valid is None:
    return out
  ones = [1] * len(shape)
  for axis, size in zip(batch_axes, valid.shape, strict=True):
    ones[axis] = size
  nothing = eqn.params['fill_value']
  if nothing is None:
    if x.dtype.kind not in 'fi':
      raise NotImplementedError(f'{x.dtype} is gathered from outside')
    nothing = np.nan if x.dtype.kind == 'f' else np.iinfo(x.dtype).min
  return graph.elementwise(
    'Where',
    reshaped(graph, valid, tuple(ones)),
    out,
    constant(np.array(nothing, x.dtype)),
    dtype=x.dtype,
  )


def _window(graph, x, picked, starts, sizes, shape):
  """One block of an array, at a known place: what slices of it may become."""
  cuts, part = [], sizes_of(sizes)
  for axis, start in zip(picked, starts.tolist(), strict=True):
    if part[axis] != x.shape[axis] < 0:
      raise NotImplementedError('the batch is cut')
    if not 0 <= start <= x.shape[axis] - part[axis]:
      raise NotImplementedError(f'{start} is no place of axis {axis}')
    cuts.append((axis, start, start + part[axis], 1))
  cuts = [cut for cut in cuts if part[cut[0]] != x.shape[cut[0]]]
  return reshaped(graph, sliced(graph, x, part, cuts), shape)


def _steps(indices):
  """Of indices [n, m, .., k] of a grid: (start, step, n) by axis, or None."""
  found = []
  for axis, size in enumerate(indices.shape[:-1]):
    line = np.moveaxis(indices[..., axis], axis, 0).reshape(size, -1)[:, 0]
    step = int(line[1] - line[0]) if size > 1 else 1
    start = int(line[0])
    ones = [-1 if i == axis else 1 for i in range(indices.ndim - 1)]
    grid = (start + step * np.arange(size)).reshape(ones)
    if start < 0 or step < 1 or np.any(indices[..., axis] != grid):
      return None
    found.append((start, step, size))
  return found


def _stepped(graph, x, steps, places):
  """Rows at even distances; `places` are the axes of the result."""
  cuts = [
    (axis, start, start + step * (size - 1) + 1, step)
    for axis, (start, step, size) in steps.items()
    if (start, step, size) != (0, 1, x.shape[axis])
  ]
  if any(limit > x.shape[axis] for axis, _, limit, _ in cuts):
    raise NotImplementedError('there are rows that the array does not have')
  part = [steps[a][2] if a in steps else size for a, size in enumerate(x.shape)]
  x = sliced(graph, x, tuple(part), cuts)
  turn = sorted(places, key=places.get)
  return _turned(x, turn)


def _inside(graph, eqn, x, indices, picked):
  """Indices that exist, and which did before (None for all of them)."""
  last = np.array([x.shape[axis] - 1 for axis in picked])
  if any(x.shape[axis] < 0 for axis in picked):
    raise NotImplementedError('indices pick from the batch')
  mode = str(eqn.params['mode']).rsplit('.', 1)[-1].upper()
  if mode.startswith('PROMISE') or (
    indices.constant
    and np.all((indices.source >= 0) & (indices.source <= last))
  ):
    return indices, None
  kind = indices.dtype
  ones = (1,) * (len(indices.shape) - 1)
  last = constant(last.astype(kind).reshape(*ones, -1), indices.shape)
  zero = constant(np.zeros((), kind))
  inside = graph.elementwise(
    'Min', graph.elementwise('Max', indices, zero), last
  )
  if mode.startswith('CLIP'):
    return inside, None
  same = graph.elementwise('Equal', indices, inside, dtype=bool)
  same = graph.plain(graph.cast(same, np.int32))
  name = graph.emit(
    'ReduceMin', graph.named(same), graph.integers(-1), keepdims=0
  )
  return inside, graph.cast(tensor(name, same.shape[:-1], np.int32), bool)


RULES = {
  'broadcast_in_dim': _broadcast,
  'concatenate': _concatenate,
  'dynamic_slice': _dynamic_slice,
  'gather': _gather,
  'pad': _pad,
  'reshape': _reshape,
  'slice': _slice,
  'split': _split,
  'squeeze': _squeeze,
  'stack': _stack,
  'tile': _tile,
  'transpose': _transpose,
}
