"""Tests of what BAM and HDMNet have in common, on both."""

import functools

import episodes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillfss_jax import backbones, params
from distillfss_jax.models import bam, core, hdmnet, pspnet
from distillfss_jax.systems import meta
from distillfss_jax.types import Support

_KINDS = {'bam': bam.BAM, 'hdmnet': hdmnet.HDMNet}


@pytest.fixture(params=_KINDS, scope='module')
def kind(request):
  return _KINDS[request.param]


@pytest.fixture(scope='module')
def two_shot(kind):
  return episodes.tiny(kind, shots=2)


def _everywhere(masks):
  return np.ones((*masks.shape[:2], masks.shape[-1]), bool)


# What the originals count: tensors of a file, and numbers of a model.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'backbone', 'shots', 'tensors', 'numbers'),
  [
    (bam.BAM, 'resnet50_deep', 1, 383, 51_631_062),
    (bam.BAM, 'resnet50_deep', 5, 387, 51_631_089),
    (bam.BAM, 'vgg16', 1, 144, 24_238_166),
    (hdmnet.HDMNet, 'resnet50_deep', 1, 625, 50_875_542),
    (hdmnet.HDMNet, 'resnet50_deep', 5, 629, 50_875_569),
    (hdmnet.HDMNet, 'vgg16', 1, 386, 23_482_646),
  ],
)
def test_files_of_the_originals(kind, backbone, shots, tensors, numbers):
  model = episodes.build(kind, backbone, shots=shots)
  names = episodes.names(model)
  unused = model.torch_unused(dict.fromkeys(names))
  assert not names.keys() & unused.keys()
  assert len(names) + len(unused) == tensors
  assert params.count(nnx.state(model, nnx.Param)) == numbers


@pytest.mark.slow
@pytest.mark.parametrize(
  ('backbone', 'tensors', 'numbers'),
  [('resnet50_deep', 692, 46_713_808), ('vgg16', 214, 19_714_128)],
)
def test_files_of_the_base_learner(backbone, tensors, numbers):
  model = episodes.build(pspnet.PSPNet, backbone)
  names = episodes.names(model)
  unused = model.torch_unused(names)
  assert len(names) + len(unused) == tensors
  assert unused['encoder.0.0.weight'] == names['layer0.0.weight']
  assert params.count(nnx.state(model, nnx.Param)) == numbers


@pytest.mark.parametrize('name', ['pspnet', 'bam', 'hdmnet'])
def test_torch_names_go_both_ways(name):
  kind = (_KINDS | {'pspnet': pspnet.PSPNet})[name]
  fields = {} if name == 'pspnet' else {'shots': 2}
  model = episodes.tiny(kind, **fields)
  arrays = {k: np.asarray(x) for k, x in params.flatten(model).items()}
  table, *_ = model.torch_tables().values()
  tensors = params.to_torch(arrays, table)
  tensors |= model.torch_unused(tensors)
  back = params.from_torch(tensors, table, params.shapes(model))
  jax.tree.map(np.testing.assert_array_equal, back, arrays)


def test_a_file_of_one_shot_does_not_fit_five(kind):
  one, five = (
    episodes.build(kind, 'resnet_tiny_deep', shots=k) for k in (1, 5)
  )
  tensors = {k: np.zeros(x, np.float32) for k, x in episodes.names(one).items()}
  table, *_ = five.torch_tables().values()
  with pytest.raises(ValueError, match='missing: kshot/layers/0/kernel'):
    params.from_torch(tensors, table, params.shapes(five))


def test_shot_weights_may_be_one_matrix():
  model = episodes.build(bam.BAM, 'resnet_tiny_deep', shots=3, shot_hidden=0)
  assert episodes.names(model)['kshot_rw.weight'] == (3, 3, 1, 1)
  weights = core.ShotWeights(3, hidden=0, rngs=nnx.Rngs(0))
  found = weights(jnp.array([[[0.1, 0.5, 0.3]]]))
  np.testing.assert_allclose(found, 1 / 3, rtol=1e-6)


def test_shot_weights_go_back_to_their_shots():
  weights = core.ShotWeights(3, rngs=nnx.Rngs(1))
  scene = jnp.array([[[0.5, 0.1, 0.3]]])
  found = weights(scene)[0, 0]
  ordered = weights(jnp.sort(scene), restored=False)[0, 0]
  np.testing.assert_allclose(found[jnp.array([1, 2, 0])], ordered, rtol=1e-6)
  # Parity: the original of HDMNet leaves them in the order of the sorting.
  left = weights(scene, restored=False)[0, 0]
  np.testing.assert_allclose(left, ordered, rtol=1e-6)
  assert np.abs(found - left).max() > 1e-4


