"""What a dense run tests, at which sizes, and what chooses its checkpoint."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import several
from PIL import Image

from configs import common
from distillfss_jax import config as configs
from distillfss_jax import datasets, systems, tasks, train
from distillfss_jax.data import augment, core, pipeline
from distillfss_jax.datasets import scenes, synthetic
from distillfss_jax.evaluators import base, images, metrics
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.types import Prediction

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 4


@pytest.fixture(autouse=True)
def known(monkeypatch):
  """The folder of the throw-away system is one more place of systems."""
  places = [*systems.__path__, str(HERE / 'throwaway')]
  monkeypatch.setattr(systems, '__path__', places)


def config(**values):
  """A short dense run of the throw-away system; `values` with __ for dots."""
  made = common.dense(common.base())
  made.name = made.system = 'pair'
  made.data.image_size = 16
  made.data.args.update(num_train=12, num_test=3, image_size=32, classes=1)
  made.dense.batch_size = 8
  made.steps, made.log_every, made.checkpoint_every = STEPS, 2, 4
  made.eval.every, made.eval.panels = 2, 0
  made.optim.name, made.optim.lr = 'sgd', 0.1
  made.optim.trainable = ('student/.*',)
  made.update_from_flattened_dict(
    {k.replace('__', '.'): v for k, v in values.items()}
  )
  return made.lock()


class Sizes:
  """Images of few shapes: what is predicted is said by their colours."""

  def __init__(self, sizes):
    self.sizes = np.array(sizes, np.int32)
    self.ids = tuple(f't{i}' for i in range(len(sizes)))

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, i):
    random = np.random.RandomState(i)
    shape = tuple(self.sizes[i])
    label = random.randint(0, 3, shape).astype(np.uint8)
    label[0, 0] = 255
    return {
      'image': random.randint(0, 256, (*shape, 3)).astype(np.uint8),
      'label': label,
      'id': self.ids[i],
    }


SIZES = [(20, 30), (30, 20), (10, 15), (20, 30), (17, 17), (20, 30), (40, 60)]


def colours(variables, memory, x, roles):
  """The largest colour; what lies beyond the middle says more of the red.

  So that padding, or another shape, would change the answer.
  """
  x = x.astype(jnp.float32)
  x = x.at[:, :, x.shape[2] // 2 :, 0].add(40.0)
  return {role: Prediction(x - x.mean((1, 2), keepdims=True)) for role in roles}


@pytest.mark.parametrize('batch_size', [1, 2, 3, 8])
def test_the_short_side_is_scored_as_each_image_alone(batch_size):
  source = Sizes(SIZES)
  metric = metrics.ModelSize(
    ('a', 'b'), base.Protocol('x', 'short_side', ''), dense=True
  )
  evaluator = images.ShortSide(
    source, colours, [metric], image_size=12, batch_size=batch_size
  )
  found = evaluator.run({}, ('student',))
  wanted = Confusion.empty(3)
  for i in range(len(source)):
    record = source[i]
    rows, columns = record['label'].shape
    shape = 12 * columns // min(rows, columns), 12 * rows // min(rows, columns)
    image, label = (
      np.asarray(Image.fromarray(record[k]).resize(shape, how))
      for k, how in (('image', Image.BILINEAR), ('label', Image.NEAREST))
    )
    logits = colours({}, None, jnp.asarray(image[None]), ('x',))['x'].logits
    wanted.add(Confusion.of(label, np.asarray(logits[0].argmax(-1)), 3).counts)
  numbers = found.scores['x']['student']
  assert numbers['miou'] == pytest.approx(wanted.miou)
  for name, value in wanted.dense_scores().items():
    assert numbers[name] == pytest.approx(value), name
  assert found.images == len(SIZES)


@pytest.mark.parametrize('batch_size', [1, 2, 4])
@pytest.mark.parametrize('parts', [1, 2, 5, 9])
def test_batches_of_one_shape_each_image_once(batch_size, parts):
  """However many processes: each has a batch, a shape has one batch size."""
  source, seen, shapes = Sizes(SIZES), [], set()
  for part in range(parts):
    batches = list(
      pipeline.short_side_batches(
        source, image_size=12, batch_size=batch_size, shard=(part, parts)
      )
    )
    assert batches
    for batch in batches:
      shapes.add(batch['images'].shape)
      np.testing.assert_array_equal(batch['valid'], batch['index'] >= 0)
      assert (batch['labels'][~batch['valid']] == 255).all()
      seen += batch['index'][batch['valid']].tolist()
      for row in np.flatnonzero(batch['valid']):
        record = source[batch['index'][row]]
        image, label = augment.short_side(record['image'], record['label'], 12)
        np.testing.assert_array_equal(batch['images'][row], image)
        np.testing.assert_array_equal(batch['labels'][row], label)
  assert sorted(seen) == list(range(len(SIZES)))
  assert len({x[1:] for x in shapes}) == 3
  if parts <= 5:
    assert len(shapes) == 3


def test_golden_scores_of_dense_methods(shared):
  """AttnFD's: background is a class, 255 is no pixel."""
  path = shared('goldens/attnfd_kdas/golden_attnfd.json')
  golden = json.loads(path.read_text())['metrics']
  found = Confusion(np.array(golden['cm'])).dense_scores()
  assert found == {
    'miou_with_background': pytest.approx(golden['miou'], abs=1e-9),
    'class_accuracy': pytest.approx(golden['acc_class'], abs=1e-9),
    'pixel_accuracy': pytest.approx(golden['acc'], abs=1e-9),
    'frequency_weighted_iou': pytest.approx(golden['fwiou'], abs=1e-9),
  }


