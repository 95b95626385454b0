"""Weights that exist elsewhere, into the parameters of a model, and back.

Strict both ways: every tensor of a file fills one parameter or is named in
`dont_load`, every parameter is filled or named, and shapes are equal. What
PyTorch keeps beside parameters (position tables, attention masks) must be what
is computed here; a classifier that no segmenter reads is passed over by name in
the rule tables (TORCH_NAMES), which stand beside each model.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np
from absl import logging
from flax import nnx

from distillfss_jax import params
from distillfss_jax.models import dcama, distilled
from distillfss_jax.pretrained import archive, hub
from distillfss_jax.workdir import checkpoint

Arrays = dict[str, np.ndarray]

BACKBONE = 'teacher/backbone/'
_STUDENT = 'student/'
# Of a position table's entries: sines of angles up to 10000, which float32
# holds to a thousandth, from files that may be float16.
_BUFFER_TOLERANCE = 2e-3
_WRAPPERS = 3  # such as 'module.model.', around all names


def load(config, system: nnx.Module, variables: Mapping) -> dict:
  """Variables of a system, with those that the config wants read from files.

  `config.model.init` fills the teacher and, if it has them, the students,
  which else keep their initial values. `config.model.backbone.init` fills the
  backbone, in place of that of `model.init` if both are given.

  Args:
    config: see `configs/common.py`.
    system: what `systems.build` gives.
    variables: {path: array}, its initial values.

  Raises:
    OSError: a file is not there, or cannot be downloaded.
    ValueError: it is damaged, of other weights, or does not fit; the message
      is the sorted difference.
  """
  whole, backbone = config.model.init, config.model.backbone.init
  if not (whole or backbone):
    if config.model.dont_load:
      raise ValueError(
        f'model.dont_load={config.model.dont_load} without model.init or '
        'model.backbone.init: nothing is loaded'
      )
    return dict(variables)
  check_fields(config)
  result, used = dict(variables), set()
  patterns = tuple(_patterns(config.model.dont_load))
  for source, alone in ((whole, False), (backbone, True)):
    if source:
      others = (f'{BACKBONE}.*',) if backbone and not alone else ()
      leave = _Leave(patterns + others, variables)
      result |= _read(source, system, result, leave, alone)
      used |= leave.used
  if unused := sorted(set(patterns) - used):
    raise ValueError(
      f'model.dont_load: {unused[0]!r} matches no name in the files and no '
      'path of the model'
    )
  return result


def check_fields(config) -> None:
  """Raises ValueError where a config does not suit the weights it names."""
  for key in ('model.init', 'model.backbone.init'):
    source = _field(config, key)
    if source not in hub.PUBLISHED:
      continue
    entry = hub.PUBLISHED[source]
    if (entry.model == 'backbone') != (key == 'model.backbone.init'):
      right = (
        'model.init'
        if key == 'model.backbone.init'
        else ('model.backbone.init')
      )
      raise ValueError(
        f'{source} is a {entry.model}: give it as config.{right}'
      )
    for name, value in entry.fields.items():
      if _field(config, name) != value:
        raise ValueError(
          f'{key}={source} needs config.{name}={value!r}, and the config says '
          f'{_field(config, name)!r}'
        )


def from_tensors(
  tensors: Mapping[str, np.ndarray],
  system: nnx.Module,
  *,
  alone: bool,
  leave: Iterable[str] = (),
) -> Arrays:
  """A torch state dict as {path: array}, strict both ways.

  Args:
    tensors: {torch name: array}, perhaps with prefixes such as 'module.'.
    system: has `teacher` and perhaps `student`; may be abstract.
    alone: whether it is a backbone's, not a whole model's.
    leave: regular expressions of names, or of paths, that are left out.

  Raises:
    ValueError: the two differ; the message is the sorted difference.
  """
  shapes = params.shapes(system)
  return _fitted(tensors, system, _Leave(leave, shapes), alone)


def to_tensors(arrays: Arrays, system: nnx.Module, *, alone: bool) -> Arrays:
  """{torch name: array} that the original loads strictly.

  Has what PyTorch keeps beside parameters, and an empty classifier, too.

  Args:
    arrays: {path: array} of the system.
    system: has `teacher` and perhaps `student`; may be abstract.
    alone: whether to give the backbone alone.

  Raises:
    ValueError: the original has no such students.
  """
  student = None if alone else getattr(system, 'student', None)
  _check_student(student)
  wanted = {
    path: x
    for path, x in arrays.items()
    if path.startswith(BACKBONE) or not alone
  }
  backbone = system.teacher.backbone
  table, *_ = backbone.torch_tables().values()
  found = params.to_torch(wanted, _rules(system, table, alone))
  prefix = '' if alone else 'feature_extractor.'
  own = {
    name.removeprefix(prefix): x
    for name, x in found.items()
    if name.startswith(prefix)
  }
  unused = backbone.torch_unused(own)
  found |= buffers(system, alone)
  found |= {prefix + name: x for name, x in unused.items()}
  if student is None:
    return found
  return {
    name if name.startswith('student.') else f'teacher.{name}': x
    for name, x in found.items()
  }


def buffers(system: nnx.Module, alone: bool) -> Arrays:
  """What PyTorch keeps beside a system's parameters, {torch name: array}."""
  teacher = system.teacher
  found = teacher.backbone.torch_buffers()
  if alone:
    return found
  found = {f'feature_extractor.{name}': x for name, x in found.items()}
  if teacher.positional:
    tables = dcama.torch_buffers(teacher)
    found |= {f'model.{name}': x for name, x in tables.items()}
  return found


