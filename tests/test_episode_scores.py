"""Scores of episodes by hand: few-shot, of base classes, generalised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillfss_jax.data import augment, core, episodes
from distillfss_jax.datasets import coco, pascal, scenes
from distillfss_jax.evaluators import episodes as scoring
from distillfss_jax.evaluators import metrics as evaluation
from distillfss_jax.ops import metrics, resize
from distillfss_jax.systems import meta
from distillfss_jax.tasks import dense
from distillfss_jax.types import Prediction


class Painted:
  """Images whose red is their label; labels 1..4, of which two are novel."""

  ids = tuple('abcdef')
  sizes = np.array([(6, 8), (8, 8), (8, 5), (8, 8), (8, 8), (8, 8)], np.int32)
  present = np.array(
    [(1, 0, 1, 0), (0, 0, 1, 1), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 1),
     (0, 0, 0, 0)], bool,
  )  # fmt: skip

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, i):
    label = np.zeros(self.sizes[i], np.uint8)
    for row, c in enumerate(np.flatnonzero(self.present[i])):
      label[2 * row : 2 * row + 2] = c + 1
    label[-1] = 255
    image = np.repeat(label[..., None], 3, -1)
    return {'image': image, 'label': label, 'id': self.ids[i]}


def pool_of(values):
  source = Painted()
  pairs = np.argwhere(source.present[:, np.array(values) - 1])
  names = tuple(f'class {i}' for i in values)
  return core.Pool(source, names, pairs, np.array(values))


KNOWN, NOVEL = pool_of((1, 2)), pool_of((3, 4))


def test_few_shot_scores_by_hand():
  """A class over its own episodes; FB-IoU over all of them."""
  counts = np.array([[[10, 2], [3, 5]], [[4, 0], [6, 10]]])
  found = scoring.scores(counts, ('a', 'b'))
  assert found['iou'] == pytest.approx({'a': 5 / 10, 'b': 10 / 16})
  assert found['miou'] == pytest.approx((5 / 10 + 10 / 16) / 2)
  assert found['fb_iou'] == pytest.approx((14 / 25 + 15 / 26) / 2)


def test_a_class_without_an_episode_is_no_part_of_the_mean():
  """Parity: to the originals it is a 0."""
  counts = np.array([[[10, 2], [3, 5]], [[0, 0], [0, 0]]])
  found = scoring.scores(counts, ('a', 'b'))
  assert (found['iou']['b'], found['miou']) == (None, 0.5)


def test_void_of_the_label_counts_nowhere():
  metric = scoring.of_class(NOVEL, ('final',))
  batch = {
    'class': np.array([0]),
    'all_labels': np.array([[[3, 3, 255], [1, 4, 255]]], np.uint8),
  }
  logits = np.zeros((1, 2, 3, 2), np.float32)
  logits[0, :, :, 1] = [[1, -1, 1], [1, -1, -1]]
  found = metric.count({'final': logits}, batch)['final']
  np.testing.assert_array_equal(found, [[[1, 1], [1, 1]]])


def test_a_base_map_is_scored_by_the_base_classes():
  metric = scoring.of_base(NOVEL, KNOWN)
  labels = np.array([[[1, 2, 3], [4, 0, 255]]], np.uint8)
  logits = jax.nn.one_hot(np.array([[[1, 1, 2], [0, 0, 1]]]), 3)
  batch = {'class': np.array([1]), 'all_labels': labels}
  counts = np.asarray(metric.count({'base': logits}, batch)['base'])
  # What is novel, 3 and 4, should be background.
  np.testing.assert_array_equal(counts[0], [[2, 0, 1], [0, 1, 0], [0, 1, 0]])
  found = metric.scores(counts)
  assert found['iou'] == pytest.approx({'class 1': 1 / 2, 'class 2': 0})


@pytest.mark.parametrize(
  ('first', 'wanted'), [('final', [0, 1, 3, 3, 2]), ('base', [0, 1, 1, 3, 2])]
)
def test_fusions(first, wanted):
  """Pixels: neither, base, both, novel, and a novel that is not sure enough."""
  base = jax.nn.one_hot(np.array([0, 1, 1, 0, 2]), 3)
  odds = np.array([0.5, 0.5, 0.95, 0.91, 0.89])
  final = jnp.stack([jnp.zeros(5), jnp.log(odds / (1 - odds))], -1)
  found = scoring.fuse(first, {'final': final, 'base': base})
  np.testing.assert_array_equal(found, wanted)


def test_generalised_scores_by_hand():
  """Two episodes, of two novel classes, beside one base class."""
  one = [[8, 1, 0], [0, 4, 1], [2, 0, 3]]
  two = [[5, 0, 1], [1, 2, 0], [0, 0, 6]]
  found = scoring.generalised_scores(
    np.array([one, two]), ('known',), ('x', 'y')
  )
  iou = {'known': 6 / 9, 'x': 3 / 6, 'y': 6 / 7}
  assert found['iou'] == pytest.approx(iou)
  assert found['base_miou'] == pytest.approx(6 / 9)
  assert found['novel_miou'] == pytest.approx((3 / 6 + 6 / 7) / 2)
  assert found['miou'] == pytest.approx(sum(iou.values()) / 3)
  background = 13 / 18
  foreground = (6 + 9) / (9 + 13)
  assert found['fb_iou'] == pytest.approx((background + foreground) / 2)


def test_generalised_labels():
  """Base classes stay themselves, the asked one is last, others background."""
  truth = scoring.generalised(NOVEL, KNOWN).truth
  np.testing.assert_array_equal(truth[:, [0, 1, 2, 3, 4, 255]], [
    [0, 1, 2, 3, 0, 255], [0, 1, 2, 0, 3, 255],
  ])  # fmt: skip


def test_generalised_episodes():
  table = episodes.generalised(NOVEL, shots=1, count=600, seed=3)
  np.testing.assert_array_equal(table[:, 1], np.arange(600) % 6)
  asked = {i: set(table[table[:, 1] == i, 0].tolist()) for i in range(6)}
  # With a base class, or with nothing, any class; else one that is there.
  assert asked == {0: {0, 1}, 1: {0, 1}, 2: {0}, 3: {1}, 4: {0, 1}, 5: {0, 1}}
  for class_, query, shot in table:
    assert shot != query
    assert NOVEL.source.present[shot, 2 + class_]
  again = episodes.generalised(NOVEL, shots=1, count=600, seed=3)
  np.testing.assert_array_equal(table, again)
  with pytest.raises(ValueError, match='3 shots and a query need 4 images'):
    episodes.generalised(NOVEL, shots=3)


# Where the pixels of an image are in what a model says of it, by each rule.
def whole(x, size, side):
  return resize.bilinear(x, size)


def squares(x, size, side):
  return resize.bilinear(x, size, align_corners=False)


def padded(x, size, side):
  """BAM: to the square around the image, and what lies on the image."""
  longest = max(size)
  return resize.bilinear(x, (longest, longest))[: size[0], : size[1]]


def corner(x, size, side):
  """The part of the square that the image fills, brought to its size."""
  part = tuple(augment.fitted(n, max(size), side) for n in size)
  return resize.bilinear(x[: part[0], : part[1]], size, align_corners=False)


@pytest.mark.parametrize(
  ('recipe', 'exact', 'alone'),
  [
    ('none', False, squares),
    ('stretch', False, whole),
    ('stretch', True, squares),
    ('fit', False, padded),
    ('fit', True, corner),
  ],
)
def test_native_counts(recipe, exact, alone):
  """Each image on its own, by the rule of an original or exactly."""
  side, sizes = 25, np.array([(40, 31), (17, 48), (25, 25)], np.int32)
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, side, side, 2)).astype(np.float32)
  labels = np.full((3, 64, 64), 255, np.uint8)
  wanted = []
  for x, label, (h, w) in zip(logits, labels, sizes, strict=True):
    label[:h, :w] = rng.integers(0, 5, (h, w))
    found = alone(jnp.asarray(x), (h, w), side).argmax(-1)
    truth = jnp.asarray(label[:h, :w] == 3).astype(int)
    wanted.append(metrics.count(truth, found, 2))
  places = scoring.places_of(recipe, exact=exact)
  metric = scoring.of_class(NOVEL, ('final',), size='native', places=places)
  batch = {'class': np.zeros(3, int), 'native_labels': labels, 'sizes': sizes}
  counts = jax.jit(metric.count)({'final': logits}, batch)['final']
  assert counts.sum() == sizes.prod(1).sum()
  # Ties aside, which the order of sums decides.
  assert np.abs(np.asarray(counts) - np.array(wanted)).sum() <= 8


def test_recipes_that_cannot_be_undone():
  with pytest.raises(ValueError, match="test_recipe='bam' is not one of none,"):
    scoring.places_of('bam', exact=False)


def test_a_perfect_system_scores_one():
  """Whole episodes through the pipeline, at both sizes, and generalised."""
  values = {'final': None, 'base': (1, 2)}

  def predict(variables, memory, images, roles):
    del variables
    red = images[..., 0].astype(int)

    def labels(role):
      if role == 'final':  # finds what the support shows
        return (red == memory[:, None, None]).astype(int)
      return jnp.asarray(scoring.truth_of(values[role]))[red] * (red < 255)

    return {
      role: Prediction(20 * jax.nn.one_hot(labels(role), 3)[..., :classes])
      for role, classes in (('final', 2), ('base', 3))
      if role in roles
    }

  def memorize(variables, support):
    inside = support.masks[..., 0] * support.images[..., 0]
    return inside.max((1, 2, 3)).astype(int)

  def run(table, found):
    evaluator = scoring.Episodes(
      NOVEL, table, memorize, predict, found, image_size=8, batch_size=4,
      recipe='none',
    )  # fmt: skip
    return evaluator.run({}, ('final',), show=(1,))

  table = episodes.listed(NOVEL, shots=1, rule='image', count=10)
  places = evaluation.stretched
  found = run(
    table,
    [
      scoring.of_class(NOVEL, ('final',)),
      scoring.of_class(NOVEL, ('final',), size='native', places=places),
      scoring.of_base(NOVEL, KNOWN),
    ],
  )
  assert list(found.scores) == ['test', 'test_native', 'test_base']
  assert found.scores['test_native']['final']['miou'] > 0.6
  assert found.shown[1]['final'].shape == (2, 8, 8)
  assert found.images == 10
  general = run(
    episodes.generalised(NOVEL, shots=1, count=10),
    [scoring.generalised(NOVEL, KNOWN)],
  )
  assert set(general.scores['generalised']) == {'final first', 'base first'}


@pytest.mark.parametrize('fold', range(4))
@pytest.mark.parametrize(
  ('count', 'novel'),
  [
    (20, pascal.fold_labels),
    (80, lambda fold: coco.fold_labels(fold, 'interleaved')),
    (12, scenes.fold_labels),
  ],
)
def test_no_novel_class_reaches_a_base_map(fold, count, novel):
  """Neither as a target of the meta learner's base map, nor as its score."""
  novel = set(novel(fold))
  known = [i for i in range(1, count + 1) if i not in novel]
  for table in (
    meta.MetaSystem.shared(None, np.array(known)),
    scoring.truth_of(known),
  ):
    assert (np.asarray(table)[sorted(novel)] == 0).all()
    np.testing.assert_array_equal(
      table[np.array(known)], np.arange(len(known)) + 1
    )
    assert table[255] == 255
    assert table[0] == 0


