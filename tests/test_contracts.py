"""What every file of a kind promises, asked of every file that is there.

Nothing is compiled: shapes are traced. A new file is tested by being there.
"""

import functools
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillfss_jax import (
  backbones,
  config,
  datasets,
  models,
  params,
  systems,
  tasks,
)
from distillfss_jax.data import core
from distillfss_jax.evaluators.base import Evaluator
from distillfss_jax.models.base import FewShotSegmenter
from distillfss_jax.systems.base import System
from distillfss_jax.types import (
  Dense,
  Episode,
  Items,
  Losses,
  Prediction,
  Support,
  Table,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZE, WAYS, SHOTS, BATCH = 64, 2, 3, 2


def shape(*sizes, dtype='float32'):
  return jax.ShapeDtypeStruct(sizes, dtype)


@functools.cache
def smoke_configs():
  """{file: its smallest config} of all that train something."""
  found = {}
  for path in sorted((ROOT / 'configs').glob('[!_]*.py')):
    if path.stem != 'common':
      found[path.stem] = config.load(f'{path}:smoke')
  return found


def config_of(system):
  """A config that trains a system, of the embedded data's size."""
  by_system = {}
  for made in smoke_configs().values():  # the first that trains it
    by_system.setdefault(made.system, made)
  if system == 'transferfss':  # an argument of all others
    return config.load(f'{ROOT}/configs/nucleus.py:method=transfer,smoke')
  assert system in by_system, (
    f'no config trains systems/{system}.py: add configs/{system}.py'
  )
  return by_system[system]


# Systems.


@functools.cache
def built(name):
  made = config_of(name)
  ways = 1 if systems_module(name).takes is Episode else WAYS
  system, draw = systems.build(made, ways)
  return made, ways, system, jax.eval_shape(draw)


def systems_module(name):
  """The class of a system, as its file defines it."""
  module = importlib.import_module(f'distillfss_jax.systems.{name}')
  [found] = [
    x
    for _, x in inspect.getmembers(module, inspect.isclass)
    if issubclass(x, System) and x.__module__ == module.__name__
  ]
  return found


def calls(system, method, variables, *args):
  """The shapes of what a method of a system gives."""
  graph, abstract = nnx.split(system)

  def run(variables, *args):
    merged = nnx.merge(graph, params.replace(abstract, variables), copy=True)
    return getattr(merged, method)(*args)

  return jax.eval_shape(run, variables, *args)


def batch_of(takes, ways):
  images = shape(BATCH, SIZE, SIZE, 3, dtype='uint8')
  labels = shape(BATCH, SIZE, SIZE, dtype='uint8')
  if takes is Table:
    return Table(shape(BATCH, 1 + SHOTS, dtype='int32'))
  if takes is Dense:
    return Dense(images, labels)
  return Episode(
    images,
    labels,
    shape(BATCH, SHOTS, SIZE, SIZE, 3, dtype='uint8'),
    shape(BATCH, SHOTS, SIZE, SIZE, dtype='uint8'),
    labels,
    shape(BATCH, dtype='int32'),
  )


def items():
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH))
  return Items(keys, shape(BATCH, dtype='bool'))


@pytest.mark.parametrize('name', systems.names())
def test_a_system_says_what_it_is(name):
  made, ways, system, variables = built(name)
  assert system.takes in (Table, Episode, Dense)
  assert system.roles
  assert system.ways == ways
  assert system.updates
  paths = set(params.shapes(nnx.state(system, nnx.Param)))
  assert set(params.shapes(system)) == set(variables)
  assert system.trains
  assert system.trains <= paths
  for regex in system.stacked:
    for path in params.matching([regex], paths):
      assert variables[path].shape[0] == ways, path
  for of_set, regexes in system.sets().items():
    assert params.matching(regexes, paths), of_set
  for row in system.sources(made):
    for part in row.parts:
      below = {f'{part.path}{path}' for path in params.shapes(part.module)}
      assert below <= set(variables), row
  source = inspect.getsource(inspect.getmodule(type(system)))
  assert any(c.isdigit() for c in source.partition('"""')[2][:600]), (
    'the docstring names no paper'
  )


