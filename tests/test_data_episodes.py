"""Episodes of source data: how they are drawn, listed, read and shared."""

import collections
import json
import pickle

import numpy as np
import pytest

from distillfss_jax.data import core, episodes, pipeline, transforms

SIZE = 8


class Source:
  """Images of stripes of classes: image i shows the classes of present[i]."""

  def __init__(self, present):
    self.present = np.asarray(present, bool)
    self.areas = (
      self.present * 10 * np.arange(1, len(self.present) + 1)[:, None]
    )
    self.ids = tuple(f'id{i:02d}' for i in range(len(self.present)))
    self.sizes = np.full((len(self.ids), 2), SIZE, np.int32)

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, i):
    label = np.zeros((SIZE, SIZE), np.uint8)
    for row, c in enumerate(np.flatnonzero(self.present[i])):
      label[row] = c + 1
    label[-1] = 255
    image = np.full((SIZE, SIZE, 3), i, np.uint8)
    return {'image': image, 'label': label, 'id': self.ids[i]}


def plain(generator, image, label, size):
  """A recipe that draws nothing."""
  del generator
  return (
    transforms.resize_image(image, size),
    transforms.resize_label(label, size),
  )


def noisy(generator, image, label, size):
  """A recipe whose draws show in the image."""
  image, label = plain(generator, image, label, size)
  return image + generator.integers(0, 100, image.shape).astype(np.uint8), label


@pytest.fixture
def source():
  present = np.random.RandomState(1).rand(24, 4) < 0.5
  present[present.sum(1) == 0, 0] = True
  return Source(present)


@pytest.fixture
def pool(source):
  """Classes b, c and d of a to d, whose labels are 2, 3 and 4."""
  return core.pool(source, ('b', 'c', 'd'), (2, 3, 4))


def test_the_pairs_of_a_pool(source, pool):
  by_hand = [
    (i, c) for i in range(24) for c in range(3) if source.present[i, c + 1]
  ]
  assert pool.pairs.tolist() == [list(pair) for pair in by_hand]
  large = core.pool(source, ('b', 'd'), (2, 4), min_area=60)
  assert set(large.pairs[:, 0].tolist()) <= set(range(5, 24))
  alone = core.pool(source, ('b', 'c', 'd'), (2, 3, 4), exclusive=True)
  shown = set(alone.pairs[:, 0].tolist())
  assert shown == {i for i, _ in by_hand if not source.present[i, 0]}
  with pytest.raises(ValueError, match='no image has 1000 pixels of b, d'):
    core.pool(source, ('b', 'd'), (2, 4), min_area=1000)


@pytest.mark.parametrize('rule', episodes.RULES)
@pytest.mark.parametrize('shots', [1, 4])
def test_an_episode_shows_its_class(source, pool, rule, shots):
  draw = episodes.Random(pool, shots, rule)
  for i in range(len(draw)):
    row = draw(i, np.random.default_rng(i))
    class_, *images = row
    assert row.shape == (2 + shots,)
    assert len(set(images)) == 1 + shots
    assert source.present[images, class_ + 1].all()


def test_what_the_rules_take_in_turn(source, pool):
  def drawn(rule, seed):
    draw = episodes.Random(pool, 1, rule)
    rows = [draw(i, np.random.default_rng([seed, i])) for i in range(len(draw))]
    return np.array(rows)

  pairs = drawn('pair', 0)
  assert pairs[:, [1, 0]].tolist() == pool.pairs.tolist()
  images = drawn('image', 0)
  with_any = np.flatnonzero(source.present[:, 1:].any(1))
  assert images[:, 1].tolist() == with_any.tolist()
  classes = drawn('class', 0)
  assert classes[:, 0].tolist() == [i % 3 for i in range(len(pool.pairs))]
  at_random = drawn('random', 0)
  assert len(at_random) == len(with_any)
  assert set(at_random[:, 0]) == {0, 1, 2}
  for rule in episodes.RULES:
    assert (drawn(rule, 0)[:, 2:] != drawn(rule, 1)[:, 2:]).any()


def test_draws_are_uniform(source, pool):
  draw = episodes.Random(pool, 1, 'image')
  image, classes = next(
    (i, c) for i, (_, c) in enumerate(episodes._candidates(pool)) if len(c) == 3
  )
  rows = [draw(image, np.random.default_rng(n)) for n in range(600)]
  count = collections.Counter(int(row[0]) for row in rows)
  assert set(count) == set(classes.tolist())
  assert min(count.values()) > 150  # 200 expected, 11 the deviation
  others = source.present[:, 1].sum() - source.present[rows[0][1], 1]
  shots = collections.Counter(int(r[2]) for r in rows if r[0] == 0)
  assert len(shots) == others