def test_no_novel_class_reaches_the_base_learner():
  """Images with novel objects train it, which are background."""
  args = {'fold': 1, 'num_train': 40, 'num_test': 12, 'image_size': 64}
  dataset = dense._base_classes('scenes', **args)
  raw = scenes.pool(part='train', **args).source
  novel, seen = scenes.fold_labels(1), 0
  assert len(dataset.classes) == 9
  assert not set(dataset.classes) & {scenes.CLASSES[i - 1] for i in novel}
  for i in np.flatnonzero(raw.present[:, np.array(novel) - 1].any(1))[:6]:
    there = np.isin(raw[i]['label'], novel)
    seen += there.sum()
    assert (dataset.train[i]['label'][there] == 0).all()
  assert seen


def test_the_released_mean_by_hand():
  """Of three classes: a matrix whose third label lies outside."""
  counts = np.array(
    [[[50, 10], [5, 35]], [[60, 4], [6, 30]], [[70, 9], [8, 13]]]
  )
  # Label 3 loses its hits; what it claims wrongly is called label 1's.
  background = 180 / (180 + 10 + 4 + 5 + 6 + 9)
  first, second = 35 / (35 + 10 + 5 + 9), 30 / (30 + 4 + 6)
  wanted = np.mean([background, first, second])
  assert scoring.released_mean(counts, 3) == pytest.approx(wanted)
  # With more rows than classes nothing falls out.
  third = 13 / 30
  background = 180 / (180 + 23 + 19)
  wanted = np.mean([background, 35 / 50, 30 / 40, third])
  assert scoring.released_mean(counts, 1000) == pytest.approx(wanted)
  # One class is the IoU of its foreground.
  assert scoring.released_mean(counts[:1], 1) == pytest.approx(35 / 50)
  nothing = scoring.released_mean(np.zeros((3, 2, 2), np.int64), 3)
  assert nothing is None