@pytest.mark.parametrize('asked', [False, True])
def test_evaluations_are_named(asked, tmp_path):
  made = config(
    eval__short_side=asked, eval__saliency=asked, eval__masks=asked,
    eval__panels=2 * asked,
  )  # fmt: skip
  results = train.run(made, tmp_path)
  names = ['test', 'test_native']
  names += ['test_short_side', 'test_saliency'] if asked else []
  assert set(results['evaluations']) == set(names)
  assert results['test_images'] == 3
  assert (tmp_path / 'saliency.csv').exists() == asked
  found = {x.name for x in tmp_path.glob('masks/test/*.png')}
  ids = synthetic.load(**made.data.args).test.ids
  assert found == ({f'{x}.png' for x in ids} if asked else set())
  table = train.score_table(results)
  for name in names:
    assert f'{name}: ' in table
  # Of what has no column in common, a table each.
  heads = [x for x in table.splitlines() if '  scored  ' in x]
  assert len(heads) == 1 + asked
  assert [('mIoU' in x, 'mean Dice' in x) for x in heads] == [
    (True, False), (False, True),
  ][: 1 + asked]  # fmt: skip
  if asked:
    # Of square images both are the same.
    student = results['test_short_side']['student']
    assert set(student) >= {'miou', 'class_accuracy', 'frequency_weighted_iou'}
    assert results['test_saliency']['student']['maxDic'] > 0
    page = (tmp_path / 'report.html').read_text()
    assert 'mean Dice' in page
    # Evenly spaced ones, and those of the lowest score.
    assert 2 <= page.count('data-role="confidence"') <= 3


def of_evaluations(results):
  return ' '.join(x['says'] for x in results['evaluations'].values())


SAID = 'checkpoints were chosen on these images'
NOTE = 'these scores are better than they would be on new ones'


@pytest.mark.parametrize(
  ('values', 'chosen_on', 'by'),
  [
    ({'dense__held_out': 0.25}, 'validation', 'miou'),
    ({'dense__select': 'test'}, 'test', 'miou'),
    (
      {'dense__held_out': 0.25, 'eval__short_side': True},
      'validation_short_side',
      'miou',
    ),
    (
      {'dense__select': 'test', 'eval__saliency': True},
      'test_saliency',
      'soft_dice',
    ),
  ],
)
def test_what_chooses_is_marked(values, chosen_on, by, tmp_path):
  results = train.run(config(eval__keep_best=True, **values), tmp_path)
  assert results['checkpoint']['chosen_on'] == chosen_on
  assert results['checkpoint']['by'].endswith(f' {by}')
  on_tests = values.get('dense__select') == 'test'
  for text in (
    of_evaluations(results),
    train.score_table(results),
    (tmp_path / 'report.html').read_text(),
    (tmp_path / 'results.json').read_text(),
  ):
    assert (SAID in text) == on_tests
  assert (NOTE in ' '.join(results['notes'])) == on_tests