def test_a_small_class_of_an_image_can_be_asked_for():
  """Parity: the area decides which images are there, not what is asked."""
  source = Source(np.ones((8, 2)))
  source.areas[:, 1] = [0, 0, 0, 0, 0, 5, 5, 5]
  pool = core.pool(source, ('a', 'b'), (1, 2))
  draw = episodes.Random(pool, 1, 'image')
  rows = [draw(0, np.random.default_rng(n)) for n in range(40)]
  assert {int(row[0]) for row in rows} == {0, 1}
  assert all(row[2] >= 5 for row in rows if row[0] == 1)


@pytest.mark.parametrize('make', [episodes.Random, episodes.listed])
def test_errors(pool, make):
  with pytest.raises(ValueError, match=r"'all' is not one of \('pair', 'im"):
    make(pool, shots=1, rule='all')
  with pytest.raises(ValueError, match='at least 1 shot, got 0'):
    make(pool, shots=0, rule='pair')
  with pytest.raises(ValueError, match=r'13 shots and a query need 14 images'):
    make(pool, shots=13, rule='pair')


def test_listed_as_the_originals_list(pool):
  """The loop of the originals, on NumPy's own global stream."""
  names = {c: [f'{i}' for i, k in pool.pairs if k == c] for c in range(3)}
  np.random.seed(0)
  for i, row in enumerate(
    episodes.listed(pool, shots=3, rule='pair', count=100)
  ):
    query, class_ = pool.pairs[i % len(pool.pairs)]
    shots = []
    while True:
      name = np.random.choice(names[class_], 1, replace=False)[0]
      if name != f'{query}':
        shots.append(name)
      if len(shots) == 3:
        break
    assert row.tolist() == [class_, query, *map(int, shots)]


def test_lists(pool):
  for rule in episodes.RULES:
    table = episodes.listed(pool, shots=2, rule=rule)
    assert table.shape == (1000, 4)
    again = episodes.listed(pool, shots=2, rule=rule, count=70)
    np.testing.assert_array_equal(table[:70], again)
    other = episodes.listed(pool, shots=2, rule=rule, seed=1)
    assert (table != other).any()
    assert (table[:, 1:2] != table[:, 2:]).all()
    # Parity: a shot can come twice, but not with BAM.
    assert (table[:, 2] == table[:, 3]).any() == (rule != 'image')
  turns = episodes.listed(pool, shots=1, rule='pair')[:, [1, 0]]
  whole = np.tile(pool.pairs, (30, 1))[:1000]
  np.testing.assert_array_equal(turns, whole)


def test_listed_at_random_as_the_originals_list(pool):
  """COCO-20i: class, query and shots from one stream."""
  images = {c: [i for i, k in pool.pairs if k == c] for c in range(3)}
  np.random.seed(0)
  for row in episodes.listed(pool, shots=2, rule='random', count=100):
    class_ = np.random.choice([0, 1, 2], 1, replace=False)[0]
    query = np.random.choice(images[class_], 1, replace=False)[0]
    shots = []
    while len(shots) < 2:
      shot = np.random.choice(images[class_], 1, replace=False)[0]
      if shot != query:
        shots.append(shot)
    assert row.tolist() == [class_, query, *shots]


def test_image_needs_labels_of_their_own(source, pool):
  ones = core.Pool(source, pool.classes, pool.pairs, np.ones(3, np.int32))
  for rule in ('pair', 'class', 'random'):
    assert len(episodes.Random(ones, 1, rule)(0, np.random.default_rng(0))) == 3
  with pytest.raises(ValueError, match='all have one label'):
    episodes.listed(ones, shots=1, rule='image')


def test_labels_are_swapped_and_back():
  label = np.arange(256, dtype=np.uint8)
  for value in (1, 7, 253, 254):
    made = pipeline._swapped(label, value)
    assert made[value] == 1
    assert (made[[0, 255]] == [0, 255]).all()
    np.testing.assert_array_equal(pipeline._swapped(made, value), label)


def test_by_name(pool):
  table = episodes.listed(pool, shots=2, rule='pair', count=3)
  named = json.loads(json.dumps(episodes.by_name(pool, table)))
  assert [x['class'] for x in named] == [pool.classes[c] for c in table[:, 0]]
  assert named[1]['query'] == f'id{table[1, 1]:02d}'
  assert named[1]['support'] == [f'id{i:02d}' for i in table[1, 2:]]