def from_folder(folder: pathlib.Path) -> Arrays:
  """{path: array} of a run's folder, or of one that `convert` wrote."""
  leaves = checkpoint.load(folder / 'checkpoints')
  return {
    path.partition('/')[2]: x
    for path, x in leaves.items()
    if path.partition('/')[0] in ('params', 'frozen', 'rest')
  }


def description(folder: pathlib.Path) -> dict:
  """The config of such a folder."""
  path = folder / 'config.json'
  if not path.is_file():
    raise ValueError(
      f'{folder} is no run of this package: it has no config.json; give a '
      "run's folder, one that convert wrote, or a file"
    )
  return json.loads(path.read_text())


def read_file(source: str) -> Arrays:
  """Tensors of a file; '#part' after it takes one of several dictionaries."""
  path, _, part = source.partition('#')
  return archive.read(hub.find(path), part)


def _patterns(patterns):
  if isinstance(patterns, str):
    raise TypeError(
      f'dont_load is the string {patterns!r}; give a tuple: ({patterns!r},)'
    )
  return patterns


class _Leave:
  """What stays out, by regular expressions of torch names or of paths.

  paths: those of the model that keep their values.
  used: the patterns that have matched something.
  """

  def __init__(self, patterns: Iterable[str], paths: Iterable[str]):
    self._expressions, self.used = {}, set()
    for pattern in _patterns(patterns):
      try:
        self._expressions[pattern] = re.compile(pattern)
      except re.error as error:
        raise ValueError(
          f'dont_load: {pattern!r} is no regular expression: {error}'
        ) from error
    self.paths = self.matched(paths)

  def matched(self, names: Iterable[str]) -> set[str]:
    """Those of the names that a pattern matches in full."""
    found = set()
    for name in names:
      for pattern, expression in self._expressions.items():
        if expression.fullmatch(name):
          found.add(name)
          self.used.add(pattern)
    return found


def _read(source, system, variables, leave, alone):
  """What a file or folder gives, {path: array}."""
  found = hub.find(source.partition('#')[0])
  if found.is_dir():
    given = from_folder(found)
    left = leave.matched(given)
    given = {
      path: x
      for path, x in given.items()
      if path not in left and (path.startswith(BACKBONE) or not alone)
    }
  else:
    given = _fitted(read_file(source), system, leave, alone)
  loaded = params.merge(
    {
      path: x
      for path, x in variables.items()
      if path in _wanted(variables, given, alone) - leave.paths
    },
    given,
  )
  logging.info('%s: %d parameters read', source, len(loaded))
  return loaded


