"""Tests of the backbones: goldens of the originals, and what they declare."""

import functools
import json
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from distillfss_jax import params
from distillfss_jax.backbones import base, resnet, swin, vgg

_PREFIX = 'teacher.feature_extractor.'

# golden file, architecture, image size, module, variant, tolerance
_GOLDENS = (
  ('resnet50_128', 'resnet50', 128, resnet, 'resnet50', parity.TOLERANCE),
  ('resnet50_384', 'resnet50', 384, resnet, 'resnet50', parity.TOLERANCE),
  ('tinyswin_128', 'tinyswin', 128, swin, 'swin_tiny_test', parity.TOLERANCE),
  ('swin_384', 'swin', 384, swin, 'swin_b', parity.DEEP_TOLERANCE),
)
_SMALL_SWIN = {
  'image_size': 64,
  'window': 2,
  'embed': 8,
  'depths': (2, 1, 1, 1),
  'heads': (1, 2, 2, 4),
}


@jax.jit
def _encode(module, images):
  return module(images)


def _abstract(module, variant):
  return nnx.eval_shape(lambda: module.variants[variant](rngs=nnx.Rngs(0)))


def _maps(pyramid):
  """The flat list of maps, shallow to deep, channels first."""
  return [
    parity.channels_first(stage[:, i])
    for stage in pyramid
    for i in range(stage.shape[1])
  ]


def _queries(shared, size, count):
  inputs = np.load(shared(f'goldens/dcama/inputs_{size}.npz'))
  return parity.normalise(inputs['query_u8'][:count])


def _resnet():
  """A small ResNet with random weights."""
  return parity.fill_randomly(_abstract(resnet, 'resnet_tiny'))


def _swin(**fields):
  """A small Swin with random weights."""
  fields = _SMALL_SWIN | fields
  build = functools.partial(swin.Swin, **fields)
  return parity.fill_randomly(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))


def _images(count, size, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, size, size, 3)).astype(np.float32)


@pytest.fixture(params=['resnet', 'swin'])
def small(request):
  """A small backbone with random weights, and two images for it."""
  return {'resnet': _resnet, 'swin': _swin}[request.param](), _images(2, 64)


@pytest.mark.parametrize('case', _GOLDENS, ids=lambda case: case[0])
def test_golden(shared, case):
  name, arch, size, module, variant, tolerance = case
  golden = np.load(shared(f'goldens/dcama/backbone_{name}.npz'))
  backbone = parity.load(
    _abstract(module, variant),
    parity.torch_weights(shared, arch, _PREFIX),
    module.TORCH_NAMES,
  )
  maps = _maps(_encode(backbone, _queries(shared, size, 1)))
  assert np.cumsum(backbone.depths).tolist() == golden['stack_ids'].tolist()
  assert len(maps) == golden['stack_ids'][-1]
  for i, x in enumerate(maps):
    parity.assert_close(golden, f'feat{i:02d}', x, tolerance)
    if f'feat{i:02d}_chmean' in golden:
      means = x[0].astype(np.float64).mean((1, 2))
      parity.assert_close(golden, f'feat{i:02d}_chmean', means, tolerance)


def test_golden_own_statistics(shared):
  """Parity: the frozen ResNet in training mode moves its statistics."""
  golden = np.load(shared('goldens/dcama/backbone_resnet50_128_bntrain.npz'))
  backbone = parity.load(
    _abstract(resnet, 'resnet50'),
    parity.torch_weights(shared, 'resnet50', _PREFIX),
    resnet.TORCH_NAMES,
  )
  encode = jax.jit(lambda m, x: m.encode_with_statistics(x, together=2))
  pyramid, statistics = encode(backbone, _queries(shared, 128, 2))
  for i, x in enumerate(_maps(pyramid)):
    parity.assert_close(golden, f'feat{i:02d}', x)
  moved = resnet.update_statistics(params.flatten(backbone), statistics, [0])
  for name in golden:
    match = re.fullmatch(r'after\.feature_extractor\.(.*running_.*)', name)
    if match:
      [path] = [
        found.expand(path)
        for regex, path, _ in resnet.TORCH_NAMES
        if (found := re.fullmatch(regex, match[1])) and path
      ]
      parity.assert_close(golden, name, moved[path], 1e-5)


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