@pytest.mark.parametrize('name', systems.names())
def test_a_system_keeps_the_contract_of_the_step(name):
  _, ways, system, variables = built(name)
  if system.coupled:
    pytest.skip('its losses reach over devices: its own tests run them')
  shared = ()
  if system.takes is Table:
    images = shape(SHOTS + 1, SIZE, SIZE, 3, dtype='uint8')
    labels = shape(SHOTS + 1, SIZE, SIZE, dtype='int32')
    shared = calls(system, 'shared', variables, images, labels)
  batch = batch_of(system.takes, ways)
  found = calls(system, 'losses', variables, shared, batch, items())
  assert isinstance(found, Losses)
  assert found.each.shape == (BATCH,)
  assert found.each.dtype == jnp.float32
  assert {x.shape for x in found.parts.values()} <= {(BATCH,)}
  for counts in found.counts.values():
    assert counts.shape == (BATCH, 1 + ways, 1 + ways)
  buffers = {p: x for p, x in variables.items() if p.endswith(('mean', 'var'))}
  after = calls(
    system, 'after_step', variables, buffers, shared, batch, items()
  )
  assert params.shapes(after) == params.shapes(buffers)
  seen = calls(system, 'seen', variables, shared, batch, items())
  assert (seen is None) or seen.shape == (ways,)
  assert not system.stacked or seen is not None


@pytest.mark.parametrize('name', systems.names())
def test_a_system_predicts(name):
  _, ways, system, variables = built(name)
  support = Support(
    shape(1, SHOTS, SIZE, SIZE, 3, dtype='uint8'),
    shape(1, SHOTS, SIZE, SIZE, ways),
    shape(1, SHOTS, ways, dtype='bool'),
  )
  memory = None
  if system.takes is not Dense:
    memory = calls(system, 'memorize', variables, support)
  images = shape(BATCH, SIZE, SIZE, 3, dtype='uint8')
  graph, abstract = nnx.split(system)

  def predict(variables, memory, images):
    merged = nnx.merge(graph, params.replace(abstract, variables))
    return merged.predict(images, memory, system.roles)

  answers = jax.eval_shape(predict, variables, memory, images)
  assert set(answers) == set(system.roles)
  for answer in answers.values():
    assert isinstance(answer, Prediction)
    assert answer.logits.shape == (BATCH, SIZE, SIZE, 1 + ways)
    assert answer.logits.dtype == jnp.float32


@pytest.mark.parametrize('teacher', ['dcama', 'bam', 'hdmnet', 'ifa'])
def test_a_student_gives_what_its_teacher_declares(teacher):
  made = config.load(f'{ROOT}/configs/nucleus.py:teacher={teacher},smoke')
  system, draw = systems.build(made, WAYS)
  graph, abstract = nnx.split(system)
  masks = teacher in ('bam', 'hdmnet')
  assert system.teacher.masks_support == masks

  def run(variables, images, support):
    system = nnx.merge(graph, params.replace(abstract, variables), copy=True)
    memory, pyramid = system.memorize(support), system.teacher.encode(images)
    coarse = system.teacher.correlate(pyramid, memory)
    lessons, learnt = system.teacher.lessons(coarse), system.student(pyramid)
    logits = [system.teacher.decode(pyramid, x) for x in (lessons, learnt)]
    return lessons, learnt, logits

  support = Support(
    shape(1, 1, SIZE, SIZE, 3, dtype='uint8'),
    shape(1, 1, SIZE, SIZE, WAYS),
    shape(1, 1, WAYS, dtype='bool'),
  )
  images = shape(BATCH, SIZE, SIZE, 3, dtype='uint8')
  found = jax.eval_shape(run, jax.eval_shape(draw), images, support)
  lessons, learnt, logits = found
  for taught, slot, own in zip(
    lessons, system.teacher.slots, learnt, strict=True
  ):
    assert own.shape[:4] == (
      BATCH, WAYS, *((1, 1) if slot.kind == 'vector' else taught.shape[2:4])
    )  # fmt: skip
    assert taught.shape == own.shape
  assert logits[0] == logits[1]


