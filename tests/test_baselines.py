"""A published few-shot method on a target dataset, as it is."""

import json

import pytest

from configs import bam, nucleus
from distillfss_jax import systems, train
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
@pytest.mark.parametrize('method', ['bam', 'hdmnet'])
def test_a_baseline_is_scored_without_a_step(tmp_path, method):
  config = small(method)
  results = train.run(config, tmp_path / 'run')
  assert results['steps'] == 0
  for size in ('test', 'test_native'):
    assert set(results[size]) == {'teacher'}
  # Nothing moves, and a finished run is not run again.
  again = train.run(config, tmp_path / 'run')
  assert again['test'] == results['test']


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
