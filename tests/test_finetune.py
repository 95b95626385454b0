"""Tests of fine-tuning by views, and of the choice on held-out images."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import common
from distillfss_jax import (
  backbones,
  config,
  datasets,
  held_out,
  params,
  systems,
  train,
  train_step,
  unlabelled,
)
from distillfss_jax.data import support as support_lib
from distillfss_jax.models import unet
from distillfss_jax.ops import losses
from distillfss_jax.tasks import adaptation
from distillfss_jax.types import VOID


def test_dice_by_hand():
  labels = jnp.array([[[1, 1, 0, VOID]], [[0, 0, 0, 0]]])
  right = 50 * jax.nn.one_hot(jnp.where(labels == VOID, 1, labels), 2)
  found = losses.dice(right, labels)
  np.testing.assert_allclose(found, [0, 0], atol=1e-6)
  # All foreground: of 2 pixels and 3 found (2 * 2 + 1) / (2 + 3 + 1); of none
  # and 4 found 1 / (4 + 1).
  everywhere = jnp.broadcast_to(jnp.array([0.0, 50.0]), (2, 1, 4, 2))
  found = losses.dice(everywhere, labels)
  np.testing.assert_allclose(found, [1 - 5 / 6, 1 - 1 / 5], atol=1e-6)


def test_shares_that_are_sure_are_labels():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(3, 6, 5, 3)), jnp.float32)
  labels = rng.integers(0, 3, (3, 6, 5))
  labels[1, :3] = VOID
  shares = jax.nn.one_hot(labels, 3)  # of void all 0
  sums = losses.cross_entropy(logits, labels)
  for a, b in zip(losses.cross_entropy(logits, shares), sums, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  np.testing.assert_allclose(
    losses.dice(logits, shares), losses.dice(logits, labels), rtol=1e-5
  )


def test_a_share_by_hand():
  """A quarter of what was certain: -log p in these parts, and p of them."""
  shares = jnp.array([[[[0.75, 0.25]]]])
  logits = jnp.log(jnp.array([[[[0.5, 0.5]]]]))
  [found], [count] = losses.cross_entropy(logits, shares)
  assert (found, count) == (pytest.approx(np.log(2)), 1)
  expected = 1 - (2 * 0.5 * 0.25 + 1) / (0.5 + 0.25 + 1)
  np.testing.assert_allclose(losses.dice(logits, shares), [expected], rtol=1e-5)


def test_dice_of_several_classes_is_of_those_shown():
  labels = jnp.array([[[2, 2, 0, 0]]])
  logits = 50 * jax.nn.one_hot(jnp.array([[[2, 2, 1, 0]]]), 3)
  np.testing.assert_allclose(losses.dice(logits, labels), [0], atol=1e-6)


@pytest.mark.parametrize('size', [(64, 64), (50, 75)])
def test_the_decoder_ends_at_the_images_size(size):
  model = nnx.eval_shape(
    lambda: unet.UNet(
      backbones.build('lite0', image_size=64, rngs=nnx.Rngs(0), finest=2),
      3,
      rngs=nnx.Rngs(0),
    )
  )
  images = jax.ShapeDtypeStruct((2, *size, 3), 'uint8')
  logits = jax.eval_shape(
    lambda model, x: model.decode(model.encode(x), size), *(model, images)
  )
  assert logits.shape == (2, *size, 3)


def test_the_pixels_of_a_place_lie_side_by_side():
  backbone = types.SimpleNamespace(channels=(4, 6), strides=(2, 4))
  model = unet.UNet(backbone, 2, rngs=nnx.Rngs(0))
  places = jnp.arange(2 * 2 * 2, dtype=jnp.float32)
  model.last = lambda x: jnp.broadcast_to(places, (*x.shape[:3], 8))
  maps = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 4, 4, 6))
  logits = model.decode(maps, (16, 16))
  block = np.asarray(places).reshape(2, 2, 2)
  np.testing.assert_array_equal(logits[0, :2, :2], block)
  np.testing.assert_array_equal(logits[0, 2:4, -2:], block)


def test_widths_must_fit():
  backbone = types.SimpleNamespace(channels=(4, 6, 8), strides=(2, 4, 8))
  with pytest.raises(ValueError, match='widths'):
    unet.UNet(backbone, 2, widths=(8,), rngs=nnx.Rngs(0))


def test_views_take_images_in_turn():
  at = support_lib.episode_tables(np.ones((3, 1), bool), kind='views', draws=4)
  rows, valid = at(0)
  assert rows.dtype == np.int32
  np.testing.assert_array_equal(rows, [[0], [1], [2], [0]])
  np.testing.assert_array_equal(at(1)[0], [[1], [2], [0], [1]])
  assert valid.all()


def test_one_annotated_image_is_enough():
  at = support_lib.episode_tables(np.ones((1, 1), bool), kind='views', draws=2)
  np.testing.assert_array_equal(at(5)[0], [[0], [0]])


# --- recipes ----------------------------------------------------------------


def test_recipes():
  paper = config.load('configs/nucleus.py')
  ours = config.load('configs/nucleus.py:recipe=ours')
  assert (paper.system, ours.system) == ('distillfss', 'finetune')
  assert ours.views.look == 'auto'
  assert tuple(ours.optim.trainable) == ('decoder',)
  steps = [
    config.load(f'configs/nucleus.py:recipe=ours,shots={n}').steps
    for n in (1, 5, 10, 20, 50)
  ]
  assert steps == [300, 300, 600, 1200, 1200]
  other = config.load('configs/nucleus.py:recipe=unet')
  assert other.views.look == 'recolour'
  assert tuple(other.optim.trainable) == ('.*',)
  assert config.load('configs/folder.py:name=x').system == 'finetune'
  assert config.load('configs/folder.py:name=x,recipe=paper').system == (
    'distillfss'
  )


@pytest.mark.parametrize('given', ['backbone=swin_b', 'method=distill'])
def test_what_belongs_to_the_papers_recipe(given):
  with pytest.raises(ValueError, match=given.partition('=')[0]):
    config.load(f'configs/nucleus.py:recipe=ours,{given}')


def _small(**views):
  made = common.get_config()
  common.few_views(made, look='polarity')
  with made.unlocked():
    common.smoke(made)
  made.views.update(views)
  made.episodes.draws = 2
  return made


def test_an_unknown_look():
  with pytest.raises(ValueError, match=r'colour, recolour, polarity, and auto'):
    systems.build(_small(look='grey'), 1)


# --- choices on held-out images ---------------------------------------------


def _data(count=3, side=32):
  """Images whose object is a light square."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 60, (count, side, side, 3), dtype=np.uint8)
  labels = np.zeros((count, side, side), np.uint8)
  labels[:, 8:20, 8:20] = 1
  images[labels == 1] += 150
  return types.SimpleNamespace(
    support=types.SimpleNamespace(images=images, labels=labels), ways=1
  )


