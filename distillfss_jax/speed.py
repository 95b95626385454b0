"""What a model and its training cost on this machine, and to compile.

    python -m distillfss_jax.speed --config configs/nucleus.py:backbone=resnet50
    python -m distillfss_jax.speed --config configs/bam.py --what train

Random images go through the config's model; no dataset is read. Compilation
and the first call stay apart from the timed calls, each of which waits for its
result. A support is memorized once, so a `teacher` row is a query alone, and
the `memorize` row before it is what its support cost. A DCAMA teacher and its
students are measured beside each other, all other systems as the config has
them.
"""

import copy
import json
import math
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from importlib import metadata

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from jax.interpreters import partial_eval
from ml_collections import config_flags

from distillfss_jax import (
  feeding,
  files,
  parallel,
  params,
  systems,
  train,
  train_step,
)
from distillfss_jax.data import pipeline
from distillfss_jax.models import distilled
from distillfss_jax.tasks import adaptation
from distillfss_jax.types import Dense, Episode, Support, Table, TrainState
from distillfss_jax.workdir import results

WHAT = ('backbone', 'teacher', 'student', 'train')  # of DCAMA and students
OTHERS = ('predict', 'train')  # of all other systems
SHOTS = (1, 5, 10, 50)


def run(
  config,
  *,
  what=None,
  shots=None,
  students=('full', 'light'),
  ways=1,
  batch_size=1,
  repeats=3,
  out=None,
) -> dict:
  """Measures one case after the other; stderr hears how it goes.

  Args:
    config: see `configs/common.py`; training takes its support and episodes.
    what: of `WHAT`, or of `OTHERS`; None for all that the config has.
    shots: sizes of the support of `teacher` or `predict`; None for `SHOTS`, or
      the config's own.
    students: of `models/distilled.py`.
    ways: foreground classes.
    batch_size: queries of a call.
    repeats: timed calls of a case.
    out: None, or what to write after every case: .json all, .md the table.

  Returns:
    The machine, the config, and 'rows', a dict per case:
      ms, least_ms: median and least of the timed calls.
      per_second: images; in training, steps: of an adaptation, that is a
        sweep over all episodes.
      parameters: those read, with those a teacher's memory took; in training,
        those moved.
      support_mb: what is kept of the support: teacher's memory, or bank.
      working_mb, program_mb: what XLA sets aside between inputs and outputs,
        and with them.
      compile_s, first_s: from tracing to an executable, and the first call.
      gflop: of a call, see `flops`.
      of_rate: that over the time, as a share of the rate of one large matrix
        product, which is timed around every case.
    Of several devices, gflop and megabytes are those of one.

  Raises:
    ValueError: an unknown name, no number, or an `out` of another kind.
    OSError: `out` cannot be written; it is tried first.
  """
  pair = is_pair(config)
  kinds = WHAT if pair else OTHERS
  what = kinds if what is None else what
  if shots is None:
    own = (config.support.shots,) if 'support' in config else ()
    shots = SHOTS if pair else own
  named = (('what', what, kinds), ('students', students, distilled.variants))
  for flag, names, known in named:
    if unknown := sorted(set(names) - set(known)):
      raise ValueError(
        f'--{flag}: no {", ".join(map(repr, unknown))}; there are: '
        f'{", ".join(known)}'
      )
  if not all(str(s).isdecimal() and int(s) for s in shots):
    raise ValueError(f'--shots: {shots} are not all whole numbers from 1 up')
  if out and pathlib.Path(out).suffix not in ('.json', '.md'):
    raise ValueError(f'--out: {out} must end in .json or .md')
  bench = _Bench(config, ways, batch_size, repeats, out)
  try:
    bench.write()
  except OSError as error:
    reason = os.strerror(error.errno)
    raise OSError(f'--out: cannot write {out}: {reason}') from error
  if 'backbone' in what:
    bench.backbone()
  if 'teacher' in what:
    bench.teacher(map(int, shots))
  for student in students if 'student' in what else ():
    bench.student(student)
  if 'predict' in what:
    bench.predict(map(int, shots))
  if 'train' in what and not pair:
    bench.train(config)
  elif 'train' in what:
    bench.train(bench.variant('transferfss'))
    for student in students:
      bench.train(bench.variant('distillfss', student), student)
  return bench.results()


def is_pair(config) -> bool:
  """Whether a config has DCAMA's teacher, which students can imitate."""
  systems_of_it = ('transferfss', 'distillfss')
  return config.model.name == 'dcama' and config.system in systems_of_it


