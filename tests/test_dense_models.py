"""DeepLabv3+, Polyp-PVT and what distils them, against the originals' numbers.

Parameters and inputs of the goldens are drawn from their names.
"""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx
from ml_collections import ConfigDict

from distillfss_jax import backbones, distillers, layers, params
from distillfss_jax.distillers import (
  aicsd,
  attnfd,
  base,
  cirkd,
  dist,
  ickd,
  kd,
  kdas,
  overhaul,
  sp,
)
from distillfss_jax.evaluators import saliency
from distillfss_jax.measuring import counts
from distillfss_jax.models import deeplab, polyp_pvt
from distillfss_jax.ops import conv, losses, resize
from distillfss_jax.ops.saliency import soft_dice
from distillfss_jax.systems.segmentation import Segmentation
from distillfss_jax.types import SOFT, VOID, Answer, Dense, Items

FOLDER = 'goldens/attnfd_kdas'
MEAN, STD = parity.MEAN, parity.STD

# Ours, theirs, fields of the backbone, entries of a file, parameters.
LABS = {
  'resnet18': ('resnet18', {}, 206, 16_658_721),
  'resnet101': ('resnet101', {'multi_grid': (1, 2, 4)}, 710, 59_888_001),
  'mobilenet': ('mobilenet_v2', {}, 698, 5_846_421),
}
POLYPS = {
  'PolypPVT': ('pvt_v2_b2', 419, 25_107_604),
  'PolypPVTtiny': ('pvt_v2_b0', 263, 3_650_740),
}


def uniform(key, count):
  """The goldens' random numbers in 0..1, by a key and their places."""
  x = np.arange(count, dtype=np.uint64) * 0x9E3779B1 + zlib.crc32(key.encode())
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x &= 0xFFFFFFFF
    x = (x ^ (x >> np.uint64(shift))) * factor
  return (x & 0xFFFFFFFF) / 2**32


def drawn(key, *shape):
  """Of mean 0 and variance 1, in PyTorch's order of axes."""
  count = int(np.prod(shape))
  return ((2 * uniform(key, count) - 1) * np.sqrt(3)).reshape(shape)


def last(x):
  """Channels last, float32."""
  return jnp.asarray(np.moveaxis(x, 1, -1), jnp.float32)


def fill(name, shape):
  """A tensor of a golden's file."""
  if name.endswith('num_batches_tracked'):
    return np.zeros(shape, np.int64)
  if name.endswith('running_mean'):
    values = 0.1 * drawn(name, *shape)
  elif name.endswith('running_var'):
    values = 1 + 0.5 * uniform(name, int(np.prod(shape))).reshape(shape)
  elif len(shape) >= 2:
    values = drawn(name, *shape) / np.sqrt(np.prod(shape[1:]))
  elif name.endswith('weight'):
    values = 1 + 0.1 * drawn(name, *shape)
  else:
    values = 0.05 * drawn(name, *shape)
  return values.astype(np.float32)


def tensors_of(module, rules):
  """The golden's tensors for a module, by torch names."""
  shapes = params.shapes(module)
  empty = {p: np.broadcast_to(np.float32(0), s) for p, s in shapes.items()}
  names = params.to_torch(empty, rules)
  return {name: fill(name, x.shape) for name, x in names.items()}


def filled(module):
  rules, *_ = module.torch_tables().values()
  return parity.load(module, tensors_of(module, rules), rules)


@functools.cache
def lab(name):
  ours, fields, *_ = LABS[name]

  def make():
    backbone = backbones.build(
      ours, image_size=513, rngs=nnx.Rngs(0), output_stride=16, **fields
    )
    return deeplab.DeepLab(
      backbone, 21, attention='learned', dropout=(0, 0, 0), rngs=nnx.Rngs(0)
    )

  return filled(nnx.eval_shape(make))


@functools.cache
def polyp(name):
  backbone = POLYPS[name][0]

  def make():
    return polyp_pvt.PolypPVT(
      backbones.build(
        backbone, image_size=352, rngs=nnx.Rngs(0), drop_path=0.0
      ),
      2,
      rngs=nnx.Rngs(0),
    )

  return filled(nnx.eval_shape(make))


@jax.jit
def answer_of(module, images):
  return module.answer(images)