def training(pool, batch_size=2, recipe=noisy, **kwargs):
  draw = episodes.Random(pool, 2, 'image')
  return pipeline.training_episodes(
    pool,
    pickle.loads(pickle.dumps(draw)),
    recipe,
    recipe,
    image_size=SIZE,
    batch_size=batch_size,
    seed=3,
    **kwargs,
  )


def take(batches, count):
  iterator = iter(batches)
  return [next(iterator) for _ in range(count)]


def same(one, other):
  assert one.keys() == other.keys()
  for key in one:
    np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_a_batch_of_training_episodes(source, pool):
  batch = take(training(pool, batch_size=3, recipe=plain), 1)[0]
  shapes = {key: (x.shape, str(x.dtype)) for key, x in batch.items()}
  assert shapes == {
    'images': ((3, SIZE, SIZE, 3), 'uint8'),
    'labels': ((3, SIZE, SIZE), 'uint8'),
    'all_labels': ((3, SIZE, SIZE), 'uint8'),
    'support_images': ((3, 2, SIZE, SIZE, 3), 'uint8'),
    'support_labels': ((3, 2, SIZE, SIZE), 'uint8'),
    'class': ((3,), 'int32'),
    'episode': ((3, 4), 'int32'),
    'valid': ((3,), 'bool'),
  }
  for b in range(3):
    class_, query, *shots = batch['episode'][b]
    assert batch['class'][b] == class_
    label = source[query]['label']
    np.testing.assert_array_equal(batch['all_labels'][b], label)
    value = class_ + 2  # the first of the classes has label 2
    mask = np.where(label == 255, 255, label == value)
    np.testing.assert_array_equal(batch['labels'][b], mask)
    assert (batch['labels'][b] == 1).any()
    for s, shot in enumerate(shots):
      assert (batch['support_images'][b, s] == shot).all()
      label = source[shot]['label']
      mask = np.where(label == 255, 255, label == value)
      np.testing.assert_array_equal(batch['support_labels'][b, s], mask)


