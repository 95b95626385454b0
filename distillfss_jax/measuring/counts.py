"""What a traced program computes, reads and moves, counted without running."""

import math
from collections.abc import Callable

import jax
from jax.interpreters import partial_eval

from distillfss_jax import params


def flops(jaxpr) -> int:
  """Multiplications and additions in matrix products and convolutions.

  Resizes count as the products that they are here, padding counts, nothing
  elementwise does. A loop's body counts as often as it runs (XLA's own
  `cost_analysis` counts it once); only where that is not known, as in the
  outermost loop of training, once. Of a condition's branches the dearest
  counts, and what no result needs does not.

  Args:
    jaxpr: a program, as `jax.jit(f).trace(...).jaxpr` gives it.
  """
  return _of_products(jaxpr, _flops, loops=True)


def product_bytes(jaxpr, *, loops: bool = True) -> int:
  """Bytes of what matrix products and convolutions take and give.

  Each is counted as if its inputs came from memory and its output went there:
  as compilers call them, one after the other. What is computed in between may
  be fused into them and counts nothing.

  Args:
    jaxpr: as in `flops`.
    loops: whether a loop's body counts as often as it runs, else once.
  """
  return _of_products(jaxpr, _bytes, loops=loops)


def _of_products(jaxpr, measure: Callable, *, loops):
  """The sum of `measure` over all products and convolutions of a program."""
  total = 0
  for equation in _needed(jaxpr)[0].eqns:
    name, fields = equation.primitive.name, equation.params
    if name in ('dot_general', 'conv_general_dilated'):
      total += measure(equation)
    else:
      bodies = [
        _of_products(leaf, measure, loops=loops)
        for leaf in jax.tree.leaves(list(fields.values()))
        if hasattr(leaf, 'eqns')
      ]
      times = fields['length'] if name == 'scan' and loops else 1
      total += times * (max if name == 'cond' else sum)(bodies or [0])
  return total


def _flops(equation):
  x, y = (var.aval.shape for var in equation.invars)
  numbers = equation.params['dimension_numbers']
  if equation.primitive.name == 'dot_general':
    terms = math.prod(x[i] for i in numbers[0][0])
  else:
    terms = math.prod(y[i] for i in numbers.rhs_spec[1:])
    # Zeros that a stride's gradient puts between pixels are not computed.
    terms /= math.prod(equation.params['lhs_dilation'])
  return round(2 * terms * equation.outvars[0].aval.size)


def _bytes(equation):
  arrays = (var.aval for var in (*equation.invars, *equation.outvars))
  return sum(x.size * x.dtype.itemsize for x in arrays)


def reads(traced, first, counted) -> dict[str, int]:
  """The parameters that a traced program reads, {path: size}.

  `first` is its first input, `counted` the paths within that may count.
  """
  _, needed = _needed(traced.jaxpr)
  shapes = params.shapes(first).items()
  return {
    path: math.prod(shape)
    for (path, shape), read in zip(shapes, needed, strict=False)
    if read and path in counted
  }


def _needed(jaxpr):
  """A program without what no result needs, and which inputs that leaves."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