@pytest.mark.parametrize(
  ('arch', 'module', 'variant', 'tolerance'),
  [
    ('resnet50', resnet, 'resnet50', parity.TOLERANCE),
    ('swin', swin, 'swin_b', parity.DEEP_TOLERANCE),
  ],
  ids=['resnet50', 'swin_b'],
)
def test_second_golden(shared, arch, module, variant, tolerance):
  path = shared('goldens/distillfss/golden_distillfss.json')
  golden = json.loads(path.read_text())[arch]['feats']
  names = json.loads(
    shared(f'goldens/dcama/names_distilled_{arch}.json').read_text()
  )['state_dict']
  weights = {
    name.removeprefix(_PREFIX): _appendix_weight(
      name.removeprefix('teacher.'), shape
    )
    for name, shape in names.items()
    if name.startswith(_PREFIX)
  }
  backbone = parity.load(
    _abstract(module, variant), weights, module.TORCH_NAMES
  )
  image = np.random.RandomState(1000).standard_normal((1, 3, 384, 384))
  image = image.astype(np.float32).transpose(0, 2, 3, 1)
  maps = _maps(_encode(backbone, image))
  assert len(maps) == len(golden)
  for i, (x, g) in enumerate(zip(maps, golden, strict=True)):
    assert list(x.shape) == g['shape'], i
    places = np.linspace(0, x.size - 1, 8).astype(int)
    x = x.astype(np.float64)
    ours = [x.mean(), x.std(), np.abs(x).max(), *x.ravel()[places]]
    theirs = [g['mean'], g['std'], g['absmax'], *g['v']]
    scale = max(1, g['absmax'])
    off = np.abs(np.subtract(ours, theirs)).max() / scale
    assert off <= tolerance, f'map {i}: {off:.2e}'


def test_swin_tables_are_the_golden_ones(shared):
  for name, size, window in (('tinyswin_128', 32, 4), ('swin_384', 96, 12)):
    golden = np.load(shared(f'goldens/dcama/backbone_{name}.npz'))
    np.testing.assert_array_equal(
      swin.relative_position_index(window), golden['relative_position_index']
    )
    regions = swin.shift_regions(size, window)
    strangers = regions[:, :, None] != regions[:, None, :]
    mask = np.where(strangers, swin.MASKED, 0).astype(np.float32)
    assert parity.error(golden, 'attn_mask_layer0_block1', mask) == 0


@pytest.mark.parametrize(
  ('module', 'variant', 'scalars'),
  [  # the originals' counts, without the classifier (and Swin's last norm)
    (resnet, 'resnet50', 25_557_032 - 2_049_000),
    (swin, 'swin_b', 87_903_584 - 1_025_000 - 2_048),
  ],
)
def test_parameter_count(module, variant, scalars):
  backbone = _abstract(module, variant)
  assert params.count(nnx.state(backbone, nnx.Param)) == scalars


@pytest.mark.parametrize(
  ('module', 'variant'),
  [(m, v) for m in (resnet, swin, vgg) for v in m.variants],
)
def test_declared_shapes_hold(module, variant):
  backbone = _abstract(module, variant)
  size = getattr(backbone, 'image_size', 96)
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  pyramid = nnx.eval_shape(lambda m, x: m(x), backbone, images)
  for i, stage in enumerate(pyramid):
    side = size // backbone.strides[i]
    wanted = (2, backbone.depths[i], side, side, backbone.channels[i])
    assert stage.shape == wanted
    assert stage.dtype == jnp.float32


def test_jit_changes_nothing(small):
  backbone, images = small
  before = jax.tree.map(np.array, nnx.state(backbone))
  plain = backbone(images)
  for a, b in zip(_encode(backbone, images), plain, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  # ... and neither does a forward change the module.
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(backbone))


def test_images_do_not_see_each_other(small):
  backbone, images = small
  both = _encode(backbone, images)
  alone = _encode(backbone, images[1:])
  for a, b in zip(both, alone, strict=True):
    np.testing.assert_allclose(a[1], b[0], atol=1e-5)


