"""Runs of random weights, as training leaves them, in no time."""

import json

import numpy as np

from configs import demo
from distillfss_jax import params, systems
from distillfss_jax.tasks import adaptation
from distillfss_jax.workdir import checkpoint
from tests import parity


def make_run(folder, system='distillfss', classes=2):
  """Writes a finished run on drawn images; returns its data."""
  config = demo.get_config('smoke')
  config.system = system
  config.support.shots = 4
  config.data.args.update(num_train=6, num_test=3, classes=classes)
  config.data.args.image_size = 80
  if system == 'transferfss':
    config.optim.trainable = ('D',)
  data = adaptation.Data(config)
  made, _ = systems.build(config, data.ways)
  filled = parity.fill_randomly(made)
  saver = checkpoint.Checkpointer(folder / 'checkpoints')
  arrays = {k: np.asarray(x) for k, x in params.flatten(filled).items()}
  saver.save(1, {'params': arrays})
  saver.close()
  role = 'student' if system == 'distillfss' else 'teacher'
  results = {
    'name': 'demo', 'test': {role: {'miou': 0.5}}, 'evaluations': {'test': {}}
  }  # fmt: skip
  for name, made in (
    ('config.json', json.loads(config.to_json_best_effort())),
    ('ids.json', data.ids()),
    ('results.json', results),
  ):
    (folder / name).write_text(json.dumps(made))
  return data