def test_the_images_that_a_dataset_keeps_choose(monkeypatch):
  def load(**args):
    made = synthetic.load(**args)
    return core.Dataset(
      made.name,
      made.classes,
      made.palette,
      core.Part(made.train, range(8)),
      made.test,
      core.Part(made.train, range(8, 12)),
    )

  monkeypatch.setattr(datasets, 'load', lambda name, **args: load(**args))
  data, _ = tasks.load(config(eval__keep_best=True))
  assert len(data.validation) == 4
  assert data.ids()['validation'] == list(data.dataset.validation.ids)
  # What is held out goes before, and the test before both.
  data, _ = tasks.load(config(dense__held_out=0.25))
  assert data.validation is data.held_out
  assert 'validation' not in data.ids()
  data, _ = tasks.load(config(eval__keep_best=True, dense__select='test'))
  assert data.validation is None


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ({'dense__select': 'val'}, "is 'val'; there are: validation, test"),
    ({'eval__keep_best': True}, 'dense.held_out=0.1, or choose on the test'),
    ({'eval__masks': True}, 'set both'),
    (
      {'eval__saliency': True, 'data__args__classes': 2},
      'maps of one foreground, and synthetic has 2 classes',
    ),
  ],
)
def test_what_does_not_fit_is_said_at_once(values, said):
  with pytest.raises(ValueError, match=said) as caught:
    tasks.load(config(**values))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('held_out', [0.0, 0.25])
def test_folders_from_before_go_on(held_out, tmp_path):
  """They chose on the test images where nothing was held out."""
  made = config(dense__held_out=held_out)
  with made.unlocked():
    del made.dense['select']
  (tmp_path / 'config.json').write_text(made.to_json_best_effort())
  found = configs.saved(tmp_path / 'config.json')
  assert found['dense.select'] == ('validation' if held_out else 'test')
  assert found['eval.saliency'] is False
  (tmp_path / 'config.json').write_text(
    common.get_config().to_json_best_effort()
  )
  assert not {'eval.saliency', 'dense.select'} & set(
    configs.saved(tmp_path / 'config.json')
  )


def test_sets_come_along():
  made = core.Dataset(
    'x', ('a',), ((0, 0, 0), (1, 1, 1)), *_blobs(), sets={'a': (0,)}
  )
  assert core.without_void(made).sets == {'a': (0,)}
  assert core.with_classes(made, [1]).sets == {'a': (0,)}


def _blobs():
  made = scenes.load('blobs', num_train=2, num_test=2)
  return made.train, made.test


def of_processes():
  """All evaluations of the throw-away system, which is not known there yet."""
  systems.__path__.append(str(HERE / 'throwaway'))
  return config(
    eval__keep_best=True, eval__saliency=True, eval__masks=True,
    eval__short_side=True, dense__select='test', optim__lr=0.0,
    data__args__num_test=5,
  )  # fmt: skip


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
  found = []
  for count in (1, 2):
    folder = tmp_path / f'{count}'
    several.run_on(folder, 'test_dense_tests:of_processes', processes=count)
    found.append(json.loads((folder / 'results.json').read_text()))
    assert len(list((folder / 'masks/test').glob('*.png'))) == 5
    lines = (folder / 'saliency.csv').read_text().splitlines()
    assert len(lines) == 1 + 2 * 5
    assert '0.000000' not in lines[1].split(',')[3:6]  # no image is missing
  one, two = found
  assert one['checkpoint']['chosen_on'] == two['checkpoint']['chosen_on']
  assert two['test_images'] == 5
  for name in ('test', 'test_short_side', 'test_saliency'):
    for role, numbers in one[name].items():
      for key, value in numbers.items():
        if isinstance(value, float):
          assert two[name][role][key] == pytest.approx(value, abs=2e-3), key
