"""The speed command: what it counts, and that it runs."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bam, dcama, nucleus, pspnet
from distillfss_jax import config as configs
from distillfss_jax import parallel, tasks, train_step
from distillfss_jax.measuring import (
  bench,
  compare,
  counts,
  programs,
  reading,
  roofline,
  suite,
)
from distillfss_jax.ops import conv, platform
from distillfss_jax.types import Support

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIDE = 64
CONFIG = ('--config', 'configs/nucleus.py:smoke')
FIELDS = {
  'what', 'shots', 'ms', 'least_ms', 'per_second', 'parameters', 'support_mb',
  'working_mb', 'program_mb', 'compile_s', 'first_s', 'start_s', 'gflop',
  'of_rate', 'rates', 'calls_ms',
}  # fmt: skip


def counted(fn, *args):
  return counts.flops(jax.jit(fn).trace(*args).jaxpr)


def command(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'distillfss_jax.speed', *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
    capture_output=True,
    text=True,
    check=False,
  )


@functools.cache
def tiny():
  """A tiny config's program, and its variables as shapes."""
  compiled = train_step.build(nucleus.get_config('smoke'), 1, parallel.mesh())
  return compiled, jax.eval_shape(compiled.draw)


def teacher(shots):
  """The traced program of one query."""
  compiled, variables = tiny()
  support = Support(
    jax.ShapeDtypeStruct((1, shots, SIDE, SIDE, 3), np.uint8),
    jax.ShapeDtypeStruct((1, shots, SIDE, SIDE, 1), np.float32),
    jax.ShapeDtypeStruct((1, shots, 1), bool),
  )
  memory = jax.eval_shape(compiled.memorize, variables, support)
  image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.uint8)
  return compiled.predict.trace(variables, memory, image, ('teacher',))


def test_products_and_convolutions():
  x, y = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))
  assert counted(jnp.matmul, x, y) == 2 * 3 * 4 * 5 * 7
  image, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 2, 12))
  conv = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(2, 2),
    padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=3,
  )
  work = 2 * (2 * 4 * 4 * 12) * (3 * 3 * 2)
  assert counted(conv, image, kernel) == work
  # The same again for either gradient, but for what is cut at the borders.
  both = counted(
    jax.grad(lambda *args: conv(*args).sum(), (0, 1)), image, kernel
  )
  assert both == pytest.approx(2 * work, rel=0.35)


def test_loops_and_branches():
  x = jnp.ones((4, 4))
  once = 2 * 4**3

  def loop(x):
    x, _ = jax.lax.scan(lambda x, _: (jax.nn.relu(x @ x), None), x, length=5)
    return jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)

  assert counted(loop, x) == 8 * once
  assert counted(jax.checkpoint(loop), x) == 8 * once
  assert counted(jax.vmap(loop), x[None]) == 8 * once

  def branch(x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ x @ x, lambda: x @ x)

  assert counted(branch, x) == 2 * once
  assert counted(lambda x: (x @ x, x + 1)[1], x) == 0  # no result needs it


def test_agrees_with_the_compiler_where_there_are_no_loops():
  compiled, variables = tiny()
  image = jax.ShapeDtypeStruct((1, 256, 256, 3), np.uint8)
  traced = compiled.predict.trace(variables, None, image, ('student',))
  theirs = traced.lower().cost_analysis()['flops']
  assert counts.flops(traced.jaxpr) == pytest.approx(theirs, rel=0.03)


def test_attention_counts_every_shot():
  levels = ((64, 128), (16, 256), (4, 512))  # tokens and channels of stages
  heads = 8
  # Per pair of tokens: the score over all heads, and its share of two sums.
  shot = sum(2 * q * q * (c + 2 * heads) for q, c in levels)
  found = [counts.flops(teacher(shots).jaxpr) for shots in (1, 2, 8)]
  # A resize's contraction order may turn with the number of maps; not here.
  assert found[1] - found[0] == shot
  assert found[2] - found[1] == 6 * shot


def test_the_teachers_working_memory_does_not_grow_with_shots():
  few, many = (
    teacher(shots).lower().compile().memory_analysis().temp_size_in_bytes
    for shots in (2, 8)
  )
  assert many == pytest.approx(few, rel=0.05)