@functools.cache
def answer(name, shape=None):
  if name in LABS:
    return answer_of(lab(name), last(drawn('input', 2, 3, 129, 161)))
  return answer_of(polyp(name), last(drawn('input', *shape)))


def golden(shared, name):
  return json.loads(shared(f'{FOLDER}/golden_{name}.json').read_text())


def assert_like(ours, theirs, what):
  """Compares a map [b, h, w, c] with a golden's statistics and values."""
  ours = parity.channels_first(ours)
  assert list(ours.shape) == theirs['shape'], what
  flat = ours.ravel().astype(np.float64)
  scale = max(1, abs(theirs['max']), abs(theirs['min']))
  found = {
    'mean': flat.mean(), 'std': flat.std(), 'min': flat.min(),
    'max': flat.max(),
  }  # fmt: skip
  off = [abs(x - theirs[name]) for name, x in found.items()]
  off += [abs(flat[int(i)] - x) for i, x in theirs['vals'].items()]
  assert max(off) <= 3e-6 * scale, (what, max(off) / scale)


@pytest.mark.parametrize('name', LABS)
def test_golden_deeplab(shared, name):
  theirs, found = golden(shared, 'attnfd')[name], answer(name)
  maps = [found.features[f'stage{i}'] for i in (1, 2, 3, 4)]
  maps += [nnx.relu(found.features[x]) for x in ('aspp', 'decoder')]
  for i, x in enumerate(maps):
    assert_like(x, theirs['feats'][i], f'feature {i}')
  for x, other in zip(
    ('stage4', 'aspp', 'decoder'), theirs['attens'], strict=True
  ):
    assert_like(found.attended[x], other, x)
  assert_like(found.logits, theirs['logits'], 'logits')


@pytest.mark.parametrize('name', LABS)
def test_a_deeplab_has_the_originals_size(shared, name):
  del shared
  _, _, entries, count = LABS[name]
  module = lab(name)
  names = tensors_of(module, module.torch_tables()['attnfd'])
  assert len(names) + len(module.torch_unused(names)) == entries
  assert params.count(nnx.state(module, nnx.Param)) == count


def test_a_deeplab_on_lite0_keeps_stride_16():
  def make():
    backbone = backbones.build(
      'lite0', image_size=513, rngs=nnx.Rngs(0), output_stride=16
    )
    return deeplab.DeepLab(backbone, 12, width=16, rngs=nnx.Rngs(0))

  module = nnx.eval_shape(make)
  graph, state = nnx.split(module)
  found = jax.eval_shape(
    lambda state, x: nnx.merge(graph, state).answer(x),
    state,
    jax.ShapeDtypeStruct((2, 97, 129, 3), jnp.uint8),
  )
  assert found.logits.shape == (2, 97, 129, 12)
  for name, (channels, norm) in module.features.items():
    assert found.features[name].shape[-1] == channels, name
    assert norm.scale.shape == (channels,), name
  assert found.features['stage4'].shape[1:3] == (7, 9)
  assert [x.depthwise.conv.dilation for x in module.backbone.blocks][-5:] == [
    2, 2, 2, 2, 2,
  ]  # fmt: skip


def plain_gmac(monkeypatch, module, size):
  """Of a module's answer without our short cuts: what others count."""
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

  def upsampled(x, kernel, sizes):
    shape = (x.shape[0], *sizes[-1], x.shape[-1])
    return conv.conv2d(jnp.broadcast_to(x[:, :1, :1], shape), kernel)

  def resized(x, size, **how):
    return jnp.broadcast_to(
      x[..., :1, :1, :], (*x.shape[:-3], *size, x.shape[-1])
    )

  monkeypatch.setattr(conv, 'conv_of_upsampled', upsampled)
  monkeypatch.setattr(resize, 'bilinear', resized)
  monkeypatch.setattr(conv, '_conv_for_cpu', conv._conv)
  graph, state = nnx.split(module)
  traced = jax.jit(
    lambda state, x: nnx.merge(graph, state).answer(x).logits
  ).trace(state, images)
  return counts.flops(traced.jaxpr) / 2e9


@pytest.mark.parametrize(
  ('name', 'gmac'),
  [('resnet18', 42.7), ('resnet101', 92.8), ('mobilenet', 27.1)],
)
def test_a_deeplab_multiplies_as_often(monkeypatch, name, gmac):
  assert plain_gmac(monkeypatch, lab(name), 513) == pytest.approx(
    gmac, rel=5e-3
  )


