"""Tests of SSP and IFA: the original's numbers, its quirks, its training."""

import functools
import json

import episodes
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from distillfss_jax import backbones, params
from distillfss_jax.models import ssp
from distillfss_jax.ops import correlation, losses, resize

SIZE = 96


def blobs(seed, count):
  """Masks [count, SIZE, SIZE]: an ellipse each."""
  rng = np.random.RandomState(seed)
  y, x = np.mgrid[:SIZE, :SIZE]
  found = np.zeros((count, SIZE, SIZE), np.float32)
  for mask in found:
    cy, cx = rng.uniform(0.35, 0.65, 2) * SIZE
    ry, rx = rng.uniform(0.15, 0.3, 2) * SIZE
    mask[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1] = 1
  return found


def build(backbone='resnet50_ssp', **fields):
  """A model without numbers."""

  def make():
    encoder = backbones.build(backbone, image_size=SIZE, rngs=nnx.Rngs(0))
    return ssp.SSP(encoder, **fields)

  return nnx.eval_shape(make)


@functools.cache
def golden(**fields):
  """A model with the goldens' weights, which come under their names."""
  model = build(**fields)
  names = episodes.names(model)
  weights = {
    name: episodes.weight(name, shape) for name, shape in names.items()
  }
  [table] = model.torch_tables().values()
  arrays = params.from_torch(weights, table, params.shapes(model))
  params.set_params(model, arrays)
  return model


def inputs(shots):
  """Query [2, ...], support [2, s, ...], masks [2, s, ...], query's mask."""
  support = np.stack(
    [episodes.image(10 + k, 2, 3, SIZE, SIZE) for k in range(shots)], 1
  )
  masks = np.stack([blobs(20 + k, 2) for k in range(shots)], 1)
  return episodes.image(1, 2, 3, SIZE, SIZE), support, masks, blobs(5, 2)


def answers_of(model, query, support, masks, mask):
  """All nine of training, at the images' size."""
  found = model.rounds(
    model.encode(query),
    model.encode(support),
    masks,
    jnp.ones(masks.shape[:2], bool),
    mask,
  )
  return jax.tree.map(lambda x: resize.bilinear(x, (SIZE, SIZE)), found)


def cross_entropies(answers, masks, mask):
  """[9] means over all pixels, in the order of `Rounds`."""

  def one(logits, labels):
    labels = labels.astype(jnp.int32).reshape(-1, SIZE, SIZE)
    flat = logits.reshape(-1, SIZE, SIZE, 2)
    total, count = losses.cross_entropy(flat, labels)
    return total.sum() / count.sum()

  return jnp.stack(
    [
      one(x, masks if name.startswith('support') else mask)
      for name, x in answers._asdict().items()
    ]
  )


@pytest.mark.parametrize('shots', [1, 5])
def test_golden(shared, shots):
  path = f'goldens/hdmnet_ifa_bam/ifa_r50_{shots}shot_eval_96.npz'
  wanted, model = np.load(shared(path)), golden()
  query, support, masks, _ = inputs(shots)

  @jax.jit
  def run(model, query, support, masks):
    present = jnp.ones((*masks.shape[:2], 1), bool)
    memory = model.memorize(model.encode(support), masks[..., None], present)
    pyramid = model.encode(query)
    coarse = model.correlate(pyramid, memory)
    given = ssp.Prototypes(*coarse[1:])
    _, first, _ = ssp._answer(pyramid[0][:, -1], coarse.likeness, given)
    whole = model.segment(pyramid, memory, (SIZE, SIZE)).logits
    return whole, resize.bilinear(first[:, 0], (SIZE, SIZE))

  whole, first = run(model, query, support, masks)
  parity.assert_close(wanted, 'refine', parity.channels_first(whole))
  parity.assert_close(wanted, 'out1', parity.channels_first(first))


