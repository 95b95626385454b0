"""The code that docs/add-a-method.md shows is there, or runs as it stands."""

import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillfss_jax import config as configs
from distillfss_jax import models, params, systems, tasks
from distillfss_jax.types import Items, Table

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'add-a-method.md'


def shown():
  """{file that a block names in its first line: texts of its blocks}."""
  found = {}
  text = PAGE.read_text()
  for file, code in re.findall(
    r'^```python\n# (\S+)\n(.*?)^```', text, re.M | re.S
  ):
    found.setdefault(file, []).append(code)
  return found


BLOCKS = shown()
THERE = [file for file in BLOCKS if (ROOT / file).exists()]


def test_every_block_names_its_file():
  assert PAGE.read_text().count('```python') == sum(map(len, BLOCKS.values()))
  new = set(BLOCKS) - set(THERE)
  assert new == {
    'configs/pair.py', 'configs/prototype.py',
    'distillfss_jax/models/prototype.py',
  }  # fmt: skip


@pytest.mark.parametrize('file', THERE)
def test_what_is_shown_of_a_file_is_there(file):
  """Parts between lines of dots, in their order."""
  text = (ROOT / file).read_text()
  for code in BLOCKS[file]:
    place = 0
    for part in re.split(r'^\.\.\.\n', code, flags=re.M):
      place = text.find(part, place)
      assert place >= 0, f'{file} has not, or not there:\n{part}'


@pytest.fixture
def write(monkeypatch, tmp_path):
  """Writes a block's file, where models are found too; gives its path."""
  monkeypatch.setattr(models, '__path__', [*models.__path__, str(tmp_path)])
  throwaway = str(ROOT / 'tests' / 'throwaway')
  monkeypatch.setattr(systems, '__path__', [*systems.__path__, throwaway])

  def put(file):
    path = tmp_path / file.replace('configs/', 'config_').rpartition('/')[2]
    [code] = BLOCKS[file]
    path.write_text(code)
    return path

  return put


@pytest.mark.parametrize('arg', ['', ':smoke'])
def test_the_config_of_a_system(write, arg):
  config = configs.load(f'{write("configs/pair.py")}{arg}')
  data, task = tasks.load(config)
  assert (data.ways, len(data.held_out)) == (2, 16)
  system, _ = systems.build(config, data.ways)
  assert system.takes is task.gives
  assert 'student/outer/kernel' in system.trains
  assert not any(path.startswith('teacher/') for path in system.trains)


@pytest.mark.parametrize('kind', ['distillfss', 'transferfss'])
def test_the_config_of_a_model_and_its_system(write, kind):
  write('distillfss_jax/models/prototype.py')
  config = configs.load(f'{write("configs/prototype.py")}:smoke')
  config.system = kind
  if kind == 'transferfss':
    config.optim.trainable = ('head',)
  system, draw = systems.build(config, 2)
  graph, abstract = nnx.split(system)
  images = jnp.zeros((3, 64, 64, 3), jnp.uint8)
  labels = jnp.zeros((3, 64, 64), jnp.int32)
  items = Items(jax.random.split(jax.random.key(0), 3), jnp.ones(3, bool))
  batch = Table(jnp.array([[0, 1], [1, 2], [2, 0]]))

  def step(variables):
    made = nnx.merge(graph, params.replace(abstract, variables))
    return made.losses(made.shared(images, labels), batch, items)

  losses = jax.eval_shape(step, jax.eval_shape(draw))
  assert losses.each.shape == (3,)
  assert set(losses.parts) <= {'teacher', 'student', 'coarse'}


def test_the_model_keeps_what_the_page_asks_for(write):
  """An absent shot has no influence, an absent way has finite gradients."""
  write('distillfss_jax/models/prototype.py')
  module = importlib.import_module('distillfss_jax.models.prototype')
  backbone = nnx.Module()
  backbone.channels = (4, 4, 4, 4)
  model = module.Prototype(backbone, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  pyramid = tuple(draw(1, 1, 2, 2, 4) for _ in range(4))
  masks = (draw(1, 2, 8, 8, 2) > 0).astype(np.float32)
  present = np.array([[[True, False], [False, False]]])

  def answer(x):
    memory = model.memorize((x,) * 4, masks, present)
    return model.segment(pyramid, memory, (8, 8)).logits

  shots = draw(1, 2, 1, 2, 2, 4)
  other = shots.copy()
  other[:, 1] = draw(1, 1, 2, 2, 4)
  np.testing.assert_array_equal(answer(shots), answer(other))
  assert not np.array_equal(answer(shots), answer(shots[:, ::-1]))
  grads = jax.grad(lambda x: jnp.sin(answer(x)[..., :2]).sum())(shots)
  assert np.isfinite(grads).all()
  assert np.abs(grads[:, 0]).max() > 0
