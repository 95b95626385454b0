"""Functions as StableHLO files, and what lowers for which platform."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillfss_jax import config, parallel, train_step
from distillfss_jax.exporting import stablehlo
from distillfss_jax.measuring import programs

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'

_WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def _scores(images):
  x = images.astype(jnp.float32).mean((1, 2)) @ _WEIGHT
  return x, x.argmax(-1)


def test_one_file_for_all_platforms(tmp_path):
  path = tmp_path / 'x.stablehlo'
  inputs = {'images': ((stablehlo.BATCH, 8, 8, 3), np.uint8)}
  size = stablehlo.save(path, _scores, inputs, record={'classes': ['a']})
  assert size == path.stat().st_size
  program = stablehlo.Program(path)
  assert program.record == {'classes': ['a']}
  assert program.platforms == ('cpu', 'cuda', 'tpu')
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  for batch in (1, 5):
    for ours, theirs in zip(
      program(images[:batch]), _scores(images[:batch]), strict=True
    ):
      np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_files_that_are_not_ours(tmp_path):
  path = tmp_path / 'x.stablehlo'
  path.write_bytes(b'no program')
  with pytest.raises(ValueError, match=r'x\.stablehlo is no StableHLO file'):
    stablehlo.Program(path)


def test_what_lowers():
  shapes = {'x': jax.ShapeDtypeStruct((4, 4), np.float32)}
  step = jax.jit(lambda tree, key: tree['x'] @ jax.random.normal(key, (4, 2)))
  stablehlo.lowers_for(step, (shapes, jax.random.key(0)))


def test_what_does_not_lower():
  x = jax.ShapeDtypeStruct((4, 4), np.float32)
  stablehlo.lowers_for(jnp.linalg.eigvals, (x,), ['cpu'])
  with pytest.raises(ValueError, match=r'does not lower for tpu: .*eig'):
    stablehlo.lowers_for(jnp.linalg.eigvals, (x,), ['cpu', 'tpu'])


def _steps():
  """The training steps of all configs, those alike once: (name, config)."""
  found = {}
  for path in sorted(CONFIGS.glob('[!_]*.py')):
    if path.stem != 'common':
      made = config.load(f'{path}:smoke')
      alike = made.system, made.model.name, made.model.backbone.name
      found.setdefault(alike, pytest.param(made, id=path.stem))
  for name in ('recipe=unet', 'method=transfer', 'method=bam', 'method=hdmnet'):
    made = config.load(f'{CONFIGS}/nucleus.py:{name},smoke')
    alike = made.system, made.model.name, made.model.backbone.name
    found.setdefault(alike, pytest.param(made, id=name))
  return list(found.values())


@pytest.mark.parametrize('made', _steps())
def test_the_step_of_every_config_lowers_for_gpu_and_tpu(made):
  """Nothing is compiled: it is what can be said without the devices."""
  mesh, random = parallel.mesh(), np.random.default_rng(0)
  program = train_step.build(made, 1, mesh)
  variables = jax.eval_shape(program.draw)
  arrays, batch, valid = programs.random_step(made, 1, program.takes, random)
  shared = jax.eval_shape(program.shared, variables, *arrays)
  places = np.arange(program.rows(len(valid)), dtype=np.int32)[None]
  rows = places.shape[1]
  batches = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, rows, *x.shape[1:]), x.dtype), batch
  )
  state = jax.eval_shape(program.start, variables)
  step = state, shared, batches, places, np.int32(1)
  stablehlo.lowers_for(program.dispatch, step, ['cuda', 'tpu'])