@pytest.mark.parametrize('parts', [2, 4])
def test_processes_share_the_batches_of_one(pool, parts):
  whole = take(training(pool, batch_size=4), 9)
  shares = [
    take(training(pool, 4 // parts, shard=(i, parts)), 9) for i in range(parts)
  ]
  for step in range(9):
    merged = {
      key: np.stack([share[step][key] for share in shares], 1).reshape(x.shape)
      for key, x in whole[step].items()
    }
    same(merged, whole[step])


def test_resumed_in_the_middle_of_an_epoch(pool):
  iterator = iter(training(pool))
  for _ in range(17):  # more than an epoch
    next(iterator)
  state = iterator.get_state()
  expected = [next(iterator) for _ in range(3)]
  other = iter(training(pool))
  other.set_state(json.loads(json.dumps(state)))
  for batch in expected:
    same(next(other), batch)


def test_each_epoch_has_every_image_anew(pool):
  length = len(episodes.Random(pool, 2, 'image'))
  batches = take(training(pool, batch_size=1), 2 * length)
  rows = np.array([batch['episode'][0] for batch in batches])
  first, second = rows[:length], rows[length:]
  assert sorted(first[:, 1]) == sorted(second[:, 1])
  assert (first[:, 1] != second[:, 1]).any()
  by_query = [x[np.argsort(x[:, 1])] for x in (first, second)]
  assert (by_query[0] != by_query[1]).any()
  images = {}
  for batch in batches:  # the same image, augmented in another way
    images.setdefault(int(batch['episode'][0, 1]), []).append(batch['images'])
  assert all((one != other).any() for one, other in images.values())


def test_workers_change_nothing(pool):
  for one, other in zip(
    take(training(pool), 3), take(training(pool, workers=1), 3), strict=True
  ):
    same(one, other)


def test_listed_episodes_are_read_once_in_order(pool):
  table = episodes.listed(pool, shots=1, rule='class', count=10)
  seen, valid = [], []
  for part in range(2):
    batches = list(
      pipeline.listed_episodes(
        pool, table, plain, plain, image_size=SIZE, batch_size=3,
        shard=(part, 2),
      )
    )  # fmt: skip
    assert len(batches) == 2
    for batch in batches:
      assert (batch['labels'][~batch['valid']] == 255).all()
      seen += batch['episode'][batch['valid']].tolist()
      valid += batch['valid'].tolist()
  assert sorted(seen) == sorted(table.tolist())
  assert sum(valid) == 10
  one = list(
    pipeline.listed_episodes(
      pool, table, plain, plain, image_size=SIZE, batch_size=4
    )
  )
  rows = np.concatenate([batch['episode'] for batch in one])
  np.testing.assert_array_equal(rows[:10], table)
  with pytest.raises(ValueError, match='need batch_size >= 1'):
    pipeline.listed_episodes(
      pool, table, plain, plain, image_size=SIZE, batch_size=0
    )


@pytest.mark.parametrize('rule', episodes.SHOT_RULES)
def test_the_query_is_one_of_the_shots(source, pool, rule):
  draw = episodes.Random(pool, 3, rule)
  queries = set()
  for i in range(len(draw)):
    for seed in range(4):
      class_, query, *shots = draw(i, np.random.default_rng([seed, i]))
      assert class_ == (i if rule == 'shot' else pool.pairs[i, 1])
      assert query in shots
      assert len(set(shots)) == 3
      assert source.present[shots, class_ + 1].all()
      queries.add(shots.index(query))
  assert queries == {0, 1, 2}
  assert len(draw) == (3 if rule == 'shot' else len(pool.pairs))
  pickle.dumps(draw)


def test_some_pairs_in_turn(pool):
  assert len(episodes.Random(pool, 1, 'shot_of_pair', pairs=5)) == 5
  with pytest.raises(
    ValueError, match="'shot' takes no pairs; these do: shot_"
  ):
    episodes.Random(pool, 1, 'shot', pairs=5)


def test_shots_that_are_always_the_same(source, pool):
  """Drawn once, in training and in every test; their pixels are not tested."""
  found = episodes.supports(pool, shots=2, seed=3)
  assert found.tolist() == episodes.supports(pool, shots=2, seed=3).tolist()
  assert found.tolist() != episodes.supports(pool, shots=2, seed=4).tolist()
  for class_, row in enumerate(found):
    assert len(set(row)) == 2
    assert source.present[row, class_ + 1].all()
  draw = episodes.Random(pool, 2, 'shot', supports=found)
  for i in range(3):
    row = draw(i, np.random.default_rng(i))
    assert row[2:].tolist() == found[i].tolist()
  rest = core.without(pool, {source.ids[i] for i in found.ravel()})
  table = episodes.listed(
    rest, shots=2, rule='class', count=40, seed=1, supports=found
  )
  assert not set(table[:, 1]) & set(found.ravel().tolist())
  assert (table[:, 2:] == found[table[:, 0]]).all()
  left = episodes.leave_one_out(found)
  assert left.shape == (6, 3)
  for class_, query, shot in left:
    assert {query, shot} == set(found[class_])
  with pytest.raises(ValueError, match='of one shot none can be left out'):
    episodes.leave_one_out(found[:, :1])
  with pytest.raises(
    ValueError, match="'pair' takes no supports; these do: sh"
  ):
    episodes.Random(pool, 2, 'pair', supports=found)
  with pytest.raises(ValueError, match=r'^40 shots need 40 images'):
    episodes.supports(pool, shots=40)


def test_copies_of_shots_are_no_part_of_a_pool(source):
  """By their pixels, whatever they are called; blank ones by their names."""
  source.contents = ('x', 'y', 'x', '', '', *source.ids[5:])
  pool = core.pool(source, ('a', 'b', 'c', 'd'), (1, 2, 3, 4))
  told = core.contents(source)
  rest = core.without(pool, {told[0], told[3]})
  gone = set(pool.pairs[:, 0]) - set(rest.pairs[:, 0])
  assert gone == {0, 2, 3}


def test_sources_one_after_the_other(source):
  both = core.Joined(source, source)
  assert len(both) == 48
  assert both[25]['id'] == both.ids[25] == source.ids[1]
  assert both.areas.shape == (48, 4)
  with pytest.raises(IndexError):
    both[48]
  dataset = core.Dataset('d', tuple('abcd'), ((0, 0, 0),) * 5, source, source)
  for part, count in (('train', 24), ('test', 24), ('all', 48)):
    pool = core.pool_of(dataset, part)
    assert len(pool.source) == count
    assert pool.classes == tuple('abcd')
  with pytest.raises(ValueError, match=r"'val' is not one of \('train',"):
    core.pool_of(dataset, 'val')
