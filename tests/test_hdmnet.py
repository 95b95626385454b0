"""Tests of HDMNet: the original's numbers, its matching, shots and dropout."""

import json

import episodes
import jax
import numpy as np
import parity
import pytest

from distillfss_jax.models import core, hdmnet
from distillfss_jax.ops import losses, resize

_FIXTURES = (
  ('hdmnet_r50_pascal_1shot_97', 'resnet50_deep', 1),
  ('hdmnet_r50_pascal_5shot_97', 'resnet50_deep', 5),
  ('hdmnet_vgg_pascal_1shot_97', 'vgg16', 1),
)


@pytest.mark.slow
@pytest.mark.parametrize('fixture', _FIXTURES, ids=lambda x: x[0])
def test_golden(shared, fixture):
  name, backbone, shots = fixture
  golden = np.load(shared(f'goldens/hdmnet_ifa_bam/{name}.npz'))
  model = episodes.golden_model(hdmnet.HDMNet, backbone, shots=shots)

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
    return final, meta, base, coarse, scene

  final, meta, base, coarse, scene = run(model, *episodes.golden_inputs(shots))
  for name, x in (('final', final), ('meta', meta), ('base', base)):
    parity.assert_close(golden, name, parity.channels_first(x))
  # That of the VGG holds the answers alone.
  if 'psi' in golden:
    for name, x in zip(('w_c', 'w_m', 'w_f'), coarse.matches, strict=True):
      parity.assert_close(golden, name, x[:, 0, ..., 0])
    similarity = parity.channels_first(coarse.similarity[:, 0])
    parity.assert_close(golden, 'sim', similarity)
    parity.assert_close(golden, 'psi', scene)


@pytest.mark.slow
def test_golden_training(shared):
  path = shared('goldens/hdmnet_ifa_bam/train_hdm_1shot_97.json')
  golden = json.loads(path.read_text())
  model = episodes.golden_model(
    hdmnet.HDMNet,
    'resnet50_deep',
    dropout=0.0,
    head_dropout=0.0,
    token_dropout=0.0,
  )
  inputs = episodes.golden_inputs(1)
  keys = jax.random.split(jax.random.key(0), 2)
  labels = episodes.blobs(7, 2)

  def loss(model):
    answers, coarse, _ = episodes.answer(
      model, *inputs, episodes.OWN, True, keys
    )
    final, meta, base = episodes.training_losses(model, answers)
    maps = [x[:, 0, ..., 0] for x in coarse.matches]
    distilled = losses.hierarchical_kl(maps, labels).mean()
    parts = (final + meta, distilled, base)
    return sum(parts), parts

  parts, norms = episodes.gradient_norms(model, loss, golden['grad_l2'])
  np.testing.assert_allclose(parts, golden['losses'], rtol=1e-5)
  for name, norm in golden['grad_l2'].items():
    assert norms[name] == pytest.approx(norm, rel=1e-3), name
