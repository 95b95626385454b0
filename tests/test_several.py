"""Few-shot methods: killed they go on, and devices change nothing."""

import functools
import pathlib

import pytest
import several

from distillfss_jax import config as configs
from distillfss_jax import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 4
ADAPTS = 'ifa', 'stage=adapt,protocol=fixed,shots=2'


def small(name, *arg, batch_size=2, rounds=None):
  """A config on few scenes of 64 pixels."""
  text = ','.join(('data=synthetic', 'smoke', *filter(None, arg)))
  made = configs.load(f'{ROOT}/configs/{name}.py:{text}')
  with made.unlocked():
    made.data.args.update(num_train=60, num_test=24)
    made.log_every = made.checkpoint_every = 1
    made.eval.panels = 0
    made.optim.schedule = 'constant'
    if made.task == 'dense':
      made.dense.batch_size = batch_size
    else:
      made.source.batch_size = batch_size
    if rounds is not None:
      made.ifa.rounds = rounds
  return made


@pytest.mark.slow
@pytest.mark.parametrize(
  'arg', [('pspnet',), ('bam',), ('hdmnet',), ('ifa',), ADAPTS], ids=str
)
def test_killed_it_goes_on(arg, tmp_path, monkeypatch):
  config = small(*arg)
  results = train.run(config, tmp_path / 'whole')
  again = several.killed_and_restarted(
    config, tmp_path / 'killed', 2, monkeypatch
  )
  assert again['test'] == results['test']
  several.check_equal(tmp_path / 'killed', tmp_path / 'whole', STEPS)


def of_devices(name):
  """Two steps of a batch of eight; IFA's with all nine terms.

  Of more steps a deep network with norms of eight tiny images makes much of the
  last digits: PSPNet's first gradients differ by 5e-7 on two devices, and by a
  percent on one that compiles with other optimisations.
  """
  made = small(name, batch_size=8, rounds=0.1 if name == 'ifa' else None)
  with made.unlocked():
    made.steps = 2
  return made


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pspnet', 'bam', 'hdmnet', 'ifa'])
def test_devices_and_processes_change_nothing(name, tmp_path):
  run = functools.partial(
    several.run_on, make='test_several:of_devices', arguments=(name,)
  )
  run(tmp_path / 'alone')
  for devices, processes in ((2, 1), (8, 1), (1, 2)):
    folder = tmp_path / f'{devices}_{processes}'
    run(folder, devices=devices, processes=processes)
    several.check_close(
      folder, tmp_path / 'alone', 2, loss=1e-3, rtol=2e-2, atol=2e-3
    )