def random_step(config, ways: int, takes: type, random):
  """Random input of a training step, as the config's task would give it.

  Args:
    config: see `configs/common.py`.
    ways: foreground classes.
    takes: the type of the system's batches.
    random: NumPy's generator.

  Returns:
    What `Program.shared` takes besides the variables, a batch [b, ...], and
    [b] bool, which of its items count.
  """
  side = config.data.image_size

  def images(*lead):
    return random.integers(0, 256, (*lead, side, side, 3), np.uint8)

  def labels(*lead, most=ways):
    return random.integers(0, 1 + most, (*lead, side, side), np.uint8)

  if takes is Dense:
    b = config.dense.batch_size
    return (), Dense(images(b), labels(b)), np.ones(b, bool)
  shots = config.support.shots
  if takes is Table:
    support = images(shots), labels(shots).astype(np.int32)
    tables = adaptation.episode_tables(config, np.ones((shots, ways), bool))
    step = next(iter(pipeline.step_tables(tables, steps=1)))
    return support, Table(step['table']), step['valid']
  b, known = config.source.batch_size, config.model.fields.get('classes', 2) - 1
  batch = Episode(
    images(b),
    labels(b, most=1),
    images(b, shots),
    labels(b, shots, most=1),
    labels(b, most=known),
    random.integers(0, known, b).astype(np.int32),
  )
  return (np.arange(1, 1 + known, dtype=np.int32),), batch, np.ones(b, bool)


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
  total = 0
  for equation in _needed(jaxpr)[0].eqns:
    name, fields = equation.primitive.name, equation.params
    if name in ('dot_general', 'conv_general_dilated'):
      x, y = (var.aval.shape for var in equation.invars)
      numbers = fields['dimension_numbers']
      if name == 'dot_general':
        terms = math.prod(x[i] for i in numbers[0][0])
      else:
        terms = math.prod(y[i] for i in numbers.rhs_spec[1:])
        # Zeros that a stride's gradient puts between pixels are not computed.
        terms /= math.prod(fields['lhs_dilation'])
      total += round(2 * terms * equation.outvars[0].aval.size)
    else:
      leaves = jax.tree.leaves(list(fields.values()))
      bodies = [flops(leaf) for leaf in leaves if hasattr(leaf, 'eqns')]
      times = fields['length'] if name == 'scan' else 1
      total += times * (max if name == 'cond' else sum)(bodies or [0])
  return total


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


def table(results: dict, style=results.table) -> str:
  """The rows for people; `style` is `results.table` or `results.markdown`."""
  rows = results['rows']
  lines = style([row.values() for row in rows], [*rows[0]]) if rows else ''
  return lines + (
    f'\n\n{results["device"]}, {results["cpus"]} CPUs under a load of '
    f'{results["load"]:.1f}; a matrix product runs at '
    f'{results["matrix_gflop_per_second"]:.1f} GFLOP/s; the process, '
    f'compiler and all, took {results["process_mb"]:.0f} MB at most.'
  )


