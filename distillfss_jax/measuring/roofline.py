"""A roofline: what a config's programs cannot beat on a GPU or TPU.

Nothing runs, and no such device is needed. A chip takes at least as long as its
arithmetic at the chip's highest rate, and at least as long as its memory
traffic at the full bandwidth; the longer of both is the bound. It is no
forecast: real programs reach a half to a tenth of it, small ones less.

What is assumed:

- FLOPs are our own count of products and convolutions (`counts.flops`), since
  XLA's counts a loop's body once. Nothing elementwise counts.
- Bytes are those that products and convolutions take and give
  (`counts.product_bytes`); a cache that keeps some of them between two products
  beats that. Beside it stands the time by XLA's own 'bytes accessed', which has
  everything elementwise, as XLA fuses it for the device that is here; loops in
  it are made up for by how much they multiply the bytes of products.
- float32 runs as JAX does it by default: TF32 on a GPU, bfloat16 on a TPU.
- Items of a batch are shared evenly by the devices; variables, optimiser and
  support are whole on each. What devices tell each other, reading images and
  starting kernels take no time.
- Memory is what XLA sets aside, compiling the accelerator's form of the program
  for the device that is here, inputs and outputs with it. Compilers for GPU and
  TPU differ in the scratch space that they want.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from distillfss_jax import files
from distillfss_jax.measuring import bench, counts, programs
from distillfss_jax.ops import platform
from distillfss_jax.types import AXIS
from distillfss_jax.workdir import results

DEVICES = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a data sheet says; rates are of dense products.

  rates: {dtype: TFLOP/s}. bandwidth: of its memory, TB/s. memory: GB.
  """

  rates: dict[str, float]
  bandwidth: float
  memory: float


_HOPPER = {'bfloat16': 989.0, 'float32': 495.0}
CHIPS = {
  'H100': Chip(_HOPPER, 3.35, 80.0),  # SXM
  'H200': Chip(_HOPPER, 4.8, 141.0),
  'v5e': Chip({'bfloat16': 197.0, 'float32': 197.0}, 0.819, 16.0),
}


def run(
  config,
  *,
  name='',
  what=None,
  shots=None,
  students=('full', 'light'),
  ways=1,
  batch_size=1,
  devices=DEVICES,
  out=None,
) -> dict:
  """Looks at one case after the other; stderr hears how it goes.

  Args:
    config: see `configs/common.py`.
    name: of the config, to be kept.
    what, shots, students: see `programs.chosen`.
    ways: foreground classes.
    batch_size: queries of a call, over all devices.
    devices: numbers of them; each is a row of a case.
    out: None, or what to write at the end: .json all, .md the table.

  Returns:
    The config, the 'chips', and 'rows', a dict per case and number of devices:
      gflop, gb: of a device and a call, see `counts`.
      xla_gb: by XLA's count.
      memory_gb: of a device.
      chips: {chip: 'ms', by the larger of arithmetic and gb; 'bound',
        'compute' or 'memory', or 'too large' for its memory; 'xla_ms', the
        same by xla_gb}.

  Raises:
    ValueError: an unknown name, no number, or an `out` of another kind.
    OSError: `out` cannot be written.
  """
  wanted = programs.chosen(config, what, shots, students)
  bench.check_out(out)
  rows, seen = [], {}
  with platform.made_for('cuda'):
    for count in devices:
      roofline = Roofline(config, count, seen, ways=ways, batch_size=batch_size)
      roofline.visit(*wanted)
      rows += roofline.rows
  first = list(dict.fromkeys((row['what'], row['shots']) for row in rows))
  rows.sort(key=lambda row: first.index((row['what'], row['shots'])))
  found = {
    'name': name,
    'config': json.loads(config.to_json_best_effort()),
    'ways': ways,
    'batch_size': batch_size,
    'chips': {key: dataclasses.asdict(chip) for key, chip in CHIPS.items()},
    'rows': rows,
  }
  if out:
    text = json.dumps(found, indent=2)
    if str(out).endswith('.md'):
      text = table(found, results.markdown)
    files.write_atomically(out, text + '\n')
  return found


