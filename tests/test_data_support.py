"""Support choice and episode tables, against the reference's own traces."""

import collections
import json
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from distillfss_jax.data import support

TRAJECTORIES = {
  'none': ('tinyswin_distill_none', 'tinyswin_focal_none'),
  'sub1': ('tinyswin_distill_sub1', 'resnet50_distill_sub1_bneval'),
  'sub3': ('tinyswin_focal_sub3',),
}


def dataset(present, ids=None, test_ids=('t',), classes=None):
  present = np.asarray(present, bool)
  ids = tuple(ids or (f'i{i:03d}' for i in range(len(present))))
  return types.SimpleNamespace(
    name='made',
    classes=classes or tuple('abcdef'[: present.shape[1]]),
    train=types.SimpleNamespace(ids=ids, present=present),
    test=types.SimpleNamespace(ids=tuple(test_ids)),
  )


def test_hus_equals_reference(shared):
  path = shared('goldens/dcama/hierarchical_uniform_sampling.json')
  for key, expected in json.loads(path.read_text()).items():
    last, count = map(int, key.split(','))
    assert support.hus(last, count) == expected, key


@pytest.mark.parametrize(
  ('last', 'count', 'expected'),
  [
    (99, 5, [0, 24, 49, 74, 99]),
    (799, 10, [0, 49, 99, 199, 299, 399, 499, 599, 699, 799]),
    (9, 4, [0, 2, 4, 9]),
    (3, 10, [0, 1, 2, 3]),
    (0, 3, [0, 0]),
    (7, 1, [0]),
  ],
)
def test_hus_by_hand(last, count, expected):
  assert support.hus(last, count) == expected


@hypothesis.given(st.integers(0, 900), st.integers(1, 60))
def test_hus_properties(last, count):
  chosen = support.hus(last, count)
  assert chosen == sorted(chosen)
  assert chosen[0] == 0
  assert chosen[-1] <= last
  if count <= last + 1:
    assert len(chosen) == count == len(set(chosen))


def test_hus_wants_something():
  with pytest.raises(ValueError, match='count >= 1, got 5 and 0'):
    support.hus(5, 0)


def test_even_choice_equals_reference(shared):
  split = json.loads(shared('goldens/dcama/split.json').read_text())
  made = dataset(np.ones((531, 1)), split['train'], split['test'])
  for shots in (1, 5, 10, 25, 50):
    indices, ids = support.choose(made, shots)
    assert indices.tolist() == split[f'support_idx_{shots}']
    assert list(ids) == split[f'support_{shots}']


def test_random_choice_ignores_the_order_of_listing():
  ids = [f'i{i:02d}' for i in range(20)]
  there = support.choose(dataset(np.ones((20, 1)), ids), 7, 3, 'random')
  back = support.choose(dataset(np.ones((20, 1)), ids[::-1]), 7, 3, 'random')
  more = support.choose(dataset(np.ones((20, 1)), ids), 12, 3, 'random')
  other = support.choose(dataset(np.ones((20, 1)), ids), 7, 4, 'random')
  assert there[1] == back[1] == more[1][:7] != other[1]
  assert len(set(there[1])) == 7
  assert there[1] == tuple(ids[i] for i in there[0])


def test_listed_images_are_taken_in_their_order():
  made = dataset(np.ones((6, 1)), list('abcdef'))
  chosen, ids = support.choose(made, 2, rule='listed', listed=('e', 'b', 'c'))
  assert (chosen.tolist(), ids) == ([4, 1], ('e', 'b'))


@pytest.mark.parametrize(
  ('shots', 'rule', 'listed', 'said'),
  [
    (2, 'listed', ('a',), r"'listed' and 2 shots, but support.ids has 1"),
    (2, 'listed', ('a', 'a'), r'support.ids has 1'),
    (1, 'listed', ('z',), r"'z' is no training image of .*'a' to 'f'"),
    (1, 'even', ('a',), r"support.rule is 'even': take 'listed'"),
  ],
)
def test_lists_that_do_not_fit(shots, rule, listed, said):
  made = dataset(np.ones((6, 1)), list('abcdef'))
  with pytest.raises(ValueError, match=said):
    support.choose(made, shots, rule=rule, listed=listed)


