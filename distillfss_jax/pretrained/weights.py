"""Weights that exist elsewhere, into the parameters of a model, and back.

Strict both ways: every tensor of a file fills one parameter or is named in
`dont_load`, every parameter is filled or named, and shapes are equal. What
PyTorch keeps beside parameters (position tables, attention masks) must be what
is computed here; a classifier that no segmenter reads is passed over by name in
the rule tables, which stand beside each model.

A module that other programs know has three methods:

    torch_tables()         {who names so: rules}, the first are written
    torch_buffers()        {torch name: array} PyTorch keeps beside parameters
    torch_unused(tensors)  {torch name: array} the original loads, never reads

and perhaps torch_misfit(tensors, paths): in a line, why a file of those tensors
cannot fill those paths; '' if it can.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from absl import logging
from flax import nnx

from distillfss_jax import files, params
from distillfss_jax.pretrained import archive, hub
from distillfss_jax.workdir import checkpoint

Arrays = dict[str, np.ndarray]

# Of a position table's entries: sines of angles up to 10000, which float32
# holds to a thousandth, from files that may be float16.
_BUFFER_TOLERANCE = 2e-3
_WRAPPERS = 3  # such as 'module.model.', around all names


@dataclasses.dataclass(frozen=True)
class Part:
  """A module of a system, and how files name what is in it.

  path: of the module within the system, 'teacher/'; '' for all of it.
  module: has the three methods above.
  names: prefix of its tensors in a file of the whole system, 'teacher.'.
  optional: whether a file may lack it; it then keeps its initial values.
  """

  path: str
  module: nnx.Module
  names: str = ''
  optional: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
  """A row of the table of what is loaded: which parts from which file.

  key: of the config, that names it. source: a file, a folder, a name; '' for
  nothing. parts: what it fills. theirs: prefix of its tensors (or, of a
  folder, of its paths) that belong to them; the others are passed over. same:
  keys that the config of a run, whose folder it is, must have like this one.
  """

  key: str
  source: str
  parts: tuple[Part, ...]
  theirs: str = ''
  same: tuple[str, ...] = ()


def load(config, system: nnx.Module, variables: Mapping) -> dict:
  """Variables of a system, with those that the config wants read from files.

  What is loaded is the system's table, `system.sources(config)`: a later row
  wins over an earlier one.

  Args:
    config: see `configs/common.py`.
    system: what `systems.build` gives.
    variables: {path: array}, its initial values.

  Raises:
    OSError: a file is not there, or cannot be downloaded.
    ValueError: it is damaged, of other weights, or does not fit; the message
      is the sorted difference.
  """
  sources = system.sources(config)
  for key in ('model.init', 'model.backbone.init'):
    if _field(config, key) and key not in {row.key for row in sources}:
      raise ValueError(
        f'config.{key}={_field(config, key)!r}: system {config.system!r} reads '
        'no such file; leave it empty'
      )
  table = [row for row in sources if row.source]
  patterns = tuple(_patterns(config.model.dont_load))
  if not table:
    if patterns:
      raise ValueError(
        f'model.dont_load={config.model.dont_load} without model.init or '
        'model.backbone.init: nothing is loaded'
      )
    _warn_of_random(system)
    return dict(variables)
  check_fields(config, table)
  for row in table:
    _check_run(config, row)
  result, used = dict(variables), set()
  for i, row in enumerate(table):
    later = {x for other in table[i + 1 :] for x in shapes_of(other.parts)}
    leave = _Leave(patterns, variables, later)
    result |= _read(row, result, leave)
    used |= leave.used
  if unused := sorted(set(patterns) - used):
    raise ValueError(
      f'model.dont_load: {unused[0]!r} matches no name in the files and no '
      'path of the model'
    )
  return result


def _warn_of_random(system):
  """Says so where parameters that do not train keep random values."""
  shapes = params.shapes(nnx.state(system, nnx.Param))
  frozen = [path for path in shapes if path not in system.trains]
  if frozen:
    heads = sorted({'/'.join(path.split('/')[:2]) for path in frozen})
    logging.warning(
      'nothing pretrained is loaded, and %s keeps random values for good: '
      'expect poor scores. Give --config.model.backbone.init or '
      '--config.model.init (see docs/weights.md), or let it train by '
      '--config.optim.trainable',
      ', '.join(heads),
    )


def check_fields(config, table: Iterable[Source]) -> None:
  """Raises ValueError where a config does not suit the weights it names."""
  for row in table:
    if row.source not in hub.PUBLISHED:
      continue
    entry = hub.PUBLISHED[row.source]
    of_backbone = row.key.endswith('backbone.init')
    if (entry.model == 'backbone') != of_backbone:
      stem = row.key.removesuffix('.init').removesuffix('.backbone')
      right = f'{stem}.init' if of_backbone else f'{stem}.backbone.init'
      raise ValueError(
        f'{row.source} is a {entry.model}: give it as config.{right}'
      )
    for name, value in entry.fields.items():
      if _field(config, name) != value:
        raise ValueError(
          f'{row.key}={row.source} needs config.{name}={value!r}, and the '
          f'config says {_field(config, name)!r}'
        )


def _check_run(config, row):
  """Raises ValueError where a run that gives weights was about other things.

  A file says nothing of it, but where published ones lie does: split2/ is of
  fold 2.
  """
  folder = pathlib.Path(row.source).expanduser()
  if row.same and folder.is_dir():
    before = description(folder)
    for key in row.same:
      was, is_ = _field_or_none(before, key), _field_or_none(config, key)
      if was is not None and was != is_:
        raise ValueError(
          f'config.{row.key}={row.source}: its config.{key} is {was!r}, here '
          f'it is {is_!r}: take a run of the same'
        )
  elif 'data.args.fold' in row.same:
    fold = _field_or_none(config, 'data.args.fold')
    splits = re.findall(r'(?:^|[/_])split_?(\d)(?=[/_.]|$)', row.source)
    if splits and fold is not None and int(splits[-1]) != fold:
      logging.warning(
        '%s=%s looks like one of fold %s, and this is fold %s: classes that '
        'are tested may have trained it',
        row.key,
        row.source,
        splits[-1],
        fold,
      )


def from_tensors(
  tensors: Mapping[str, np.ndarray],
  parts: Sequence[Part],
  *,
  leave: Iterable[str] = (),
) -> Arrays:
  """A torch state dict as {path: array}, strict both ways.

  Args:
    tensors: {torch name: array}, perhaps with prefixes such as 'module.'.
    parts: what it fills; modules may be abstract.
    leave: regular expressions of names, or of paths, that are left out.

  Raises:
    ValueError: the two differ; the message is the sorted difference.
  """
  return _fitted(tensors, parts, _Leave(leave, shapes_of(parts)))


def to_tensors(arrays: Arrays, parts: Sequence[Part]) -> Arrays:
  """{torch name: array} that the original loads strictly.

  Has what PyTorch keeps beside parameters, and an empty classifier, too.

  Args:
    arrays: {path: array} of the system; what is of other parts is left.
    parts: what to give.

  Raises:
    ValueError: the original has no such module.
  """
  found = {}
  for part in parts:
    mine = {
      path.removeprefix(part.path): x
      for path, x in arrays.items()
      if path.startswith(part.path)
    }
    table, *_ = part.module.torch_tables().values()
    tensors = params.to_torch(mine, table)
    tensors = {
      **tensors,
      **part.module.torch_buffers(),
      **part.module.torch_unused(tensors),
    }
    found |= {f'{part.names}{name}': x for name, x in tensors.items()}
  return found


def shapes_of(parts: Sequence[Part]) -> dict[str, tuple[int, ...]]:
  """{path within the system: shape} of all that the parts hold."""
  return {
    f'{part.path}{path}': shape
    for part in parts
    for path, shape in params.shapes(part.module).items()
  }


def from_folder(
  folder: pathlib.Path,
  checkpoints: str = 'checkpoints',
  wanted: int | None = None,
) -> Arrays:
  """{path: array} of a run's folder, or of one that `convert` wrote.

  Args:
    folder: of the run.
    checkpoints: the folder in it: of the newest ones, or 'best'.
    wanted: the step, if only one will do.
  """
  # 'rest' is what an older version called the buffers.
  leaves = checkpoint.load(folder / checkpoints, wanted=wanted)
  return {
    path.partition('/')[2]: x
    for path, x in leaves.items()
    if path.partition('/')[0] in ('params', 'frozen', 'rest', 'buffers')
  }


def description(folder: pathlib.Path) -> dict:
  """The config of such a folder."""
  path = folder / 'config.json'
  if not path.is_file():
    raise ValueError(
      f'{folder} is no run of this package: it has no config.json; give a '
      "run's folder, one that convert wrote, or a file"
    )
  return files.read_json(path)


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

  def __init__(
    self,
    patterns: Iterable[str],
    paths: Iterable[str],
    others: Iterable[str] = (),
  ):
    """Takes the user's patterns, the model's paths, and others that stay."""
    self._expressions, self.used = {}, set()
    for pattern in _patterns(patterns):
      try:
        self._expressions[pattern] = re.compile(pattern)
      except re.error as error:
        raise ValueError(
          f'dont_load: {pattern!r} is no regular expression: {error}'
        ) from error
    self.paths = self.matched(paths) | set(others)

  def matched(self, names: Iterable[str]) -> set[str]:
    """Those of the names that a pattern matches in full."""
    found = set()
    for name in names:
      for pattern, expression in self._expressions.items():
        if expression.fullmatch(name):
          found.add(name)
          self.used.add(pattern)
    return found


def _read(row, variables, leave):
  """What a row's file or folder gives, {path: array}."""
  found = hub.find(row.source.partition('#')[0])
  if found.is_dir():
    given = _of_folder(from_folder(found, kept(found)), row)
    left = leave.matched(given) | leave.paths
    given = {path: x for path, x in given.items() if path not in left}
  else:
    tensors = read_file(row.source)
    if row.theirs:
      tensors = _below(tensors, row.theirs, row.source)
    given = _fitted(tensors, row.parts, leave)
  wanted = _wanted(shapes_of(row.parts), given, row.parts) - leave.paths
  loaded = params.merge(
    {path: x for path, x in variables.items() if path in wanted}, given
  )
  logging.info('%s: %d parameters read', row.source, len(loaded))
  return loaded