def test_without_train_the_key_is_not_looked_at(small):
  backbone, images = small
  keyed = jax.jit(lambda m, x, key: m(x, train=False, key=key))
  jax.tree.map(
    np.testing.assert_array_equal,
    _encode(backbone, images),
    keyed(backbone, images, jax.random.key(3)),
  )


def test_every_parameter_moves_the_pyramid(small):
  backbone, images = small

  def loss(module):
    return sum(jnp.sin(3 * stage + 1).sum() for stage in module(images))

  gradients = params.flatten(nnx.jit(nnx.grad(loss))(backbone))
  held = params.flatten(nnx.state(backbone, nnx.Param))
  assert gradients.keys() == held.keys()
  still = [path for path, g in gradients.items() if not np.abs(g).max() > 1e-6]
  assert not still


def test_half_precision_stays_half(small):
  backbone, images = small
  exact = _encode(backbone, images)
  half = _encode(backbone, images.astype(jnp.bfloat16))
  for a, b in zip(half, exact, strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      a.astype(jnp.float32), b, atol=0.05 * float(jnp.abs(b).max())
    )


@pytest.mark.parametrize(
  ('build', 'leaf', 'deviation'),
  [
    (
      functools.partial(resnet.Bottleneck, 8, 32, stride=1, project=True),
      'conv2/kernel',
      np.sqrt(2 / (3 * 3 * 32)),
    ),
    (functools.partial(swin.WindowAttention, 8, 4, 8), 'relative_bias', 0.02),
    (functools.partial(swin.WindowAttention, 8, 4, 8), 'qkv/kernel', 0.02),
    (
      functools.partial(swin.PatchEmbed, 4, 32),
      'proj/kernel',
      1 / np.sqrt(3 * 4 * 4 * 3),
    ),
  ],
)
def test_initial_weights_are_drawn_from_the_seed(build, leaf, deviation):
  a, b, c = (
    params.flatten(build(rngs=nnx.Rngs(seed)))[leaf] for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(a, b)
  assert (a != c).all()
  assert float(a.std()) == pytest.approx(deviation, rel=0.1)
  assert abs(float(a.mean())) < deviation / 5


@pytest.mark.parametrize(
  ('module', 'variant', 'size'),
  [(resnet, 'resnet_tiny', 64), (vgg, 'vgg_tiny', 32)],
)
def test_own_statistics_are_those_of_each_image(module, variant, size):
  backbone = parity.fill_randomly(_abstract(module, variant))
  images = _images(3, size)
  encode = jax.jit(lambda m, x: m.encode_with_statistics(x))
  pyramid, statistics = encode(backbone, images)
  for i in range(3):
    alone, own = encode(backbone, images[i : i + 1])
    for a, b in zip(pyramid, alone, strict=True):
      # Sums of another order, through all layers.
      np.testing.assert_allclose(a[i], b[0], atol=3e-4)
    for path, value in own.items():
      np.testing.assert_allclose(statistics[path][i], value[0], atol=1e-4)
  path, conv = (
    ('bn1', backbone.conv1)
    if module is resnet
    else ('layer0/norms/0', backbone.layer0.convs[0])
  )
  first = np.asarray(conv(jnp.asarray(images)))
  np.testing.assert_allclose(
    statistics[f'{path}/var'], first.var((1, 2), ddof=1), rtol=1e-4
  )
  running = params.flatten(nnx.state(backbone, nnx.BatchStat))
  assert statistics.keys() == running.keys()


def test_own_statistics_need_something_to_vary():
  encode = resnet.ResNet.encode_with_statistics
  with pytest.raises(ValueError, match='1x1; give larger images'):
    nnx.eval_shape(encode, _resnet(), jnp.zeros((1, 32, 32, 3)))
  with pytest.raises(ValueError, match='no multiple of together=2'):
    _resnet().encode_with_statistics(jnp.zeros((3, 64, 64, 3)), together=2)


def test_replayed_statistics_are_those_of_one_forward_after_the_other():
  rng = np.random.default_rng(0)
  running = {'bn1/mean': rng.normal(size=5), 'bn1/var': rng.uniform(size=5)}
  statistics = {path: rng.normal(size=(4, 5)) for path in running}
  visits = rng.integers(0, 4, 37)
  wanted = dict(running)
  for i in visits:
    for path in wanted:
      wanted[path] = 0.9 * wanted[path] + 0.1 * statistics[path][i]
  moved = jax.jit(resnet.update_statistics)(running, statistics, visits)
  for path in wanted:
    np.testing.assert_allclose(moved[path], wanted[path], rtol=1e-5, atol=1e-6)


def test_swin_without_drop_path_trains_as_it_evaluates():
  backbone, images = _swin(drop_path=0.0), _images(2, 64)
  train = jax.jit(lambda m, x: m(x, train=True))
  jax.tree.map(
    np.testing.assert_array_equal,
    _encode(backbone, images),
    train(backbone, images),
  )


def test_swin_drops_branches_of_single_images():
  backbone = _swin(drop_path=0.5, depths=(1, 1, 1, 1))
  images = np.tile(_images(1, 64), (64, 1, 1, 1))
  train = jax.jit(lambda m, x, key: m(x, train=True, key=key))
  first = train(backbone, images, jax.random.key(7))
  again = train(backbone, images, jax.random.key(7))
  other = train(backbone, images, jax.random.key(8))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert (first[3] != other[3]).any()
  # The first block's rate is 0, so equal images stay equal; the second's is
  # a sixth, so four outcomes appear: two branches, each dropped or not.
  exact = _encode(backbone, images)
  np.testing.assert_allclose(first[0], exact[0], atol=1e-5)
  outcomes = np.unique(np.round(first[1][:, 0, 0, 0, 0], 3))
  assert 2 <= len(outcomes) <= 4


def test_swin_drop_path_keeps_the_mean():
  x = jnp.ones((4000, 1, 1, 1))
  kept = swin._drop(jax.random.key(0), 3, 0.3, 1, x)
  np.testing.assert_allclose(np.unique(kept), [0, 1 / 0.7], rtol=1e-6)
  assert abs(float(kept.mean()) - 1) < 0.05


def test_swin_needs_a_key_to_drop():
  with pytest.raises(ValueError, match='give key='):
    _swin()(jnp.zeros((1, 64, 64, 3)), train=True)


def test_swin_window_as_large_as_the_stage_does_not_shift():
  backbone = _swin(window=4, depths=(2, 2, 2, 2))
  shifts = [[b.shift for b in stage.blocks] for stage in backbone.layers]
  windows = [stage.blocks[0].window for stage in backbone.layers]
  assert shifts == [[0, 2], [0, 2], [0, 0], [0, 0]]
  assert windows == [4, 4, 4, 2]


@pytest.mark.parametrize('size', [0, 16, 100, 96])
def test_swin_names_the_sizes_that_fit(size):
  with pytest.raises(ValueError, match=rf'image_size {size} .* 128 and its'):
    _swin(image_size=size, window=4)


def test_swin_names_the_size_it_was_built_for():
  with pytest.raises(ValueError, match=r'takes \[b, 64, 64, 3\]'):
    _swin()(jnp.zeros((1, 32, 32, 3)))


def test_swin_refuses_heads_that_do_not_divide():
  with pytest.raises(ValueError, match='8 channels do not divide among 3'):
    _swin(heads=(3, 2, 2, 4))


@pytest.mark.parametrize(
  ('fields', 'strides', 'dilations'),
  [
    ({}, (4, 8, 16, 32), ([1] * 2, [1] * 2, [1] * 2, [1] * 3)),
    # PSPNet's: every block of a stage, its first included.
    ({'output_stride': 8}, (4, 8, 8, 8), ([1] * 2, [1] * 2, [2] * 2, [4] * 3)),
    # torchvision's and SSP's: the first block stays behind.
    (
      {'output_stride': 8, 'lagging': True},
      (4, 8, 8, 8),
      ([1] * 2, [1] * 2, [1, 2], [2, 4, 4]),
    ),
    # DeepLab's, with a grid of dilations in the last stage.
    (
      {'output_stride': 16, 'multi_grid': (1, 2, 4)},
      (4, 8, 16, 16),
      ([1] * 2, [1] * 2, [1] * 2, [2, 4, 8]),
    ),
  ],
)
def test_dilation_takes_the_place_of_strides(fields, strides, dilations):
  backbone = nnx.eval_shape(
    lambda: resnet.ResNet(
      depths=(2, 2, 2, 3), width=4, rngs=nnx.Rngs(0), **fields
    )
  )
  assert backbone.strides == strides
  for i, wanted in enumerate(dilations):
    blocks = getattr(backbone, f'layer{i + 1}')
    assert [block.conv2.dilation for block in blocks] == wanted
  images = jax.ShapeDtypeStruct((1, 65, 65, 3), jnp.float32)
  pyramid = nnx.eval_shape(lambda m, x: m(x), backbone, images)
  for x, stride in zip(pyramid, strides, strict=True):
    assert x.shape[2:4] == (-(-65 // stride),) * 2


def test_basic_blocks_dilate_both_convolutions():
  backbone = _resnet_of(block='basic', output_stride=8, width=4)
  dilations = [
    (block.conv1.dilation, block.conv2.dilation)
    for i in (1, 2, 3, 4)
    for block in getattr(backbone, f'layer{i}')
  ]
  assert dilations == [(1, 1)] * 2 + [(2, 2), (4, 4)]
  # No projection where nothing changes; one where channels do.
  assert backbone.layer1[0].downsample is None
  assert backbone.layer3[0].downsample is not None


def _resnet_of(**fields):
  fields = {'depths': (1, 1, 1, 1)} | fields
  return nnx.eval_shape(lambda: resnet.ResNet(rngs=nnx.Rngs(0), **fields))


@pytest.mark.parametrize(
  ('field', 'value', 'said'),
  [
    ('block', 'wide', 'bottleneck, basic'),
    ('stem', '7x7', 'plain, deep'),
    ('output_stride', 4, '8, 16, 32'),
  ],
)
def test_resnets_that_there_are_not(field, value, said):
  with pytest.raises(ValueError, match=f'no {field} {value!r}.*{said}'):
    _resnet_of(**{field: value})


@pytest.mark.parametrize(
  ('module', 'variant'), [(resnet, 'resnet_tiny_deep'), (vgg, 'vgg_tiny')]
)
def test_stages_one_by_one(module, variant):
  backbone = parity.fill_randomly(_abstract(module, variant))
  images = jnp.asarray(_images(2, 32))
  pyramid = _encode(backbone, images)

  @jax.jit
  def train(backbone, images):
    valid = jnp.array([True, False])

    def normalise(norm, x):
      return norm.train(x, valid)

    x = backbone.stem(images, normalise)
    found = []
    for i in range(4):
      maps = backbone.stage(i, x, normalise)
      found.append(jnp.stack(maps, 1))
      x = backbone.activate(maps[-1])
    return found, nnx.state(backbone, nnx.BatchStat)

  found, moved = train(backbone, images)
  # The first image alone decides, as if the other were not there.
  alone, statistics = backbone.encode_with_statistics(images[:1])
  for a, b, c in zip(found, alone, pyramid, strict=True):
    assert a.shape == c.shape
    np.testing.assert_allclose(a[0], b[0], atol=1e-3)
  running = params.flatten(nnx.state(backbone, nnx.BatchStat))
  for path, x in params.flatten(moved).items():
    wanted = 0.9 * running[path] + 0.1 * statistics[path][0]
    np.testing.assert_allclose(x, wanted, atol=1e-4)


def test_vgg_pools_what_is_left_over():
  backbone = _abstract(vgg, 'vgg_tiny')
  images = jax.ShapeDtypeStruct((1, 97, 97, 3), jnp.float32)
  pyramid = nnx.eval_shape(lambda m, x: m(x), backbone, images)
  assert [x.shape[2] for x in pyramid] == [25, 13, 7, 7]
  x = jnp.arange(5.0).reshape(1, 1, 5, 1)
  pooled = base.max_pool(x, 2, 2, ((0, 1), (0, 1)))
  np.testing.assert_array_equal(pooled.ravel(), [1, 3, 4])


@pytest.mark.parametrize(
  ('module', 'variant'),
  [
    (resnet, 'resnet18'),
    (resnet, 'resnet_tiny'),
    (resnet, 'resnet_tiny_deep'),
    (vgg, 'vgg_tiny'),
    (swin, 'swin_tiny_test'),
  ],
)
def test_torch_names_go_both_ways(module, variant):
  backbone = _abstract(module, variant)
  rng = np.random.default_rng(0)
  arrays = {
    path: rng.normal(size=shape).astype(np.float32)
    for path, shape in params.shapes(backbone).items()
  }
  for table in backbone.torch_tables().values():
    tensors = params.to_torch(arrays, table)
    assert len(tensors) == len(arrays)
    tensors |= backbone.torch_unused(tensors)
    back = params.from_torch(tensors, table, params.shapes(backbone))
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


def test_names_of_deep_stems():
  backbone = _abstract(resnet, 'resnet_tiny_deep')
  arrays = {
    path: np.zeros(shape) for path, shape in params.shapes(backbone).items()
  }
  last = {
    who: {
      path: name
      for path in ('conv3/kernel', 'bn3/mean')
      for name in params.to_torch({path: arrays[path]}, table)
    }
    for who, table in backbone.torch_tables().items()
  }
  assert last == {
    'imagenet': {
      'conv3/kernel': 'conv3.weight',
      'bn3/mean': 'bn3.running_mean',
    },
    'pspnet': {
      'conv3/kernel': 'layer0.6.weight',
      'bn3/mean': 'layer0.7.running_mean',
    },
    'nested': {
      'conv3/kernel': 'conv1.6.weight',
      'bn3/mean': 'bn1.running_mean',
    },
    'ssp': {
      'conv3/kernel': 'layer0.0.6.weight',
      'bn3/mean': 'layer0.1.running_mean',
    },
  }


def _hashed(name, shape):
  """The filler of the goldens of dilated ResNets: a hash, variance 1."""
  i = np.arange(np.prod(shape), dtype=np.uint32)
  x = i * np.uint32(0x9E3779B1) + np.uint32(zlib.crc32(name.encode()))
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  x = ((x ^ (x >> 16)) / 2**32).reshape(shape)
  z = (2 * x - 1) * 3**0.5
  if name.endswith('running_mean'):
    z = 0.1 * z
  elif name.endswith('running_var'):
    z = 1 + 0.5 * x
  elif len(shape) > 1 and name != 'input':
    z = z / np.prod(shape[1:]) ** 0.5
  elif len(shape) == 1:
    z = 1 + 0.1 * z if name.endswith('weight') else 0.05 * z
  return z.astype(np.float32)


@pytest.mark.parametrize(
  ('variant', 'grid'),
  [
    ('resnet18', (1,)),
    pytest.param('resnet101', (1, 2, 4), marks=pytest.mark.slow),
  ],
)
def test_golden_dilated(shared, variant, grid):
  """Stages before their ReLU, at output stride 16."""
  path = shared('goldens/attnfd_kdas/golden_attnfd.json')
  golden = json.loads(path.read_text())[variant]['feats'][:4]
  build = functools.partial(
    resnet.variants[variant], output_stride=16, multi_grid=grid
  )
  backbone = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
  empty = {
    path: np.broadcast_to(np.float32(0), shape)
    for path, shape in params.shapes(backbone).items()
  }
  names = params.to_torch(empty, resnet.TORCH_NAMES)
  weights = {k: _hashed(f'backbone.{k}', x.shape) for k, x in names.items()}
  parity.load(backbone, weights, resnet.TORCH_NAMES)
  images = _hashed('input', (2, 3, 129, 161)).transpose(0, 2, 3, 1)
  for x, wanted in zip(_encode(backbone, images), golden, strict=True):
    x = parity.channels_first(x[:, -1])
    assert list(x.shape) == wanted['shape']
    places = list(map(int, wanted['vals']))
    ours = [x.mean(), x.std(), x.min(), *x.ravel()[places]]
    theirs = [wanted[k] for k in ('mean', 'std', 'min')]
    theirs += wanted['vals'].values()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(x).max())