def test_shots_per_class():
  """Evenly within each class, an image counting for the first that has it."""
  present = np.zeros((12, 3), bool)
  present[:6, 0] = present[4:9, 1] = present[9:, 2] = True
  made = dataset(present)
  chosen, ids = support.choose(made, 6, rule='per_class')
  # Of 0-5 both ends; of 4, 6, 7, 8 (5 is taken) both ends; of 9-11 both ends.
  assert chosen.tolist() == [0, 5, 4, 8, 9, 11]
  assert ids[1] == 'i005'
  # The reference counts the background as a class: 9 // 4 of each of 3.
  chosen, _ = support.choose(made, 9, rule='per_class_reference')
  assert chosen.tolist() == [0, 5, 4, 8, 9, 11]


@pytest.mark.parametrize('rule', ['per_class', 'per_class_reference'])
def test_no_image_is_drawn_for_two_classes(rule):
  """Classes that always occur together, or nearly so, share no shot."""
  present = np.ones((12, 3), bool)
  for _ in range(2):
    chosen, ids = support.choose(dataset(present), 9, rule=rule)
    assert len(set(chosen.tolist())) == len(set(ids)) == len(chosen)
    assert len(chosen) == (9 if rule == 'per_class' else 6)
    present[::5, 1] = False  # not all of them
  # 0, 11; then 1, 10 of what is left; then 2, 9.
  chosen, _ = support.choose(dataset(np.ones((12, 3), bool)), 6, rule=rule[:9])
  assert chosen.tolist() == [0, 11, 1, 10, 2, 9]
  few = np.ones((6, 3), bool)
  few[3:, 2] = False  # of 0, 1, 2 only 2 is left
  with pytest.raises(ValueError, match=r"class 'c' .* made has 1 training"):
    support.choose(dataset(few), 6, rule='per_class')


@pytest.mark.parametrize(
  ('shots', 'rule', 'message'),
  [
    (0, 'even', 'at least 1 shot, got 0'),
    (9, 'even', '9 shots asked for, but made has 8 training images'),
    (5, 'odd', "rule 'odd' is not one of"),
    (3, 'per_class', 'shares 3 shots among the 2 classes .* a multiple of 2'),
    (2, 'per_class_reference', 'a multiple of 2'),
    (4, 'per_class', "2 shots of class 'b' asked for, but made has 1"),
    (2, 'even', r"no support for class 'b' \(1 of 8 training images have it\)"),
    (1, 'random', 'another seed or more shots'),
  ],
)
def test_choose_errors(shots, rule, message):
  present = np.ones((8, 2), bool)
  present[:, 1] = np.arange(8) == 3
  with pytest.raises(ValueError, match=message):
    support.choose(dataset(present), shots, rule=rule)


def test_test_images_never_support():
  with pytest.raises(AssertionError, match='i000'):
    support.choose(dataset(np.ones((4, 1)), test_ids=('i000',)), 2)


def test_torch_random_words():
  """First words of MT19937 seeded with 5489, its published default."""
  stream = support.TorchRandom(5489)
  assert stream.permutation(2).tolist() == [0, 1]  # 3499211612 is even
  assert stream.drawn == 1
  ahead = support.TorchRandom(5489)
  ahead.skip(1)
  assert ahead.permutation(9).tolist() == stream.permutation(9).tolist()


def test_episodes_equal_reference(shared):
  """Every trace of Substitutor and PairedSubstitutor, torch seed 11.

  With 3 classes, class 1 is in every image, 2 in none, 3 in all but the first.
  """
  traces = json.loads(shared('goldens/dcama/substitutor.json').read_text())
  compared = collections.Counter()
  for trace in traces:
    if trace['error']:  # the reference fails on pairs of two images
      continue
    images, ways = trace['k'], trace['n_classes_with_bg'] - 1
    present = np.zeros((images, ways), bool)
    present[:, 0] = present[1:, -1] = True
    expected = [step['images'] for step in trace['substeps']]
    draws = 1 + ways if trace['iterations_is_num_classes'] else images
    kind = trace['substitutor'] or 'leave_one_out'
    tables = support.episode_tables(
      present,
      kind=kind,
      subsample=trace['subsample'],
      seed=trace['torch_seed'],
      draws=draws if kind == 'paired' else None,
    )
    table, valid = tables(0)
    assert table.dtype == np.int32
    assert table[valid].tolist() == expected, trace
    if kind == 'paired':
      skips = ways == 3
      assert valid.tolist() == [
        not (skips and t % ways == 1) for t in range(draws)
      ]
    compared[kind] += 1
  assert compared == {'leave_one_out': 20, 'paired': 60}