@pytest.mark.parametrize('shots', [1, 2])
def test_golden_training(shared, shots):
  """Parity: that of two shots has the originals' order of them."""
  path = f'goldens/hdmnet_ifa_bam/ifa_r50_{shots}shot_train_96.npz'
  wanted, model = np.load(shared(path)), golden(shot_major=True)
  *given, masks, mask = inputs(shots)

  @jax.jit
  def run(model):
    answers = answers_of(model, *given, masks, mask)
    return answers, cross_entropies(answers, masks, mask)

  answers, each = run(model)
  for i, (name, x) in enumerate(answers._asdict().items()):
    if name.startswith('support'):  # shot by shot, as the original has them
      x = jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
    x = parity.channels_first(x)[..., ::2, ::2]
    parity.assert_close(wanted, f'out{i}', x)
  np.testing.assert_allclose(each, wanted['losses'], rtol=1e-5)


def test_shots_meet_their_own_prototypes(shared):
  """Of one shot both orders are the same; of two only episode by episode."""
  path = 'goldens/hdmnet_ifa_bam/ifa_r50_2shot_train_96.npz'
  wanted = np.load(shared(path))['losses']
  query, support, masks, mask = inputs(2)

  @jax.jit
  def run(model, *given):
    return cross_entropies(answers_of(model, *given), *given[2:])

  both = run(golden(), query, support, masks, mask)
  # Episodes do not see each other: the batch is the mean of each alone.
  alone = [
    run(golden(), *(x[i : i + 1] for x in (query, support, masks, mask)))
    for i in range(2)
  ]
  np.testing.assert_allclose(both, np.mean(alone, 0), rtol=1e-4)
  # What comes before the support side is the same in both orders.
  same = np.isclose(both, wanted, rtol=1e-4)
  np.testing.assert_array_equal(same, [1, 1, 1, 1, 0, 0, 0, 0, 0])


def test_golden_gradients(shared):
  path = shared('goldens/hdmnet_ifa_bam/train_ifa_1shot_96.json')
  wanted, model = json.loads(path.read_text()), golden()
  *given, masks, mask = inputs(1)
  weights = np.array([1, 1, 1, 0.2, 0.4, 0.1, 0.1, 0.1, 0.1], np.float32)

  def loss(model):
    each = cross_entropies(answers_of(model, *given, masks, mask), masks, mask)
    return (weights * each).sum(), each

  each, norms = episodes.gradient_norms(model, loss, wanted['grad_l2'])
  assert (weights * each).sum() == pytest.approx(wanted['loss'], rel=1e-5)
  assert (weights[:5] * each[:5]).sum() == pytest.approx(2.657618, rel=1e-5)
  for name, norm in wanted['grad_l2'].items():
    assert norms[name] == pytest.approx(norm, rel=1e-3), name


def test_files_of_the_original():
  """270 tensors under its names, and back; the numbers that it counts."""
  for backbone, tensors, numbers in (
    ('resnet50_ssp', 270, 8_667_072), ('resnet101_ssp', None, 27_659_200),
  ):  # fmt: skip
    model = build(backbone)
    names = episodes.names(model)
    unused = model.torch_unused(dict.fromkeys(names))
    assert tensors in (None, len(names) + len(unused))
    assert {x.partition('.')[0] for x in names} == {
      'layer0', 'layer1', 'layer2', 'layer3',
    }  # fmt: skip
    assert params.count(nnx.state(model, nnx.Param)) == numbers
  model = parity.fill_randomly(build('resnet_tiny_ssp'))
  arrays = {k: np.asarray(x) for k, x in params.flatten(model).items()}
  [table] = model.torch_tables().values()
  tensors = params.to_torch(arrays, table)
  back = params.from_torch(
    tensors | model.torch_unused(tensors), table, params.shapes(model)
  )
  jax.tree.map(np.testing.assert_array_equal, back, arrays)


def test_a_fourth_stage_in_a_file_is_passed_over():
  """As in files of ImageNet weights; but a stage too few is an error."""
  backbone = build('resnet_tiny_ssp').backbone
  table = backbone.torch_tables()['nested']
  shapes = params.shapes(backbone)
  tensors = params.to_torch(
    {k: np.zeros(x, np.float32) for k, x in shapes.items()}, table
  )
  more = {
    'layer4.0.conv1.weight': np.zeros((4, 4, 1, 1)),
    'fc.bias': np.ones(2),
  }
  found = params.from_torch(tensors | more, table, shapes)
  assert set(found) == set(shapes)
  few = {k: x for k, x in tensors.items() if not k.startswith('layer3')}
  with pytest.raises(ValueError, match='layer3'):
    params.from_torch(few, table, shapes)