def test_the_released_number_depends_on_the_batch():
  """As users report of DeepGlobe: 96 at once is FB-IoU, 1 is something else."""
  rng, classes = np.random.default_rng(0), 6
  table = np.zeros((600, 3), np.int32)
  table[:, 0] = np.arange(600) % classes
  # Classes of very different sizes, found well and badly.
  right = np.array([900, 30, 400, 60, 200, 10])[table[:, 0]]
  episode = np.zeros((600, 2, 2), np.int64)
  episode[:, 1, 1] = right + rng.integers(0, 5, 600)
  episode[:, 1, 0] = rng.integers(0, 100, 600)
  episode[:, 0, 1] = rng.integers(0, 200, 600)
  episode[:, 0, 0] = 1500
  pool = core.Pool(
    Painted(), tuple('abcdef'), np.zeros((0, 2)), np.arange(1, 7)
  )

  def counted(metric):
    counts = np.zeros((classes, 2, 2), np.int64)
    np.add.at(counts, metric.counted_as(table), episode)
    return metric.scores(counts)

  plain = counted(scoring.of_class(pool, ('teacher',)))
  found = {
    n: counted(scoring.of_batches(pool, ('teacher',), batch=n))['as_released']
    for n in (96, 48, 12, 6, 1, 5)
  }
  for n in (96, 48, 12, 6):
    assert found[n] == pytest.approx(plain['fb_iou'])
  assert abs(found[96] - found[1]) > 0.05
  assert abs(found[5] - found[1]) > 0.01
  assert abs(found[96] - plain['miou']) > 0.1


def test_a_batch_counts_as_its_first():
  """Through the evaluator, whose own batches do not matter."""
  table = np.array([[0, 0, 2], [1, 3, 4], [1, 1, 3], [0, 2, 1], [0, 0, 2]])

  def predict(variables, memory, images, roles):
    logits = jax.nn.one_hot((images[..., 0] == 3).astype(int), 2)
    return {role: Prediction(logits) for role in roles}

  metric = scoring.of_batches(NOVEL, ('teacher',), batch=2, classes=3)
  np.testing.assert_array_equal(metric.counted_as(table), [0, 0, 1, 1, 0])
  seen = []
  for size in (4, 8):
    metric = scoring.dataclasses.replace(
      metric, scores=lambda counts: seen.append(counts) or {'as_released': 0.0}
    )
    evaluator = scoring.Episodes(
      NOVEL, table, lambda variables, support: 0, predict, [metric],
      image_size=8, batch_size=size,
    )  # fmt: skip
    evaluator.run({}, ('teacher',))
  np.testing.assert_array_equal(*seen)
  assert seen[0][0].sum() > seen[0][1].sum() > 0