def test_nothing_is_open(tmp_path):
  made = _small()
  assert held_out.decide(made, _data(), tmp_path) is made
  assert not list(tmp_path.iterdir())


def test_a_choice_is_kept(tmp_path, monkeypatch):
  asked = []

  def score(config, support, ways, tell):
    asked.append(config.views.look)
    tell(held_out.STEPS)
    value = {'colour': 0.2, 'recolour': 0.9, 'polarity': 0.5}[asked[-1]]
    return {
      'as they are': value, 'mean': value, 'error': 0.1, 'temperature': 2.0,
    }  # fmt: skip

  monkeypatch.setattr(held_out, 'score', score)
  made = _small(look='auto')
  chosen = held_out.decide(made, _data(), tmp_path)
  assert asked == ['colour', 'recolour', 'polarity']
  assert (chosen.views.look, made.views.look) == ('recolour', 'auto')
  told = json.loads((tmp_path / 'held_out.json').read_text())
  assert told['choice'] == {'views.look': 'recolour'}
  assert told['scores']['colour']['mean'] == 0.2

  (tmp_path / 'config.json').write_text(chosen.to_json_best_effort())
  monkeypatch.delattr(held_out, 'score')  # it is not asked again
  again = held_out.decide(made, _data(), tmp_path)
  assert again.views.look == 'recolour'
  assert not config.differences(config.saved(tmp_path / 'config.json'), made)


@pytest.mark.parametrize(
  ('means', 'choice'),
  [
    ((0.5, 0.7, 0.6), 'polarity'),  # within an error of the best
    ((0.5, 0.7, 0.59), 'recolour'),
    ((0.7, 0.65, 0.5), 'recolour'),
    ((0.7, 0.5, 0.5), 'colour'),
    ((0.5, 0.6, 0.8), 'polarity'),
  ],
)
def test_the_blindest_look_that_is_no_worse(
  tmp_path, monkeypatch, means, choice
):
  left = iter(means)
  monkeypatch.setattr(
    held_out,
    'score',
    lambda *_: {'mean': next(left), 'error': 0.1001, 'temperature': 1.0},
  )
  chosen = held_out.decide(_small(look='auto'), _data(), tmp_path)
  assert chosen.views.look == choice


def test_one_image_cannot_be_held_out(tmp_path, caplog):
  chosen = held_out.decide(_small(look='auto'), _data(1), tmp_path)
  assert chosen.views.look == 'polarity'
  assert 'cannot be held out' in caplog.text