def test_selections_are_filled_with_the_last_shot():
  present = np.array([[1, 0], [1, 1], [0, 0], [1, 0], [0, 0]], bool)[None]
  found = core.select_shots(jnp.asarray(present), 2)
  assert found.present.shape == (1, 5, 2, 3)
  np.testing.assert_array_equal(
    found.table[0, :2],
    [[0, 1], [3, 3]],  # way 0: shots 0, 1, 3
  )
  np.testing.assert_array_equal(found.table[0, 3], [1, 1])  # way 1: shot 1
  some = found.present.any(1).reshape(-1)
  np.testing.assert_array_equal(some, [True, True, False, True, False, False])


def test_ensemble_by_hand():
  ensemble = core.Ensemble(rngs=nnx.Rngs(0))
  meta = jnp.log(jnp.array([1.0, 3])).reshape(1, 1, 1, 1, 2)
  base = jnp.log(jnp.array([4.0, 1, 2, 1])).reshape(1, 1, 1, 4)
  scene = jnp.full((1, 1, 1, 1, 1), 0.5)
  first = ensemble(meta, base, scene)
  np.testing.assert_allclose(first.ravel(), [0.25, 0.75], rtol=1e-6)
  ensemble.scene.kernel[...] = jnp.array([2.0, 0.1]).reshape(1, 1, 2, 1)
  ensemble.base.kernel[...] = jnp.array([3.0, 0.4]).reshape(1, 1, 2, 1)
  # Background 3 * (2 * 1/4 + 0.1 * 0.5) + 0.4 * known, of channels 1 to 3.
  for own, known in ((None, 0.5), ([1], 0.25), ([-1], 0.5)):
    own = None if own is None else jnp.array(own)
    found = ensemble(meta, base, scene, own)
    np.testing.assert_allclose(
      found.ravel(), [3 * 0.55 + 0.4 * known, 1.55], rtol=1e-6
    )


def test_gram_and_scene_difference_by_hand():
  maps = jnp.array([[3.0, 0], [4, 2]]).reshape(1, 2, 1, 2)
  wanted = [[1, 0.8], [0.8, 1]]
  np.testing.assert_allclose(core.gram(maps)[0], wanted, rtol=1e-6)
  other = jnp.array([[[1.0, -0.2], [-0.2, 1]]])
  np.testing.assert_allclose(
    core.scene_difference(core.gram(maps), other), [2**0.5 / 2], rtol=1e-6
  )


def test_prototype_by_hand():
  maps = jnp.array([1.0, 5, 9]).reshape(1, 3, 1)
  found = core.prototypes(maps, jnp.array([[1.0, 0.5, 0]]))
  np.testing.assert_allclose(found, [3.5 / 1.5005], rtol=1e-6)


def test_only_staged_backbones(kind):
  with pytest.raises(ValueError, match=r'Swin has not; these have: .*vgg16'):
    nnx.eval_shape(
      lambda: kind(
        backbones.build('swin_tiny_test', image_size=128, rngs=nnx.Rngs(0)),
        5,
        rngs=nnx.Rngs(0),
      )
    )


@pytest.mark.slow
def test_ways_do_not_see_each_other(two_shot):
  """Two ways at once are each way alone, with the shots that show it."""
  query, support, masks = episodes.scene_of(4, ways=2)
  masks[0, :, :, :, 0] = [masks[0, 0, ..., 0] + 1] * 4
  present = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], bool)[None]
  masks = (masks > 0).astype(np.float32)
  both = episodes.segment(two_shot, query, support, masks, present)
  alone = [
    episodes.segment(
      two_shot,
      query,
      support[:, picked],
      masks[:, picked, ..., i : i + 1],
      np.ones((1, 2, 1), bool),
    )
    for i, picked in enumerate(([0, 2], [1, 2]))
  ]
  for i in range(2):
    np.testing.assert_allclose(both[..., 1 + i], alone[i][..., 1], atol=1e-4)
  first = np.asarray(alone[0][..., 1] > alone[1][..., 1])
  background = np.where(first, alone[0][..., 0], alone[1][..., 0])
  np.testing.assert_allclose(both[..., 0], background, atol=1e-4)


@pytest.mark.slow
def test_more_shots_come_in_rounds(two_shot):
  """Three shots: two, then the last twice; the largest of both counts."""
  query, support, masks = episodes.scene_of(3)
  whole = episodes.segment(two_shot, query, support, masks, _everywhere(masks))
  rounds = [
    episodes.segment(
      two_shot,
      query,
      support[:, picked],
      masks[:, picked],
      np.ones((1, 2, 1), bool),
    )
    for picked in ([0, 1], [2, 2])
  ]
  np.testing.assert_allclose(whole, np.maximum(*rounds), atol=1e-4)


@pytest.mark.slow
def test_queries_share_a_memory(two_shot):
  query, support, masks = episodes.scene_of(2, episodes=2)
  present = _everywhere(masks)[:1]
  one = support[:1], masks[:1]
  both = episodes.segment(two_shot, query, *one, present)
  for i in range(2):
    alone = episodes.segment(two_shot, query[i : i + 1], *one, present)
    np.testing.assert_allclose(both[i], alone[0], atol=1e-4)


