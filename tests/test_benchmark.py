"""Every dataset of the benchmark: raw files -> prepare -> look -> run.

The raw trees are those that the datasets' own tests check the labels of.
"""

import functools
import importlib
import json
from unittest import mock

import numpy as np
import pytest
import several
import test_data_benchmark_a as small
import test_data_camvid
import test_data_chestxray
import test_data_cityscapes
import test_data_coco
import test_data_evican
import test_data_folder
import test_data_fss1000
import test_data_industrial
import test_data_lung
import test_data_nucleus
import test_data_pascal
import test_data_polyp
import test_data_weedmap
from conftest import ROOT
from trees import put

from distillfss_jax import datasets, prepare, train
from distillfss_jax.data import augment, builder, episodes, pipeline
from distillfss_jax.data import prepared as prepared_lib
from distillfss_jax.datasets import pascal
from distillfss_jax.tasks import adaptation


def deepglobe_tree():
  """Three times the tree, with other images: each class in several."""
  files = {}
  for k in range(3):
    draw = functools.partial(_photo_from, 100 * k, small.photo)
    with mock.patch.object(small, 'photo', draw):
      made = small.deepglobe_tree()[0]
    files |= {f'{k}{path}': contents for path, contents in made.items()}
  return files


def _photo_from(start, photo, seed, *args):
  return photo(start + seed, *args)


TREES = {
  'nucleus': lambda: test_data_nucleus.tree(test_data_nucleus.real_ids())[0],
  'kvasir': lambda: small.kvasir_tree()[0],
  'pothole': lambda: small.pothole_tree()[0],
  'isic': lambda: small.isic_tree()[0],
  'deepglobe': deepglobe_tree,
  'industrial': lambda: test_data_industrial.tree(per_class=6)[0],
  'weedmap': lambda: test_data_weedmap.tree()[0],
  'lung': lambda: test_data_lung.tables(
    test_data_lung.slices(6, 0), test_data_lung.slices(3, 1)
  ),
  'folder': lambda: test_data_folder.tree([test_data_folder.grey([255])]),
  'pascal': test_data_pascal.tree,
  'coco': test_data_coco.tree,
  'cityscapes': test_data_cityscapes.tree,
  'camvid': test_data_camvid.tree,
  'evican': test_data_evican.tree,
  'polyp': test_data_polyp.tree,
  'chestxray': test_data_chestxray.tree,
  'fss1000': test_data_fss1000.tree,
}
SHOTS = {
  'isic': 6,
  'deepglobe': 6,
  'industrial': 10,
  'weedmap': 2,
  'pascal': 10,
  'coco': 20,
  'cityscapes': 19,
  'camvid': 11,
}
EPISODIC = ('pascal', 'coco', 'chestxray', 'fss1000')


def test_no_dataset_is_left_out():
  assert set(TREES) == set(datasets.names()) - {'synthetic', 'scenes'}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """Prepares a dataset's tree once; gives the folder of its records."""
  made = {}

  def get(name):
    if name not in made:
      place = tmp_path_factory.mktemp(name)
      raw = put(TREES[name](), place / 'raw')
      options = {'name': 'mine'} if name == 'folder' else {}
      prepare.run(name, raw, place / 'data', **options)
      made[name] = place / 'data'
    return made[name]

  return get


def config_of(name, data_dir):
  """The dataset's own config, made small, on the records of its tree."""
  arg = f'smoke,shots={SHOTS.get(name, 3)}'
  if name == 'folder':
    arg += ',name=mine'
  config = importlib.import_module(f'configs.{name}').get_config(arg)
  config.data.args.data_dir = str(data_dir)
  return config


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', TREES)
def test_a_support_is_chosen_and_shown(name, prepared):
  data_dir = prepared(name)
  config = config_of(name, data_dir)
  data = adaptation.Data(config)
  assert data.present.any(0).all()
  assert not set(data.support.ids) & set(data.dataset.test.ids)
  for seed in range(3):  # a draw of any seed, and no test image in it
    config.support.rule, config.support.seed = 'random', seed
    config.support.shots = len(data.dataset.train)
    again = adaptation.Data(config)
    assert not set(again.support.ids) & set(data.dataset.test.ids)
  options = {'name': 'mine'} if name == 'folder' else {}
  path = prepare.show(name, data_dir, **options)
  assert path.stat().st_size > 1000


@pytest.mark.parametrize('part', ['train', 'test'])
@pytest.mark.parametrize('name', sorted(set(TREES) - {'folder'}))
def test_a_bad_image_divides_no_other(name, part, prepared, tmp_path):
  """What --skip_bad leaves out does not deal the others anew."""
  raw = prepared(name).parent / 'raw'
  place = next((prepared(name) / name).glob(f'*/{prepared_lib.MANIFEST}'))
  rows = json.loads(place.read_text())['records']
  lost = next(row['id'] for row in rows if row['split'].startswith(part))
  check = builder.check

  def check_and_lose(layout, *, skip_bad):
    good, bad = check(layout, skip_bad=skip_bad)
    return [x for x in good if x.id != lost], {**bad, lost: 'is lost'}

  with mock.patch.object(builder, 'check', check_and_lose):
    made, _ = datasets.module(name).prepare(
      raw, tmp_path / 'data', skip_bad=True
    )
  assert made['skipped'] == {lost: 'is lost'}
  left = [(row['split'], row['id']) for row in made['records']]
  assert left == [(x['split'], x['id']) for x in rows if x['id'] != lost]


def test_which_have_episodes():
  found = (x for x in datasets.names() if hasattr(datasets.module(x), 'pool'))
  assert set(found) == {*EPISODIC, 'scenes'}


