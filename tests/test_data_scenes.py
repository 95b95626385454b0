"""Scenes: the same everywhere, quick to say what they hold, and not trivial."""

import pickle

import numpy as np
import pytest

from configs import dcama
from distillfss_jax import datasets, prepare, tasks
from distillfss_jax.data import augment, core, episodes, pipeline, support
from distillfss_jax.datasets import scenes

KINDS = pytest.mark.parametrize('kind', scenes.KINDS)


def small(**options):
  return scenes.load(
    **{'num_train': 24, 'num_test': 12, 'image_size': 64} | options
  )


def labels_of(fold):
  return set(scenes.fold_labels(fold))


@KINDS
def test_records_depend_on_seed_split_and_index_alone(kind):
  few = small(kind=kind, num_train=5, seed=5)
  many = small(kind=kind, num_train=9, num_test=20, seed=5)
  other = small(kind=kind, num_train=5, seed=6)
  for i in (4, 0):
    one, same = few.train[i], pickle.loads(pickle.dumps(many.train))[i]
    np.testing.assert_array_equal(one['image'], same['image'])
    np.testing.assert_array_equal(one['label'], same['label'])
    assert one['id'] == same['id'] == few.train.ids[i]
    assert (one['image'] != few.test[i]['image']).any()
    assert (one['image'] != other.train[i]['image']).any()


@pytest.mark.parametrize(
  'options',
  [{}, {'image_size': 97}, {'kind': 'blobs'}, {'fold': 1}]
  + [{'fold': 3, 'base': True, 'exclusive': True}],
  ids=str,
)
def test_records_hold_what_is_declared(options):
  made = small(**options)
  ways, size = len(made.classes), options.get('image_size', 64)
  assert len(made.palette) == 1 + ways == 1 + len(set(made.classes))
  for source in (made.train, made.test):
    assert source.sizes.tolist() == [[size, size]] * len(source)
    for i, record in enumerate(source):
      assert record['image'].shape == (size, size, 3)
      assert record['label'].shape == (size, size)
      assert record['image'].dtype == record['label'].dtype == np.uint8
      counts = np.bincount(record['label'].ravel(), minlength=1 + ways)[1:]
      assert len(counts) == ways
      assert (counts > 0).tolist() == source.present[i].tolist()
      assert counts[i % ways]
      assert (counts[counts > 0] >= 0.0058 * size**2).all()
  assert len(support.choose(made, 24, seed=1, rule='random')[0]) == 24


def test_classes_are_pairs_of_what_two_share():
  pairs = [name.split() for name in scenes.CLASSES]
  assert len(scenes.CLASSES) == len(set(scenes.CLASSES)) == 12
  for kind in (0, 1):
    found = [pair[kind] for pair in pairs]
    assert {found.count(x) for x in found} == {2}
    for fold in range(scenes.FOLDS):
      assert len({found[k - 1] for k in scenes.fold_labels(fold)}) == 3


def test_folds_part_the_classes():
  folds = [scenes.fold_labels(fold) for fold in range(scenes.FOLDS)]
  assert sorted(sum(folds, ())) == list(range(1, 13))
  for fold in range(scenes.FOLDS):
    train, test = (scenes.pool(part, fold) for part in scenes.PARTS)
    assert train.values.tolist() + test.values.tolist() == [
      *sorted(set(range(1, 13)) - labels_of(fold)), *scenes.fold_labels(fold),
    ]  # fmt: skip
    for pool in (train, test):
      names = [scenes.CLASSES[label - 1] for label in pool.values]
      assert list(pool.classes) == names
      assert set(pool.pairs[:, 0]) == set(range(len(pool.source)))
    # A base learner has the classes of the training part, in their order.
    base = small(fold=fold, base=True)
    assert base.classes == train.classes
    assert small(fold=fold).classes == test.classes
  named = small(classes=('dotted star', 'striped disc'))
  assert named.classes == ('dotted star', 'striped disc')
  record = named.train[1]['label']
  assert (record == 2).any()


@pytest.mark.parametrize('part', scenes.PARTS)
def test_exclusive_images_hold_no_class_of_the_other_part(part):
  options = {'num_train': 40, 'num_test': 40, 'image_size': 64, 'fold': 1}
  for exclusive in (True, False):
    pool = scenes.pool(part, exclusive=exclusive, **options)
    found = {x for r in pool.source for x in np.unique(r['label']).tolist()}
    if exclusive:
      assert found == {0, *pool.values.tolist()}
    else:
      assert found - {0, *pool.values.tolist()}
    declared = pool.source.areas[
      pool.pairs[:, 0], pool.values[pool.pairs[:, 1]] - 1
    ]
    assert (declared > 0).all()
    assert len(pool.pairs) == pool.source.present[:, pool.values - 1].sum()