@pytest.mark.parametrize('subsample', TRAJECTORIES)
def test_episodes_of_every_step_equal_reference(shared, subsample):
  """Ten steps on one random stream, each made on its own and out of order."""
  for name in TRAJECTORIES[subsample]:
    path = shared(f'goldens/dcama/traj_{name}.npz')
    with np.load(path) as golden:
      expected = golden['indices']
    tables = support.episode_tables(
      np.ones((5, 1)),
      kind='leave_one_out',
      subsample=None if subsample == 'none' else int(subsample[3:]),
      seed=7,
    )
    for step in reversed(range(10)):
      table, valid = tables(step)
      assert table.tolist() == expected[step].tolist(), (name, step)
      assert valid.all()


def test_paired_trace_of_the_specification():
  """Images of classes 1 2 3 1 2 3, pairs share a class and keep the order."""
  present = np.eye(3, dtype=bool)[[0, 1, 2, 0, 1, 2]]
  table, valid = support.paired(present, 1, 6, support.TorchRandom(0))
  assert valid.all()
  assert [sorted(row) for row in table.tolist()] == 2 * [[0, 3], [1, 4], [2, 5]]
  table, _ = support.paired(present, None, 4, support.TorchRandom(0))
  assert (np.sort(table, axis=1) == np.arange(6)).all()


@hypothesis.given(
  st.integers(2, 9), st.none() | st.integers(1, 12), st.integers(0, 2**32 - 1)
)
def test_leave_one_out_properties(images, subsample, seed):
  table = support.leave_one_out(images, subsample, support.TorchRandom(seed))
  width = images - 1 if subsample is None else min(subsample, images - 1)
  assert table.shape == (images, 1 + width)
  assert table[:, 0].tolist() == list(range(images))
  for query, *supports in table.tolist():
    assert query not in supports
    if subsample is None:
      assert sorted([query, *supports]) == list(range(images))


@hypothesis.given(
  st.integers(2, 8), st.integers(1, 3), st.data(), st.integers(0, 1000)
)
def test_random_episodes_properties(images, ways, data, step):
  bits = data.draw(st.lists(st.booleans(), min_size=images * ways,
                            max_size=images * ways))  # fmt: skip
  present = np.reshape(bits, (images, ways))
  subsample = data.draw(st.none() | st.integers(1, images))
  draw = np.random.RandomState(step)
  table, valid = support.random_episodes(
    present, subsample, np.arange(images), draw
  )
  assert table[valid, 0].tolist() == np.flatnonzero(valid).tolist()
  for row, good in zip(table, valid, strict=True):
    if not good:
      assert not row.any()
      continue
    query, *supports = row
    assert query not in supports
    assert len(set(supports)) == len(supports)
    if present[query].any():
      assert (present[query] & present[supports[0]]).any()
    else:
      assert present[supports[0]].any()


def test_random_episodes_are_uniform():
  """Over many steps each image supports each other equally often."""
  tables = support.episode_tables(
    np.ones((5, 1)), kind='random', subsample=2, seed=1
  )
  seen = np.zeros((5, 5))
  for step in range(1500):
    for query, *supports in tables(step)[0]:
      seen[query, supports] += 1
  assert (np.diag(seen) == 0).all()
  others = seen[~np.eye(5, dtype=bool)]
  np.testing.assert_allclose(others, 750, rtol=0.12)


def test_random_episodes_take_queries_in_turn():
  tables = support.episode_tables(
    np.ones((5, 1)), kind='random', subsample=1, draws=3
  )
  queries = np.concatenate([tables(step)[0][:, 0] for step in range(5)])
  assert queries.tolist() == 3 * list(range(5))


@pytest.mark.parametrize(
  ('present', 'options', 'message'),
  [
    (np.ones((1, 1)), {'kind': 'random'}, 'at least 2 support images, got 1'),
    (np.ones((3, 1)), {'kind': 'all'}, "'all' is not one of"),
    (np.ones((3, 1)), {'kind': 'random', 'subsample': 0}, 'None or at least 1'),
    (np.ones((3, 1)), {'kind': 'random', 'draws': 0}, 'None or at least 1'),
    (np.ones((3, 1)), {'kind': 'leave_one_out', 'draws': 2}, 'must be None'),
    (np.eye(3), {'kind': 'paired'}, 'no two support images'),
    (np.eye(3), {'kind': 'random'}, 'no two support images'),
  ],
)
def test_episode_errors(present, options, message):
  with pytest.raises(ValueError, match=message):
    support.episode_tables(present, **options)