def _wanted(paths, given, alone):
  """The paths to fill: the backbone's, or all but students not given."""
  students = any(path.startswith(_STUDENT) for path in given)
  return {
    path
    for path in paths
    if path.startswith(BACKBONE)
    or not (alone or (path.startswith(_STUDENT) and not students))
  }


def _fitted(tensors, system, leave, alone):
  """A torch state dict as {path: array}; see `from_tensors`."""
  rules, names = _best(tensors, system, alone)
  tensors = {names[name]: x for name, x in tensors.items()}
  places = params.places(tensors, rules)
  left = leave.matched(tensors)
  tensors = {
    name: x
    for name, x in tensors.items()
    if name not in left and places.get(name) not in leave.paths
  }
  _check_buffers(tensors, buffers(system, alone))
  shapes = params.shapes(system)
  wanted = _wanted(shapes, places.values(), alone) - leave.paths
  return params.from_torch(
    tensors,
    rules,
    {path: shape for path, shape in shapes.items() if path in wanted},
  )


def _field(config, name):
  for key in name.split('.'):
    config = config[key]
  return config


def _check_student(student):
  if student is not None and not isinstance(student, distilled.FullDistiller):
    raise ValueError(
      f'{type(student).__name__} has no counterpart in the original: only '
      "student='full' has"
    )


def _rules(system, backbone, alone):
  """The table of a whole model, or of its backbone alone."""
  if alone:
    return tuple((name, BACKBONE + path, kind) for name, path, kind in backbone)
  parts = [
    ('feature_extractor', BACKBONE, backbone),
    ('model', 'teacher/', dcama.TORCH_NAMES),
  ]
  if isinstance(getattr(system, 'student', None), distilled.FullDistiller):
    parts.append(('student', _STUDENT, distilled.TORCH_NAMES))
  return tuple(
    (rf'{part}\.{name}', place + path, kind)
    for part, place, table in parts
    for name, path, kind in table
  )


def _best(tensors, system, alone):
  """The table and the names, without prefixes, that claim most tensors."""
  found = []
  for table in system.teacher.backbone.torch_tables().values():
    rules = _rules(system, table, alone)
    names = {name: name for name in tensors}
    for _ in range(1 + _WRAPPERS):
      plain = {
        name: short if alone else short.removeprefix('teacher.')
        for name, short in names.items()
      }
      claimed = len(params.places(plain.values(), rules))
      if len(set(plain.values())) == len(plain):
        found.append((claimed, rules, plain))
      heads = {short.partition('.')[0] for short in names.values()}
      if len(heads) != 1 or not all('.' in short for short in names.values()):
        break
      names = {name: x.partition('.')[2] for name, x in names.items()}
  _, rules, names = max(found, key=lambda item: item[0])
  return rules, names


def _check_buffers(tensors, expected):
  """Raises ValueError for a table that is not what is computed here."""
  faults = []
  for name in sorted(tensors.keys() & expected.keys()):
    theirs, ours = np.asarray(tensors[name]), expected[name]
    if theirs.shape != ours.shape:
      faults.append(f'  {name} is {theirs.shape}, here {ours.shape}')
      continue
    off = np.abs(theirs.astype(np.float32) - ours.astype(np.float32)).max()
    bound = 0.0  # of indices
    if ours.dtype.kind == 'f':
      bound = _BUFFER_TOLERANCE * max(1.0, float(np.abs(ours).max()))
    if not off <= bound:
      faults.append(f'  {name} differs by up to {off:.3g}')
  if faults:
    raise ValueError(
      'these tables are not what this model computes (is it for another image '
      'size?):\n' + '\n'.join(faults)
    )
