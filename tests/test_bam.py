"""Tests of PSPNet and BAM: the originals' numbers, shots, ways and dropout."""

import json

import episodes
import jax
import numpy as np
import parity
import pytest

from distillfss_jax.models import bam, core
from distillfss_jax.ops import resize

_FIXTURES = (
  ('bam_r50_pascal_1shot_97', 'resnet50_deep', 1),
  ('bam_r50_pascal_5shot_97', 'resnet50_deep', 5),
  ('bam_vgg_pascal_1shot_97', 'vgg16', 1),
)


@pytest.mark.parametrize('fixture', _FIXTURES, ids=lambda x: x[0])
def test_golden(shared, fixture):
  name, backbone, shots = fixture
  golden = np.load(shared(f'goldens/hdmnet_ifa_bam/{name}.npz'))
  model = episodes.golden_model(bam.BAM, backbone, shots=shots)

  @jax.jit
  def run(model, *inputs):
    answers, coarse, memory = episodes.answer(model, *inputs)
    f2 = model.encode(inputs[0])[0][:, -1]
    scene = core.scene_difference(core.gram(f2)[:, None, None], memory.scenes)[
      ..., 0
    ]
    size = (episodes.SIZE,) * 2
    final, meta = (
      resize.bilinear(x[:, 0], size) for x in (answers.final, answers.meta)
    )
    base = resize.bilinear(answers.base, size)[:, ::4, ::4]
    weights = model.kshot(scene[:, None]) if shots > 1 else scene[:, None]
    return final, meta, base, coarse.prior[:, 0], scene, weights[:, 0]

  final, meta, base, prior, scene, weights = run(
    model, *episodes.golden_inputs(shots)
  )
  for name, x in (('final', final), ('meta', meta), ('base', base)):
    parity.assert_close(golden, name, parity.channels_first(x))
  # That of the VGG holds the answers alone.
  if 'prior' in golden:
    parity.assert_close(golden, 'prior', parity.channels_first(prior))
    parity.assert_close(golden, 'psi', scene)
  if shots > 1:
    parity.assert_close(golden, 'w', weights)


@pytest.mark.slow
def test_golden_training(shared):
  path = shared('goldens/hdmnet_ifa_bam/train_bam_1shot_97.json')
  golden = json.loads(path.read_text())
  model = episodes.golden_model(
    bam.BAM, 'resnet50_deep', dropout=0.0, head_dropout=0.0
  )
  inputs = episodes.golden_inputs(1)
  keys = jax.random.split(jax.random.key(0), 2)

  def loss(model):
    answers, *_ = episodes.answer(model, *inputs, episodes.OWN, True, keys)
    parts = episodes.training_losses(model, answers)
    return sum(parts), parts

  parts, norms = episodes.gradient_norms(model, loss, golden['grad_l2'])
  np.testing.assert_allclose(parts, golden['losses'], rtol=1e-5)
  for name, norm in golden['grad_l2'].items():
    assert norms[name] == pytest.approx(norm, rel=1e-3), name