@pytest.mark.parametrize('name', EPISODIC)
def test_episodes_are_listed_and_shown(name, prepared):
  data_dir = prepared(name)
  options = {'part': 'test'}
  if name in ('pascal', 'coco'):  # whose trees have small images
    options['min_area'] = 1
  module = datasets.module(name)
  pool = module.pool(data_dir=data_dir, **options)
  for rule in episodes.RULES:
    if name == 'fss1000' and rule == 'image':
      continue  # its records do not say which classes they show
    table = episodes.listed(pool, shots=1, rule=rule)
    assert table.shape == (1000, 3)
    assert set(table[:, 0]) == set(range(len(pool.classes)))
  with mock.patch.object(module, 'pool', return_value=pool):
    path = prepare.show_episodes(name, data_dir)
  assert path.stat().st_size > 1000
  # What is asked for is there, in the query and in the shot.
  batch = next(
    iter(
      pipeline.listed_episodes(
        pool,
        table[:8],
        augment.get('none'),
        augment.get('none'),
        image_size=64,
        batch_size=8,
      )
    )
  )
  assert (batch['labels'] == 1).any((1, 2)).all()
  assert (batch['support_labels'] == 1).any((1, 2, 3)).all()


def test_the_readme_reads_episodes(prepared):
  """The lines of its page, but on small images and without processes."""
  text = (ROOT / 'docs' / 'benchmark.md').read_text()
  code = text.split('```python\n')[1].split('```')[0]
  code = code.replace("'data'", repr(str(prepared('pascal'))))
  code = code.replace('473', '33').replace('workers=4', 'workers=0')
  of_small = functools.partial(pascal.pool, min_area=1)
  names = {}
  with mock.patch.object(pascal, 'pool', of_small):
    exec(code, names)
  batch = next(iter(names['batches']))
  assert batch['images'].shape == (8, 33, 33, 3)
  assert batch['support_labels'].shape == (8, 1, 33, 33)
  assert names['table'].shape == (1000, 3)


def test_too_few_for_episodes_is_no_error(prepared):
  """The contact sheet is there all the same; min_area is 2048."""
  said = prepare._episodes('pascal', prepared('pascal'))
  assert said.startswith('no episodes to show: no image has 2048 pixels')


def test_others_have_no_episodes(prepared):
  assert prepare.show_episodes('kvasir', prepared('kvasir')) is None


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'arg'),
  [
    ('deepglobe', 'fixed'),
    ('isic', 'released'),
    ('isic', 'fixed'),
    ('chestxray', 'fixed'),
    ('fss1000', 'released'),
    ('nucleus', 'fixed'),
  ],
)
def test_ifa_goes_to_another_domain(name, arg, prepared, tmp_path):
  """Source training on PASCAL, adaptation, test: from the owners' files."""
  place = tmp_path / 'data'
  place.mkdir()
  for dataset in {'pascal', name}:
    (place / dataset).symlink_to(prepared(dataset) / dataset)
  get_config = importlib.import_module('configs.ifa').get_config
  config = get_config(f'target={name},smoke')
  config.data.args.data_dir, config.data.args.min_area = str(place), 1
  first = train.run(config, tmp_path / 'source')
  config = get_config(f'target={name},stage=adapt,protocol={arg},smoke')
  config.data.args.data_dir = str(place)
  config.model.init = str(tmp_path / 'source')
  results = train.run(config, tmp_path / 'run')
  for found in (first, results):
    assert np.isfinite(found['test']['teacher']['fb_iou'])
  assert f'protocol {arg}' in results['evaluations']['test']['says']
  before = results['references']['untrained']['teacher']['fb_iou']
  if arg == 'fixed':
    assert np.isfinite(before)
  else:  # of the same episodes, by the same weights
    assert before == pytest.approx(first['test']['teacher']['fb_iou'], abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize('system', ['bam', 'hdmnet'])
@pytest.mark.parametrize('name', ['pascal', 'coco'])
def test_base_and_meta_learner(name, system, prepared, tmp_path, monkeypatch):
  """One after the other, from the owners' files; killed, the latter goes on."""
  data_dir = prepared(name) if name == 'pascal' else tmp_path / 'data'
  if name == 'coco':  # with images enough to test every base class
    raw = put(test_data_coco.tree(counts=(200, 160)), tmp_path / 'raw')
    prepare.run(name, raw, data_dir)

  def config_of(which):
    get_config = importlib.import_module(f'configs.{which}').get_config
    config = get_config(f'data={name},fold=1,smoke')
    config.data.args.data_dir, config.data.args.min_area = str(data_dir), 1
    config.checkpoint_every = config.log_every = 1
    return config

  train.run(config_of('pspnet'), tmp_path / 'base')
  config = config_of(system)
  config.base.init = str(tmp_path / 'base')
  if name == 'coco':  # whose few images show classes of two folds each
    config.data.args.exclusive = False
  config.source.test_seeds = (5, 6)
  whole = train.run(config, tmp_path / 'whole')
  again = several.killed_and_restarted(
    config, tmp_path / 'killed', 2, monkeypatch
  )
  for evaluation in ('test', 'test_native', 'test_base'):
    assert again[evaluation] == whole[evaluation]
  assert list(whole['test']['final']['seeds']) == ['5', '6']
  several.check_equal(tmp_path / 'killed', tmp_path / 'whole', config.steps)


@pytest.mark.slow
@pytest.mark.parametrize('name', TREES)
def test_a_smoke_run_of_its_config(name, prepared, tmp_path):
  data_dir = prepared(name)
  config = config_of(name, data_dir)
  results = train.run(config, tmp_path / 'run')
  scores = results['test']['student']
  assert len(scores['iou']) == len(adaptation.Data(config).dataset.classes)
  assert np.isfinite(scores['fb_iou'])
  assert (tmp_path / 'run' / 'panels' / 'support.png').exists()