def test_sure_places_by_hand():
  """Strictly above the thresholds; else the twelve surest."""
  likeness = np.zeros((1, 2, 20), np.float32)
  likeness[0, 0, [3, 7]] = 0.9, 0.8  # sigmoid(0.8473) is 0.7
  likeness[0, 0, 5] = -0.5  # sigmoid(0.4055) is 0.6
  likeness[0, 1] = np.linspace(-0.4, 0.4, 20)
  background, foreground = ssp.sure(jnp.asarray(likeness))
  assert np.flatnonzero(foreground[0, 0]).tolist() == [3]
  assert np.flatnonzero(background[0, 0]).tolist() == [5]
  assert np.flatnonzero(foreground[0, 1]).tolist() == list(range(8, 20))
  assert np.flatnonzero(background[0, 1]).tolist() == list(range(12))
  few = ssp.sure(jnp.zeros((1, 1, 4)))[0]
  assert few.all()  # of fewer than twelve all


def test_means_by_likeness(monkeypatch):
  """In blocks of places as in one matrix, gradients too."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 23, 5)), jnp.float32)
  chosen = jnp.asarray(rng.random((2, 3, 23)) < 0.4).at[:, :, 0].set(True)

  def plain(x):
    unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    odds = 2 * jnp.einsum('apc,aqc->apq', unit, unit)[:, None]
    odds = jnp.where(chosen[:, :, None], odds, -jnp.inf)
    return jnp.einsum('ajpq,aqc->ajpc', jax.nn.softmax(odds), x)

  for block in (1024, 8):
    monkeypatch.setattr(correlation, '_BLOCK', block)
    for of in (lambda f: f, lambda f: jax.grad(lambda x: (f(x) ** 2).sum())):
      found = of(lambda x: correlation.alike_mean(x, chosen))(x)
      np.testing.assert_allclose(found, of(plain)(x), rtol=2e-4, atol=1e-5)


@pytest.fixture(scope='module')
def tiny():
  return parity.fill_randomly(build('resnet_tiny_ssp'))


def test_ways_and_absent_shots(tiny):
  """Each way is alone with its shots; none at all is finite."""
  query, support, masks = episodes.scene_of(3, ways=2)
  present = np.array([[1, 0], [0, 1], [0, 1]], bool)[None]
  masks[:] = 0
  masks[:, :, 4:20, 4:20] = present[:, :, None, None]
  both = episodes.segment(tiny, query, support, masks, present)
  first = episodes.segment(
    tiny, query, support[:, :1], masks[:, :1, ..., :1], present[:, :1, :1]
  )
  second = episodes.segment(
    tiny, query, support[:, 1:], masks[:, 1:, ..., 1:], present[:, 1:, 1:]
  )
  for i, alone in enumerate((first, second)):
    np.testing.assert_allclose(both[..., 1 + i], alone[..., 1], atol=1e-4)
  none = episodes.segment(tiny, query, support, masks, present & False)
  assert np.isfinite(none).all()
  assert (none.argmax(-1) == 0).all()


def test_queries_share_a_memory(tiny):
  query, support, masks = episodes.scene_of(2, episodes=2)
  present = np.ones((1, 2, 1), bool)
  both = episodes.segment(tiny, query, support[:1], masks[:1], present)
  for i in range(2):
    alone = episodes.segment(
      tiny, query[i : i + 1], support[:1], masks[:1], present
    )
    np.testing.assert_allclose(both[i], alone[0], atol=1e-4)


def test_only_backbones_of_three_stages():
  with pytest.raises(ValueError, match='reads stage 3 of its backbone, which'):
    nnx.eval_shape(
      lambda: ssp.SSP(backbones.resnet.ResNet(depths=(1, 1), rngs=nnx.Rngs(0)))
    )