@functools.cache
def _answered(kind):
  """A model, queries, and what it says of them."""
  model = episodes.tiny(kind)
  inputs = episodes.scene_of(1, episodes=2)
  return model, inputs, jax.jit(episodes.answer)(model, *inputs)[0]


def test_the_prior_mask_answers_alone(kind):
  """It goes from 0 to 1, and what is above a half is foreground."""
  system = meta.MetaSystem(episodes.tiny(kind), 1)
  query, support, masks = episodes.scene_of(1)

  @jax.jit
  def run(system, query, support):
    memory = system.memorize(support)
    pyramid = system.model.encode(query)
    prior = system.model.prior(system.model.correlate(pyramid, memory))
    return prior, system.predict(query, memory, ('prior',))['prior']

  present = jnp.ones((1, 1, 1), bool)
  prior, answer = run(system, query, Support(support, masks, present))
  assert 0 <= prior.min() < 1e-3
  assert 1 - 1e-3 < prior.max() <= 1
  # Corners aligned: every eighth pixel is a feature's own.
  foreground = np.asarray(answer.logits.argmax(-1))[:, ::8, ::8]
  np.testing.assert_array_equal(foreground, prior[:, 0] > 0.5)


@pytest.mark.slow
def test_dropout_follows_its_key(kind):
  model, inputs, exact = _answered(kind)

  @jax.jit
  def run(model, key):
    keys = jax.random.split(key, 2)
    return episodes.answer(model, *inputs, train=True, keys=keys)[0]

  first, again, other = (run(model, jax.random.key(i)) for i in (0, 0, 1))
  for part in core.Answers._fields:
    a, b, c, d = (getattr(x, part) for x in (first, again, other, exact))
    np.testing.assert_array_equal(a, b)
    # Parity: that of the frozen base learner, too.
    assert np.abs(a - c).max() > 1e-4, part
    assert np.abs(a - d).max() > 1e-4, part
    assert np.isfinite(a).all()


@pytest.mark.slow
def test_gradients_are_finite_without_foreground(kind):
  model = episodes.tiny(kind)
  query, support, masks = episodes.scene_of(1)

  @jax.jit
  @nnx.grad
  def gradients(model):
    answers, *_ = episodes.answer(model, query, support, 0 * masks)
    return answers.final.sum()

  for path, x in params.flatten(gradients(model)).items():
    assert np.isfinite(x).all(), path


@pytest.mark.slow
def test_masks_of_another_size_and_whole_numbers(two_shot):
  _, _, masks = episodes.scene_of(2)
  rng = np.random.default_rng(0)
  query, support = (
    rng.integers(0, 256, shape, np.uint8)
    for shape in ((1, 33, 33, 3), (1, 2, 33, 33, 3))
  )
  large = masks.repeat(2, 2).repeat(2, 3)
  present = _everywhere(masks)
  found = episodes.segment(two_shot, query, support, large, present)
  assert found.shape == (1, 33, 33, 2)
  assert np.isfinite(found).all()


@pytest.mark.slow
def test_half_precision_answers(kind, two_shot):
  half = episodes.tiny(kind, shots=2, dtype='bfloat16')
  query, support, masks = episodes.scene_of(2)
  present = _everywhere(masks)
  a, b = (
    episodes.segment(model, query, support, masks, present)
    for model in (two_shot, half)
  )
  assert b.dtype == jnp.float32
  np.testing.assert_allclose(a, b, atol=0.1 * float(jnp.abs(a).max()))


@pytest.mark.slow
def test_base_learner_inside_is_pspnet(kind):
  model, (query, _, _), answers = _answered(kind)
  alone = episodes.build(pspnet.PSPNet, 'resnet_tiny_deep')
  held = params.flatten(model)
  params.set_params(alone, {path: held[path] for path in params.shapes(alone)})
  logits = jax.jit(lambda m, x: m(x))(alone, query)
  assert logits.shape == (2, 33, 33, episodes.CLASSES)
  # Corners aligned: every eighth pixel is a feature's own.
  np.testing.assert_allclose(logits[:, ::8, ::8], answers.base, atol=1e-4)


@pytest.mark.slow
def test_pspnet_trains_its_norms():
  model = episodes.tiny(pspnet.PSPNet)
  images = episodes.scene_of(1, episodes=3)[0]

  @jax.jit
  def train(model, images, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    logits = model(
      images,
      train=True,
      keys=keys,
      normalise=lambda norm, x: norm.train(x, jnp.array([True, True, False])),
    )
    return logits, nnx.state(model, nnx.BatchStat)

  first, moved = train(model, images, 0)
  other, _ = train(model, images, 1)
  assert np.abs(first - other).max() > 1e-4
  before = params.flatten(nnx.state(model, nnx.BatchStat))
  for path, x in params.flatten(moved).items():
    assert np.isfinite(x).all(), path
    assert (x != before[path]).any(), path