def test_auto_is_a_name_elsewhere(tmp_path):
  made = _small()
  made.name = 'auto'
  assert held_out.decide(made, _data(), tmp_path) is made
  other = made.copy_and_resolve_references()
  other.name = 'other'
  [said] = config.differences(other, made)
  assert said == "name was 'other', is 'auto'"


@pytest.mark.slow
def test_held_out_images_are_scored(monkeypatch):
  monkeypatch.setattr(held_out, 'STEPS', 20)
  made = _small()
  told = []
  found = held_out.score(made, _data().support, 1, told.append)
  assert told == [10, 20, 30, 40]
  assert set(found) == {
    'as they are', 'recoloured', 'mean', 'error', 'temperature',
  }  # fmt: skip
  assert 1 / 8 < found['temperature'] < 8
  assert 0 < found['error'] < 0.3
  assert found['as they are'] > 0.5  # a square of 12 x 12 is 0.14 of the image
  wanted = (found['as they are'] + found['recoloured']) / 2
  assert found['mean'] == pytest.approx(wanted)


def test_a_temperature_is_chosen_by_itself(tmp_path, monkeypatch):
  """The look is given, and stays; the folder has what was chosen."""
  asked = []

  def score(config, support, ways, tell):
    asked.append((config.views.look, config.views.temperature))
    return {'mean': 0.5, 'error': 0.1, 'temperature': 1.5}

  monkeypatch.setattr(held_out, 'score', score)
  made = _small(temperature=0.0)
  chosen = held_out.decide(made, _data(), tmp_path)
  assert asked == [('polarity', 1.0)]
  assert (chosen.views.look, chosen.views.temperature) == ('polarity', 1.5)
  (tmp_path / 'config.json').write_text(chosen.to_json_best_effort())
  monkeypatch.delattr(held_out, 'score')
  assert held_out.decide(made, _data(), tmp_path).views.temperature == 1.5
  alone = held_out.decide(made, _data(1), tmp_path / 'other')
  assert alone.views.temperature == 1


def test_a_temperature_by_hand():
  """Of a model that says 0.9 and is right 8 times in 10: 0.8 is wanted."""
  labels = np.repeat([1, 0], [8, 2])
  logits = np.tile([0.0, np.log(9)], (10, 1))
  found = held_out.fitted_temperature(logits, labels)
  assert found == pytest.approx(np.log(9) / np.log(4), rel=0.03)
  # Always right: as sure as may be.
  assert held_out.fitted_temperature(logits[:8], labels[:8]) == 1 / 8
  assert held_out.fitted_temperature(logits[:0], labels[:0]) == 1


def test_a_temperature_changes_no_label():
  made = [systems.build(_small(temperature=t), 1) for t in (1.0, 4.0)]
  images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
  one, four = (
    _answer(system, draw(), images)['student'].logits for system, draw in made
  )
  np.testing.assert_allclose(one, 4 * four, rtol=1e-5)


def _answer(system, variables, images):
  graph, abstract = nnx.split(system)
  module = nnx.merge(graph, params.replace(abstract, variables))
  return module.predict(images, None, ('student',))


# --- images without labels ---------------------------------------------------


def test_half_of_the_rows_are_of_others():
  rows = support_lib.half_of_others(3, 5, draws=5, seed=1)
  found = np.stack([rows(step)[0][:, 0] for step in range(5)])
  own, others = found[:, :3], found[:, 3:]
  assert (np.sort(own, 1) == [0, 1, 2]).all()
  # Each once before any comes again, in another order each time.
  first, second = others.reshape(2, 5).tolist()
  assert sorted(first) == sorted(second) == [3, 4, 5, 6, 7]
  assert first != second
  assert rows(0)[1].all()
  with pytest.raises(ValueError, match='draws=1'):
    support_lib.half_of_others(3, 5, draws=1)


def _folder(path, count=3):
  path.mkdir()
  rng = np.random.default_rng(0)
  for i in range(count):
    image = rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)
    Image.fromarray(image).save(path / f'{i}.png')
  return path


def test_images_of_a_folder(tmp_path, caplog):
  (_folder(tmp_path / 'more') / 'bad.png').write_bytes(b'no image')
  found = adaptation.unlabelled_images(str(tmp_path / 'more'), None, [], 32)
  assert found.ids == ('0.png', '1.png', '2.png')
  assert found.images.shape == (3, 32, 32, 3)
  assert found.labels is None
  assert 'bad.png' in caplog.text