def kept(folder: pathlib.Path) -> str:
  """Which checkpoints of a run's folder it concluded with."""
  path = folder / 'results.json'
  chosen = path.is_file() and 'checkpoint' in files.read_json(path)
  return 'best' if chosen else 'checkpoints'


def _below(names, prefix, source):
  """What has a prefix, without it."""
  found = {
    name.removeprefix(prefix): x
    for name, x in names.items()
    if name.startswith(prefix)
  }
  if not found:
    raise ValueError(f'nothing in {source} has a name that begins {prefix!r}')
  return found


def _of_folder(arrays, row):
  """What of a folder's arrays belongs to a row, under the system's paths."""
  if row.theirs:
    part, *_ = row.parts
    below = _below(arrays, row.theirs, row.source)
    return {f'{part.path}{path}': x for path, x in below.items()}
  paths = tuple(part.path for part in row.parts)
  found = {path: x for path, x in arrays.items() if path.startswith(paths)}
  heads = {path.partition('/')[0] for path in arrays}
  if found or len(heads) > 1 or not all(x.optional for x in row.parts[1:]):
    return found
  # A system of one model, which it calls otherwise.
  return {f'{paths[0]}{x.partition("/")[2]}': y for x, y in arrays.items()}


def _wanted(paths, given, parts):
  """The paths to fill: those of the parts, but optional ones not given."""
  absent = tuple(
    part.path
    for part in parts
    if part.optional and not any(x.startswith(part.path) for x in given)
  )
  return {
    path
    for path in paths
    if path.startswith(tuple(part.path for part in parts))
    and not (absent and path.startswith(absent))
  }