@pytest.mark.parametrize(
  ('name', 'gmac'), [('PolypPVT', 10.84), ('PolypPVTtiny', 1.90)]
)
def test_a_polyp_pvt_multiplies_as_often(monkeypatch, name, gmac):
  found = plain_gmac(monkeypatch, polyp(name), 352)
  assert found == pytest.approx(gmac, rel=5e-3)


@pytest.mark.parametrize('name', POLYPS)
def test_golden_polyp_pvt(shared, name):
  theirs = golden(shared, 'kdas')[name]
  found = answer(name, (2, 3, 128, 160))
  for i in range(4):
    assert_like(found.features[f'stage{i + 1}'], theirs['backbone'][i], i)
  for x, other in (('cim', 'cim'), ('cfm', 'cfm'), ('edges', 'T2')):
    assert_like(found.features[x], theirs[other], x)
  assert_like(found.features['sam'], theirs['sam'], 'sam')
  for i in (0, 1):
    assert_like(found.sides[..., i : i + 1], theirs[f'P{i + 1}'], i)
    square = answer(name, (2, 3, 128, 128)).sides[..., i : i + 1]
    assert_like(square, theirs[f'P{i + 1}_sq'], i)
  np.testing.assert_array_equal(found.logits[..., 0], 0)
  np.testing.assert_allclose(
    found.logits[..., 1], found.sides.sum(-1), rtol=1e-6
  )


@pytest.mark.parametrize('name', POLYPS)
def test_a_polyp_pvt_has_the_originals_size(shared, name):
  del shared
  _, entries, count = POLYPS[name]
  module = polyp(name)
  names = tensors_of(module, module.torch_tables()['original'])
  assert len(names) + len(module.torch_unused(names)) == entries
  assert params.count(nnx.state(module, nnx.Param)) == count


def test_a_polyp_pvt_takes_multiples_of_32():
  module = polyp('PolypPVTtiny')
  with pytest.raises(ValueError, match=r'264x352.*multiples of 32'):
    module.answer(jnp.zeros((1, 264, 352, 3)))


@pytest.mark.parametrize(
  ('name', 'count'),
  [
    ('pvt_v2_b1', 13_496_000), ('pvt_v2_b3', 44_725_696),
    ('pvt_v2_b4', 62_043_072), ('pvt_v2_b5', 81_443_008),
  ],
)  # fmt: skip
def test_pvt_sizes(name, count):
  made = nnx.eval_shape(
    lambda: backbones.build(name, image_size=352, rngs=nnx.Rngs(0))
  )
  assert params.count(nnx.state(made, nnx.Param)) == count


# Losses of the distillers.


def items_of(count, valid=None):
  keys = jax.random.split(jax.random.key(0), count)
  return Items(keys, jnp.ones(count, bool) if valid is None else valid)


def added(distiller, taught, learnt, items=None):
  """The sum of a distiller's terms, as the step would have it."""
  items = items or items_of(taught.logits.shape[0])
  terms = distiller(taught, learnt, None, items, None).added
  return float(sum(x.mean() for x in terms.values()))


@pytest.mark.parametrize(
  ('distiller', 'name'),
  [
    (kd.KD(mean='elements'), 'kd_meanKL_T1_aicsd'),
    (kd.KD(), 'kd_cirkd_batchmean_pixel'),
    (kd.KD(temperature=4.0), 'kd_cirkd_T4'),
    (dist.DIST(), 'dist'),
    (ickd.ICKD(), 'ic(no lambda)'),
    (aicsd.AICSD(weight=1.0, logits=0.0), 'lo_asrun(no lambda)'),
  ],
  ids=['kd_elements', 'kd', 'kd_4', 'dist', 'ickd', 'aicsd'],
)
def test_golden_of_logits(shared, distiller, name):
  taught, learnt = (
    Answer(2 * last(drawn(key, 2, 21, 8, 10))) for key in ('bl_lt', 'bl_ls')
  )
  theirs = golden(shared, 'baselines')[name]
  assert added(distiller, taught, learnt) == pytest.approx(theirs, rel=1e-5)