def test_shapes_are_of_one_area_and_within_reach():
  """So that none is told by its size, and no window cuts it."""
  side = np.linspace(-2, 2, 801, dtype=np.float32)
  x, y = side[None], side[:, None]
  for name, (outline, reach) in scenes._OUTLINES.items():
    inside = outline(x, y) > 0
    assert inside.mean() * 16 == pytest.approx(np.pi, rel=0.04), name
    far = np.maximum(abs(x), abs(y))[inside].max()
    round_ = np.hypot(x, y)[inside].max()
    assert far <= round_ <= reach + 0.01 <= round_ + 0.06, name


@KINDS
def test_neither_brightness_nor_colour_tells(kind):
  made = small(kind=kind, num_train=100, num_test=50)
  ways = 1 + len(made.classes)
  (images, labels), (tests, truth) = (
    [np.stack([r[x] for r in source]) for x in ('image', 'label')]
    for source in (made.train, made.test)
  )
  grey, inside = tests.mean(-1), truth > 0
  scores = []
  for level in range(0, 256, 8):
    for guess in (grey > level, grey <= level):
      scores.append((guess & inside).sum() / (guess | inside).sum())
  assert max(scores) < inside.mean() + 0.08
  # The class of each of 512 colours by their numbers in training.
  images, tests = (x // 32 @ np.array([64, 8, 1]) for x in (images, tests))
  counts = np.stack(
    [np.bincount(images[labels == k], minlength=512) for k in range(ways)]
  )
  for table in (counts, (counts + 1) / (counts + 1).sum(1, keepdims=True)):
    guess = table.argmax(0)[tests]
    both = np.bincount((truth * ways + guess).ravel(), minlength=ways**2)
    both = both.reshape(ways, ways)
    hits = np.diag(both)
    iou = hits / np.maximum(both.sum(0) + both.sum(1) - hits, 1)
    assert iou[1:].mean() < (0.04 if kind == 'objects' else 0.25)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'kind': 'cells'}, "'cells' is not one of"),
    ({'num_train': 0}, 'num_train must be .* at least 1, .*; got 0'),
    ({'num_test': 2.5}, 'num_test must be a whole number .*; got 2.5'),
    ({'image_size': 63}, 'image_size must be .* at least 64, .*; got 63'),
    ({'seed': -1}, 'seed must be'),
    ({'seed': 2**32}, 'seed must be'),
    ({'fold': 4}, r'fold 4 is not one of 0\.\.3'),
    ({'fold': True}, 'fold True is not one of'),
    ({'classes': ('striped disk',)}, 'should be different ones of: striped d'),
    ({'classes': 'striped disc'}, 'should be different ones of'),
    ({'classes': ()}, 'should be different ones of'),
    ({'classes': ('dotted star',) * 2}, 'should be different ones of'),
    ({'classes': ('dotted star',), 'fold': 0}, 'both say which classes'),
    ({'base': True}, 'name a fold'),
    ({'kind': 'blobs', 'fold': 0}, "'blobs' has one class"),
  ],
)
def test_errors(options, message):
  with pytest.raises(ValueError, match=message):
    scenes.load(**options)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'part': 'val'}, "part 'val' is not one of"),
    ({'fold': None}, 'name a fold'),
    ({'fold': '0'}, "fold '0' is not one of"),
    ({'num_train': 5}, 'no image has 1 pixels of'),
    ({'image_size': 8}, 'image_size must be'),
  ],
)
def test_pools_errors(options, message):
  with pytest.raises(ValueError, match=message):
    scenes.pool(**options)


def test_the_sheets(tmp_path):
  for path in (
    prepare.show('scenes', tmp_path),
    prepare.show_episodes('scenes', tmp_path),
  ):
    assert path.parent == tmp_path / 'scenes'
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize('rule', episodes.RULES)
def test_episodes_ask_for_what_is_there(rule):
  pool = scenes.pool(num_train=27, image_size=64, exclusive=True)
  draw = episodes.Random(pool, 1, rule)
  recipe = augment.get('none')
  batches = pipeline.training_episodes(
    pool, draw, recipe, recipe, image_size=64, batch_size=8, seed=0
  )
  batch = next(iter(batches))
  assert (batch['labels'] == 1).any((1, 2)).all()
  assert (batch['support_labels'] == 1).any((1, 2, 3)).all()
  # All labels are of base classes, that of the episode among them.
  assert set(np.unique(batch['all_labels'])) <= {0, *pool.values.tolist()}
  asked = pool.values[batch['class']][:, None, None]
  np.testing.assert_array_equal(
    batch['all_labels'] == asked, batch['labels'] == 1
  )


def test_a_source_task_takes_it():
  config = dcama.get_config('smoke')
  config.data.name = 'scenes'
  with config.unlocked():
    config.data.args = {'num_train': 40, 'image_size': 64, 'fold': 2}
  task, _ = tasks.load(config)
  assert isinstance(task.train, core.Pool)
  assert set(task.held_out.values) == labels_of(2)
  assert not set(task.train.values) & labels_of(2)
  assert 'scenes' in datasets.names()