def bound(gflop: float, gb: float, chip: Chip, dtype: str) -> tuple[float, str]:
  """The least milliseconds, and what takes them: 'compute' or 'memory'."""
  compute, memory = gflop / chip.rates[dtype], gb / chip.bandwidth
  return max(compute, memory), 'compute' if compute >= memory else 'memory'


def table(results: dict, style=results.table) -> str:
  """The rows for people; `style` is `results.table` or `results.markdown`."""
  header = ['what', 'shots', 'devices', 'gflop', 'gb', 'xla_gb', 'memory_gb']
  lines = []
  for row in results['rows']:
    line = [row[key] for key in header]
    for of in row['chips'].values():
      line += [of['ms'], of['bound'], of['xla_ms']]
    lines.append(line)
  for chip in results['chips']:
    header += [f'{chip} ms', 'bound by', 'XLA ms']
  return style(lines, header) + (
    "\n\nA bound, no forecast: 'ms' is the least that arithmetic and the "
    "traffic of products take, 'XLA ms' with all traffic by XLA's count; all "
    'of one device.'
  )


class Roofline(programs.Programs):
  """Counts what one of several devices does with each program.

  Args:
    config: see `configs/common.py`.
    devices: that share a batch.
    seen: what was compiled so far, to be filled in.
    ways, batch_size: see `run`.
  """

  def __init__(self, config, devices, seen, *, ways, batch_size):
    # The program of one device, on its part of the batch.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (AXIS,))
    each = -(-batch_size // devices)
    super().__init__(config, mesh, ways=ways, batch_size=each)
    self.devices, self.seen, self.rows = devices, seen, []

  def draw(self, program):
    return jax.eval_shape(program.draw)

  def step(self, program, variables, arrays, batch, valid):
    kept = jax.eval_shape(program.shared, variables, *arrays)
    rows = program.rows(-(-len(valid) // self.devices))
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((1, rows, *x.shape[1:]), x.dtype), batch
    )
    state = jax.eval_shape(program.start, variables)
    places = jax.ShapeDtypeStruct((1, rows), np.int32)
    return (state, kept, batch, places, np.int32(1)), kept

  def look(self, case, call, inputs, counted, items, kept=None, before=()):
    what, shots = programs.case_of(case)
    traced = call.trace(*inputs)
    shapes = jax.tree.map(
      lambda x: (x.shape, str(x.dtype)), programs.arrays_of(inputs)
    )
    key = case, str(shapes)
    if key not in self.seen:
      print(f'{what} ...', file=sys.stderr, flush=True)
      self.seen[key] = self._of(traced)
    found = self.seen[key]
    self.rows.append(
      {'what': what, 'shots': shots, 'devices': self.devices, **found}
    )
    return traced.out_info, {}

  def _of(self, traced):
    compiled, jaxpr = traced.lower().compile(), traced.jaxpr
    gflop, gb = counts.flops(jaxpr) / 1e9, counts.product_bytes(jaxpr) / 1e9
    once = counts.product_bytes(jaxpr, loops=False) / 1e9
    xla_gb = compiled.cost_analysis()['bytes accessed'] / 1e9
    xla_gb *= gb / once if once else 1.0
    size = compiled.memory_analysis()
    memory_gb = 1e-9 * (
      size.argument_size_in_bytes
      + size.output_size_in_bytes
      + size.temp_size_in_bytes
      - size.alias_size_in_bytes
    )
    dtype, chips = self.config.model.dtype, {}
    for name, chip in CHIPS.items():
      ms, by = bound(gflop, gb, chip, dtype)
      chips[name] = {
        'ms': ms,
        'bound': by if memory_gb <= chip.memory else 'too large',
        'xla_ms': bound(gflop, xla_gb, chip, dtype)[0],
      }
    return {
      'gflop': gflop,
      'gb': gb,
      'xla_gb': xla_gb,
      'memory_gb': memory_gb,
      'chips': chips,
    }