# Tasks, models, backbones, datasets.


@pytest.mark.parametrize('name', tasks.names())
def test_a_task_has_data_and_a_loop(name):
  module = importlib.import_module(f'distillfss_jax.tasks.{name}')
  assert issubclass(module.Data, tasks.base.Data)
  assert issubclass(module.Task, tasks.base.Task)
  assert module.Task.gives in (Table, Episode, Dense)
  assert isinstance(module.Task.own, bool)
  assert not inspect.isabstract(module.Task)


@pytest.mark.parametrize('name', models.names())
def test_a_model_states_its_paper_and_is_built_by_name(name):
  module = importlib.import_module(f'distillfss_jax.models.{name}')
  signature = inspect.signature(module.build)
  first, more = list(signature.parameters)[:3], list(signature.parameters)[3:]
  assert first == ['config', 'image_size', 'rngs']
  assert more in ([], ['classes'])
  assert any(c.isdigit() for c in module.__doc__), 'it names no paper'
  for _, found in inspect.getmembers(module, inspect.isclass):
    if issubclass(found, FewShotSegmenter) and found.__module__ == name:
      assert not inspect.isabstract(found)


@pytest.mark.parametrize('name', sorted(backbones.variants()))
def test_a_backbone_is_what_it_declares(name):
  size = 128 if 'tiny' in name else 384
  make = functools.partial(backbones.build, name, image_size=size)
  backbone = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  graph, state = nnx.split(backbone)
  images = shape(1, size, size, 3)
  pyramid = jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, images)
  for i, x in enumerate(pyramid):
    side = -(-size // backbone.strides[i])
    assert abs(x.shape[2] - side) <= 1, (name, i)
    assert x.shape == (
      1, backbone.depths[i], x.shape[2], x.shape[2], backbone.channels[i],
    )  # fmt: skip
  shapes = params.shapes(backbone)
  empty = {p: np.broadcast_to(np.float32(0), s) for p, s in shapes.items()}
  for table in backbone.torch_tables().values():
    names = params.to_torch(empty, table)
    back = params.from_torch(names, table, shapes)
    assert params.shapes(back) == dict(shapes)


@pytest.mark.parametrize('name', datasets.names())
def test_a_dataset_can_be_loaded_and_says_how(name):
  module = datasets.module(name)
  assert module.__doc__
  assert callable(module.load)
  assert module.load.__doc__ or name == 'folder'
  if hasattr(module, 'prepare'):
    assert list(inspect.signature(module.prepare).parameters)[:2] == [
      'raw', 'data_dir',
    ]  # fmt: skip
  if hasattr(module, 'pool'):
    assert 'part' in inspect.signature(module.pool).parameters


@pytest.mark.parametrize(
  'name',
  [x for x in datasets.names() if not hasattr(datasets.module(x), 'prepare')],
)
def test_embedded_data_are_a_dataset(name):
  made = datasets.load(name, num_train=3, num_test=2, image_size=64)
  assert isinstance(made, core.Dataset)
  assert len(made.palette) == 1 + len(made.classes)
  for source in (made.train, made.test):
    record = source[0]
    assert record['id'] == source.ids[0]
    assert record['image'].shape == (*source.sizes[0], 3)
    assert record['label'].shape == tuple(source.sizes[0])
    assert record['label'].max() <= len(made.classes)
    assert source.present.shape == (len(source), len(made.classes))


def test_evaluators_are_found():
  folder = ROOT / 'distillfss_jax' / 'evaluators'
  kinds = []
  for path in folder.glob('[!_]*.py'):
    module = importlib.import_module(f'distillfss_jax.evaluators.{path.stem}')
    kinds += [
      x
      for _, x in inspect.getmembers(module, inspect.isclass)
      if issubclass(x, Evaluator) and x is not Evaluator
    ]
  assert len(set(kinds)) >= 2
  assert not any(map(inspect.isabstract, kinds))