def check(row):
  assert set(row) == FIELDS
  lists = {'rates', 'calls_ms'}
  positive = FIELDS - {'what', 'shots', 'support_mb', 'start_s'} - lists
  assert all(row[name] > 0 for name in positive), row
  assert all(x > 0 for name in lists for x in row[name]), row
  assert row['least_ms'] == min(row['calls_ms']) <= row['ms']
  assert len(row['rates']) == 2
  if row['what'].startswith('train'):
    assert row['start_s'] > row['compile_s'] + row['first_s']
  else:
    assert row['start_s'] is None
  assert row['working_mb'] <= row['program_mb']


def test_test_time(tmp_path):
  out = tmp_path / 'deep' / 'speed.json'
  done = command(
    *CONFIG, '--what', 'backbone,teacher,student', '--shots', '2', '--out',
    out, '--students', 'light', '--ways', '2', '--batch_size', '3',
    '--repeats', '1',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'teacher, 2 shots: compiled in' in done.stderr
  results = json.loads(out.read_text())
  assert results['config']['model']['backbone']['name'] == 'resnet_tiny'
  assert results['versions']['jax'] == jax.__version__
  assert results['name'] == CONFIG[1]
  assert results['cpus'] == os.cpu_count()
  assert results['matrix_gflop_per_second'] > 0
  assert results['process_mb'] > 10
  rows = {(row['what'], row['shots']): row for row in results['rows']}
  assert list(rows) == [
    ('backbone', None), ('memorize', 2), ('teacher', 2),
    ('student light', None),
  ]  # fmt: skip
  for (what, shots), row in rows.items():
    check(row)
    assert f'\n{what}' in done.stdout
    images = shots if what == 'memorize' else 3
    assert row['per_second'] == pytest.approx(1e3 * images / row['ms'])
  keys = 4 * (64 * 128 + 16 * 256 + 4 * 512)
  masks = 4 * 2 * (64 + 16 + 4) + 2
  assert rows['teacher', 2]['support_mb'] == 2 * (keys + masks) / 1e6
  # Only the students lack the attention's projections.
  attention = sum(2 * (c * c + c) for c in (128, 256, 512))
  students = 2 * sum(
    c * 128 + 128 + 9 * 128**2 + 128 + 128 + 1 for c in (128, 256, 512)
  )
  held = {what: row['parameters'] for (what, _), row in rows.items()}
  assert held['student light'] == held['teacher'] - attention + students
  assert held['memorize'] == held['backbone'] + attention // 2


def test_the_papers_parameter_counts():
  """Of the distilled model on a ResNet-50; the original counts the fc too."""
  config = nucleus.get_config('backbone=resnet50')
  compiled = train_step.build(config, 2, parallel.mesh())
  variables = jax.eval_shape(compiled.draw)
  image = jax.ShapeDtypeStruct((1, 384, 384, 3), np.uint8)
  traced = compiled.predict.trace(variables, None, image, ('student',))
  known = variables.keys() - jax.eval_shape(compiled.start, variables).buffers
  fc, attention = 2048 * 1000 + 1000, 11_017_216
  found = counts.reads(traced, variables, known)
  assert sum(found.values()) == 137_992_464 - fc - attention


@pytest.mark.slow
def test_training(tmp_path):
  out = tmp_path / 'speed.md'
  results = bench.run(
    nucleus.get_config('smoke'),
    what=('train',),
    students=('light',),
    repeats=1,
    out=out,
  )
  transfer, distill = results['rows']
  assert transfer['what'] == 'train transferfss'
  assert distill['what'] == 'train distillfss light'
  for row in (transfer, distill):
    check(row)
    assert row['per_second'] == pytest.approx(1e3 / row['ms'])
    assert row['support_mb'] > 0
    # Five episodes, forward and twice as much backward.
    assert row['gflop'] > 10 * counts.flops(teacher(1).jaxpr) / 1e9
  assert distill['gflop'] > transfer['gflop']
  students = sum(
    c * 128 + 128 + 9 * 128**2 + 128 + 128 + 1 for c in (128, 256, 512)
  )
  assert distill['parameters'] == transfer['parameters'] + students
  assert out.read_text().startswith('| what | shots |')


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize('config', [bam, dcama, nucleus, pspnet], ids=str)
def test_a_random_step_is_what_the_task_gives(tmp_path, config):
  """So that what is timed, and lowered, is what a run does."""
  config = config.get_config('data=synthetic,smoke')
  data, task = tasks.load(config)
  program = train_step.build(config, data.ways, parallel.mesh())
  place = tasks.base.Place(program, parallel.mesh(), tmp_path, None)
  task = task(config, data, place, 2)
  theirs = task.as_batch(next(iter(task.batches())))
  random = np.random.default_rng(0)
  arrays, *ours = programs.random_step(config, data.ways, program.takes, random)
  assert shapes(tuple(ours)) == shapes(theirs)
  if config.task == 'adaptation':
    support = data.support
    assert shapes(arrays) == shapes(
      (support.images, support.labels.astype(np.int32))
    )
  elif config.system == 'bam':  # its base learner's classes
    assert arrays[0].shape == np.shape(data.train.values)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('config', 'rows'),
  [
    (
      pspnet.get_config('data=synthetic,smoke'),
      [('predict', None), ('train pspnet', None)],
    ),
    (
      nucleus.get_config('recipe=ours,smoke'),
      [('predict', None), ('train finetune', 5)],
    ),
    (
      bam.get_config('data=synthetic,smoke'),
      [('memorize', 1), ('predict', 1), ('train bam', 1)],
    ),
    (
      nucleus.get_config('teacher=bam,smoke'),
      [('memorize', 5), ('predict', 5), ('train distillfss', 5)],
    ),
  ],
  ids=['pspnet', 'finetune', 'bam', 'taught'],
)
def test_other_systems(config, rows):
  results = bench.run(config, repeats=1)
  assert [(x['what'], x['shots']) for x in results['rows']] == rows
  for row in results['rows']:
    check(row)
  with pytest.raises(ValueError, match=r"no 'teacher'; there are: predict"):
    bench.run(config, what=('teacher',))


