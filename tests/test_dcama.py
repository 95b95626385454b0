"""Tests of the teacher: goldens of the original, and what models promise."""

import functools
import importlib.util
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from distillfss_jax.backbones import resnet, swin
from distillfss_jax.models import dcama
from distillfss_jax.ops import resize, ways

_BACKBONES = {
  'resnet50': (resnet, 'resnet50'),
  'swin': (swin, 'swin_b'),
  'tinyswin': (swin, 'swin_tiny_test'),
}

# shots, labels, concat_support, voting, positional
_VARIANTS = {
  'k1_F': (1, 'single', False, None, True),
  'k3_F': (3, 'single', False, None, True),
  'k5_F': (5, 'single', False, None, True),
  'k10_F': (10, 'single', False, None, True),
  'k1_T': (1, 'single', True, None, True),
  'k3_T': (3, 'single', True, None, True),
  'k10v4_F': (10, 'single', False, 4, True),
  'k10v4_T': (10, 'single', True, 4, True),
  'k3_F_nope': (3, 'single', False, None, False),
  'multi_k5_F': (5, 'multi', False, None, True),
  'multi_k5v4_F': (5, 'multi', False, 4, True),
  'absent1_k3_F': (3, 'absent', False, None, True),
}

# What of a file is not slow; all of it where it is not named.
_QUICK = {
  'resnet50_128': (
    *('k1_F', 'k3_F', 'k5_F', 'k10_F', 'k1_T', 'k3_T'),
    *('multi_k5_F', 'absent1_k3_F'),
  ),
  'resnet50_384': ('k3_F',),
  'swin_384': ('k1_F',),
}
_HELD = {
  'tinyswin_128': tuple(_VARIANTS),
  'resnet50_128': tuple(_VARIANTS),
  'resnet50_384': (
    *('k1_F', 'k3_F', 'k1_T', 'k3_T', 'k10v4_F', 'k10v4_T'),
    *('k3_F_nope', 'multi_k5_F', 'multi_k5v4_F'),
  ),
  'swin_384': ('k1_F', 'k3_F', 'k1_T', 'k3_T', 'k10v4_F', 'multi_k5_F'),
}


@jax.jit
def _encode(model, images):
  return model.encode(images)


@functools.partial(jax.jit, static_argnames=('size', 'train'))
def _segment(
  model, query, support, masks, present, size, train=False, keys=None
):
  """The prediction of episodes, their memory and the decoder's maps."""
  memory = model.memorize(support, masks, present, train=train, keys=keys)
  answer = model.segment(query, memory, size, train=train, keys=keys)
  return answer, memory, _decoder_maps(model, query, answer.coarse, memory)


def _decoder_maps(model, pyramid, coarse, memory):
  """What passes through `decode`, [b * j, h, w, c] each.

  The original's `mix`, the stack of all maps that enter the mixers, is not
  among them: it is never formed. Nor are its raw scores, `fg_raw`, `bg_raw`.
  """
  b, j = coarse[0].shape[:2]
  fine, middle, deep = (x.reshape(b * j, *x.shape[2:]) for x in coarse)
  f1, f2, f3 = model.conv1(deep), model.conv2(middle), model.conv3(fine)
  x = model.conv4(resize.bilinear(f1, f2.shape[1:3]) + f2)
  pre_mix = model.conv5(resize.bilinear(x, f3.shape[1:3]) + f3)
  x = nnx.relu(model.mixer1[1](model._mix(pyramid, pre_mix, memory)))
  mix1 = resize.bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))
  x = nnx.relu(model.mixer2[1](nnx.relu(model.mixer2[0](mix1))))
  mix2 = resize.bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))
  return {'pre_mix': pre_mix, 'mix1': mix1, 'mix2': mix2}


