"""What does not fit BAM or HDMNet is said in a line, before any training."""

import json
import types

import episodes as fixtures
import numpy as np
import pytest
from flax import nnx

from configs import bam, dcama, hdmnet, pspnet
from distillfss_jax import models, systems, tasks
from distillfss_jax.data import core
from distillfss_jax.models import bam as bam_model
from distillfss_jax.pretrained import weights
from distillfss_jax.tasks import source

SMOKE = 'data=synthetic,smoke'


def run_of(folder, config):
  """A run's folder as far as its config goes."""
  folder.mkdir()
  text = config.to_json_best_effort()
  (folder / 'config.json').write_text(text)
  return str(folder)


@pytest.fixture(scope='module')
def system():
  return systems.build(bam.get_config(SMOKE), 1)[0]


@pytest.mark.parametrize(
  ('key', 'value', 'said'),
  [
    ('base.init', 'fold=1', r'config.data.args.fold is 1, here it is 0'),
    ('base.init', 'data=pascal', "data.name is 'pascal', here it is 'scenes'"),
    ('base.init', 'backbone=vgg16', "backbone.name is 'vgg_tiny', here"),
    ('model.init', 'fold=2', r'config.data.args.fold is 2, here it is 0'),
    ('model.init', 'shots=5', r'config.model.fields.shots is 5, here it is 1'),
  ],
)  # fmt: skip
def test_runs_of_another_kind(system, tmp_path, key, value, said):
  made = pspnet if key == 'base.init' else bam
  other = made.get_config(f'{SMOKE},{value}')
  config = bam.get_config(SMOKE)
  folder = run_of(tmp_path / 'other', other)
  config.update_from_flattened_dict({key: folder})
  with pytest.raises(ValueError, match=said) as caught:
    weights.load(config, system, {})
  assert str(caught.value).startswith(f'config.{key}={folder}: its ')
  assert '\n' not in str(caught.value)


def test_a_method_is_not_the_other(system, tmp_path):
  config = bam.get_config(SMOKE)
  config.model.init = run_of(tmp_path / 'x', hdmnet.get_config(SMOKE))
  with pytest.raises(
    ValueError, match=r"model.name is 'hdmnet', here it is 'bam'"
  ):
    weights.load(config, system, {})


def test_a_file_of_another_fold_is_told(system, tmp_path, caplog):
  config = bam.get_config(f'{SMOKE},fold=3')
  config.base.init = str(tmp_path / 'pascal/split2/resnet50/best.pth')
  with pytest.raises(OSError, match=r'best\.pth'):
    weights.load(config, system, {})
  assert 'looks like one of fold 2, and this is fold 3' in caplog.text


@pytest.mark.parametrize(('have', 'want'), [(1, 5), (5, 1), (2, 5)])
def test_files_of_other_shots(have, want):
  given, model = (
    fixtures.build(bam_model.BAM, 'resnet_tiny_deep', shots=k)
    for k in (have, want)
  )
  tensors = {
    k: np.zeros(x, np.float32) for k, x in fixtures.names(given).items()
  }
  said = rf'takes {have} shots?, and config.model.fields.shots is {want}'
  with pytest.raises(ValueError, match=said):
    weights.from_tensors(tensors, [weights.Part('model/', model)])


def test_weights_of_shots_may_stay_out():
  given, model = (
    fixtures.build(bam_model.BAM, 'resnet_tiny_deep', shots=k) for k in (1, 5)
  )
  tensors = {
    k: np.zeros(x, np.float32) for k, x in fixtures.names(given).items()
  }
  found = weights.from_tensors(
    tensors, [weights.Part('model/', model)], leave=['model/kshot/.*']
  )
  assert not any('kshot' in path for path in found)


def with_(config, changes):
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (
      {'support.shots': 300},
      '300 shots and a query need 301 images of a class',
    ),
    ({'model.fields.classes': 16}, '9 base classes here, 10 with background'),
    ({'source.test_recipe': 'bam'}, "test_recipe='bam' is not one of none,"),
    ({'data.args.fold': 7}, r'fold 7 is not one of 0\.\.3'),
    ({'source.generalised': 4, 'support.shots': 99}, '99 shots and a query'),
  ],
)
def test_data_that_cannot_be(changes, said):
  with pytest.raises(ValueError, match=said):
    tasks.load(with_(bam.get_config(SMOKE), changes))


def test_a_fold_without_novel_classes():
  prepared = types.SimpleNamespace(
    areas=np.array([[5000, 0], [3000, 100]]),
    present=np.array([[True, False], [True, True]]),
  )
  with pytest.raises(ValueError, match='no image has 2048 pixels of dog: take'):
    core.pool(prepared, ['dog'], [2], 2048)


def test_only_what_has_a_base_learner_is_tested_beside_it():
  config = dcama.get_config(SMOKE)
  config.source.generalised = 4
  data, task = tasks.load(config)
  program = types.SimpleNamespace(roles=('teacher',), beside=())
  place = types.SimpleNamespace(
    program=program, mesh=None, workdir=None, out=None
  )
  with pytest.raises(ValueError, match="'episodic' has no base learner"):
    task(config, data, place, 4)


def test_images_too_small_for_a_transformer():
  config = hdmnet.get_config(SMOKE)
  for size in (24, 25):
    config.data.image_size = size

    def build(size=size):
      return models.build(config.model, size, nnx.Rngs(0))

    if size < 25:
      with pytest.raises(
        ValueError, match='makes of images of 25 pixels or more'
      ):
        nnx.eval_shape(build)
    else:
      nnx.eval_shape(build)


def test_images_that_show_tested_classes_are_left_out_of_training_alone():
  """Parity: BAM's filter is of its training list; both ways."""
  config = bam.get_config(SMOKE)
  for exclusive in (True, False):
    with config.unlocked():
      config.data.args.exclusive = exclusive
    data = source.Data(config)
    novel = np.array(data.held_out.values) - 1
    shows = data.train.source.present[:, novel].any()
    assert shows != exclusive
    known = np.array(data.train.values) - 1
    assert data.held_out.source.present[:, known].any()


def test_settings_of_the_tests():
  """BAM fits and pads, HDMNet stretches; both at the queries' sizes."""
  for module, recipe in ((bam, 'fit'), (hdmnet, 'stretch')):
    config = module.get_config('data=pascal,fold=1')
    assert config.source.test_recipe == recipe
    assert (config.eval.native, config.source.test_exact) == (True, False)
    assert config.source.test_seed == 321
    assert 321 not in config.source.test_seeds  # which chose the checkpoint
    kept = json.loads(config.to_json_best_effort())
    assert kept['source']['generalised'] == 0


def test_the_last_test_has_seeds_of_its_own():
  """What chose the checkpoint is no part of the mean, nor of what is named."""
  config = bam.get_config('data=synthetic,smoke')
  with config.unlocked():
    config.source.test_seed, config.source.test_seeds = 321, (5, 6)
  data = source.Data(config)
  assert tuple(data.tables) == (5, 6)
  assert (data.table == data.tables[5]).all()
  assert (data.choosing != data.table).any()
  config.source.test_seeds = (321, 6)
  data = source.Data(config)
  assert data.choosing is data.tables[321]
  config.source.test_seeds = ()
  assert tuple(source.Data(config).tables) == (321,)