def test_bytes_of_products():
  def moved(fn, *args, **options):
    jaxpr = jax.jit(fn).trace(*args).jaxpr
    return counts.product_bytes(jaxpr, **options)

  x, y = jnp.ones((4, 6)), jnp.ones((6, 8), jnp.bfloat16)
  both = (4 * 6 + 6 * 8 + 4 * 8) * 4
  assert moved(lambda x, y: jnp.tanh(x) @ y.astype(x.dtype), x, y) == both
  half = (4 * 6 + 6 * 8 + 4 * 8) * 2
  assert moved(lambda x, y: x.astype(y.dtype) @ y, x, y) == half
  square = jnp.ones((5, 5))

  def loop(x):
    return jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)

  assert moved(loop, square) == 3 * moved(loop, square, loops=False)
  assert moved(loop, square, loops=False) == 3 * 25 * 4


def test_bounds():
  chip = roofline.Chip({'float32': 100.0}, bandwidth=2.0, memory=16.0)
  # 100 GFLOP at 100 TFLOP/s are 1 ms, 1 GB at 2 TB/s is half of one.
  assert roofline.bound(100, 1, chip, 'float32') == (1.0, 'compute')
  assert roofline.bound(10, 1, chip, 'float32') == (0.5, 'memory')


def test_roofline(tmp_path):
  out = tmp_path / 'roofline.json'
  found = roofline.run(
    nucleus.get_config('smoke'),
    what=('teacher',),
    shots=('2',),
    batch_size=8,
    devices=(1, 4),
    out=out,
  )
  assert json.loads(out.read_text())['rows'] == found['rows']
  rows = {(row['what'], row['devices']): row for row in found['rows']}
  assert list(rows) == [
    (what, n) for what in ('memorize', 'teacher') for n in (1, 4)
  ]
  # The support is on every device, queries are shared: eight, or two of them.
  memorize, one = rows['memorize', 1], rows['teacher', 1]
  assert rows['memorize', 4] == {**memorize, 'devices': 4}
  part = rows['teacher', 4]
  assert one['gflop'] > 3.9 * part['gflop']
  assert one['memory_gb'] > part['memory_gb'] > 0.01
  chips = one['chips']
  assert list(chips) == ['H100', 'H200', 'v5e']
  for name, chip in roofline.CHIPS.items():
    of = chips[name]
    assert of['ms'] >= one['gflop'] / chip.rates['float32']
    assert of['ms'] >= one['gb'] / chip.bandwidth
  assert chips['v5e']['ms'] > chips['H100']['ms'] >= chips['H200']['ms']
  assert 'v5e ms' in roofline.table(found)
  assert not roofline.platform._made_for.get()


