"""Training on a source's episodes: its loss, its optimiser, whole runs."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_data_pascal
import test_run
from test_cluster import run_all, wait_for
from test_run import assert_same, finish, rows, scores, steps_saved
from trees import put

from configs import common, dcama
from distillfss_jax import datasets, optim, prepare, tasks, train
from distillfss_jax.data import episodes
from distillfss_jax.evaluators import episodes as episodes_lib
from distillfss_jax.ops import losses, resize

STEPS = 8


def test_the_loss_of_the_maps():
  """As the original computes it: all maps brought to size, then averaged."""
  rng = np.random.default_rng(0)
  sizes = ((6, 3), (3, 4), (2, 2))
  coarse = tuple(
    rng.uniform(0, 1, (2, 1, n, n, m)).astype(np.float32) for n, m in sizes
  )
  masks = rng.integers(0, 2, (2, 12, 12)).astype(np.float32)
  every = np.concatenate(
    [np.asarray(resize.bilinear(x[:, 0], (12, 12))) for x in coarse], -1
  )
  mean = every.mean(-1)
  assert every.shape[-1] == 9
  wanted = -(masks * np.log(mean) + (1 - masks) * np.log(1 - mean))
  found = losses.map_bce(coarse, masks)
  np.testing.assert_allclose(found, wanted.mean((1, 2)), rtol=1e-5)


def test_the_loss_of_the_maps_is_finite():
  """Parity: where the mean is 0 or 1 and wrong."""
  coarse = (jnp.zeros((1, 1, 2, 2, 1)), jnp.zeros((1, 1, 2, 2, 2)))
  loss, grad = jax.value_and_grad(
    lambda x: losses.map_bce(x, jnp.ones((1, 4, 4))).sum()
  )(coarse)
  assert 10 < loss < 100
  assert all(np.isfinite(x).all() for x in grad)


def test_sgd_is_torchs():
  """Decay in the gradient, Nesterov's momentum, by hand."""
  config = dcama.get_config().optim
  assert (config.lr, config.momentum, config.weight_decay) == (1e-3, 0.9, 1e-4)
  rng = np.random.default_rng(0)
  start = {'teacher/x': rng.normal(size=5)}
  tx = optim.build(config, start, 10)
  now, state = start, tx.init(start)
  x, velocity = start['teacher/x'].copy(), 0
  for _ in range(4):
    grad = rng.normal(size=5)
    updates, state = tx.update(
      {'teacher/x': grad}, state, now, seen=np.array([True])
    )
    now = optax.apply_updates(now, updates)
    grad = grad + 1e-4 * x
    velocity = 0.9 * velocity + grad
    x = x - 1e-3 * (grad + 0.9 * velocity)
  np.testing.assert_allclose(now['teacher/x'], x, rtol=1e-5)
  with common.get_config().unlocked() as config:
    config.optim.name = 'adam'
    with pytest.raises(ValueError, match='there are: adamw, sgd'):
      optim.build(config.optim, start, 10)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """PASCAL VOC and SBD, in small."""
  place = tmp_path_factory.mktemp('voc')
  prepare.run('pascal', put(test_data_pascal.tree(), place / 'raw'), place)
  return place


def flags(data_dir):
  """The smoke run of DCAMA's training on it."""
  return (
    '--config=configs/dcama.py:smoke',
    f'--config.data.args.data_dir={data_dir}',
    '--config.data.args.min_area=1',
    f'--config.steps={STEPS}',
    '--config.optim.lr=1e-5',
  )


def small(data_dir):
  config = dcama.get_config('smoke')
  config.data.args.data_dir, config.data.args.min_area = str(data_dir), 1
  return config