def test_golden_of_features(shared):
  theirs = golden(shared, 'baselines')
  margins = overhaul.margins(
    jnp.array([1, 0.5, 0.2, 1, -0.8, 0.3]),
    jnp.array([0, 0.5, 1.5, -2, 0.1, -0.1]),
  )
  np.testing.assert_allclose(margins, theirs['margin'], rtol=1e-6)
  learnt, taught = (last(drawn(x, 2, 6, 5, 5)) for x in ('bl_s', 'bl_t'))
  total = overhaul.partial_l2(learnt, taught, margins).sum()
  assert total == pytest.approx(theirs['overhaul_one_layer_sum'], rel=1e-6)
  learnt, taught = (last(drawn(x, 2, 16, 6, 7)) for x in ('bl_fs', 'bl_ft'))
  within = cirkd.within_batch(
    base.unit(taught), base.unit(learnt), items_of(2), 0.1
  )
  other = theirs['cirkd_minibatch_tau0.1']
  assert within.mean() == pytest.approx(other, rel=1e-6)
  pairs = sp.pairs(taught, learnt, (3, 3)).mean()
  assert pairs == pytest.approx(theirs['pairwise_pa_sum(no lambda)'], rel=1e-5)


class Alike(nnx.Module):
  """A model that says what distillers ask of one."""

  def __init__(self, channels, classes=3):
    self.channels, self.classes, self.heads = channels, classes, 2
    self.norm = nnx.data(None)

  @property
  def features(self):
    names = ('stage1', 'stage2', 'stage3', 'stage4', 'aspp', 'decoder')
    norm = layers.BatchNorm(self.channels)
    return {name: (self.channels, norm) for name in names}

  @property
  def attended(self):
    return dict.fromkeys(('stage4', 'aspp', 'decoder'), self.channels)


def random_answer(channels, seed, classes=3, images=3):
  rng = np.random.default_rng(seed)

  def maps(side, c):
    return jnp.asarray(rng.normal(size=(images, side, side, c)), jnp.float32)

  model = Alike(channels)
  return Answer(
    maps(16, classes),
    {name: maps(8, channels) for name in model.features},
    {name: maps(8, channels) for name in model.attended},
    maps(16, 2),
  )


def fields_of(name):
  small = {'queued_pixels': 8, 'queued_regions': 8}
  return small if name == 'cirkd' else {}