def _load(arch, weights, **fields):
  """A DCAMA of a golden architecture with torch weights.

  `mix_size` is what the original forces.
  """
  module, variant = _BACKBONES[arch]
  model = nnx.eval_shape(
    lambda: dcama.DCAMA(
      module.variants[variant](rngs=nnx.Rngs(0)),
      mix_size=96,
      rngs=nnx.Rngs(0),
      **fields,
    )
  )
  rules = [('model\\.' + a, b, c) for a, b, c in dcama.TORCH_NAMES]
  rules += [
    ('feature_extractor\\.' + a, f'backbone/{b}', c)
    for a, b, c in module.TORCH_NAMES
  ]
  return parity.load(model, weights, rules)


def _with(model, **fields):
  """The model with other settings and the same arrays."""
  model = nnx.merge(*nnx.split(model))
  for name, value in fields.items():
    assert hasattr(model, name)
    setattr(model, name, value)
  return model


# --- goldens of the original as run -----------------------------------------


class _Held:
  """One head_*.npz, with the model and the images it was computed from."""

  def __init__(self, shared, name):
    self.shared, (self.arch, size) = shared, name.split('_')
    self.size = int(size)
    self.numbers = dict(np.load(shared(f'goldens/dcama/head_{name}.npz')))
    deep = self.arch == 'swin'
    self.tolerance = parity.DEEP_TOLERANCE if deep else parity.TOLERANCE
    self.inputs = np.load(shared(f'goldens/dcama/inputs_{size}.npz'))
    self.masks = self.inputs['support_mask']
    self.model = functools.cache(self._model)
    self.pyramid = functools.cache(self._pyramid)

  def _model(self, concat):
    weights = _golden_weights(self.shared, self.arch, concat)
    return _load(self.arch, weights, concat_support=concat)

  def _pyramid(self, role, index):
    """Of one image at a time, and only of those that are asked for."""
    return _encode(self.model(False), self.inputs[f'{role}_u8'][index][None])

  def episode(self, tag):
    """Support pyramid, masks [1,s,S,S,n] and present of a variant's episode.

    Small episodes are padded with shots and ways that are not present, so that
    one program serves several variants; images come with the absent shots.
    """
    k, kind, *_ = _VARIANTS[tag]
    masks = self.masks[:k].astype(np.int32)
    if kind != 'single':
      masks = masks * (np.arange(self.size) * 3 // self.size + 1)
    if kind == 'multi':
      masks[masks == 2] = 0
      for shot in (0, 2, 4):
        masks[shot][masks[shot] == 3] = 0
    if kind == 'absent':
      masks[masks == 1] = 0
    small = self.size == 128
    n = 3 if small or kind != 'single' else 1
    masks = masks[None, ..., None] == np.arange(1, n + 1)
    present = masks.any((2, 3))
    pad = len(self.masks) - k if small else 0
    masks = np.pad(masks, ((0, 0), (0, pad), *[(0, 0)] * 3))
    present = np.pad(present, ((0, 0), (0, pad), (0, 0)))
    shots = [self.pyramid('support', i) for i in range(k + pad)]
    support = tuple(jnp.stack(x, 1) for x in zip(*shots, strict=True))
    return support, jnp.asarray(masks, jnp.float32), jnp.asarray(present)

  def answer(self, tag, query=0):
    """`_segment` of a variant, and how many shots each way has."""
    _, _, concat, voting, positional = _VARIANTS[tag]
    model = _with(self.model(concat), voting=voting, positional=positional)
    support, masks, present = self.episode(tag)
    return np.asarray(present.sum(1))[0], _segment(
      model,
      self.pyramid('query', query),
      support,
      masks,
      present,
      (self.size, self.size),
    )


@pytest.fixture(scope='module')
def golden(shared):
  """`golden('resnet50_128')` is that `_Held`; the last one is kept."""
  return functools.lru_cache(maxsize=1)(functools.partial(_Held, shared))


def _golden_weights(shared, arch, concat):
  """{torch name: array} of a golden teacher."""
  weights = parity.torch_weights(shared, arch, 'teacher.')
  if not concat:
    return weights
  names = shared(f'goldens/dcama/names_teacher_concat_{arch}.json')
  shapes = json.loads(names.read_text())['state_dict']
  assert shapes.keys() == weights.keys()
  wider = [n for n, x in weights.items() if list(x.shape) != shapes[n]]
  assert wider == ['model.mixer1.0.weight']
  spec = importlib.util.spec_from_file_location(
    'golden_fill', shared('goldens/dcama/fill.py')
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return weights | {name: module.fill(name, shapes[name]) for name in wider}


def _cases():
  cases = []
  for name, tags in _HELD.items():
    for tag in tags:
      fast = tag in _QUICK.get(name, tags)
      marks = () if fast else pytest.mark.slow
      cases.append(pytest.param(name, tag, id=f'{name}-{tag}', marks=marks))
  return cases


@pytest.mark.parametrize(('name', 'tag'), _cases())
def test_the_teacher_is_the_golden_one(golden, name, tag):
  held = golden(name)
  _, _, concat, voting, _ = _VARIANTS[tag]
  shots, (answer, memory, maps) = held.answer(tag)
  _assert_logits(held, tag, answer.logits, shots > 0)
  votes = answer.coarse[0].shape[1] // len(shots)
  assert votes == (-(-memory.present.shape[1] // voting) if voting else 1)
  for way in np.flatnonzero(shots):
    # With voting, the golden's maps are those of the last chunk of shots.
    last = -(-int(shots[way]) // voting) - 1 if voting else 0
    j = way * votes + last
    ours = {f'coarse{3 - i}': x[:, j] for i, x in enumerate(answer.coarse)}
    ours |= {map_name: x[j][None] for map_name, x in maps.items()}
    if concat:
      skips = enumerate(memory.skips)
      ours |= {f'support_feat_{1 - i}': x[:, j] for i, x in skips}
    for map_name, x in ours.items():
      key = f'{tag}.c{way}.{map_name}'
      if key in held.numbers or map_name.startswith('coarse'):
        x = parity.channels_first(x)
        parity.assert_close(held.numbers, key, x, held.tolerance)


def _assert_logits(held, tag, logits, some):
  """Logits, where a way has a shot, and what they predict.

  The golden has -inf for a way without a shot, ours `ways.ABSENT`. Which vote
  or way gives a pixel its background is a choice between foregrounds: where
  two are equal but for rounding, either may win, and the background jumps.
  """
  numbers, name = held.numbers, f'{tag}.logits'
  theirs = numbers[name].ravel()
  stride = int(numbers.get(f'{name}@stride', 1))
  n = int(numbers.get(f'{name}@shape', numbers[name].shape)[1])
  ours = parity.channels_first(logits)
  assert np.isfinite(ours).all()
  assert (ours[:, 1:][:, ~some] <= ways.ABSENT / 2).all()
  pixels = ours[0, 0].size
  x = ours[:, :n].ravel()[::stride]
  channel = np.arange(n * pixels)[::stride] // pixels
  there = np.append(True, some[: n - 1])[channel]
  np.testing.assert_array_equal(np.isfinite(theirs), there)
  scale = max(1, np.abs(theirs[there]).max())
  off = np.abs(np.where(there, x, 0) - np.where(there, theirs, 0)) / scale
  front = off[channel > 0].max()
  assert front <= held.tolerance, f'{name}: error {front:.2e}'
  chosen = '.k10v4' in f'.{tag}' or n > 2
  jumps = (off[channel == 0] > held.tolerance).mean()
  assert jumps <= (2e-4 if chosen else 0), f'{name}: {jumps:.1e} of background'
  if f'{tag}.pred' in numbers:
    wrong = (ours.argmax(1) != numbers[f'{tag}.pred']).mean()
    assert wrong <= 2e-4, f'{name}: {wrong:.1e} of pixels'


@pytest.mark.parametrize('query', [1, 2])
@pytest.mark.parametrize('name', ['tinyswin_128', 'resnet50_128'])
def test_other_queries_are_the_golden_ones(golden, name, query):
  held = golden(name)
  shots, (answer, _, _) = held.answer('k1_F', query)
  _assert_logits(held, f'k1_F_query{query}', answer.logits, shots > 0)


@pytest.mark.parametrize('name', list(_HELD))
def test_no_golden_variant_is_left_out(shared, name):
  numbers = np.load(shared(f'goldens/dcama/head_{name}.npz'))
  tags = {n.split('.')[0] for n in numbers}
  tags -= {'k1_F_query1', 'k1_F_query2'}
  assert tags == set(_HELD[name])


# --- the second, independent set --------------------------------------------


def _appendix_weight(name, shape):
  """The fill rule of the second set of goldens (specs, Appendix A)."""
  seed = zlib.crc32(name.encode()) & 0xFFFFFFFF
  g = np.random.RandomState(seed).standard_normal(shape)
  leaf = name.rsplit('.', 1)[-1]
  if leaf == 'running_mean':
    g *= 0.05
  elif leaf == 'running_var':
    g = 1 + 0.2 * np.abs(g)
  elif leaf == 'relative_position_bias_table':
    g *= 0.1
  elif leaf == 'weight' and len(shape) == 1:
    g = (1 + 0.1 * g) * (0.3 if '.bn3.' in name else 1)
  elif leaf == 'weight':
    g *= np.sqrt(2 / np.prod(shape[1:]))
  elif leaf == 'bias':
    g *= 0.02
  else:
    g = np.zeros(shape)  # a buffer, which we compute
  return g.astype(np.float32)


def _appendix_mask(n):
  mask = np.zeros((384, 384), np.float32)
  mask[40 + 20 * n : 200 + 10 * n, 60 + 15 * n : 180 + 25 * n] = 1
  return mask


class _Appendix:
  """The second set of one architecture."""

  def __init__(self, shared, arch):
    path = shared('goldens/distillfss/golden_distillfss.json')
    self.numbers = json.loads(path.read_text())[arch]
    deep = arch == 'swin'
    self.tolerance = parity.DEEP_TOLERANCE if deep else parity.TOLERANCE
    weights = {
      name: _appendix_weight(name, x.shape)
      for name, x in parity.torch_weights(shared, arch, 'teacher.').items()
    }
    self.model = _load(arch, weights)
    self.pyramid = functools.cache(self._pyramid)

  def _pyramid(self, n):
    image = np.random.RandomState(1000 + n).standard_normal((1, 3, 384, 384))
    return _encode(self.model, image.astype(np.float32).transpose(0, 2, 3, 1))

  def answer(self, images, masks, voting=None):
    """`_segment` of image 0; masks [s, 384, 384, n]."""
    shots = [self.pyramid(n) for n in images]
    masks = jnp.asarray(masks)[None]
    return _segment(
      _with(self.model, voting=voting),
      self.pyramid(0),
      tuple(jnp.stack(x, 1) for x in zip(*shots, strict=True)),
      masks,
      masks.any((2, 3)),
      (384, 384),
    )

  def assert_close(self, name, ours, golden):
    """Statistics and eight values of an array [c, h, w] or [1, c, h, w]."""
    ours = np.asarray(ours, np.float64)
    assert list(ours.shape) == golden['shape'], name
    places = np.linspace(0, ours.size - 1, 8).astype(int)
    found = [ours.mean(), ours.std(), np.abs(ours).max(), *ours.ravel()[places]]
    expected = [golden['mean'], golden['std'], golden['absmax'], *golden['v']]
    off = np.abs(np.subtract(found, expected)).max() / max(1, golden['absmax'])
    assert off <= self.tolerance, f'{name}: error {off:.2e}'


@pytest.fixture(scope='module')
def appendix(shared):
  """`appendix('resnet50')` is that `_Appendix`; the last one is kept."""
  return functools.lru_cache(maxsize=1)(functools.partial(_Appendix, shared))


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['resnet50', 'swin'])
def test_one_shot_of_the_second_set(appendix, arch):
  held = appendix(arch)
  golden = held.numbers['one_shot']
  answer, _, maps = held.answer([1], _appendix_mask(1)[None, ..., None])
  for i in range(3):
    x = parity.channels_first(answer.coarse[2 - i][:, 0])
    held.assert_close(f'coarse {i}', x, golden['coarse'][i])
  for name, x in maps.items():
    held.assert_close(name, parity.channels_first(x), golden[name])
  logits = parity.channels_first(answer.logits)
  held.assert_close('logits', logits, golden['logits'])


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['resnet50', 'swin'])
def test_three_shots_of_the_second_set(appendix, arch):
  held = appendix(arch)
  golden = held.numbers['three_shot']
  masks = np.stack([_appendix_mask(n) for n in (1, 2, 3)])[..., None]
  answer, _, _ = held.answer([1, 2, 3], masks)
  for i in range(3):
    x = parity.channels_first(answer.coarse[2 - i][:, 0])
    held.assert_close(f'coarse {i}', x, golden['coarse'][i])
  logits = parity.channels_first(answer.logits)
  held.assert_close('logits', logits, golden['logits'])
  assert logits.argmax(1).mean() == pytest.approx(golden['fg_frac'], abs=1e-4)
  answer, _, _ = held.answer([1, 2, 3], masks, voting=2)
  logits = parity.channels_first(answer.logits)
  held.assert_close('voting', logits, held.numbers['voting2']['logits'])


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['resnet50', 'swin'])
def test_an_absent_way_of_the_second_set(appendix, arch):
  held = appendix(arch)
  golden = held.numbers['multiclass_absent2']
  nothing = np.zeros((384, 384), np.float32)
  masks = [
    [_appendix_mask(1), nothing, nothing],
    [_appendix_mask(2), nothing, _appendix_mask(0)],
  ]
  answer, _, _ = held.answer([1, 2], np.moveaxis(np.array(masks), 1, -1))
  # Scored at 256 pixels, so resized once more, by the other convention.
  logits = resize.bilinear(answer.logits, (256, 256), align_corners=False)
  logits = parity.channels_first(logits)[0]
  for i, expected in enumerate(golden['ch']):
    if expected == 'all -inf':
      assert i == 2
      assert (logits[i] <= ways.ABSENT / 2).all()
    else:
      held.assert_close(f'channel {i}', logits[i : i + 1], expected)
  counts = np.bincount(logits.argmax(0).ravel(), minlength=4)
  np.testing.assert_allclose(counts, golden['argmax_hist'], atol=20)


# --- what models promise ----------------------------------------------------


def _tiny(**fields):
  backbone = resnet.variants['resnet_tiny'](rngs=nnx.Rngs(0))
  return dcama.DCAMA(backbone, rngs=nnx.Rngs(0), **fields)


def _tiny_model(**fields):
  return parity.fill_randomly(nnx.eval_shape(lambda: _tiny(**fields)))


@pytest.fixture(scope='module')
def tiny():
  """A small DCAMA with random weights."""
  return _tiny_model()


@pytest.fixture(scope='module')
def tiny_concat():
  """A small DCAMA that reads the support's shallow maps."""
  return _tiny_model(concat_support=True)


def _images(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def _masks(*shape, seed=1):
  return np.random.default_rng(seed).uniform(size=shape) < 0.4


@functools.partial(jax.jit, static_argnames='train')
def _episodes(model, images, shots, masks, present, train=False, keys=None):
  """From pixels to a prediction."""
  memory = model.memorize(
    model.encode(shots),
    masks.astype(jnp.float32),
    present,
    train=train,
    keys=keys,
  )
  query = model.encode(images)
  return model.segment(query, memory, images.shape[1:3], train=train, keys=keys)


def _episode_case():
  """Two queries, three shots, two ways; shot 2 is absent, way 1 has one."""
  present = np.zeros((2, 3, 2), bool)
  present[:, :2, 0] = True
  present[:, 1, 1] = True
  return (
    _images(2, 64, 64, seed=2),
    _images(2, 3, 64, 64),
    _masks(2, 3, 64, 64, 2),
    present,
  )


def _assert_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def _assert_near(a, b, tolerance=1e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    np.testing.assert_allclose(
      x, y, atol=tolerance * max(1, np.abs(y[y > ways.ABSENT / 2]).max())
    )


@pytest.mark.parametrize(
  ('which', 'voting'), [('tiny', None), ('tiny_concat', 1)]
)
def test_an_absent_shot_has_no_influence(request, which, voting):
  model = _with(request.getfixturevalue(which), voting=voting)
  images, shots, masks, present = _episode_case()
  answer = _episodes(model, images, shots, masks, present)
  assert answer.logits.shape == (2, 64, 64, 3)
  assert np.isfinite(answer.logits).all()
  votes = 3 if voting else 1
  assert [x.shape for x in answer.coarse] == [
    (2, 2 * votes, 8, 8, 1),
    (2, 2 * votes, 4, 4, 1),
    (2, 2 * votes, 2, 2, 1),
  ]
  others, drawn = shots.copy(), masks.copy()
  others[:, 2], drawn[:, 2] = 255 - others[:, 2], ~drawn[:, 2]
  drawn[:, 0, ..., 1] = True  # shot 0 is there, but not for way 1
  _assert_equal(answer, _episodes(model, images, others, drawn, present))
  # And one that is there has influence, on its way alone.
  drawn = masks.copy()
  drawn[:, 0, ..., 0] = ~drawn[:, 0, ..., 0]
  moved = _episodes(model, images, shots, drawn, present)
  for x, y in zip(answer.coarse, moved.coarse, strict=True):
    assert (x[:, 0] != y[:, 0]).any()
    np.testing.assert_array_equal(x[:, votes:], y[:, votes:])


def test_shots_are_a_set(tiny):
  images, *support = _episode_case()

  def answer(order):
    found = _episodes(tiny, images, *(x[:, order] for x in support))
    # The background is that of the best way, which rounding may decide.
    return found.replace(logits=found.logits[..., 1:])

  wanted = answer([0, 1, 2])
  _assert_near(wanted, answer([2, 1, 0]))
  _assert_near(wanted, answer([0, 1, 2, 0, 1, 2]))


def test_padding_with_shots_and_ways_changes_nothing(tiny):
  images, shots, masks, present = _episode_case()
  padded = _episodes(tiny, images, shots, masks, present)
  bare = _episodes(
    tiny, images, shots[:, :2], masks[:, :2, ..., :1], present[:, :2, :1]
  )
  for x, y in zip(padded.coarse, bare.coarse, strict=True):
    np.testing.assert_allclose(x[:, :1], y, atol=1e-6)
  np.testing.assert_allclose(
    padded.logits[..., 1], bare.logits[..., 1], atol=1e-5
  )


def test_without_any_shot_all_is_background(tiny):
  images, shots, masks, present = _episode_case()
  answer = _episodes(tiny, images, shots, masks, present & False)
  assert (np.asarray(answer.logits).argmax(-1) == 0).all()
  for x in jax.tree.leaves(answer):
    assert np.isfinite(x).all()


@pytest.mark.parametrize(
  ('which', 'voting'), [('tiny', None), ('tiny', 2), ('tiny_concat', None)]
)
def test_images_are_memorized_as_their_pyramid_is(request, which, voting):
  model = _with(request.getfixturevalue(which), voting=voting)
  _, shots, masks, present = _episode_case()
  masks = masks.astype(jnp.float32)
  memory = jax.jit(lambda m, *x: m.memorize_images(*x))
  whole = jax.jit(lambda m, x, *y: m.memorize(m.encode(x), *y))
  found = memory(model, shots, masks, present)
  _assert_near(found, whole(model, shots, masks, present))


def test_memorizing_many_shots_takes_the_room_of_their_keys_alone(tiny):
  def planned(shots):
    shapes = [(1, shots, 64, 64, 3), (1, shots, 64, 64, 1), (1, shots, 1)]
    types = np.uint8, np.float32, bool
    inputs = map(jax.ShapeDtypeStruct, shapes, types)
    memorize = jax.jit(lambda m, *x: m.memorize_images(*x))
    return memorize.lower(tiny, *inputs).compile().memory_analysis()

  few, many = planned(4), planned(64)
  grown = many.temp_size_in_bytes - few.temp_size_in_bytes
  kept = many.output_size_in_bytes - few.output_size_in_bytes
  # Of tiny maps, masks are a third of that; pyramids would be all of it.
  assert grown < 0.5 * kept


@pytest.mark.slow
def test_jit_changes_nothing(tiny):
  images, shots, masks, present = _episode_case()
  query, support = _encode(tiny, images), _encode(tiny, shots)
  rest = jnp.asarray(masks, jnp.float32), jnp.asarray(present)
  compiled = _segment(tiny, query, support, *rest, (64, 64))[0]
  memory = tiny.memorize(support, *rest)
  _assert_near(tiny.segment(query, memory, (64, 64)), compiled)


def test_queries_share_one_memory(tiny_concat):
  model = tiny_concat
  _, shots, masks, present = _episode_case()
  images = _images(3, 64, 64, seed=4)
  one = shots[:1], masks[:1], present[:1]
  together = _episodes(model, images, *one)
  assert together.logits.shape == (3, 64, 64, 3)
  alone = [_episodes(model, images[i : i + 1], *one) for i in range(3)]
  _assert_near(together, jax.tree.map(lambda *x: jnp.concatenate(x), *alone))


def test_dropout_goes_by_episode(tiny):
  case = _episode_case()
  keys = jax.random.split(jax.random.key(0), 3)
  run = functools.partial(_episodes, tiny, *case, train=True)
  a, again, b = run(keys=keys[:2]), run(keys=keys[:2]), run(keys=keys[::2])
  _assert_equal(a, again)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(x[0], y[0])
  for x, y in zip(a.coarse, b.coarse, strict=True):
    assert (np.asarray(x[1] != y[1])).mean() > 0.5
  still = _episodes(tiny, *case)
  for x, y in zip(a.coarse, still.coarse, strict=True):
    assert (x != y).any()


@pytest.mark.slow
def test_an_absent_way_has_finite_gradients(tiny):
  images, shots, masks, present = _episode_case()
  present[..., 1] = False
  graph, state, rest = nnx.split(tiny, nnx.Param, ...)
  keys = jax.random.split(jax.random.key(0), 2)

  @jax.jit
  def grads(state):
    def loss(state):
      model = nnx.merge(graph, state, rest)
      answer = _episodes(
        model, images, shots, masks, present, train=True, keys=keys
      )
      return (jax.nn.log_softmax(answer.logits)[..., 0] ** 2).mean()

    return jax.grad(loss)(state)

  leaves = jax.tree.leaves(grads(state))
  assert all(np.isfinite(x).all() for x in leaves)
  assert sum(bool((x != 0).any()) for x in leaves) > len(leaves) // 2


def _plain_mix(model, pyramid, x, memory):
  """The stack of all maps at full size, and one convolution over it."""
  j = x.shape[0] // pyramid[0].shape[0]

  def by_way(q):
    return jnp.repeat(q[:, -1], j, 0)

  skips = [s.reshape(-1, *s.shape[2:]) for s in memory.skips] or [None, None]
  x = jnp.concatenate(
    [y for y in (x, by_way(pyramid[1]), skips[0]) if y is not None], -1
  )
  size = 2 * x.shape[1], 2 * x.shape[2]
  fine = [y for y in (by_way(pyramid[0]), skips[1]) if y is not None]
  x = [resize.bilinear(y, size) for y in (x, *fine)]
  if model.mix_size:
    x = [resize.bilinear(y, (model.mix_size,) * 2) for y in x]
  return nnx.relu(model.mixer1[0](jnp.concatenate(x, -1)))


@pytest.mark.parametrize(
  ('which', 'mix_size'),
  [('tiny', None), ('tiny', 20), ('tiny_concat', None), ('tiny_concat', 44)],
)
def test_any_grid_is_mixed_as_if_stacked(request, which, mix_size):
  model = _with(request.getfixturevalue(which), mix_size=mix_size)
  c4, c8 = model.backbone.channels[:2]
  # Twice 9 x 13 is what stride 4 has; twice 10 x 13 is not quite.
  for h, w in ((9, 13), (10, 13)):
    rng = np.random.default_rng(0)

    def maps(*shape, rng=rng):
      return jnp.asarray(rng.normal(size=shape), jnp.float32)

    pyramid = maps(1, 1, 18, 26, c4), maps(1, 1, h, w, c8)
    skips = ()
    if model.concat_support:
      fine = (18, 26) if h == 9 else (20, 26)
      skips = maps(1, 2, h, w, c8), maps(1, 2, *fine, c4)
    memory = dcama.Memory((), (), jnp.ones((1, 1, 2, 1), bool), skips)
    x = maps(2, h, w, dcama.WIDTH)
    ours = jax.jit(dcama.DCAMA._mix)(model, pyramid, x, memory)
    plain = jax.jit(_plain_mix)(model, pyramid, x, memory)
    assert ours.shape[1:3] == ((mix_size,) * 2 if mix_size else (2 * h, 2 * w))
    _assert_near(ours, plain)


def test_images_need_not_be_square(tiny):
  # 72x104 pixels are 18x26, 9x13, 5x7, 3x4: odd, and halved with a remainder.
  size = (72, 104)
  answer = _episodes(
    tiny,
    _images(1, *size, seed=2),
    _images(1, 2, *size),
    _masks(1, 2, *size, 2),
    np.ones((1, 2, 2), bool),
  )
  assert answer.logits.shape == (1, *size, 3)
  assert np.isfinite(answer.logits).all()
  assert [x.shape for x in answer.coarse] == [
    (1, 2, 9, 13, 1),
    (1, 2, 5, 7, 1),
    (1, 2, 3, 4, 1),
  ]


def test_the_size_of_the_mixers_is_a_choice():
  # 128 pixels have 32 at stride 4; the original brings them to 96.
  model = parity.fill_randomly(
    nnx.eval_shape(
      lambda: dcama.DCAMA(
        swin.variants['swin_tiny_test'](rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
      )
    )
  )
  case = (
    jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.uint8),
    jax.ShapeDtypeStruct((1, 2, 128, 128, 3), jnp.uint8),
    jax.ShapeDtypeStruct((1, 2, 128, 128, 1), jnp.float32),
    jax.ShapeDtypeStruct((1, 2, 1), jnp.bool_),
  )

  def decoded(model, images, shots, masks, present):
    query = model.encode(images)
    memory = model.memorize(model.encode(shots), masks, present)
    return model.decode(query, model.correlate(query, memory), memory)

  for mix_size, side in ((None, 128), (96, 384)):
    out = jax.eval_shape(decoded, _with(model, mix_size=mix_size), *case)
    assert out.shape == (1, 1, side, side, 2)


@pytest.mark.slow
def test_half_precision_stays_near(tiny):
  case = _episode_case()
  whole = _episodes(tiny, *case)
  half = _episodes(_with(tiny, dtype='bfloat16'), *case)
  assert half.logits.dtype == jnp.float32
  assert {x.dtype for x in half.coarse} == {jnp.dtype('bfloat16')}
  x, y = np.asarray(half.logits), np.asarray(whole.logits)
  assert np.abs(x - y).max() < 0.1 * np.abs(y[y > ways.ABSENT / 2]).max()


def test_normalised_images_are_taken_as_such(tiny):
  images = _images(2, 64, 64)
  floats = parity.normalise(images)
  _assert_near(_encode(tiny, floats), _encode(tiny, images))


def test_heads_that_do_not_divide_are_an_error():
  with pytest.raises(ValueError, match='7 heads do not divide 128 channels'):
    nnx.eval_shape(lambda: _tiny(heads=7))
