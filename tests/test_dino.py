"""Tests of the DINOv3 backbone: a plain recomputation, and what it declares."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from distillfss_jax import backbones, params
from distillfss_jax.backbones import dino

_SIZE, _PATCH, _EMBED, _HEADS = 64, 16, 16, 2
_SMALL = {
  'image_size': _SIZE,
  'patch': _PATCH,
  'embed': _EMBED,
  'depths': (1, 2, 1, 1),
  'heads': _HEADS,
}


def _abstract(**fields):
  build = functools.partial(dino.Dino, **(_SMALL | fields))
  return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))


def _dino(**fields):
  """A small Dino with random weights, whose branches weigh as the rest."""
  backbone = parity.fill_randomly(_abstract(**fields))
  held = params.flatten(backbone)
  gammas = {p: 0.7 + 3 * a for p, a in held.items() if p.endswith('gamma')}
  params.set_params(backbone, gammas)
  return backbone


def _images(count, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, _SIZE, _SIZE, 3)).astype(np.float32)


@jax.jit
def _encode(module, images):
  return module(images)


@jax.jit
def _train(module, images, key):
  return module(images, train=True, key=key)


def _torch_weights(seed=0, *, embed=_EMBED, blocks=5, patch=_PATCH):
  """Random numbers by the names and in the layouts of the checkpoint."""
  c = embed
  shapes = {
    'cls_token': (1, 1, c),
    'storage_tokens': (1, 4, c),
    'mask_token': (1, c),
    'patch_embed.proj.weight': (c, 3, patch, patch),
    'patch_embed.proj.bias': (c,),
    'rope_embed.periods': (c // _HEADS // 4,),
    'norm.weight': (c,),
    'norm.bias': (c,),
  }
  for i in range(blocks):
    for name, shape in {
      'norm1.weight': (c,),
      'norm1.bias': (c,),
      'attn.qkv.weight': (3 * c, c),
      'attn.qkv.bias': (3 * c,),
      'attn.qkv.bias_mask': (3 * c,),
      'attn.proj.weight': (c, c),
      'attn.proj.bias': (c,),
      'ls1.gamma': (c,),
      'norm2.weight': (c,),
      'norm2.bias': (c,),
      'mlp.fc1.weight': (4 * c, c),
      'mlp.fc1.bias': (4 * c,),
      'mlp.fc2.weight': (c, 4 * c),
      'mlp.fc2.bias': (c,),
      'ls2.gamma': (c,),
    }.items():
      shapes[f'blocks.{i}.{name}'] = shape
  rng = np.random.default_rng(seed)
  weights = {}
  for name, shape in shapes.items():
    g = rng.normal(size=shape)
    if len(shape) > 1 and name.endswith('weight'):
      g *= 1.5 * np.prod(shape[1:]) ** -0.5
    elif name.endswith(('gamma', 'weight')):
      g = 0.7 + 0.3 * g
    weights[name] = g.astype(np.float32)
  return weights


def _plain_norm(token, weights, name):
  mean = token.mean()
  var = ((token - mean) ** 2).mean()
  normal = (token - mean) / math.sqrt(var + 1e-5)
  return normal * weights[f'{name}.weight'] + weights[f'{name}.bias']


def _plain_turned(vector, y, x, h, w, factor):
  """A head's vector turned pair by pair, by a complex number each."""
  d = len(vector)
  turned = np.empty(d)
  for axis, place in enumerate(((y + 0.5) / h, (x + 0.5) / w)):
    for i in range(d // 4):
      period = 100 ** (2 * i / (d / 2))
      angle = 2 * math.pi * factor * (2 * place - 1) / period
      low = axis * d // 4 + i
      high = low + d // 2
      z = complex(vector[low], vector[high]) * complex(
        math.cos(angle), math.sin(angle)
      )
      turned[low], turned[high] = z.real, z.imag
  return turned


def _plain_attention(tokens, weights, name, h, w, factor):
  t, c = tokens.shape
  d = c // _HEADS
  qkv = tokens @ weights[f'{name}.qkv.weight'].T
  bias = weights[f'{name}.qkv.bias']
  qkv[:, :c] += bias[:c]
  qkv[:, 2 * c :] += bias[2 * c :]
  out = np.zeros((t, c))
  for head in range(_HEADS):
    here = slice(head * d, head * d + d)
    q, k, v = (qkv[:, i * c : i * c + c][:, here] for i in range(3))
    q, k = q.copy(), k.copy()
    for p in range(h * w):
      for x in (q, k):
        x[5 + p] = _plain_turned(x[5 + p], p // w, p % w, h, w, factor)
    for i in range(t):
      share = np.array([math.exp(q[i] @ k[j] / math.sqrt(d)) for j in range(t)])
      out[i, here] = share @ v / share.sum()
  return out @ weights[f'{name}.proj.weight'].T + weights[f'{name}.proj.bias']


def _plain_forward(weights, image, blocks, factor=1.0):
  """All maps of an image [H, W, 3], [blocks, h, w, c], by loops."""
  weights = {name: x.astype(np.float64) for name, x in weights.items()}
  h, w = (n // _PATCH for n in image.shape[:2])
  tokens = [weights['cls_token'][0, 0], *weights['storage_tokens'][0]]
  for y in range(h):
    for x in range(w):
      patch = image[
        y * _PATCH : (y + 1) * _PATCH, x * _PATCH : (x + 1) * _PATCH
      ]
      token = [
        (kernel * patch.transpose(2, 0, 1)).sum()
        for kernel in weights['patch_embed.proj.weight']
      ]
      tokens.append(token + weights['patch_embed.proj.bias'])
  tokens = np.array(tokens)
  gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
  maps = []
  for i in range(blocks):
    at = f'blocks.{i}'
    y = np.array([_plain_norm(x, weights, f'{at}.norm1') for x in tokens])
    y = _plain_attention(y, weights, f'{at}.attn', h, w, factor)
    tokens = tokens + weights[f'{at}.ls1.gamma'] * y
    y = np.array([_plain_norm(x, weights, f'{at}.norm2') for x in tokens])
    y = y @ weights[f'{at}.mlp.fc1.weight'].T + weights[f'{at}.mlp.fc1.bias']
    y = gelu(y) @ weights[f'{at}.mlp.fc2.weight'].T
    y = y + weights[f'{at}.mlp.fc2.bias']
    tokens = tokens + weights[f'{at}.ls2.gamma'] * y
    patches = [_plain_norm(x, weights, 'norm') for x in tokens[5:]]
    maps.append(np.reshape(patches, (h, w, -1)))
  return np.array(maps)


def test_forward_is_the_plain_one():
  weights = _torch_weights()
  backbone = parity.load(_abstract(), weights, dino.TORCH_NAMES)
  images = _images(2)
  ours = np.concatenate(_encode(backbone, images), 1)
  for i in range(2):
    plain = _plain_forward(weights, images[i], 5)
    np.testing.assert_allclose(ours[i], plain, atol=1e-4)


def test_training_forward_is_the_plain_one():
  """Parity: in training the positions are scaled by a random factor."""
  weights = _torch_weights(1)
  backbone = parity.load(_abstract(), weights, dino.TORCH_NAMES)
  images, key = _images(1), jax.random.key(7)
  factor = float(backbone._factor(True, key))
  assert abs(math.log(factor)) > 0.1
  ours = np.concatenate(_train(backbone, images, key), 1)
  plain = _plain_forward(weights, images[0], 5, factor)
  np.testing.assert_allclose(ours[0], plain, atol=1e-4)


def test_table_claims_every_parameter_once():
  weights = _torch_weights()
  wanted = params.shapes(_abstract())
  loaded = params.from_torch(weights, dino.TORCH_NAMES, wanted)
  dropped = {'mask_token', 'rope_embed.periods'} | {
    f'blocks.{i}.attn.qkv.bias_mask' for i in range(5)
  }
  assert len(loaded) == len(weights.keys() - dropped)
  # As they are: the tokens keep their axes, the matrices are turned over.
  np.testing.assert_array_equal(
    loaded['storage_tokens'], weights['storage_tokens']
  )
  np.testing.assert_array_equal(
    loaded['blocks/4/attn/qkv/kernel'], weights['blocks.4.attn.qkv.weight'].T
  )
  for name in sorted(weights.keys() - dropped):
    rest = {k: v for k, v in weights.items() if k != name}
    with pytest.raises(ValueError, match='missing'):
      params.from_torch(rest, dino.TORCH_NAMES, wanted)
  with pytest.raises(ValueError, match=r'left over: torch tensor head\.weight'):
    params.from_torch(
      weights | {'head.weight': np.zeros(3)},
      dino.TORCH_NAMES,
      wanted,
    )


def test_table_fits_the_large_one():
  """Public size of ViT-L/16, counted by hand, and its names all the way."""
  backbone = nnx.eval_shape(
    lambda: dino.variants['dinov3_vitl16'](rngs=nnx.Rngs(0))
  )
  c = 1024
  block = 12 * c**2 + 9 * c + 4 * c + 2 * c  # matrices, biases, norms, gammas
  rest = 16 * 16 * 3 * c + c + 5 * c + 2 * c  # patches, tokens, norm
  assert params.count(backbone) == 24 * block + rest == 303_153_152
  assert params.shapes(backbone)['blocks/23/attn/qkv/kernel'] == (c, 3 * c)


@pytest.mark.parametrize('variant', dino.variants)
def test_declared_shapes_hold(variant):
  backbone = nnx.eval_shape(lambda: dino.variants[variant](rngs=nnx.Rngs(0)))
  size = backbone.image_size
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  pyramid = nnx.eval_shape(lambda m, x: m(x), backbone, images)
  assert len(pyramid) == 4
  for i, stage in enumerate(pyramid):
    side = size // backbone.strides[i]
    wanted = (2, backbone.depths[i], side, side, backbone.channels[i])
    assert stage.shape == wanted
    assert stage.dtype == jnp.float32


def test_the_large_one_is_that_of_the_paper():
  backbone = nnx.eval_shape(
    lambda: backbones.build('dinov3_vitl16', image_size=384, rngs=nnx.Rngs(0))
  )
  assert backbone.channels == (1024,) * 4
  assert backbone.depths == (3, 7, 7, 7)
  assert backbone.strides == (16,) * 4
  assert backbone.image_size == 384
  assert backbone.rescale == 2.0
  assert backbone.blocks[0].attn.heads == 16


def test_scores_depend_on_the_offset_alone():
  h, w, d = 4, 6, 16
  rng = np.random.default_rng(0)
  turns = dino.angles(h, w, d)
  cos, sin = jnp.cos(turns), jnp.sin(turns)
  q, k = (
    dino.rotate(jnp.tile(x, (1, h * w, 1, 1)), cos, sin)[0, :, 0]
    for x in rng.normal(size=(2, 1, 1, 1, d)).astype(np.float32)
  )
  scores = np.asarray(q @ k.T).reshape(h, w, h, w)
  offsets = {}
  for y, x, v, u in np.ndindex(scores.shape):
    offsets.setdefault((v - y, u - x), []).append(scores[y, x, v, u])
  assert len(offsets) == (2 * h - 1) * (2 * w - 1)
  for found in offsets.values():
    np.testing.assert_allclose(found, found[0], atol=1e-4)
  # ... and on that they do depend: no two are alike.
  values = np.sort([found[0] for found in offsets.values()])
  assert np.diff(values).min() > 1e-5


def test_each_axis_is_normalised_by_itself():
  turns = np.asarray(dino.angles(2, 4, 8))
  assert turns.shape == (8, 8)
  rows, columns = turns[:, 0].reshape(2, 4), turns[:, 2].reshape(2, 4)
  np.testing.assert_allclose(rows[:, 0], [-np.pi, np.pi], rtol=1e-6)
  np.testing.assert_allclose(
    columns[0], np.pi * np.array([-1.5, -0.5, 0.5, 1.5]), rtol=1e-6
  )
  # Periods 1 and 10 of the head's two quarters; the other half repeats them.
  np.testing.assert_allclose(turns[:, 1] * 10, turns[:, 0], rtol=1e-5)
  np.testing.assert_array_equal(turns[:, :4], turns[:, 4:])


def test_only_patches_are_turned():
  cos, sin = _dino()._rotation(4, 5, 1.0)
  assert cos.shape == sin.shape == (5 + 16, _EMBED // _HEADS)
  np.testing.assert_array_equal(cos[:5], np.ones_like(cos[:5]))
  np.testing.assert_array_equal(sin[:5], np.zeros_like(sin[:5]))
  assert (np.abs(sin[5:]) > 1e-3).all()


def test_keys_have_no_bias():
  """Parity: the part of the bias that the original masks is not read."""
  backbone, images = _dino(), _images(1)
  before = _encode(backbone, images)
  bias = np.asarray(backbone.blocks[0].attn.qkv.bias[...]).copy()
  bias[_EMBED : 2 * _EMBED] = np.nan
  params.set_params(backbone, {'blocks/0/attn/qkv/bias': bias})
  after = _encode(backbone, images)
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_training_rescales_by_the_key():
  backbone, images = _dino(), np.tile(_images(1), (2, 1, 1, 1))
  first, again, other = (
    _train(backbone, images, jax.random.key(seed)) for seed in (7, 7, 8)
  )
  jax.tree.map(np.testing.assert_array_equal, first, again)
  exact = _encode(backbone, images)
  for a, b, c in zip(first, other, exact, strict=True):
    assert np.abs(a - b).max() > 1e-3
    assert np.abs(a - c).max() > 1e-3
    # One factor for the forward: equal images stay equal.
    np.testing.assert_allclose(a[0], a[1], atol=1e-5)


def test_factors_are_log_uniform():
  backbone = _abstract(rescale=2.0)
  keys = jax.random.split(jax.random.key(0), 4000)
  factors = jax.vmap(lambda key: backbone._factor(True, key))(keys)
  logs = np.log2(factors)
  assert logs.min() >= -1
  assert logs.max() <= 1
  counts, _ = np.histogram(logs, 8, (-1, 1))
  assert (np.abs(counts - 500) < 100).all()


@pytest.mark.parametrize('rescale', [0, None])
def test_without_rescaling_training_is_evaluation(rescale):
  backbone, images = _dino(rescale=rescale), _images(1)
  train = jax.jit(lambda m, x: m(x, train=True))
  jax.tree.map(
    np.testing.assert_array_equal,
    _encode(backbone, images),
    train(backbone, images),
  )


def test_without_train_the_key_is_not_looked_at():
  backbone, images = _dino(), _images(1)
  keyed = jax.jit(lambda m, x, key: m(x, train=False, key=key))
  jax.tree.map(
    np.testing.assert_array_equal,
    _encode(backbone, images),
    keyed(backbone, images, jax.random.key(3)),
  )


def test_jit_changes_nothing_and_images_do_not_see_each_other():
  backbone, images = _dino(), _images(2)
  before = jax.tree.map(np.array, nnx.state(backbone))
  plain = backbone(images)
  alone = _encode(backbone, images[1:])
  for a, b, c in zip(_encode(backbone, images), plain, alone, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(c[0], b[1], atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(backbone))


def test_every_parameter_moves_the_pyramid():
  backbone, images = _dino(), _images(1)

  def loss(module):
    return sum(jnp.sin(3 * stage + 1).sum() for stage in module(images))

  gradients = params.flatten(nnx.jit(nnx.grad(loss))(backbone))
  assert gradients.keys() == params.flatten(backbone).keys()
  still = [path for path, g in gradients.items() if not np.abs(g).max() > 1e-6]
  assert not still
  bias = gradients['blocks/1/attn/qkv/bias']
  assert not bias[_EMBED : 2 * _EMBED].any()


def test_half_precision_stays_half():
  backbone, images = _dino(), _images(1)
  exact = _encode(backbone, images)
  half = _encode(backbone, images.astype(jnp.bfloat16))
  for a, b in zip(half, exact, strict=True):
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(
      a.astype(jnp.float32), b, atol=0.05 * float(jnp.abs(b).max())
    )


def test_initial_weights_are_drawn_from_the_seed():
  a, b, c = (
    params.flatten(dino.Dino(**_SMALL, rngs=nnx.Rngs(seed)))
    for seed in (0, 0, 1)
  )
  for path in ('class_token', 'storage_tokens', 'blocks/1/mlp/fc1/kernel'):
    np.testing.assert_array_equal(a[path], b[path])
    assert (a[path] != c[path]).all()
  assert float(a['blocks/1/mlp/fc1/kernel'].std()) == pytest.approx(0.02, 0.1)
  np.testing.assert_allclose(a['blocks/0/ls1/gamma'], 1e-5)


@pytest.mark.parametrize('size', [0, 8, 100])
def test_names_the_sizes_that_fit(size):
  with pytest.raises(ValueError, match=rf'{size} is no multiple .* 16 pixels'):
    _abstract(image_size=size)


def test_names_the_size_it_was_built_for():
  with pytest.raises(ValueError, match=r'takes \[b, 64, 64, 3\]'):
    _dino()(jnp.zeros((1, 32, 32, 3)))


def test_needs_a_key_to_rescale():
  with pytest.raises(ValueError, match='give key='):
    _dino()(jnp.zeros((1, _SIZE, _SIZE, 3)), train=True)


def test_refuses_heads_that_do_not_divide():
  with pytest.raises(ValueError, match='16 channels do not divide among 3'):
    _abstract(heads=3)


def test_refuses_a_factor_below_one():
  with pytest.raises(ValueError, match=r'not 0\.5'):
    _abstract(rescale=0.5)