@pytest.mark.parametrize('name', distillers.names())
def test_padding_changes_nothing(name):
  """A distiller's terms and gradients, with and without an item too many."""
  made = nnx.eval_shape(
    lambda: distillers.build(
      _config(name, fields_of(name)), Alike(6), Alike(4), nnx.Rngs(0)
    )
  )
  distiller = parity.fill_randomly(made)
  graph, state = nnx.split(distiller)
  taught, learnt = random_answer(6, 0), random_answer(4, 1)
  labels = jnp.asarray(np.arange(16 * 16 * 3).reshape(3, 16, 16) % 3)

  def total(learnt, taught, labels, items):
    distiller = nnx.merge(graph, state, copy=True)
    terms = distiller(taught, learnt, labels, items, Alike(6)).added
    each = sum(terms.values())
    assert each.shape == (len(labels),)
    return jnp.where(items.valid, each, 0).sum() / items.valid.sum()

  run = jax.value_and_grad(total)
  two = jax.tree.map(lambda x: x[:2], (learnt, taught, labels))
  loss, grads = jax.jit(run)(*two, items_of(2))
  padded = Items(items_of(2).keys[jnp.array([0, 1, 1])], jnp.arange(3) < 2)
  same, padded = jax.jit(run)(learnt, taught, labels, padded)
  assert np.isfinite(loss)
  assert loss > 0
  np.testing.assert_allclose(same, loss, rtol=2e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(padded), strict=True):
    assert np.isfinite(b).all()
    np.testing.assert_allclose(b[:2], a, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(b[2], 0, atol=1e-7)


def _config(name, fields):
  return ConfigDict({'name': name, 'fields': fields})


@pytest.mark.parametrize(
  'name', sorted(set(distillers.names()) - {'attnfd', 'overhaul', 'lad'})
)
def test_nothing_is_asked_of_an_equal(name):
  """A student that says what its teacher says has nothing left to learn.

  The first is CIRKD's queue, which a projection of the student is compared to.
  """
  fields = fields_of(name)
  if name == 'cirkd':
    fields = {**fields, 'pixels': 0.0, 'regions': 0.0}
  model, answer = Alike(6), random_answer(6, 0)
  distiller = distillers.build(_config(name, fields), model, model, nnx.Rngs(0))
  labels = jnp.zeros((3, 16, 16), jnp.int32)
  terms = distiller(answer, answer, labels, items_of(3), model).added
  for term in terms.values():
    np.testing.assert_allclose(term, 0, atol=1e-4)


def test_aicsd_as_published_is_a_divergence_of_all_pairs():
  logits = random_answer(4, 0).logits
  q = np.exp(logits - np.asarray(logits).max((1, 2), keepdims=True))
  q = (q / q.sum((1, 2), keepdims=True)).reshape(3, -1, 3)
  wanted = np.zeros((3, 3, 3))
  for i in range(3):
    for j in range(3):
      ratio = np.log(q[:, :, j] / q[:, :, i])
      wanted[:, i, j] = (q[:, :, j] * ratio).sum(1)
  wanted /= np.linalg.norm(wanted, axis=2, keepdims=True)
  np.testing.assert_allclose(aicsd.pairs(logits), wanted, atol=1e-5)


@pytest.mark.parametrize('released', [True, False])
def test_cirkd_remembers_by_class(released):
  """Regions are means of a class; pixels are of it where repaired."""
  model, fields = Alike(6), fields_of('cirkd') | {'released': released}
  made = distillers.build(_config('cirkd', fields), model, model, nnx.Rngs(0))
  answer = random_answer(6, 0)
  labels = jnp.where(jnp.arange(16)[:, None] < 8, 1, 2)
  labels = jnp.broadcast_to(labels, (3, 16, 16)).at[2].set(VOID)
  before = jax.tree.map(np.asarray, (made.regions[...], made.pixels[...]))
  items = items_of(3, jnp.array([True, False, True]))
  made(answer, answer, labels, items, model)
  t = np.asarray(base.unit(nnx.relu(answer.features['aspp'])))[0]
  regions, pixels = np.asarray(made.regions[...]), np.asarray(made.pixels[...])
  for kind, half in ((1, t[:4]), (2, t[4:])):
    mean = half.reshape(-1, 6).mean(0)
    np.testing.assert_allclose(
      regions[kind, 0], mean / np.linalg.norm(mean), rtol=1e-4
    )
    assert made.regions_at[...][kind] == 1
    known = half.reshape(-1, 6)
    within = [np.abs(known - x).sum(1).min() < 1e-5 for x in pixels[kind]]
    assert all(within) or released
  assert made.regions_at[...][0] == 0  # no image shows it
  np.testing.assert_array_equal(regions[0], before[0][0])
  np.testing.assert_array_equal(pixels[0], before[1][0])
  everything = t.reshape(-1, 6)
  if released:  # any pixel of the image
    for x in pixels[1:].reshape(-1, 6):
      assert np.abs(everything - x).sum(1).min() < 1e-5


def test_a_queue_goes_round():
  queue = cirkd.Queue(jnp.zeros((1, 3, 1)))
  at = cirkd.Queue(jnp.zeros(1, jnp.int32))
  new = jnp.arange(1.0, 3)[:, None, None, None]
  there = jnp.ones((2, 1, 1), bool)
  cirkd._put(queue, at, new, there)
  cirkd._put(queue, at, new + 2, there)
  assert queue[...].ravel().tolist() == [4, 2, 3]
  assert at[...].tolist() == [1]
  many = jnp.arange(10.0, 15)[:, None, None, None]
  cirkd._put(queue, at, many, jnp.ones((5, 1, 1), bool))
  assert sorted(queue[...].ravel().tolist()) == [12, 13, 14]


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('overhaul', 'student .PolypPVT. lacks the features aspp, decoder'),
    ('cirkd', 'lacks the features aspp; it has stage1'),
    ('attnfd', 'has no maps weighted by attention'),
  ],
)
def test_what_a_model_lacks_is_said(name, says):
  model = polyp('PolypPVTtiny')
  with pytest.raises(ValueError, match=says):
    distillers.build(_config(name, {}), lab('resnet18'), model, nnx.Rngs(0))


def test_heads_are_asked_for():
  with pytest.raises(
    ValueError, match=r'teacher .DeepLab. has no binary heads'
  ):
    distillers.build(
      _config('kdas', {}),
      lab('resnet18'),
      polyp('PolypPVTtiny'),
      nnx.Rngs(0),
    )


