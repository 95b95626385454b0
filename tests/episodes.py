"""Weights, images and masks of the goldens of BAM and HDMNet, by their recipe.

Every tensor is drawn from its PyTorch name; images and masks from a number.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
from flax import nnx

from distillfss_jax import backbones, params
from distillfss_jax.ops import losses, resize

SIZE, CLASSES = 97, 16
OWN = np.array([2, 9])  # the base classes of the goldens' two episodes


def weight(name, shape):
  """The tensor of a PyTorch name."""
  rng = np.random.RandomState(zlib.crc32(name.encode()))
  if name.endswith('running_mean'):
    x = 0.1 * rng.standard_normal(shape)
  elif name.endswith('running_var'):
    x = 0.5 + rng.random_sample(shape)
  elif name in ('gram_merge.weight', 'cls_merge.weight'):
    x = np.reshape([0.8, 0.3], shape)
  elif len(shape) == 1:
    x = rng.standard_normal(shape)
    x = 1 + 0.1 * x if name.endswith('weight') else 0.05 * x
  else:
    x = rng.standard_normal(shape) * np.sqrt(1.5 / np.prod(shape[1:]))
  return x.astype(np.float32)


def image(seed, *shape):
  """Normal noise, channels first, given channels last."""
  x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
  return np.moveaxis(x, -3, -1)


def blobs(seed, count):
  """Labels [count, SIZE, SIZE]: an ellipse of 1, and a corner of void."""
  rng = np.random.RandomState(seed)
  y, x = np.mgrid[:SIZE, :SIZE]
  found = np.zeros((count, SIZE, SIZE), np.int32)
  for label in found:
    cy, cx = rng.uniform(0.35, 0.65, 2) * SIZE
    ry, rx = rng.uniform(0.15, 0.3, 2) * SIZE
    label[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1] = 1
    label[:3, :5] = 255
  return found


def names(model):
  """{torch name: shape} of a model's parameters, by its first table."""
  table, *_ = model.torch_tables().values()
  empty = {
    path: np.broadcast_to(np.float32(0), shape)
    for path, shape in params.shapes(model).items()
  }
  return {k: x.shape for k, x in params.to_torch(empty, table).items()}


def build(kind, backbone, **fields):
  """A model without numbers."""

  def make():
    rngs = nnx.Rngs(0)
    encoder = backbones.build(backbone, image_size=SIZE, rngs=rngs)
    return kind(encoder, CLASSES, rngs=rngs, **fields)

  return nnx.eval_shape(make)


def golden_model(kind, backbone, **fields):
  """A model with the goldens' weights, which come under their names."""
  model = build(kind, backbone, **fields)
  weights = {name: weight(name, shape) for name, shape in names(model).items()}
  table, *_ = model.torch_tables().values()
  arrays = params.from_torch(weights, table, params.shapes(model))
  params.set_params(model, arrays)
  return model


def golden_inputs(shots):
  """Query [2, H, W, 3], support [2, shots, H, W, 3] and masks [..., 1]."""
  query = image(1, 2, 3, SIZE, SIZE)
  support = image(2, 2, shots, 3, SIZE, SIZE)
  masks = (blobs(3, 2 * shots) == 1).reshape(2, shots, SIZE, SIZE, 1)
  return query, support, masks.astype(np.float32)


def answer(model, query, support, masks, own=None, train=False, keys=None):
  """All that a model says of queries, each with its support."""
  mode = {'train': train, 'keys': keys}
  present = jnp.ones((*masks.shape[:2], masks.shape[-1]), bool)
  pyramid = model.encode(query)
  shots = model.encode_support(support, masks)
  memory = model.memorize(shots, masks, present, **mode)
  coarse = model.correlate(pyramid, memory, **mode)
  return model.answer(pyramid, coarse, own=own, **mode), coarse, memory


def training_losses(model, answers, size=(SIZE, SIZE)):
  """Cross-entropies of final, meta and base on the goldens' labels."""
  labels = blobs(7, 2)
  cells = np.random.RandomState(9).randint(0, CLASSES, (2, 7, 7))
  known = cells.repeat(14, 1).repeat(14, 2)[:, :SIZE, :SIZE]
  known = np.where(labels == 255, 255, known)
  found = []
  for logits, wanted in (
    (answers.final[:, 0], labels),
    (answers.meta[:, 0], labels),
    (answers.base, known),
  ):
    total, count = losses.cross_entropy(resize.bilinear(logits, size), wanted)
    found.append(total.sum() / count.sum())
  return found


def gradient_norms(model, loss, wanted):
  """L2 norms by torch name of the gradients of loss(model), and its parts."""
  table, *_ = model.torch_tables().values()
  everything = names(model)
  places = params.places(everything, table)
  moved = {places[name] for name in wanted}
  graph, state = nnx.split(model)
  held = params.flatten(state)
  trained = {path: held[path] for path in moved}

  @jax.jit
  def step(trained, state):
    def of(trained):
      return loss(nnx.merge(graph, params.replace(state, trained)))

    return jax.value_and_grad(of, has_aux=True)(trained)

  (_, parts), gradients = step(trained, state)
  norms = {
    name: float(jnp.linalg.norm(gradients[places[name]])) for name in wanted
  }
  return parts, norms


def tiny(kind, seed=0, **fields):
  """A small model with random numbers; deterministic."""
  return parity.fill_randomly(build(kind, 'resnet_tiny_deep', **fields), seed)


def scene_of(shots, ways=1, episodes=1, size=33, seed=0):
  """Random query [e, H, W, 3], support [e, s, H, W, 3] and masks [..., n]."""
  rng = np.random.default_rng(seed)
  query = rng.normal(size=(episodes, size, size, 3))
  support = rng.normal(size=(episodes, shots, size, size, 3))
  masks = np.zeros((episodes, shots, size, size, ways))
  for mask in masks.reshape(-1, size, size, ways):
    y, x = rng.integers(0, size // 2, 2)
    mask[y : y + size // 2, x : x + size // 2, rng.integers(ways)] = 1
  return tuple(x.astype(np.float32) for x in (query, support, masks))


@jax.jit
def segment(model, query, support, masks, present):
  """Logits [b, H, W, 1+n] of queries [b, ...], as a test asks for them."""
  memory = model.memorize(model.encode_support(support, masks), masks, present)
  return model.segment(model.encode(query), memory, query.shape[1:3]).logits
