"""Tests of SSP and IFA: the original's numbers, its quirks, its training."""

import functools
import json
import re

import episodes
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from configs import ifa
from distillfss_jax import backbones, optim, params, systems, train
from distillfss_jax.models import ssp
from distillfss_jax.ops import correlation, losses, resize
from distillfss_jax.pretrained import weights
from distillfss_jax.tasks import source
from distillfss_jax.types import Episode, Items

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
  filled = {name: episodes.weight(name, shape) for name, shape in names.items()}
  [table] = model.torch_tables().values()
  arrays = params.from_torch(filled, table, params.shapes(model))
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
  scale = np.array([1, 1, 1, 0.2, 0.4, 0.1, 0.1, 0.1, 0.1], np.float32)

  def loss(model):
    each = cross_entropies(answers_of(model, *given, masks, mask), masks, mask)
    return (scale * each).sum(), each

  each, norms = episodes.gradient_norms(model, loss, wanted['grad_l2'])
  assert (scale * each).sum() == pytest.approx(wanted['loss'], rel=1e-5)
  assert (scale[:5] * each[:5]).sum() == pytest.approx(2.657618, rel=1e-5)
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


@functools.cache
def system(shots=1, **changes):
  """A small system with numbers, of the config that adapts on scenes."""
  config = ifa.get_config('data=synthetic,stage=adapt,smoke')
  config.support.shots = shots
  config.update_from_flattened_dict(changes)
  made, _ = systems.build(config, 1)
  return parity.fill_randomly(made)


