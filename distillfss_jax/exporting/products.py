"""Primitives that sum products or look at windows: convolutions and such."""

import math

import numpy as np

from distillfss_jax.exporting.graph import constant, tensor
from distillfss_jax.exporting.moves import padded, shape_of


def _max_pool(graph, eqn, x):
  params = eqn.params
  window = params['window_dimensions']
  if set(params['base_dilation']) != {1}:
    raise NotImplementedError('the array is spread out before it is pooled')
  if any(low < 0 or high < 0 for low, high in params['padding']):
    raise NotImplementedError('the padding is negative')
  wide = [
    axis for axis, size in enumerate(window)
    if size != 1 or params['window_strides'][axis] != 1
  ]  # fmt: skip
  # Padding may not be all that a window sees: its value is not the same.
  if any(max(params['padding'][a]) >= size for a, size in enumerate(window)):
    raise NotImplementedError('a window sees only padding')
  if len(wide) not in (1, 2, 3):
    raise NotImplementedError(f'the window is {tuple(window)}')
  others = [axis for axis in x.order if axis not in wide]
  x = graph.arranged(graph.full(x), (*others, *wide))
  shape = shape_of(eqn.outvars[0])
  # ONNX wants two axes before those that are pooled.
  lead = _two([x.held[axis] for axis in others])
  name = graph.restored(
    graph.named(x), x.stored, (*lead, *(x.held[a] for a in wide))
  )
  pads = [params['padding'][axis] for axis in wide]
  name = graph.emit(
    'MaxPool',
    name,
    kernel_shape=[window[a] for a in wide],
    strides=[params['window_strides'][a] for a in wide],
    dilations=[params['window_dilation'][a] for a in wide],
    pads=[low for low, _ in pads] + [high for _, high in pads],
  )
  after = [shape[axis] for axis in x.order]
  name = graph.restored(name, (*lead, *(shape[a] for a in wide)), after)
  return tensor(name, shape, x.dtype, x.order)


def _two(sizes):
  """Any number of sizes as two."""
  return (math.prod(sizes[:-1]), sizes[-1]) if sizes else (1, 1)


def _conv(graph, eqn, x, kernel):
  params = eqn.params
  if params['batch_group_count'] != 1:
    raise NotImplementedError('the batch is in groups')
  spec = params['dimension_numbers']
  pads, spread = list(params['padding']), params['lhs_dilation']
  space = spec.lhs_spec[2:]
  if set(spread) != {1} or any(min(sides) < 0 for sides in pads):
    config, shape = [(0, 0, 0)] * len(x.shape), list(x.shape)
    for axis, (low, high), times in zip(space, pads, spread, strict=True):
      config[axis] = (low, high, times - 1)
      shape[axis] = (shape[axis] - 1) * times + 1 + low + high
    zero = constant(np.zeros((), x.dtype))
    x, pads = padded(graph, x, zero, config, tuple(shape)), [(0, 0)] * len(pads)
  dtype = eqn.outvars[0].aval.dtype
  x, kernel = (graph.cast(graph.full(v), dtype) for v in (x, kernel))
  name = graph.emit(
    'Conv',
    graph.named(graph.arranged(x, spec.lhs_spec)),
    graph.named(graph.arranged(kernel, spec.rhs_spec)),
    kernel_shape=[kernel.shape[axis] for axis in spec.rhs_spec[2:]],
    strides=list(params['window_strides']),
    dilations=list(params['rhs_dilation']),
    group=params['feature_group_count'],
    pads=[low for low, _ in pads] + [high for _, high in pads],
  )
  return tensor(name, shape_of(eqn.outvars[0]), dtype, spec.out_spec)


def _dot(graph, eqn, x, y):
  contracted, paired = eqn.params['dimension_numbers']
  dtype, shape = eqn.outvars[0].aval.dtype, shape_of(eqn.outvars[0])
  x, y = (graph.cast(graph.full(v), dtype) for v in (x, y))
  sides = [_Side(v, paired[i], contracted[i]) for i, v in enumerate((x, y))]
  # Results have the axes of the batch, of x and of y, in this order.
  pairs = len(paired[0])
  firsts = (pairs, pairs + len(sides[0].free))
  if not pairs:
    small = int(y.constant or not (x.constant or _smaller(x, y)))
    return _product_with_matrix(
      graph, sides[1 - small], sides[small], firsts[1 - small], firsts[small],
      shape, dtype,
    )  # fmt: skip
  names = []
  # Both sides list pairs and what is summed over in the same order.
  turn = sorted(range(pairs), key=lambda i: x.order.index(paired[0][i]))
  over = sorted(
    range(len(contracted[0])), key=lambda i: x.order.index(contracted[0][i])
  )
  for i, side in enumerate(sides):
    names.append(side.stacked(graph, turn, over, last=i == 0))
  name = graph.emit('MatMul', *names)
  order = [*turn]
  for first, side in zip(firsts, sides, strict=True):
    order += [first + side.free.index(a) for a in side.stored_free]
  before = (
    math.prod(shape[i] for i in turn), sides[0].rows, sides[1].rows,
  )  # fmt: skip
  name = graph.restored(name, before, [shape[axis] for axis in order])
  return tensor(name, shape, dtype, order)