def test_a_run(data_dir, tmp_path):
  config = small(data_dir)
  results = train.run(config, tmp_path / 'run')
  found = results['test']['teacher']
  assert set(found['iou']) == {
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle',
  }  # fmt: skip
  assert found['miou'] == pytest.approx(np.mean(list(found['iou'].values())))
  assert 0 <= found['fb_iou'] <= 1
  assert results['test_images'] == 6
  told = [row for row in rows(tmp_path / 'run') if 'train/loss' in row]
  assert [row['step'] for row in told] == [2, 4]
  for row in told:
    assert row['train/loss'] == pytest.approx(
      0.5 * row['train/loss_logits'] + 2 * row['train/loss_coarse'], rel=1e-4
    )
  pictures = {x.name for x in (tmp_path / 'run/panels').iterdir()}
  named = json.loads((tmp_path / 'run/ids.json').read_text())['test']
  shown = [(i, named[i]['class']) for i in (0, 5)]
  assert pictures == {
    'curves.png', 'episodes.png', *(
      f'test_{i:04d}_{name}.png' for i, name in shown
    ),
  }  # fmt: skip
  ids = json.loads((tmp_path / 'run/ids.json').read_text())
  task, _ = tasks.load(config)
  assert ids['test'] == episodes.by_name(task.held_out, task.table)
  # What is tested was not trained on: no class, no image.
  assert not set(task.train.classes) & set(task.held_out.classes)
  assert not set(task.train.source.ids) & set(task.held_out.source.ids)
  pickle.dumps(task.draw)  # for processes that read


def test_scores_are_per_class():
  """By hand: classes are averaged, the foreground counts all together."""
  counts = np.zeros((3, 2, 2), np.int64)
  counts[0] = [[50, 10], [10, 30]]  # IoU 0.6
  counts[1] = [[80, 0], [15, 5]]  # IoU 0.25; the third has no episode
  scores = episodes_lib.scores(counts, ('a', 'b', 'c'))
  assert scores['iou'] == pytest.approx({'a': 0.6, 'b': 0.25, 'c': None})
  assert scores['miou'] == pytest.approx(0.85 / 2)
  assert scores['fb_iou'] == pytest.approx((130 / 165 + 35 / 70) / 2)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'data.name': 'kvasir'}, 'kvasir has no episodes to train on; these have'),
    ({'system': 'transferfss'}, 'learns from a Table, and .* gives a Episode'),
    ({'task': 'pretraining'}, 'there are: adaptation, dense, source'),
    ({'source.recipe': 'zoom'}, "'zoom'"),
    ({'source.rule': 'all'}, "'all' is not one of"),
    ({'support.shots': 99}, '99 shots and a query need 100 images'),
  ],
)
def test_errors(data_dir, change, message):
  config = small(data_dir)
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    train.run(config, data_dir / 'never')
  assert not (data_dir / 'never').exists()


def test_all_sources_are_named():
  found = [x for x in datasets.names() if hasattr(datasets.module(x), 'pool')]
  assert {'pascal', 'coco', 'fss1000'} <= set(found)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def one(home, data_dir):
  done = test_run.run(home / 'one', *flags(data_dir))
  assert done.returncode == 0, done.stderr
  return home / 'one'


@pytest.mark.slow
def test_two_processes_are_one(home, data_dir, one):
  done = run_all(home / 'two', 2, *flags(data_dir))
  assert [x.returncode for x in done] == [0, 0], done[0].stderr[-3000:]
  for found, wanted in zip(rows(home / 'two'), rows(one), strict=True):
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
  ours, theirs = (scores(x)['test']['teacher'] for x in (home / 'two', one))
  assert ours['fb_iou'] == pytest.approx(theirs['fb_iou'], abs=2e-3)


@pytest.mark.slow
def test_killed_and_restarted(home, data_dir, one):
  workdir = home / 'killed'
  process = test_run.start(workdir, *flags(data_dir))
  wait_for(lambda: steps_saved(workdir), [process])
  process.kill()
  finish(process)
  assert steps_saved(workdir)[-1] < STEPS
  assert test_run.run(workdir, *flags(data_dir)).returncode == 0
  assert_same(workdir, one, STEPS)