# AttnFD.


def attnfd_of(student, norm='batch'):
  """The golden's connectors between a student and the ResNet-101."""
  models = lab('resnet101'), lab(student)
  made = nnx.eval_shape(
    lambda: attnfd.AttnFD(*models, norm=norm, rngs=nnx.Rngs(0))
  )
  rules = []
  for i, name in enumerate(('stage4', 'aspp', 'decoder'), 3):
    ours = f'connectors/{name}/'
    rules += layers.torch_rules('conv', rf'Connectors\.{i}\.0', ours + 'conv')
    rules += layers.torch_rules('norm', rf'Connectors\.{i}\.1', ours + 'norm')
  return parity.load(made, tensors_of(made, rules), rules)


@pytest.mark.parametrize('student', ['resnet18', 'mobilenet'])
def test_golden_attnfd(shared, student, monkeypatch):
  theirs = golden(shared, 'attnfd')
  distiller = attnfd_of(student)
  # The golden's connectors go by their running statistics.
  monkeypatch.setattr(
    base.Connector, '__call__', lambda self, x, items: self.norm(self.conv(x))
  )
  terms = distiller(
    answer('resnet101'), answer(student), None, items_of(2), None
  ).added
  names = ('stage4', 'aspp', 'decoder')
  each = [float(terms[name].mean()) / 2 for name in names]
  np.testing.assert_allclose(
    each, theirs[f'attnfd_per_layer_{student}'], rtol=5e-5
  )
  total = float(sum(x.mean() for x in terms.values()))
  assert total == pytest.approx(theirs[f'attnfd_loss_eval_{student}'], rel=1e-5)


def test_lengths_of_attnfd():
  """`norm` says what has length 1: a batch, an image, a channel."""
  rng = np.random.default_rng(0)
  t, s = rng.normal(size=(2, 3, 4, 4, 5)).astype(np.float32)

  def apart(axes):
    length = [np.sqrt((x**2).sum(axes, keepdims=True)) for x in (t, s)]
    return (t / length[0] - s / length[1]) ** 2

  wanted = {
    'batch': apart((0, 1, 2, 3)).sum() / 3,
    'sample': apart((1, 2, 3)).sum((1, 2, 3)).mean(),
    'channel': apart((1, 2)).sum((1, 2)).mean(),
  }
  for norm, value in wanted.items():
    made = nnx.eval_shape(
      lambda norm=norm: attnfd.AttnFD(
        Alike(5), Alike(5), norm=norm, rngs=nnx.Rngs(0)
      )
    )
    found = made._apart(jnp.asarray(t), jnp.asarray(s), items_of(3)).mean()
    assert found == pytest.approx(value, rel=1e-5), norm


LOSS = {
  'name': 'cross_entropy', 'labels': 1.0, 'divided': False, 'weighted': False,
  'soft': False, 'sizes': (),
}  # fmt: skip


def system_of(model, teacher, distiller, *, statistics='running', **loss):
  return Segmentation(
    model,
    model.classes - 1,
    teacher=teacher,
    distiller=distiller,
    loss=ConfigDict(LOSS | loss),
    statistics=statistics,
    noise=False,
    sizes=(),
  )


def step(system, images, labels):
  """Loss, parts, gradients and buffers of a system on a golden's batch."""
  images = (last(images) * STD + MEAN) * 255
  graph, state = nnx.split(system)
  known = set(params.shapes(nnx.state(system, nnx.Param)))
  arrays = params.flatten(state)
  trained = {
    path: x
    for path, x in arrays.items()
    if path in known and not path.startswith('teacher/')
  }

  @jax.jit
  def run(trained, images, labels):
    def loss(trained):
      made = nnx.merge(
        graph, params.replace(state, {**arrays, **trained}), copy=True
      )
      found = made.losses((), Dense(images, labels), items_of(len(labels)))
      buffers = params.flatten(nnx.state(made, nnx.Not(nnx.Param)))
      return found.each.mean(), (found.parts, buffers)

    return jax.value_and_grad(loss, has_aux=True)(trained)

  (loss, (parts, buffers)), grads = run(trained, images, labels)
  return loss, {k: float(x.mean()) for k, x in parts.items()}, grads, buffers


