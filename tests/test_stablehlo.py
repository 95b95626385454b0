"""Functions as StableHLO files, and what lowers for which platform."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import attnfd, kdas
from distillfss_jax import config
from distillfss_jax.data import transforms
from distillfss_jax.exporting import resizing, stablehlo
from distillfss_jax.measuring import programs, roofline
from distillfss_jax.ops import platform, resize

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'

_WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def _scores(images):
  x = images.astype(jnp.float32).mean((1, 2)) @ _WEIGHT
  return x, x.argmax(-1)


def test_one_file_for_all_platforms(tmp_path):
  path = tmp_path / 'x.stablehlo'
  inputs = {'images': ((stablehlo.BATCH, 8, 8, 3), np.uint8)}
  size = stablehlo.save(path, _scores, inputs, record={'classes': ['a']})
  assert size == path.stat().st_size
  program = stablehlo.Program(path)
  assert program.record == {'classes': ['a']}
  assert program.platforms == ('cpu', 'cuda', 'tpu')
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
  for batch in (1, 5):
    for ours, theirs in zip(
      program(images[:batch]), _scores(images[:batch]), strict=True
    ):
      np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def _logits(images):
  """Logits [b, h / 2, w / 2, 3] that change from pixel to pixel."""
  assert jnp.arange(2.0).dtype == np.float32, 'the model gets other numbers'
  x = images[:, ::2, ::2].astype(jnp.float32) / 255
  return x + jnp.roll(x, 1, 2) - x.mean((1, 2), keepdims=True)


@pytest.mark.parametrize('free_size', [True, False])
def test_segmenters(tmp_path, free_size):
  path = tmp_path / 'x.stablehlo'
  record = {'classes': ['a']}
  stablehlo.save_segmenter(
    path, _logits, 24, free_size=free_size, record=record
  )
  program = stablehlo.Program(path)
  assert program.record == {'size': None if free_size else 24} | record
  random = np.random.default_rng(0)
  other = (1, 31, 70) if free_size else (1, 24, 24)
  for shape in ((2, 24, 24), other):
    images = random.integers(0, 256, (*shape, 3), np.uint8)
    labels, shares = program(images)
    assert (labels.shape, labels.dtype) == (shape, np.uint8)
    small = np.stack([transforms.resize_image(x, 24) for x in images])
    wanted = resize.bilinear(_logits(small), shape[1:], align_corners=False)
    np.testing.assert_allclose(shares, jax.nn.softmax(wanted), atol=1e-5)
    assert np.mean(labels == wanted.argmax(-1)) > 0.999


@pytest.mark.parametrize('shape', [(1, 1), (24, 90), (61, 24), (7, 200)])
def test_images_are_resized_to_the_byte(shape):
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  columns = Image.fromarray(image).resize((24, shape[0]), Image.BILINEAR)
  wanted = columns.resize((24, 24), Image.BILINEAR)
  with jax.enable_x64(True):
    found = jax.jit(resizing.by_jax, static_argnums=1)(image[None], 24)[0]
  np.testing.assert_array_equal(found, wanted)


def test_files_that_are_not_ours(tmp_path):
  path = tmp_path / 'x.stablehlo'
  path.write_bytes(b'no program')
  with pytest.raises(ValueError, match=r'x\.stablehlo is no StableHLO file'):
    stablehlo.Program(path)


def test_what_lowers():
  shapes = {'x': jax.ShapeDtypeStruct((4, 4), np.float32)}
  step = jax.jit(lambda tree, key: tree['x'] @ jax.random.normal(key, (4, 2)))
  stablehlo.lowers_for(step, (shapes, jax.random.key(0)))


def test_what_does_not_lower():
  x = jax.ShapeDtypeStruct((4, 4), np.float32)
  stablehlo.lowers_for(jnp.linalg.eigvals, (x,), ['cpu'])
  with pytest.raises(ValueError, match=r'does not lower for tpu: .*eig'):
    stablehlo.lowers_for(jnp.linalg.eigvals, (x,), ['cpu', 'tpu'])


# What files of configs/ can be told that makes a program of another kind.
ARGUMENTS = {
  'nucleus': (
    'method=transfer', 'method=bam', 'method=hdmnet', 'method=ifa',
    'teacher=bam', 'student=light', 'student=attention', 'recipe=ours',
    'recipe=unet',
  ),
  'attnfd': tuple(f'distiller={name}' for name in attnfd.DISTILLERS),
  'kdas': tuple(f'distiller={name}' for name in kdas.DISTILLERS),
  'deeplab': ('attention=learned',),
  'ifa': ('stage=adapt',),
  'bam': ('shots=5',),
  'hdmnet': ('shots=5',),
}  # fmt: skip
# A kind each, for every run of the tests; all others are slow ones.
QUICK = ('bam', 'camvid', 'nucleus:recipe=unet')


def _kinds():
  """One config for each kind of program that configs/ can name."""
  texts = [
    ':'.join(filter(None, (path.stem, arg)))
    for path in sorted(CONFIGS.glob('[!_]*.py'))
    if path.stem != 'common'
    for arg in ('', *ARGUMENTS.get(path.stem, ()))
  ]
  found = {}
  for text in sorted(texts, key=lambda x: x not in QUICK):
    file, _, arg = text.partition(':')
    arg = ','.join(filter(None, (arg, 'smoke')))
    made = config.load(f'{CONFIGS}/{file}.py:{arg}')
    kind = (
      made.system, made.model.name, str(made.model.backbone),
      made.system == 'distillfss' and made.student,
      'distiller' in made and (made.distiller.name, made.teacher.name),
      'ifa' in made and made.ifa.rounds,
      'shots' in made.model.fields and made.model.fields.shots,
      made.model.fields.get('attention'),
    )  # fmt: skip
    marks = () if text in QUICK else pytest.mark.slow
    found.setdefault(kind, pytest.param(made, id=text, marks=marks))
  return list(found.values())


class _Lowered(roofline.Roofline):
  """Lowers each program, and keeps the names of those that it saw."""

  def look(self, case, call, inputs, counted, items, kept=None, before=()):
    stablehlo.lowers_for(call, inputs, ['cuda', 'tpu'])
    self.rows.append(programs.case_of(case)[0])
    return call.trace(*inputs).out_info, {}


@pytest.mark.parametrize('made', _kinds())
def test_all_of_every_config_lowers_for_gpu_and_tpu(made):
  """Nothing is compiled: it is what can be said without the devices.

  Programs are those that the devices get: on a CPU, convolutions and attention
  have forms of their own.
  """
  with platform.made_for('cuda'):
    lowered = _Lowered(made, 1, {}, ways=1, batch_size=2)
    lowered._predict([made.support.shots] if 'support' in made else ())
    lowered._train(made)
  *predicts, trains = lowered.rows
  assert predicts in (['predict'], ['memorize', 'predict'])
  assert trains.startswith(f'train {made.system}')
