"""Few-shot methods: killed they go on, and devices change nothing."""

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
  """Two steps of a batch of eight; IFA's with all nine terms."""
  made = small(name, batch_size=8, rounds=0.1 if name == 'ifa' else None)
  with made.unlocked():
    made.steps = 2
    if name == 'hdmnet':
      # By gradients: AdamW takes a whole step of one that is rounding alone.
      made.optim.name = 'sgd'
  return made


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pspnet', 'bam', 'hdmnet', 'ifa'])
def test_devices_and_processes_change_nothing(name, tmp_path):
  several.check_devices(tmp_path, 'test_several:of_devices', (name,), 2)


def of_two_devices():
  """Two steps of adaptation; three classes give no batch for eight devices."""
  made = small(*ADAPTS)
  with made.unlocked():
    made.steps = 2
  return made


@pytest.mark.slow
def test_two_devices_adapt_as_one(tmp_path):
  make = 'test_several:of_two_devices'
  several.run_on(tmp_path / 'one', make)
  for devices, processes in ((2, 1), (1, 2)):
    folder = tmp_path / f'{devices}_{processes}'
    several.run_on(folder, make, devices=devices, processes=processes)
    several.check_close(
      folder, tmp_path / 'one', 2, loss=1e-4, rtol=2e-3, atol=2e-4
    )


def of_unlabelled():
  """Two steps of our recipe, beside images that nobody annotated."""
  made = configs.load(
    f'{ROOT}/configs/nucleus.py:recipe=ours,data=synthetic,smoke,'
    'unlabelled=train'
  )
  with made.unlocked():
    made.steps, made.optim.name, made.optim.schedule = 2, 'sgd', 'constant'
    made.log_every = made.checkpoint_every = 1
  return made


@pytest.mark.slow
def test_all_processes_learn_the_same_of_unlabelled_images(tmp_path):
  several.check_devices(tmp_path, 'test_several:of_unlabelled', (), 2)