def assert_norms(theirs, rules, grads, below, rel):
  for name, norm in theirs.items():
    [path] = params.places([name], rules).values()
    found = np.linalg.norm(np.asarray(grads[below + path], np.float64))
    assert found == pytest.approx(norm, rel=rel), name


@pytest.mark.slow
def test_golden_step_of_attnfd(shared):
  """Both in training mode: loss, gradients, running statistics (C9.1)."""
  theirs = golden(shared, 'train_attnfd')
  student, teacher = lab('resnet18'), lab('resnet101')
  before = jax.tree.map(np.asarray, params.flatten(teacher))
  target = np.floor(22 * uniform('target_voc', 2 * 129 * 161))
  labels = np.where(target == 21, VOID, target).reshape(2, 129, 161)
  loss, parts, grads, buffers = step(
    system_of(
      student, teacher, attnfd_of('resnet18'), statistics='batch', divided=True
    ),
    drawn('input', 2, 3, 129, 161),
    jnp.asarray(labels, jnp.uint8),
  )
  assert parts['labels'] == pytest.approx(theirs['ce_over_B'], rel=1e-5)
  of_maps = sum(parts[x] for x in ('stage4', 'aspp', 'decoder'))
  assert of_maps == pytest.approx(theirs['attn'], rel=1e-5)
  assert loss == pytest.approx(theirs['total'], rel=1e-5)
  rules = student.torch_tables()['attnfd']
  # The golden is float64's. In float64 ours agree to 6e-6; in float32 maps of
  # 9x11 normalised by a batch of two leave 1e-2 of a small gradient.
  assert_norms(theirs['grad_norm'], rules, grads, 'model/', 2e-2)
  ours = {'0.weight': 'conv/kernel', '1.weight': 'norm/scale'}
  ours['1.bias'] = 'norm/bias'
  names = {'3': 'stage4', '4': 'aspp', '5': 'decoder'}
  for name, norm in theirs['conn'].items():
    number, _, leaf = name.partition('.')
    path = f'distiller/connectors/{names[number]}/{ours[leaf]}'
    found = np.linalg.norm(np.asarray(grads[path], np.float64))
    assert found == pytest.approx(norm, rel=2e-3), name
  for name, values in theirs['running'].items():
    torch = name.removeprefix('s.').removesuffix('[0..2]')
    [path] = params.places([torch], rules).values()
    np.testing.assert_allclose(
      buffers[f'model/{path}'][:3], values, rtol=1e-5, atol=1e-6
    )
  # What the teacher has seen moved nothing of it.
  for path, x in before.items():
    if f'teacher/{path}' in buffers:
      np.testing.assert_array_equal(buffers[f'teacher/{path}'], x)


# KDAS.


def kdas_masks():
  y, x = np.mgrid[:128, :128]
  first = (y - 60) ** 2 + (x - 50) ** 2 < 900
  second = (y - 90) ** 2 / 400 + (x - 80) ** 2 / 900 < 1
  return np.stack([first, second])


def test_golden_kdas(shared):
  theirs, shape = golden(shared, 'kdas'), (2, 3, 128, 128)
  learnt, taught = (answer(x, shape) for x in ('PolypPVTtiny', 'PolypPVT'))
  masks = jnp.asarray(kdas_masks(), jnp.float32)
  of_heads = []
  for i in (0, 1):
    for weighted, name in ((False, 'asrun'), (True, 'fixed')):
      found = losses.structure(learnt.sides[..., i], masks, weighted=weighted)
      other = theirs[f'structure_loss_{name}'][f'P{i + 1}']
      assert found.mean() == pytest.approx(other, rel=1e-5)
      of_heads += [] if weighted else [float(found.mean())]
  distiller = kdas.KDAS(polyp('PolypPVT'), polyp('PolypPVTtiny'), weight=1.0)
  terms = distiller(taught, learnt, None, items_of(2), None)
  symmetric = float(terms.added['symmetric'].mean())
  assert symmetric == pytest.approx(theirs['sym_mse'], rel=2e-5)
  total = 0.7 * sum(of_heads) + 0.3 * symmetric
  assert total == pytest.approx(theirs['kdas_effective'], rel=1e-5)
  attended = kdas.attend(taught.sides[..., 0], 2.0)
  assert_like(attended[..., None], theirs['teacher_att_P1'], 'attention')
  half = jnp.full_like(attended, 0.5)
  kl = kdas.released_kl(jnp.abs(attended), half).mean()
  assert kl == pytest.approx(theirs['kl_const_abs'], rel=1e-4)
  # The Dice that its log has, of the first image's answer at another size.
  y, x = np.mgrid[:100, :120]
  mask = (y - 47) ** 2 + (x - 40) ** 2 < 625
  _, sums = saliency.maps(
    learnt.logits[:1], np.int32([mask.shape]), mask[None].astype(np.uint8)
  )
  shared_, marked, there = (float(x) for x in sums[0])
  exact, rounded = theirs['train_dice']
  assert soft_dice(shared_, marked, there) == rounded
  found = (2 * shared_ + 1) / (marked + there + 1)
  assert found == pytest.approx(exact, rel=1e-4)