@pytest.mark.slow
def test_roofline_of_training():
  made = nucleus.get_config('smoke')
  found = roofline.run(made, what=('train',), students=(), devices=(1, 8))
  transfer, parts = found['rows']
  assert transfer['what'] == parts['what'] == 'train transferfss'
  # Five episodes, or one of them and the same state.
  assert transfer['gflop'] == pytest.approx(5 * parts['gflop'], rel=0.2)
  assert transfer['memory_gb'] > parts['memory_gb'] > 0.01
  assert transfer['chips']['H100']['xla_ms'] > 0


def test_other_devices_have_forms_of_their_own():
  image, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))

  def traced():  # made anew: jax.jit would not trace the same one twice
    return str(
      jax.make_jaxpr(lambda *x: conv.conv2d(*x, groups=4))(image, kernel)
    )

  assert 'custom_vjp' in traced()
  with platform.made_for('tpu'):
    assert 'custom_vjp' not in traced()
  assert 'custom_vjp' in traced()


def measured(tmp_path, name, rows, *, config='configs/x.py', **changes):
  """A file as one config leaves it; rows are (what, calls, rates)."""
  path = tmp_path / name
  one = {
    'name': config, 'config': {'steps': 1}, 'ways': 1, 'batch_size': 1,
    'process_mb': 100.0,
    'rows': [
      {'what': what, 'shots': 5, 'calls_ms': calls, 'rates': rates,
       'gflop': 2.0, 'parameters': 7, 'working_mb': 3.0}
      for what, calls, rates in rows
    ],
    **changes,
  }  # fmt: skip
  path.write_text(json.dumps(one))
  return path


def test_compare(tmp_path):
  steady = [10.0, 10.1, 10.2]
  before = measured(
    tmp_path, 'a.json',
    [('same', steady, [100, 102]), ('quick', steady, [100, 100]),
     ('slow', steady, [100, 100]), ('noisy', [10, 14, 9], [100, 100]),
     ('gone', steady, [100, 100])],
  )  # fmt: skip
  now = measured(
    tmp_path, 'b.json',
    # A machine of half the rate takes twice the time.
    [('same', [20.1, 20.2, 20.5], [50, 51]), ('quick', steady, [50, 50]),
     ('slow', [20.1, 20.2, 20.5], [100, 100]),
     ('noisy', [12, 13, 11], [100, 100]), ('new', steady, [100, 100])],
    process_mb=130.0, ways=2, config='configs/y.py',
  )  # fmt: skip
  said = compare.compare(before, now).splitlines()
  verdicts = {line.split()[0]: line.split()[-1] for line in said[2:6]}
  assert verdicts['quick'] == 'faster'
  assert verdicts['slow'] == 'slower'
  assert verdicts['same'].endswith('%')
  assert verdicts['noisy'].endswith('%')
  assert 'same, 5 shots: process_mb was 100, is 130' in said
  assert f'only in {before}: gone, 5 shots' in said
  assert f'only in {now}: new, 5 shots' in said
  assert 'not the same: ways was 1, is 2' in said
  assert not any('gflop' in line for line in said)


def test_compare_finds_a_config_in_a_suite(tmp_path):
  row = ('train', [10.0, 10.1], [100, 100])
  one = measured(tmp_path, 'one.json', [row])
  other = measured(tmp_path, 'other.json', [row], config='configs/y.py')
  whole = tmp_path / 'suite.json'
  parts = [json.loads(path.read_text()) for path in (other, one)]
  whole.write_text(json.dumps({'suite': parts, 'failed': {'z': 'why'}}))
  said = compare.compare(one, whole).splitlines()
  assert said[2].split()[:2] == ['configs/x.py', 'train']
  assert said[3:] == [
    f'only in {whole}: configs/y.py train, 5 shots', f'failed in {whole}: z',
  ]  # fmt: skip


