"""A config's programs, timed on this machine."""

import json
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

from distillfss_jax import feeding, files, parallel, train
from distillfss_jax.measuring import counts, programs
from distillfss_jax.types import TrainState
from distillfss_jax.workdir import results

ONE_BY_ONE = ('calls_ms', 'rates')  # lists of a row, for `compare`


def run(
  config,
  *,
  name='',
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
    name: of the config, to be kept.
    what, shots, students: see `programs.chosen`.
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
      start_s: of training, both and what comes before them: initial values,
        the support encoded. With the imports and the data's first batch it is
        the time to the first step of a run that finds no compiled programs.
      gflop: of a call, see `counts.flops`.
      of_rate: that over the time, as a share of the rate of one large matrix
        product.
      rates: of that product just before and just after the timed calls,
        GFLOP/s, the best of four.
      calls_ms: each of the timed calls.
    Of several devices, gflop and megabytes are those of one.

  Raises:
    ValueError: an unknown name, no number, or an `out` of another kind.
    OSError: `out` cannot be written; it is tried first.
  """
  wanted = programs.chosen(config, what, shots, students)
  check_out(out)
  bench = Bench(config, name, ways, batch_size, repeats, out)
  try:
    bench.write()
  except OSError as error:
    reason = os.strerror(error.errno)
    raise OSError(f'--out: cannot write {out}: {reason}') from error
  bench.visit(*wanted)
  return bench.results()


def check_out(out) -> None:
  """Raises a ValueError if a name is not that of a file we write."""
  if out and pathlib.Path(out).suffix not in ('.json', '.md'):
    raise ValueError(f'--out: {out} must end in .json or .md')


def table(results: dict, style=results.table) -> str:
  """The rows for people; `style` is `results.table` or `results.markdown`."""
  rows = [
    {key: x for key, x in row.items() if key not in ONE_BY_ONE}
    for row in results['rows']
  ]
  lines = style([row.values() for row in rows], [*rows[0]]) if rows else ''
  return lines + (
    f'\n\n{results["device"]}, {results["cpus"]} CPUs under a load of '
    f'{results["load"]:.1f}; a matrix product runs at '
    f'{results["matrix_gflop_per_second"]:.1f} GFLOP/s; the process, '
    f'compiler and all, took {results["process_mb"]:.0f} MB at most.'
  )


class Bench(programs.Programs):
  """Times each program; see `run`."""

  def __init__(self, config, name, ways, batch_size, repeats, out):
    super().__init__(config, parallel.mesh(), ways=ways, batch_size=batch_size)
    self.name, self.repeats = name, repeats
    self.out = pathlib.Path(out) if out else None
    self.rows, self.rate, self.begin = [], 0.0, 0.0
    side = 1024 if jax.default_backend() == 'cpu' else 8192
    self.matrix = jnp.ones((side, side), config.model.dtype)
    self.product = jax.jit(jnp.matmul)

  def draw(self, program):
    self.begin = time.perf_counter()
    return program.draw()

  def step(self, program, variables, arrays, batch, valid):
    bank = program.shared(variables, *arrays)
    feed = feeding.Feed(
      iter(grain.MapDataset.source([(batch, valid)]).to_iter_dataset()),
      lambda x: x,
      rows=program.rows,
      mesh=self.mesh,
      own=False,
      most=1,
    )
    state, bank_everywhere = (
      parallel.replicate(x, self.mesh) for x in (program.start(variables), bank)
    )
    return (state, bank_everywhere, *feed.take(1), np.int32(1)), bank

  def results(self):
    """Everything so far."""
    device, own = jax.devices()[0], resource.getrusage(resource.RUSAGE_SELF)
    peak = own.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    peak = (device.memory_stats() or {}).get('peak_bytes_in_use', peak)
    return {
      'name': self.name,
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
      'rows': self.rows,
    }

  def write(self):
    """Writes everything so far, if a place was given."""
    if self.out:
      found = self.results()
      text = json.dumps(found, indent=2)
      if self.out.suffix == '.md':
        text = table(found, results.markdown)
      files.write_atomically(self.out, text + '\n')

  def look(self, case, call, inputs, counted, items, kept=None, before=()):
    what, shots = programs.case_of(case)
    name = f'{what}, {shots} shots' if shots else what
    print(name, end=': ', file=sys.stderr, flush=True)
    ready_s = time.perf_counter() - self.begin
    begin = time.perf_counter()
    traced = call.trace(*inputs)
    compiled = traced.lower().compile()
    compile_s = time.perf_counter() - begin
    read = {**counts.reads(traced, inputs[0], counted), **dict(before)}
    print(f'compiled in {compile_s:.1f} s; took', end='', file=sys.stderr)
    trains = isinstance(inputs[0], TrainState)
    rates = [self._time_product()]
    out, seconds = self._time(compiled, programs.arrays_of(inputs), trains)
    rates.append(self._time_product())
    self.rate = max(self.rate, *rates)
    size = compiled.memory_analysis()
    working = size.temp_size_in_bytes
    around = size.argument_size_in_bytes + size.output_size_in_bytes
    held = jax.tree.leaves(kept)
    median, gflop = statistics.median(seconds[1:]), counts.flops(traced.jaxpr)
    gflop /= 1e9
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
      'start_s': ready_s + compile_s + seconds[0] if trains else None,
      'gflop': gflop,
      'of_rate': gflop / median / statistics.mean(rates),
      'rates': rates,
      'calls_ms': [1e3 * x for x in seconds[1:]],
    }
    self.rows.append(row)
    self.write()
    return out, read

  def _time(self, compiled, inputs, trains):
    """The last result, and the seconds of the first and `repeats` calls."""
    seconds, out = [], None
    for _ in range(1 + self.repeats):
      del out  # before there are two
      begin = time.perf_counter()
      out = jax.block_until_ready(compiled(*inputs))
      seconds.append(time.perf_counter() - begin)
      print(f' {seconds[-1]:.3g}', end='', file=sys.stderr, flush=True)
      if trains:
        inputs[0] = out[0]
    print(' s', file=sys.stderr)
    return out, seconds

  def _time_product(self):
    """The best rate of four large matrix products, GFLOP/s."""
    best = 0.0
    for _ in range(4):
      begin = time.perf_counter()
      self.product(self.matrix, self.matrix).block_until_ready()
      seconds = time.perf_counter() - begin
      best = max(best, 2e-9 * len(self.matrix) ** 3 / seconds)
    return best