class _Bench:
  """The cases, and the rows they leave."""

  def __init__(self, config, ways, batch_size, repeats, out):
    self.config, self.ways, self.batch_size = config, ways, batch_size
    self.repeats, self.out = repeats, pathlib.Path(out) if out else None
    self.random = np.random.default_rng(0)
    self.rows, self.rate = [], 0.0
    side = 1024 if jax.default_backend() == 'cpu' else 8192
    self.matrix = jnp.ones((side, side), config.model.dtype)
    self.product = jax.jit(jnp.matmul)

  def backbone(self):
    config = self.variant('transferfss')
    graph, abstract = nnx.split(systems.build(config, self.ways)[0])

    def encode(variables, images):
      module = nnx.merge(graph, params.replace(abstract, variables))
      return module.teacher.encode(images)

    _, variables, counted = self._build(config)
    images = self._images(self.batch_size)
    inputs = variables, images
    self._measure('backbone', jax.jit(encode), inputs, counted, len(images))

  def teacher(self, shots):
    built = self._build(self.variant('transferfss'))
    for s in shots:
      self._few_shot('teacher', s, *built, ('teacher',))

  def predict(self, shots):
    """What the config's system says of images, in all its roles."""
    program, variables, counted = self._build(self.config)
    if program.takes is Dense or program.roles == ('student',):
      images = self._images(self.batch_size)
      inputs = variables, None, images, program.roles
      self._measure('predict', program.predict, inputs, counted, len(images))
      return
    for s in shots:
      self._few_shot('predict', s, program, variables, counted, program.roles)

  def _few_shot(self, name, s, program, variables, counted, roles):
    """A support of s shots, and then queries."""
    images = self._images(1, s)
    masks = self.random.random((*images.shape[:4], self.ways)) < 0.5
    support = Support(
      images,
      jnp.asarray(masks, jnp.float32),
      jnp.ones((1, s, self.ways), bool),
    )
    inputs, case = (variables, support), ('memorize', s)
    memory, read = self._measure(case, program.memorize, inputs, counted, s)
    images, case = self._images(self.batch_size), (name, s)
    inputs, items = (variables, memory, images, roles), len(images)
    self._measure(case, program.predict, inputs, counted, items, memory, read)

  def student(self, student):
    config = self.variant('distillfss', student)
    program, variables, counted = self._build(config)
    images = self._images(self.batch_size)
    inputs = variables, None, images, ('student',)
    name = f'student {student}'
    self._measure(name, program.predict, inputs, counted, len(images))

  def train(self, config, student=''):
    """A step: all of a batch forward and backward, and the optimiser."""
    mesh = parallel.mesh()
    program, variables, _ = self._build(config)
    arrays, *batch = random_step(config, self.ways, program.takes, self.random)
    bank = program.shared(variables, *arrays)
    state = program.start(variables)
    moved = {f'params/{path}' for path in state.params}
    feed = feeding.Feed(
      iter(grain.MapDataset.source([tuple(batch)]).to_iter_dataset()),
      lambda x: x,
      rows=program.rows,
      mesh=mesh,
      own=False,
      most=1,
    )
    inputs = (
      parallel.replicate(state, mesh),
      parallel.replicate(bank, mesh),
      *feed.take(1),
      np.int32(1),
    )
    name = f'train {config.system} {student}'.strip()
    shots = None if program.takes is Dense else config.support.shots
    self._measure((name, shots), program.dispatch, inputs, moved, 1, bank)

  def results(self):
    """Everything so far."""
    device, own = jax.devices()[0], resource.getrusage(resource.RUSAGE_SELF)
    peak = own.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    peak = (device.memory_stats() or {}).get('peak_bytes_in_use', peak)
    return {
      'config': json.loads(self.config.to_json_best_effort()),
      'ways': self.ways,
      'batch_size': self.batch_size,
      'repeats': self.repeats,
      'device': device.device_kind,
      'devices': jax.device_count(),
      'platform': platform.platform(),
      'cpus': os.cpu_count(),
      'load': os.getloadavg()[0],
      'python': platform.python_version(),
      'versions': {name: metadata.version(name) for name in train.PACKAGES},
      'matrix_gflop_per_second': self.rate,
      'process_mb': peak / 1e6,
      'rows': [
        {**row, 'of_rate': 1e3 * row['gflop'] / row['ms'] / self.rate}
        for row in self.rows
      ],
    }

  def write(self):
    """Writes everything so far, if a place was given."""
    if self.out:
      found = self.results()
      text = json.dumps(found, indent=2)
      if self.out.suffix == '.md':
        text = table(found, results.markdown)
      files.write_atomically(self.out, text + '\n')

  def _measure(self, case, call, inputs, counted, items, kept=None, before=()):
    """Adds a row; returns the last result and the parameters read.

    Args:
      case: its name, or that and the number of shots.
      call: jitted; with a training state as first input it returns the next.
      inputs: arrays, and roles.
      counted: paths of parameters within the first input.
      items: images or sweeps of a call.
      kept: of the support.
      before: parameters that were read to make the inputs.
    """
    what, shots = (case, None) if isinstance(case, str) else case
    name = f'{what}, {shots} shots' if shots else what
    print(name, end=': ', file=sys.stderr, flush=True)
    self._time_product()
    begin = time.perf_counter()
    traced = call.trace(*inputs)
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - begin
    read = {**reads(traced, inputs[0], counted), **dict(before)}
    print(f'compiled in {compile_s:.1f} s; took', end='', file=sys.stderr)
    out, seconds = self._time(compiled, inputs)
    self._time_product()
    size = compiled.memory_analysis()
    working = size.temp_size_in_bytes
    around = size.argument_size_in_bytes + size.output_size_in_bytes
    held = jax.tree.leaves(kept)
    median = statistics.median(seconds[1:])
    row = {
      'what': what,
      'shots': shots,
      'ms': 1e3 * median,
      'least_ms': 1e3 * min(seconds[1:]),
      'per_second': items / median,
      'parameters': sum(read.values()),
      'support_mb': sum(x.nbytes for x in held) / 1e6 if held else None,
      'working_mb': working / 1e6,
      'program_mb': (working + around - size.alias_size_in_bytes) / 1e6,
      'compile_s': compile_s,
      'first_s': seconds[0],
      'gflop': flops(traced.jaxpr) / 1e9,
    }
    self.rows.append(row)
    self.write()
    return out, read

  def _time(self, compiled, inputs):
    """The last result, and the seconds of the first and `repeats` calls."""
    # A compiled program does not take what it was compiled for: the roles.
    inputs = [x for x in inputs if not _is_roles(x)]
    seconds, out = [], None
    for _ in range(1 + self.repeats):
      del out  # before there are two
      begin = time.perf_counter()
      out = jax.block_until_ready(compiled(*inputs))
      seconds.append(time.perf_counter() - begin)
      print(f' {seconds[-1]:.3g}', end='', file=sys.stderr, flush=True)
      if isinstance(inputs[0], TrainState):
        inputs[0] = out[0]
    print(' s', file=sys.stderr)
    return out, seconds

  def _time_product(self):
    for _ in range(4):
      begin = time.perf_counter()
      self.product(self.matrix, self.matrix).block_until_ready()
      seconds = time.perf_counter() - begin
      self.rate = max(self.rate, 2e-9 * len(self.matrix) ** 3 / seconds)

  def variant(self, system, student=''):
    """The config, as one of both systems."""
    config = copy.deepcopy(self.config)
    config.system = system
    trained = [name for name in config.optim.trainable if 'student' not in name]
    if student:
      config.student = student
      config.model.fields.voting = 0
      config.model.fields.concat_support = False
      trained.append('student')
    config.optim.trainable = tuple(trained)
    return config

  def _build(self, config):
    """A config's program, its variables, and the paths of its parameters."""
    program = train_step.build(config, self.ways, parallel.mesh())
    variables = program.draw()
    buffers = jax.eval_shape(program.start, variables).buffers
    return program, variables, variables.keys() - buffers.keys()

  def _images(self, *lead):
    shape = (*lead, *(self.config.data.image_size,) * 2, 3)
    return jnp.asarray(self.random.integers(0, 256, shape, np.uint8))