def _fitted(tensors, parts, leave):
  """A torch state dict as {path: array}; see `from_tensors`."""
  rules, names = _best(tensors, parts)
  tensors = {names[name]: x for name, x in tensors.items()}
  places = params.places(tensors, rules)
  left = leave.matched(tensors)
  tensors = {
    name: x
    for name, x in tensors.items()
    if name not in left and places.get(name) not in leave.paths
  }
  _check_buffers(tensors, _buffers(parts))
  shapes = shapes_of(parts)
  wanted = _wanted(shapes, places.values(), parts) - leave.paths
  for part in parts:
    says = getattr(part.module, 'torch_misfit', None)
    filled = {
      x.removeprefix(part.path) for x in wanted if x.startswith(part.path)
    }
    if reason := says and says(tensors, filled):
      raise ValueError(reason)
  return params.from_torch(
    tensors,
    rules,
    {path: shape for path, shape in shapes.items() if path in wanted},
  )


def _field(config, name):
  for key in name.split('.'):
    config = config[key]
  return config


def _field_or_none(config, name):
  """What a config has under a name with dots; None where it has nothing."""
  for key in name.split('.'):
    if key not in config:
      return None
    config = config[key]
  return config


def _buffers(parts):
  """What PyTorch keeps beside parameters, {torch name: array}."""
  return {
    f'{_names(part, parts)}{name}': x
    for part in parts
    for name, x in part.module.torch_buffers().items()
  }


def _names(part, parts):
  """Prefix of a part's names; that of the first is cut off while reading.

  A teacher alone and a teacher with students are the same tensors but for it.
  """
  return '' if part is parts[0] else part.names


def _tables(parts):
  """The tables of rules of all parts together, one for each naming."""
  each = [_known_tables(part) for part in parts]
  for i in range(max(map(len, each))):
    yield tuple(
      rule
      for part, tables in zip(parts, each, strict=True)
      for rule in params.prefixed(
        tables[min(i, len(tables) - 1)], _names(part, parts), part.path
      )
    )


def _known_tables(part):
  """A part's tables; none where files have no such module."""
  try:
    return tuple(part.module.torch_tables().values())
  except ValueError:
    if part.optional:
      return ((),)
    raise


def _best(tensors, parts):
  """The table and the names, without prefixes, that claim most tensors."""
  found, first = [], parts[0].names
  for rules in _tables(parts):
    names = {name: name for name in tensors}
    for _ in range(1 + _WRAPPERS):
      plain = {name: short.removeprefix(first) for name, short in names.items()}
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