def _smaller(x, y):
  return abs(math.prod(x.shape)) < abs(math.prod(y.shape))


class _Side:
  """One factor of a product, by what its axes are for."""

  def __init__(self, value, paired, contracted):
    self.value, self.paired, self.contracted = value, paired, contracted
    taken = (*paired, *contracted)
    self.free = [a for a in range(len(value.shape)) if a not in taken]
    self.stored_free = [a for a in value.order if a in self.free]
    self.rows = math.prod(value.shape[a] for a in self.free)
    self.depth = math.prod(value.shape[a] for a in contracted)

  def stacked(self, graph, turn, over, *, last):
    """[pairs, rows, depth], or [pairs, depth, rows] unless `last`."""
    x = self.value
    pairs = [self.paired[i] for i in turn]
    summed = [self.contracted[i] for i in over]
    pair_size = math.prod(x.shape[a] for a in pairs)
    orders = {
      True: (*pairs, *self.stored_free, *summed),
      False: (*pairs, *summed, *self.stored_free),
    }
    # As it lies, if in the other: products swap the last two axes for nothing.
    is_last = last
    if not graph.lies(x, orders[last]) and graph.lies(x, orders[not last]):
      is_last = not last
    order = orders[is_last]
    x = graph.arranged(x, order)
    wide = (self.rows, self.depth) if is_last else (self.depth, self.rows)
    name = graph.laid(x, (pair_size, *wide))
    if is_last != last:
      name = graph.emit('Transpose', name, perm=(0, 2, 1))
    return name


def _product_with_matrix(graph, side, matrix, first, other, shape, dtype):
  """Contracts axes of a large array with those of a matrix.

  The large array stays as it lies: if what is summed over lies last, the
  matrix comes from the right, if last but one, from the left, and channels
  before rows and columns are a convolution of size 1.
  """
  x = side.value
  inner = [a for a in x.order if a in side.contracted]
  at = [x.order.index(a) for a in inner]
  if dtype.kind != 'f':  # which convolutions do not take
    x = graph.arranged(x, (*side.stored_free, *inner))
  elif at and at[-1] - at[0] + 1 != len(at):  # brought together, at the last
    rest = [a for a in x.order[: at[-1]] if a not in inner]
    x = graph.arranged(x, (*rest, *inner, *x.order[at[-1] + 1 :]))
  begin = x.order.index(inner[0]) if inner else len(x.order)
  before, after = x.order[:begin], x.order[begin + len(inner) :]
  lead, plane = [x.shape[a] for a in before], [x.shape[a] for a in after]
  pair = dict(zip(side.contracted, matrix.contracted, strict=True))
  columns, summed = matrix.stored_free, [pair[a] for a in inner]
  rows, depth = matrix.rows, matrix.depth
  left = graph.arranged(matrix.value, (*columns, *summed))
  if not after:
    right = graph.arranged(matrix.value, (*summed, *columns))
    lead = lead or [1]
    name = graph.emit(
      'MatMul', graph.laid(x, (*lead, depth)), graph.laid(right, (depth, rows))
    )
    now = (*lead, rows)
  elif len(after) == 1:
    name = graph.laid(x, (*lead, depth, *plane))
    name = graph.emit('MatMul', graph.laid(left, (rows, depth)), name)
    now = (*lead, rows, *plane)
  else:
    lead, plane = math.prod(lead), _two(plane)
    name = graph.emit(
      'Conv',
      graph.laid(x, (lead, depth, *plane)),
      graph.laid(left, (rows, depth, 1, 1)),
      kernel_shape=[1, 1],
    )
    now = (lead, rows, *plane)
  new = {a: first + i for i, a in enumerate(side.free)}
  order = (
    *(new[a] for a in before),
    *(other + matrix.free.index(a) for a in columns),
    *(new[a] for a in after),
  )
  name = graph.restored(name, now, [shape[axis] for axis in order])
  return tensor(name, shape, dtype, order)


RULES = {
  'conv_general_dilated': _conv,
  'dot_general': _dot,
  'reduce_window_max': _max_pool,
}
