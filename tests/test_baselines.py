"""A published few-shot method on a target dataset, as it is."""

import json

import jax
import numpy as np
import pytest

from configs import bam, nucleus
from distillfss_jax import parallel, systems, train, train_step
from distillfss_jax.measuring import programs
from distillfss_jax.pretrained import weights


def small(method, **changes):
  """The smoke run of a baseline on drawn images."""
  config = nucleus.get_config(f'method={method},shots=3,smoke')
  with config.unlocked():
    config.data.name = 'synthetic'
    config.data.args = {'num_train': 6, 'num_test': 4, 'image_size': 64}
  config.eval.panels = 0
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.slow
@pytest.mark.parametrize('method', ['bam', 'hdmnet', 'ifa'])
def test_a_baseline_is_scored_without_a_step(tmp_path, method):
  config = small(method)
  results = train.run(config, tmp_path / 'run')
  assert results['steps'] == 0
  for size in ('test', 'test_native'):
    assert set(results[size]) == {'teacher'}
  # Nothing moves, and a finished run is not run again.
  again = train.run(config, tmp_path / 'run')
  for name in ('miou', 'fb_iou', 'f1'):  # the file has six digits
    before, now = (x['test']['teacher'][name] for x in (results, again))
    assert now == pytest.approx(before, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('teacher', ['bam', 'hdmnet', 'ifa'])
@pytest.mark.parametrize('method', ['distill', 'transfer'])
def test_it_is_a_teacher(tmp_path, teacher, method):
  config = nucleus.get_config(
    f'teacher={teacher},method={method},data=synthetic,smoke'
  )
  results = train.run(config, tmp_path / 'run')
  roles = {'teacher'} if method == 'transfer' else {'teacher', 'student'}
  assert set(results['test']) == roles
  assert results['steps'] == 4


def test_several_rounds_cannot_be_taught():
  config = nucleus.get_config('teacher=bam,shots=4,smoke')
  config.episodes.subsample = 0  # all others: three
  program = train_step.build(config, 1, parallel.mesh())
  variables = jax.eval_shape(program.draw)
  random = np.random.default_rng(0)
  arrays, batch, _ = programs.random_step(config, 1, program.takes, random)
  shared = jax.eval_shape(program.shared, variables, *arrays)
  state = jax.eval_shape(program.start, variables)
  steps = jax.tree.map(lambda x: x[None], batch)
  places = np.arange(len(batch.rows), dtype=np.int32)[None]
  with pytest.raises(ValueError, match=r'episodes\.subsample to 1 or less'):
    program.dispatch.trace(state, shared, steps, places, np.int32(1))


def test_a_published_method_has_no_teacher():
  with pytest.raises(ValueError, match='teacher=bam belongs to method=distill'):
    nucleus.get_config('method=hdmnet,teacher=bam')


def test_the_model_of_ifa_takes_any_number_of_shots():
  config = nucleus.get_config('method=ifa,shots=25')
  assert (config.model.name, config.data.image_size) == ('ssp', 400)
  assert config.model.backbone.name == 'resnet50_ssp'
  for arg in ('method=ifa', 'teacher=ifa'):
    with pytest.raises(ValueError, match='model_shots=5 is of bam and hdmnet'):
      nucleus.get_config(f'{arg},model_shots=5')
  config = nucleus.get_config('teacher=ifa,shots=25')
  assert config.optim.trainable == ('convolutions', 'student')
  assert config.episodes.subsample == 1  # as for DCAMA


def test_a_run_on_a_source_is_its_model(tmp_path, monkeypatch):
  """The folder of configs/bam.py, whose system calls the model otherwise."""
  source, _ = systems.build(bam.get_config('data=synthetic,smoke'), 1)
  system, _ = systems.build(small('bam', **{'model.fields.classes': 10}), 1)
  shapes = weights.shapes_of([weights.Part('', source)])
  monkeypatch.setattr(weights, 'from_folder', lambda _: dict(shapes))
  folder = tmp_path / 'run'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({}))
  [row, _] = system.sources(small('bam', **{'model.init': str(folder)}))
  found = weights._of_folder(weights.from_folder(folder), row)
  assert found == weights.shapes_of(row.parts)
