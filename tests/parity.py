"""Comparison with the numbers that the original programs left behind.

The reference material lies beside the clone; `shared` is the fixture of
conftest.py that finds it. Its arrays are channels first, ours channels last.
"""

import importlib.util
import json

import numpy as np

from distillfss_jax import params

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

TOLERANCE = 1e-4  # of features and logits, of max(1, max|b|)
DEEP_TOLERANCE = 5e-4  # of the deep maps of Swin


def normalise(images_u8):
  """uint8 [..., H, W, 3] -> float32 as the originals feed their models."""
  return (images_u8.astype(np.float32) / np.float32(255) - MEAN) / STD


def torch_weights(shared, arch, keep=''):
  """{torch name: array} of the golden models, drawn from the names.

  Args:
    shared: the fixture.
    arch: 'resnet50', 'swin' or 'tinyswin'.
    keep: prefix of the names to keep, which is cut off, such as
      'teacher.feature_extractor.'. Buffers that a model computes itself are
      zeros: whoever reads them finds out.
  """
  path = shared('goldens/dcama/fill.py')
  spec = importlib.util.spec_from_file_location('golden_fill', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  names = json.loads(
    shared(f'goldens/dcama/names_distilled_{arch}.json').read_text()
  )['state_dict']
  weights = {}
  for name, shape in names.items():
    if name.startswith(keep):
      value = module.fill(name, shape)
      value = np.zeros(shape, np.float32) if value is None else value
      weights[name[len(keep) :]] = value
  return weights


def channels_first(x):
  """[..., h, w, c] -> [..., c, h, w], as numpy."""
  return np.moveaxis(np.asarray(x), -1, -3)


def error(golden, name, ours):
  """Largest |ours - golden[name]|, over max(1, max |golden[name]|).

  `ours` has the golden's layout (channels first). A golden that holds only
  every n-th value is compared there, and by its statistics over all values.
  """
  ours = np.asarray(ours)
  theirs = golden[name]
  scale = max(1.0, float(np.abs(theirs).max()))
  if f'{name}@stride' not in golden:
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max()) / scale
  shape = tuple(golden[f'{name}@shape'])
  assert ours.shape == shape, (name, ours.shape, shape)
  stride = int(golden[f'{name}@stride'])
  sampled = float(np.abs(ours.ravel()[::stride] - theirs).max()) / scale
  x = ours.astype(np.float64)
  norm = np.linalg.norm(x)
  stats = np.array([x.mean(), x.std(), x.min(), x.max(), norm])
  stats_scale = np.array([scale] * 4 + [max(1.0, norm)])
  off = np.abs(stats - golden[f'{name}@stats']) / stats_scale
  return max(sampled, float(off.max()))


def assert_close(golden, name, ours, tolerance=TOLERANCE):
  """Fails with the name and the error if `ours` is not the golden's array."""
  found = error(golden, name, ours)
  assert found <= tolerance, f'{name}: error {found:.2e} > {tolerance:.0e}'


def load(module, weights, rules):
  """Fills an NNX module (abstract or not) from torch tensors, strictly."""
  arrays = params.from_torch(weights, rules, params.shapes(module))
  params.set_params(module, arrays)
  return module


def fill_randomly(module, seed=0):
  """Fills an NNX module (abstract or not) with numbers that keep its scale.

  Much faster than running the initialisers: nothing is compiled.
  """
  rng = np.random.default_rng(seed)
  arrays = {}
  for path, shape in params.shapes(module).items():
    g = rng.normal(size=shape)
    leaf = path.rsplit('/', 1)[-1]
    if len(shape) > 1 and leaf == 'kernel':
      g *= np.prod(shape[:-1]) ** -0.5
    elif leaf in ('scale', 'var'):
      g = 1 + 0.1 * np.abs(g)
    else:
      g *= 0.1
    arrays[path] = g.astype(np.float32)
  params.set_params(module, arrays)
  return module
