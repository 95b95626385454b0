"""Exported runs: files that answer as the run does, or are not kept."""

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image

import distillfss_jax
from distillfss_jax import export
from distillfss_jax.exporting import onnx
from distillfss_jax.inference import sources
from tests import segmenters

pytest.importorskip(
  'onnxruntime', reason='needs pip install -r requirements-export.txt'
)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A run of random weights and its data."""
  home = tmp_path_factory.mktemp('runs')
  return home / 'run', segmenters.make_run(home / 'run')


def _equal(first, second, image):
  return np.mean(first.predict(image) == second.predict(image))


def test_onnx(made, tmp_path):
  run, data = made
  out = tmp_path / 'new' / 'x.onnx'
  found = export.run(run, 'onnx', out)
  assert found['equal_labels'] >= export.EQUAL
  assert found['probabilities'] < 1e-3
  assert found['images'] == 3
  assert found['bytes'] == out.stat().st_size
  assert '100.0000% of the labels' in export.report(out, found)
  assert [x.name for x in out.parent.iterdir()] == ['x.onnx']
  record = onnx.Segmenter(out).record
  assert record['classes'] == list(data.classes)
  assert record['scores'] == {'test': {'miou': 0.5}}
  ours, theirs = distillfss_jax.load(run), distillfss_jax.load(out)
  assert theirs.classes == ours.classes
  assert theirs.palette == ours.palette
  assert (theirs.seen, theirs.digest) == (ours.seen, ours.digest)
  image = data.dataset.test[0]['image']
  for scale in (None, 0.6):
    labels = [x.predict(image, scale=scale) for x in (ours, theirs)]
    assert np.mean(labels[0] == labels[1]) >= export.EQUAL
  with pytest.raises(ValueError, match=r'x\.onnx exists: .*--overwrite'):
    export.run(run, 'onnx', out)


@pytest.mark.slow
def test_int8(made, tmp_path):
  run, data = made
  out = tmp_path / 'x.onnx'
  found = export.run(run, 'onnx', out, int8=True, fixed_size=True)
  assert set(found['scores']) == {'support', 'test'}
  for scores in found['scores'].values():
    assert abs(scores['float'] - scores['int8']) < 0.2
  assert 'int8' in export.report(out, found)
  program = onnx.Segmenter(out)
  labels, _ = program(data.support.images[:2])
  assert labels.shape == (2, 64, 64)
  with pytest.raises(ValueError, match='this file takes uint8'):
    program(np.zeros((1, 80, 80, 3), np.uint8))
  ours = distillfss_jax.load(run)
  assert _equal(ours, distillfss_jax.load(out), data.support.images[0]) > 0.8


@pytest.mark.slow
def test_stablehlo(made, tmp_path):
  run, data = made
  Image.fromarray(data.dataset.test[0]['image']).save(tmp_path / 'a.png')
  out = tmp_path / 'x.stablehlo'
  found = export.run(run, 'stablehlo', out, images=str(tmp_path / 'a.png'))
  assert found['images'] == 1
  assert found['equal_labels'] >= export.EQUAL
  file = sources.open_file(out)
  assert file.record['size'] is None
  assert file.platforms == ('cpu', 'cuda', 'tpu')
  ours, theirs = distillfss_jax.load(run), distillfss_jax.load(out)
  image = data.dataset.test[1]['image']
  assert _equal(ours, theirs, image) >= export.EQUAL


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('torch') is None, reason='needs pip install torch'
)
def test_torch(made, tmp_path):
  run, data = made
  out = tmp_path / 'x.pt2'
  found = export.run(run, 'torch', out)
  assert found['equal_labels'] >= export.EQUAL
  assert found['probabilities'] < 1e-3
  assert found['bytes'] == out.stat().st_size
  file = sources.open_file(out)
  assert file.record['scores'] == {'test': {'miou': 0.5}}
  ours, theirs = distillfss_jax.load(run), distillfss_jax.load(out)
  assert theirs.classes == ours.classes
  assert (theirs.seen, theirs.digest) == (ours.seen, ours.digest)
  assert _equal(ours, theirs, data.dataset.test[0]['image']) >= export.EQUAL


def test_a_file_that_answers_otherwise_is_not_kept(made, tmp_path, monkeypatch):
  out = tmp_path / 'x.onnx'
  compared = {'equal_labels': 0.5}
  monkeypatch.setattr(export, 'compare', lambda *_: compared)
  with pytest.raises(ValueError, match=r'gives 50\.0000% of the labels'):
    export.run(made[0], 'onnx', out)
  assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(made, tmp_path, monkeypatch):
  run, _ = made
  out = tmp_path / 'x'
  for to in ('stablehlo', 'torch'):
    with pytest.raises(ValueError, match='--int8 is of --to onnx'):
      export.run(run, to, out, int8=True)
  monkeypatch.setattr(
    sources.Run, 'data', property(lambda _: (_ for _ in ()).throw(OSError('x')))
  )
  with pytest.raises(ValueError, match=r'no images to compare on \(x\)'):
    export.run(run, 'stablehlo', out)
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  with pytest.raises(ValueError, match='needs the package onnxruntime: pip'):
    export.run(run, 'onnx', out)
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError, match='need the package torch: pip install'):
    export.run(run, 'torch', out)


@pytest.mark.slow
def test_a_teacher_with_its_memory(tmp_path, capsys):
  data = segmenters.make_run(tmp_path / 'run', 'transferfss', classes=1)
  found = export.run(tmp_path / 'run', 'onnx', tmp_path / 'x.onnx')
  assert found['equal_labels'] >= export.EQUAL
  assert 'the memory of the support goes into the file' in (
    capsys.readouterr().out
  )
  model = distillfss_jax.load(tmp_path / 'x.onnx')
  assert model.predict(data.dataset.test[0]['image']).shape == (80, 80)