def test_the_released_attention_of_kdas_moves_nothing():
  """Its gradient is exactly 0; repaired, it is not."""
  taught, learnt = random_answer(4, 0), random_answer(4, 1)
  for mode, moves in (('released', False), ('repaired', True)):
    distiller = kdas.KDAS(Alike(4), Alike(4), mode=mode)

    def attention(sides, distiller=distiller):
      terms = distiller(
        taught, learnt.replace(sides=sides), None, items_of(3), None
      )
      every = {**terms.added, **terms.seen}
      [found] = [x for name, x in every.items() if 'attention' in name]
      return found.sum()

    value, grad = jax.value_and_grad(attention)(learnt.sides)
    assert np.isfinite(value)
    assert bool(jnp.abs(grad).max() > 0) == moves


def test_guides_of_kdas():
  taught, learnt = random_answer(4, 0), random_answer(4, 1)
  apart = np.asarray(learnt.sides - taught.sides)[..., 0]
  apart = apart + apart.swapaxes(1, 2)
  for guide, wanted in (
    ('mse', (apart**2).mean()), ('l1', np.abs(apart).mean()),
  ):  # fmt: skip
    made = kdas.KDAS(Alike(4), Alike(4), guide=guide, weight=1.0)
    found = made(taught, learnt, None, items_of(3), None).added['symmetric']
    assert found.mean() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_golden_step_of_kdas(shared):
  """A student in training mode: loss, gradients, statistics (C9.2)."""
  theirs = golden(shared, 'train_kdas')
  student, teacher = polyp('PolypPVTtiny'), polyp('PolypPVT')
  loss, parts, grads, buffers = step(
    system_of(
      student,
      teacher,
      kdas.KDAS(teacher, student),
      name='structure',
      soft=True,
      labels=0.7,
    ),
    drawn('input', 2, 3, 128, 128),
    jnp.asarray(SOFT * kdas_masks(), jnp.uint8),
  )
  both = theirs['SL1'] + theirs['SL2']
  assert parts['labels'] == pytest.approx(0.7 * both, rel=1e-4)
  assert parts['symmetric'] == pytest.approx(0.3 * theirs['sym_mse'], rel=1e-4)
  assert loss == pytest.approx(theirs['L_eff'], rel=1e-4)
  rules = student.torch_tables()['original']
  assert_norms(theirs['grad_norm'], rules, grads, 'model/', 2e-3)
  for name, values in theirs['running'].items():
    [path] = params.places([name.removesuffix('[0..2]')], rules).values()
    np.testing.assert_allclose(
      buffers[f'model/{path}'][:3], values, rtol=1e-4, atol=1e-6
    )


# Losses of labels.


def test_golden_losses_of_labels(shared):
  theirs = golden(shared, 'attnfd')
  logits = 2 * last(drawn('logits', 2, 5, 6, 7))
  labels = np.floor(6 * uniform('target', 84)).reshape(2, 6, 7)
  labels = jnp.asarray(np.where(labels == 5, VOID, labels), jnp.int32)
  model = Alike(4, classes=5)
  for loss, name in (
    ({}, 'ce_plain'),
    ({'divided': True}, 'ce_over_n'),
    ({'name': 'focal', 'divided': True}, 'focal'),
  ):
    system = system_of(model, None, None, **loss)
    found = system._labels(Answer(logits), labels, labels, items_of(2))
    assert found.mean() == pytest.approx(theirs[name], rel=1e-6), name
