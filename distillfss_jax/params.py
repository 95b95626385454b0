"""Parameter paths: flattening, regex selection, strict merge, torch names.

A parameter is named by its path, the NNX attribute names and list indices that
lead to it joined by '/': 'backbone/layers/0/blocks/1/norm1/scale'. Everything
that picks parameters (freezing, learning rates, not loading) does so with
regular expressions that must match a whole path; everything that moves
parameters does so by path and shape, and says in full what does not fit.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

Rules = tuple[tuple[str, str, str], ...]

_LINES = 20  # of each kind, in an error


def _join(path: Iterable[Any]) -> str:
  return '/'.join(str(part) for part in path)


def flatten(tree: Any) -> dict[str, jax.Array]:
  """{path: array} of an NNX module, an nnx.State or nested dicts and lists.

  Leaves may be abstract (jax.ShapeDtypeStruct), as nnx.eval_shape makes them.
  """
  if isinstance(tree, nnx.Module):
    tree = nnx.state(tree)
  if isinstance(tree, nnx.State):
    return {
      _join(path): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
      for path, leaf in nnx.to_flat_state(tree)
    }
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """{path: shape} of anything `flatten` takes."""
  return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def count(tree: Any) -> int:
  """Number of scalars in a module, a state or a tree."""
  return sum(math.prod(shape) for shape in shapes(tree).values())


def matching(patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
  """The paths that at least one of the regular expressions matches in full.

  Raises:
    TypeError: `patterns` is one string, which would be read letter by letter.
    ValueError: a pattern is no regular expression, or matches nothing; the
      paths nearest to it are listed.
  """
  if isinstance(patterns, str):
    raise TypeError(
      f'patterns is the string {patterns!r}; give a list or tuple of patterns, '
      f'such as ({patterns!r},)'
    )
  paths = sorted(paths)
  selected = set()
  for pattern in patterns:
    try:
      expression = re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f'{pattern!r} is not a regular expression: {error}'
      ) from error
    matched = {path for path in paths if expression.fullmatch(path)}
    if not matched:
      near = _near(pattern, paths) or paths[:5]
      raise ValueError(
        f'pattern {pattern!r} matches none of the {len(paths)} parameter '
        f'paths in full; nearest: {", ".join(near) or "(there are none)"}'
      )
    selected |= matched
  return selected


def merge(
  current: Mapping[str, Any],
  loaded: Mapping[str, Any],
  *,
  keep: Iterable[str] = (),
) -> dict[str, Any]:
  """`loaded`, checked to be exactly what `current` has room for.

  Args:
    current: {path: array or ShapeDtypeStruct}; decides paths, shapes, dtypes.
    loaded: {path: array}, the new values.
    keep: patterns of paths that keep their current value, loaded or not.

  Returns:
    {path: array} with the paths of `current`, in its order and dtypes.

  Raises:
    ValueError: the two differ; the message is the sorted difference.
  """
  kept = matching(keep, current)
  wanted = {p: a.shape for p, a in current.items() if p not in kept}
  given = {p: a.shape for p, a in loaded.items() if p not in kept}
  _check(wanted, given, 'the parameters to load')
  return {
    path: leaf if path in kept else loaded[path].astype(leaf.dtype, copy=False)
    for path, leaf in current.items()
  }


def replace(state: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
  """A copy of `state` with the arrays at the given paths; the rest stays.

  Raises:
    ValueError: a path does not exist in `state`, or has another shape there.
  """
  held = shapes(state)
  _check(
    {path: shape for path, shape in held.items() if path in arrays},
    {path: array.shape for path, array in arrays.items()},
    'the parameters to write',
    known=held,
  )

  def new(path, leaf):
    if path not in arrays:
      return leaf
    array = jax.numpy.asarray(arrays[path], leaf.dtype)
    return leaf.replace(array) if isinstance(leaf, nnx.Variable) else array

  return nnx.from_flat_state(
    (path, new(_join(path), leaf)) for path, leaf in nnx.to_flat_state(state)
  )


def set_params(module: nnx.Module, arrays: Mapping[str, Any]) -> None:
  """Writes {path: array} into an NNX module, in place; other paths stay.

  Raises:
    ValueError: as `replace`.
  """
  nnx.update(module, replace(nnx.state(module), arrays))


def from_torch(
  tensors: Mapping[str, np.ndarray],
  rules: Rules,
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
  r"""A torch state dict as {path: array}, strict both ways.

  A rule is (regex, path template, layout). The regex must match a whole torch
  name; the template may use its groups (\1). Layouts: 'conv' OIHW to HWIO,
  'linear' (out, in) to (in, out), 'conv1d' (out, in, 1) to (in, out), 'copy',
  'drop' (not wanted; no path). A
  template that ends in '@\1' fills index \1 of a leading axis in which several
  tensors are stacked.

  Args:
    tensors: {torch name: array}.
    rules: the table of the model (TORCH_NAMES of its file).
    shapes: {path: shape} of every parameter to fill.

  Returns:
    {path: array} in the order of `shapes`.

  Raises:
    ValueError: a name that no rule or more than one rule claims, a path filled
      twice, not at all or in another shape. All are listed.
  """
  compiled = [(re.compile(regex), path, kind) for regex, path, kind in rules]
  found, stacks, sources, strange, faults = {}, {}, {}, {}, []
  for name in sorted(tensors):
    claims = [
      (match.expand(path), kind)
      for regex, path, kind in compiled
      if (match := regex.fullmatch(name))
    ]
    if not claims:
      strange[name] = tuple(tensors[name].shape)
      continue
    if len(claims) > 1:
      faults.append(f'  torch tensor {name}: claimed by {claims}')
      continue
    [(place, kind)] = claims
    if kind == 'drop':
      continue
    if place in sources:
      faults.append(f'  {place}: filled by {sources[place]} and by {name}')
      continue
    sources[place] = name
    try:
      array = _from_layout(np.asarray(tensors[name]), kind)
    except ValueError as error:
      faults.append(f'  torch tensor {name}: {error}')
      continue
    path, _, index = place.partition('@')
    if index:
      stacks.setdefault(path, {})[int(index)] = array
    else:
      found[path] = array
  for path, parts in sorted(stacks.items()):
    if sorted(parts) != list(range(len(parts))):
      faults.append(f'  {path}: indices {sorted(parts)} leave a gap')
    elif len({part.shape for part in parts.values()}) > 1:
      faults.append(f'  {path}: its parts differ in shape')
    else:
      found[path] = np.stack([parts[i] for i in range(len(parts))])
  given = {path: array.shape for path, array in found.items()}
  faults += _differences(dict(shapes), given) + _left_over(
    strange, shapes, rules
  )
  if faults:
    raise ValueError('the torch tensors do not fit:\n' + '\n'.join(faults))
  return {path: found[path] for path in shapes}


def prefixed(rules: Rules, theirs: str, ours: str) -> Rules:
  """The rules of a module within another: torch prefix and path prefix."""
  return tuple(
    (re.escape(theirs) + name, path and ours + path, kind)
    for name, path, kind in rules
  )


def _left_over(strange, shapes, rules):
  """Lines on torch tensors that no rule claims, with the nearest known."""
  if not strange:
    return []
  empty = {
    path: np.broadcast_to(np.float32(0), shape)
    for path, shape in shapes.items()
  }
  try:
    known = to_torch(empty, rules)
  except ValueError:  # the table does not fit these paths: a line above says so
    known = {}
  lines = []
  for name, shape in sorted(strange.items())[:_LINES]:
    near = _near(name, known)
    hint = f'; nearest: {", ".join(near)}' if near else ''
    lines.append(f'  left over: torch tensor {name} {shape}{hint}')
  if len(strange) > _LINES:
    lines.append(f'  left over: {len(strange) - _LINES} more torch tensors')
  return lines


def places(names: Iterable[str], rules: Rules) -> dict[str, str]:
  """{torch name: path} of the names that the rules claim; '' is dropped."""
  compiled = [(re.compile(regex), path, kind) for regex, path, kind in rules]
  return {
    name: '' if kind == 'drop' else match.expand(path).partition('@')[0]
    for name in names
    for regex, path, kind in compiled
    if (match := regex.fullmatch(name))
  }


def to_torch(arrays: Mapping[str, Any], rules: Rules) -> dict[str, np.ndarray]:
  r"""The inverse of `from_torch`: {torch name: array}, in torch's layouts.

  The rules are read backwards. So that this is possible, a regex consists of
  plain text and of groups without groups in them, all named by its template.

  Args:
    arrays: {path: array} of parameters that the rules fill.
    rules: the table of the model; rows that drop are passed over.

  Raises:
    ValueError: paths that no rule or more than one rule fills; all are listed.
  """
  backward = [
    (re.compile(path), name, kind)
    for path, name, kind in map(_backward, rules)
    if kind != 'drop'
  ]
  found, faults = {}, []
  for path, array in arrays.items():
    array = np.asarray(array)
    stacked = any(regex.fullmatch(f'{path}@0') for regex, _, _ in backward)
    parts = {path: array}
    if stacked:
      parts = {f'{path}@{i}': part for i, part in enumerate(array)}
    for place, part in parts.items():
      claims = [
        (match.expand(name), kind)
        for regex, name, kind in backward
        if (match := regex.fullmatch(place))
      ]
      if len(claims) != 1:
        faults.append(f'  {place} {part.shape}: filled by {claims or "none"}')
        continue
      [(name, kind)] = claims
      axes = _AXES[kind]
      if kind == 'conv1d':
        part = part[None]
      found[name] = part.transpose(np.argsort(axes)) if axes else part
  if faults:
    raise ValueError('no torch tensors for:\n' + '\n'.join(faults))
  return found


def _backward(rule):
  r"""(regex of a path, template of a name, layout) of a rule read backwards."""
  regex, path, kind = rule
  groups = re.findall(r'\(([^()?][^()]*)\)', regex)
  back, order = '', []
  for text, group in re.findall(r'([^\\]*)(?:\\(\d))?', path):
    back += re.escape(text)
    if group:
      back += f'({groups[int(group) - 1]})'
      order.append(int(group))
  count = iter(range(1, len(groups) + 1))
  name = re.sub(
    r'\([^()?][^()]*\)',
    lambda _: f'\\{order.index(next(count)) + 1}' if kind != 'drop' else '',
    regex,
  )
  return back, name.replace('\\.', '.'), kind


_AXES = {
  'conv': (2, 3, 1, 0),
  'linear': (1, 0),
  'conv1d': (2, 1, 0),  # of one tap, which is dropped
  'copy': None,
}


def _from_layout(array: np.ndarray, kind: str) -> np.ndarray:
  """One torch tensor in our layout."""
  axes = _AXES
  if kind not in axes:
    raise ValueError(
      f'layout {kind!r} is unknown; known are {sorted(axes)} and drop'
    )
  if axes[kind] is None:
    return array
  if array.ndim != len(axes[kind]):
    raise ValueError(
      f'layout {kind!r} needs {len(axes[kind])} axes, not shape {array.shape}'
    )
  array = array.transpose(axes[kind])
  if kind != 'conv1d':
    return array
  if array.shape[0] != 1:
    raise ValueError(f'a kernel of {array.shape[0]} taps, expected one')
  return array[0]


def _near(text: str, names: Iterable[str]) -> list[str]:
  return difflib.get_close_matches(text.replace('\\', ''), names, 3, 0.5)


def _check(wanted, given, what, known=None):
  faults = _differences(wanted, given, known)
  if faults:
    raise ValueError(f'{what} do not fit:\n' + '\n'.join(faults))


def _differences(wanted, given, known=None) -> list[str]:
  """Lines that say how {path: shape} `given` differs from `wanted`.

  `known` are the paths among which the nearest to a left-over one is sought.
  """
  missing = sorted(set(wanted) - set(given))
  extra = sorted(set(given) - set(wanted))
  both = sorted(set(wanted) & set(given))
  shaped = [path for path in both if tuple(wanted[path]) != tuple(given[path])]

  def one_sided(path, shape, others):
    near = _near(path, others)
    return f'{tuple(shape)}' + (f'; nearest: {", ".join(near)}' if near else '')

  lines = []
  for kind, paths, describe in (
    ('missing', missing, lambda p: one_sided(p, wanted[p], extra)),
    ('left over', extra, lambda p: one_sided(p, given[p], known or missing)),
    (
      'mis-shaped',
      shaped,
      lambda p: f'is {tuple(given[p])}, must be {tuple(wanted[p])}',
    ),
  ):
    lines += [f'  {kind}: {path} {describe(path)}' for path in paths[:_LINES]]
    if len(paths) > _LINES:
      lines.append(f'  {kind}: {len(paths) - _LINES} more')
  return lines