def _is_roles(x):
  return isinstance(x, tuple) and bool(x) and isinstance(x[0], str)


def _needed(jaxpr):
  """A program without what no result needs, and which inputs that leaves."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def main(argv):
  """Runs the flags and prints the table."""
  values = flags.FLAGS
  if len(argv) > 1:
    sys.exit(f'error: unknown arguments {argv[1:]}; see --help')
  if values.config is None:
    sys.exit('error: --config is missing, such as --config configs/nucleus.py')
  logging.set_verbosity(logging.WARNING)
  jax.config.update('jax_enable_compilation_cache', False)
  options = (
    'what',
    'shots',
    'students',
    'ways',
    'batch_size',
    'repeats',
    'out',
  )
  try:
    results = run(values.config, **{x: values[x].value for x in options})
  except (ValueError, TypeError, OSError) as error:
    logging.debug('where it failed', exc_info=True)
    sys.exit(f'error: {error}')
  print(table(results))


def parse(argv):
  """Parses flags; whatever is wrong with them is one line on the terminal."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, TypeError, OSError) as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


def define_flags():
  """Defines the flags; not on import, other programs have their own."""
  config_flags.DEFINE_config_file('config', None, 'The model and training.')
  what = f'Of {", ".join(WHAT)}; of other systems {", ".join(OTHERS)}.'
  flags.DEFINE_list('what', None, what)
  flags.DEFINE_list('shots', None, "Sizes of a few-shot method's support.")
  flags.DEFINE_list('students', 'full,light', 'Of full, light, attention.')
  flags.DEFINE_integer('ways', 1, 'Foreground classes.', lower_bound=1)
  flags.DEFINE_integer('batch_size', 1, 'Queries of a call.', lower_bound=1)
  flags.DEFINE_integer('repeats', 3, 'Timed calls of a case.', lower_bound=1)
  flags.DEFINE_string('out', None, 'speed.json for everything, or speed.md.')


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=parse)