@pytest.mark.parametrize(
  'text',
  ['no json', '[]', '{}', '{"suite": 3}', '{"suite": [1], "failed": {}}',
   '{"rows": [{"what": "train", "shots": 5, "ms": 3.0}]}'],
)  # fmt: skip
def test_files_that_are_not_of_speed(tmp_path, text):
  path, good = tmp_path / 'a.json', measured(tmp_path, 'b.json', [])
  path.write_text(text)
  with pytest.raises(ValueError, match=r'a\.json .*: measure again') as error:
    compare.compare(good, path)
  assert '\n' not in str(error.value)


def test_suite(tmp_path, capsys):
  out = tmp_path / 'suite.json'
  good = f'{CONFIG[1]} --what=backbone'
  bad = f'{CONFIG[1]} --what=nothing'
  failed = suite.run((bad, good), repeats=2, out=out)
  assert list(failed) == [bad]
  assert "--what: no 'nothing'" in failed[bad]
  whole = json.loads(out.read_text())
  assert whole['failed'] == failed
  (one,) = whole['suite']
  assert one['case'] == good
  assert [row['what'] for row in one['rows']] == ['backbone']
  check(one['rows'][0])
  said = capsys.readouterr().err
  assert f'2/2 {good}, about ' in said
  assert 'failed: it ended with 1' in said
  # Nothing is faster than itself.
  compared = compare.compare(out, out)
  assert 'faster' not in compared
  assert '+0%' in compared


@pytest.mark.parametrize('case', suite.CASES)
def test_the_suites_cases_can_be_asked_for(case):
  name, *options = case.split()
  given = dict(option.removeprefix('--').split('=') for option in options)
  made = configs.load(str(ROOT / name))
  assert given.keys() <= {'what', 'shots', 'students', 'ways'}
  lists = {key: x.split(',') for key, x in given.items() if key != 'ways'}
  what, shots, _ = programs.chosen(
    made,
    lists.get('what'),
    lists.get('shots'),
    lists.get('students', ('full', 'light')),
  )
  assert what
  assert shots or made.task == 'dense'


@pytest.mark.parametrize(
  ('config', 'trains'),
  [
    ('demo.py:smoke', False),
    ('kdas.py:data=synthetic,smoke', True),
    ('bam.py:data=synthetic,smoke', True),
  ],
)
def test_reading(config, trains, monkeypatch):
  """Each way that a config's run reads images, beside decoding alone."""
  monkeypatch.setattr(reading, 'MOST', 4)
  rows = reading.run(configs.load(f'configs/{config}'))
  named = [row['what'] for row in rows]
  assert named == [
    'decoding', 'records', 'test batches', *['training batches'] * trains
  ]  # fmt: skip
  assert rows[0]['of_decoding'] == 1
  for row in rows:
    assert row['images'] >= (4 if row['what'] == 'training batches' else 1)
    assert row['ms'] > 0
    assert row['of_decoding'] == rows[0]['ms'] / row['ms']
  assert 'of_decoding' in reading.table(rows)


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (('--suite', '--out', 'x.md'), 'must end in .json'),
    (('--suite', '--compare', 'a', 'b'), 'give one of --suite, --compare'),
    (('--suite', '--out', 'x.json', *CONFIG), 'takes no --config'),
    (('--compare', '--repeats', '3', 'a', 'b'), 'takes no --repeats'),
    (('--compare', 'no.json', 'b.json'), 'no.json'),
    (('--reading', *CONFIG, '--out', 'x.json'), '--reading takes no --out'),
    (('--reading',), '--config is missing'),
    ((), '--config is missing'),
  ],
)
def test_errors_without_a_config(arguments, said):
  refused(said, *arguments)


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (('--what', 'student,teachr'), "--what: no 'teachr'; there are: backbone"),
    (('--students', 'ful'), "no 'ful'; there are: full, light, attention"),
    (('--shots', '1,x'), '--shots'),
    (('--shots', '0'), '--shots'),
    (('--out', 'speed.txt'), '.json or .md'),
    (('--out', '/dev/null/speed.json'), 'cannot write /dev/null/speed.json'),
    (('--repeats', '0'), '--repeats=0'),
    (('rest',), 'rest'),
  ],
)
def test_errors_are_one_line(arguments, said):
  refused(said, *CONFIG, *arguments)


def refused(said, *arguments):
  done = command(*arguments)
  assert done.returncode == 1
  assert 'Traceback' not in done.stderr
  lines = [line for line in done.stderr.splitlines() if 'error: ' in line]
  assert len(lines) == 1, done.stderr
  assert said in lines[0]