def test_a_folder_without_images(tmp_path):
  (tmp_path / 'notes.txt').write_text('none')
  with pytest.raises(ValueError, match='no image that can be read'):
    adaptation.unlabelled_images(str(tmp_path), None, [], 32)
  with pytest.raises(ValueError, match='does not exist'):
    adaptation.unlabelled_images(str(tmp_path / 'nowhere'), None, [], 32)


def test_the_other_training_images():
  dataset = datasets.load('synthetic', num_train=6, num_test=2, image_size=64)
  found = adaptation.unlabelled_images('train', dataset, [1, 4], 32)
  assert found.ids == tuple(dataset.train.ids[i] for i in (0, 2, 3, 5))
  with pytest.raises(ValueError, match='all 6 training images'):
    adaptation.unlabelled_images('train', dataset, range(6), 32)


def test_many_images_are_thinned_out(monkeypatch, caplog):
  monkeypatch.setattr(adaptation, 'MOST_UNLABELLED', 3 * 32**2)
  dataset = datasets.load('synthetic', num_train=8, num_test=2, image_size=64)
  found = adaptation.unlabelled_images('train', dataset, [0], 32)
  assert found.ids == tuple(dataset.train.ids[i] for i in (1, 4, 7))
  assert '3 of its 7 images' in caplog.text


def test_they_belong_to_our_recipes():
  ours = config.load('configs/nucleus.py:recipe=ours,unlabelled=train')
  assert ours.support.unlabelled == 'train'
  assert ours.steps == 600  # half of the views are annotated, as many as before
  with pytest.raises(ValueError, match='recipe=paper learns from annotated'):
    config.load('configs/nucleus.py:unlabelled=train')


def test_a_first_network_answers(tmp_path, monkeypatch):
  """Soft labels that sum to 1, kept for a run that goes on."""
  made = config.load('configs/nucleus.py:recipe=ours,smoke,unlabelled=train')
  made = made.copy_and_resolve_references()
  with made.unlocked():
    made.data.image_size = made.views.size = 64
  made.views.update(look='colour', temperature=1.0, sides=(64.0, 64.0))
  data = _data(side=64)
  images = np.stack([*data.support.images, *data.support.images[::-1]])[1:]
  data.unlabelled = types.SimpleNamespace(images=images)
  assert unlabelled.answer(made, data, 0, tmp_path) is None
  assert not list(tmp_path.iterdir())  # nothing is learnt
  shares = unlabelled.answer(made, data, 4, tmp_path)
  assert shares.shape == (5, 64, 64, 2)
  assert abs(shares.astype(int).sum(-1) - 255).max() <= 1
  np.testing.assert_array_equal(shares[1], shares[2])  # the same image
  monkeypatch.delattr(train_step, 'learn')  # it is not trained again
  np.testing.assert_array_equal(
    unlabelled.answer(made, data, 4, tmp_path), shares
  )
  made.seed += 1  # those of another run are not taken
  with pytest.raises(AttributeError, match='learn'):
    unlabelled.answer(made, data, 4, tmp_path)
  made.seed -= 1
  whole = (tmp_path / unlabelled.FILE).read_bytes()
  (tmp_path / unlabelled.FILE).write_bytes(whole[:200])
  with pytest.raises(ValueError, match='damaged'):
    unlabelled.answer(made, data, 4, tmp_path)


@pytest.mark.slow
def test_a_run_learns_from_them(tmp_path):
  made = config.load(
    'configs/nucleus.py:recipe=ours,data=synthetic,smoke,unlabelled=train'
  )
  results = train.run(made, tmp_path / 'run')
  assert 0 <= results['test']['student']['miou'] <= 1
  told = json.loads((tmp_path / 'run/ids.json').read_text())
  assert told['unlabelled']
  assert not set(told['unlabelled']) & {*told['support'], *told['test']}


def test_of_no_annotated_image_alone_is_anything_other():
  """Annotated and other images lie in one list, in this order."""
  made = _small()
  system, draw = systems.build(made, 1)
  del draw
  data = _data(side=64)
  shares = np.full((1, 64, 64, 2), (255, 0), np.uint8)
  images = np.concatenate([data.support.images, data.support.images[:1]])
  labels = data.support.labels.astype(np.int32)
  labels[0, 0] = VOID
  shared = system.shared(images, labels, shares)
  assert len(shared.atlas) == 4
  np.testing.assert_array_equal(shared.labels[3], shares[0])
  np.testing.assert_array_equal(
    shared.labels[:3].argmax(-1), np.where(labels == VOID, 0, labels)
  )
  assert not shared.labels[0, 0].any()  # void
  alone = system.shared(data.support.images, labels)
  np.testing.assert_array_equal(shared.atlas[:3], alone.atlas)
  np.testing.assert_array_equal(shared.places[:3], alone.places)
