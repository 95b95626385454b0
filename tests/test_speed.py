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
from distillfss_jax import parallel, speed, tasks, train_step
from distillfss_jax.types import Support

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIDE = 64
CONFIG = ('--config', 'configs/nucleus.py:smoke')
FIELDS = {
  'what', 'shots', 'ms', 'least_ms', 'per_second', 'parameters', 'support_mb',
  'working_mb', 'program_mb', 'compile_s', 'first_s', 'gflop', 'of_rate',
}  # fmt: skip


def counted(fn, *args):
  return speed.flops(jax.jit(fn).trace(*args).jaxpr)


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
  assert speed.flops(traced.jaxpr) == pytest.approx(theirs, rel=0.03)


def test_attention_counts_every_shot():
  levels = ((64, 128), (16, 256), (4, 512))  # tokens and channels of stages
  heads = 8
  # Per pair of tokens: the score over all heads, and its share of two sums.
  shot = sum(2 * q * q * (c + 2 * heads) for q, c in levels)
  found = [speed.flops(teacher(shots).jaxpr) for shots in (1, 2, 8)]
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
  positive = FIELDS - {'what', 'shots', 'support_mb'}
  assert all(row[name] > 0 for name in positive), row
  assert row['least_ms'] <= row['ms']
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
  found = speed.reads(traced, variables, known)
  assert sum(found.values()) == 137_992_464 - fc - attention


@pytest.mark.slow
def test_training(tmp_path):
  out = tmp_path / 'speed.md'
  results = speed.run(
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
    assert row['gflop'] > 10 * speed.flops(teacher(1).jaxpr) / 1e9
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
  arrays, *ours = speed.random_step(config, data.ways, program.takes, random)
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
  results = speed.run(config, repeats=1)
  assert [(x['what'], x['shots']) for x in results['rows']] == rows
  for row in results['rows']:
    check(row)
  with pytest.raises(ValueError, match=r"no 'teacher'; there are: predict"):
    speed.run(config, what=('teacher',))


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
  done = command(*CONFIG, *arguments)
  assert done.returncode == 1
  assert 'Traceback' not in done.stderr
  lines = [line for line in done.stderr.splitlines() if 'error: ' in line]
  assert len(lines) == 1, done.stderr
  assert said in lines[0]