def batch_of(shots, size=33):
  """Two episodes; of each, a corner of void."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 1 + shots, size, size, 3), np.uint8)
  labels = np.zeros((2, 1 + shots, size, size), np.uint8)
  for i, label in enumerate(labels.reshape(-1, size, size)):
    label[5 + i : 20 + i, 3:22] = 1
    label[:6, :6] = 255
  return Episode(
    images[:, 0], labels[:, 0], images[:, 1:], labels[:, 1:], labels[:, 0],
    np.zeros(2, np.int32),
  )  # fmt: skip


@jax.jit
def losses_of(system, batch):
  keys = jax.random.split(jax.random.key(0), len(batch.images))
  return system.losses((), batch, Items(keys, jnp.ones(len(keys), bool)))


def test_nine_terms_or_five():
  batch = batch_of(1)
  adapts = losses_of(system(), batch)
  learns = losses_of(system(**{'ifa.rounds': 0.0}), batch)
  first = dict(final=1, query_1=1, query_own=1, support_own=0.2, support_1=0.4)
  assert set(learns.parts) == set(first)
  wanted = sum(first[k] * x for k, x in learns.parts.items())
  np.testing.assert_allclose(learns.each, wanted, rtol=1e-5)
  assert len(adapts.parts) == 9
  wanted += 0.1 * sum(x for k, x in adapts.parts.items() if k not in first)
  np.testing.assert_allclose(adapts.each, wanted, rtol=1e-4)
  for name, x in learns.parts.items():
    np.testing.assert_allclose(x, adapts.parts[name], rtol=1e-4)


def test_void_is_background_or_counts_nowhere():
  batch = batch_of(1)
  painted = jax.tree.map(lambda x: x, batch)
  painted = painted.replace(
    labels=np.where(batch.labels == 255, 0, batch.labels),
    support_labels=np.where(
      batch.support_labels == 255, 0, batch.support_labels
    ),
  )
  counted, same, left_out = (
    losses_of(system(**{'ifa.void': void}), x).each
    for void, x in ((False, batch), (False, painted), (True, batch))
  )
  np.testing.assert_allclose(counted, same, rtol=1e-6)
  assert np.abs(counted - left_out).min() > 1e-4


def test_released_order_mixes_episodes():
  """Parity: so that they have to be taken together, and only of many shots."""
  batch = batch_of(2)
  mixed = system(shots=2, **{'model.fields.shot_major': True})
  assert mixed.coupled
  assert not system(shots=2).coupled
  assert not system(**{'model.fields.shot_major': True}).coupled
  apart, mixed = (losses_of(x, batch).parts for x in (system(shots=2), mixed))
  for name, x in apart.items():
    same = np.allclose(x, mixed[name], rtol=1e-4)
    first = name in ('final', 'query_1', 'query_own', 'support_own')
    assert same == first, name


def test_only_convolutions_of_two_stages_move():
  paths = set(params.shapes(nnx.state(system(), nnx.Param)))
  moved = system().trains
  assert moved == {
    x for x in paths if re.match(r'teacher/backbone/layer[23]/', x)
    and x.endswith('/kernel')
  }  # fmt: skip
  whole, _ = systems.build(ifa.get_config('stage=adapt'), 1)
  shapes = params.shapes(whole)
  assert sum(np.prod(shapes[x]) for x in whole.trains) == 8_290_304


@pytest.mark.parametrize(
  'protocol', ['fixed', pytest.param('released', marks=pytest.mark.slow)]
)
def test_a_run_adapts(tmp_path, protocol):
  """Whole, in small: what it says, what it saw, what it moved."""
  config = ifa.get_config(
    f'data=synthetic,stage=adapt,shots=2,protocol={protocol},smoke'
  )
  config.steps, config.eval.panels = 2, 0
  config.data.args.update(num_test=24)
  if protocol == 'fixed':
    config.eval.every, config.eval.keep_best = 1, True
  results = train.run(config, tmp_path / 'run')
  for name in ('test', 'reference_batch'):
    assert f'protocol {protocol}' in results['evaluations'][name]['says']
  assert results['references']['untrained']['teacher']['miou'] is not None
  ids = json.loads((tmp_path / 'run/ids.json').read_text())
  supports = ids.get('support', {})
  if protocol == 'fixed':
    assert results['checkpoint']['chosen_on'] == 'leave_one_out'
    assert not any('chosen by' in note for note in results['notes'])
    for row in ids['test']:
      assert row['support'] == supports[row['class']]
    known = {x for row in supports.values() for x in row}
    assert not known & {row['query'] for row in ids['test']}
  else:
    assert not supports
  _, draw = systems.build(config, 1)
  before = {k: np.asarray(x) for k, x in draw().items()}
  after = weights.from_folder(tmp_path / 'run')
  assert set(after) == set(before)
  for path, x in after.items():
    trained = re.fullmatch(r'teacher/backbone/layer[23]/.*kernel', path)
    assert bool(trained) != np.array_equal(x, before[path]), path


def test_what_does_not_fit_is_said():
  def data(arg='', **changes):
    config = ifa.get_config(f'data=synthetic,smoke,{arg}')
    config.update_from_flattened_dict(changes)
    return source.Data(config)

  adapts = 'stage=adapt,protocol=fixed'
  with pytest.raises(ValueError, match=r'protocol is .open.; there are: apart'):
    data(**{'source.protocol': 'open'})
  with pytest.raises(ValueError, match="'reference_batch' needs config"):
    data(**{'source.metric': 'reference_batch', 'source.reference_batch': 0})
  with pytest.raises(ValueError, match='trains on what is tested: say so'):
    data(**{'source.parts': ('test', 'test')})
  with pytest.raises(ValueError, match="rule 'pair' takes no supports"):
    data(adapts, **{'source.rule': 'pair'})
  with pytest.raises(ValueError, match='of one shot none can be left out'):
    data(adapts, **{'eval.keep_best': True})
  with pytest.raises(
    ValueError, match=r"take config\.source\.protocol='fixed'"
  ):
    data(
      'stage=adapt',
      **{'source.chosen_by': 'leave_one_out', 'eval.keep_best': True},
    )
  with pytest.raises(ValueError, match='tests the classes that it adapts to'):
    data(adapts, **{'source.parts': ('train', 'test')})
  with pytest.raises(
    ValueError, match="'cityscapes' is not known; there are: deep"
  ):
    ifa.get_config('target=cityscapes')


def test_settings_of_the_original():
  """9.2 of the specification, and the switch of the early fall of the rate."""
  for arg, batch, stairs in (
    ('shots=1', 12, ('666', '1333')),
    ('shots=5', 6, ('1333', '2666')),
    ('drops=late', 12, ('6.67 epochs', '13.33 epochs')),
  ):
    config = ifa.get_config(arg)
    assert config.source.batch_size == batch
    assert config.optim.stairs == tuple((x, 0.1) for x in stairs)
  rate = optim.schedule(ifa.get_config().optim, 22_800, 1140)
  found = [float(rate(step)) for step in (0, 665, 667, 1332, 1334, 22_799)]
  wanted = [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5]
  assert found == pytest.approx(wanted, rel=1e-3)
  rates = {'deepglobe': 5e-4, 'isic': 5e-4, 'chestxray': 5e-6, 'fss1000': 5e-4}
  batches = {'deepglobe': 6, 'isic': 3, 'chestxray': 1, 'fss1000': 12}
  for place, lr in rates.items():
    config = ifa.get_config(f'target={place},stage=adapt')
    assert (config.optim.lr, config.epochs) == (lr, 20)
    assert config.source.batch_size == batches[place]
    assert config.source.tests == (2400 if place == 'fss1000' else 600)
    assert (config.eval.keep_best, config.source.protocol) == (True, 'released')
    config = ifa.get_config(f'target={place},stage=adapt,protocol=fixed')
    assert (config.eval.keep_best, config.source.protocol) == (False, 'fixed')
