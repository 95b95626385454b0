"""Metric writers, read back with TensorBoard's own readers."""

import errno
import io
import json
import logging
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import (
  event_accumulator,
  plugin_event_accumulator,
)
from tensorboard.summary.writer import event_file_writer
from tensorboard.util import tensor_util

from distillfss_jax.workdir import writer

READERS = [
  event_accumulator.EventAccumulator,
  plugin_event_accumulator.EventAccumulator,  # what the server uses
]


def read(folder, reader=READERS[0]):
  accumulator = reader(str(folder))
  accumulator.Reload()
  return accumulator


def scalars(accumulator, tag):
  return [
    (e.step, float(tensor_util.make_ndarray(e.tensor_proto)))
    for e in accumulator.Tensors(tag)
  ]


def strings(accumulator, tag):
  (event,) = accumulator.Tensors(tag)
  return list(tensor_util.make_ndarray(event.tensor_proto).ravel())


def rows(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_everything_tensorboard_shows(tmp_path):
  w = writer.create(tmp_path)
  w.write_scalars(1, {'loss': 0.5, 'jax': jnp.ones(())})
  w.write_scalars(2, {'loss': np.float32(0.25), 'one': np.ones(1)})
  pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
  gray = np.linspace(-0.5, 1.5, 20, dtype=np.float32).reshape(4, 5, 1)
  w.write_images(3, {'colour': pixels, 'gray': gray})
  w.write_texts(3, {'note': 'some **words**'})
  w.write_histograms(3, {'weights': np.arange(100.0)}, {'weights': 4})
  config = ml_collections.ConfigDict({'lr': 0.1, 'model': {'depths': (1, 2)}})
  w.write_hparams(config)
  w.write_summaries(4, {'raw': np.eye(2)})
  w.flush()
  w.close()

  found = read(tmp_path / 'tensorboard')
  assert scalars(found, 'loss') == [(1, 0.5), (2, 0.25)]
  assert scalars(found, 'jax') == [(1, 1.0)]
  width, height, *pictures = strings(found, 'colour')
  assert (width, height) == (b'6', b'4')
  for png, expected in zip(pictures, pixels, strict=True):
    np.testing.assert_array_equal(Image.open(io.BytesIO(png)), expected)
  width, height, png = strings(found, 'gray')
  expected = np.rint(np.clip(gray[..., 0], 0, 1) * 255)
  np.testing.assert_array_equal(Image.open(io.BytesIO(png)), expected)
  assert b'some **words**' in strings(found, 'note')
  (event,) = found.Tensors('weights')
  counts = tensor_util.make_ndarray(event.tensor_proto)[:, 2]
  np.testing.assert_array_equal(counts, [25] * 4)
  metadata = found.SummaryMetadata('_hparams_/session_start_info')
  assert b'model/depths' in metadata.plugin_data.content
  assert found.SummaryMetadata('colour').plugin_data.plugin_name == 'images'
  assert found.Tensors('raw')[0].step == 4

  assert [(r['step'], r.get('loss')) for r in rows(tmp_path)] == [
    (1, 0.5),
    (2, 0.25),
  ]
  assert all(r['time'] > 1e9 for r in rows(tmp_path))


def test_numbers_that_are_not_finite(tmp_path):
  w = writer.create(tmp_path)
  w.write_scalars(1, {'loss': float('nan'), 'norm': jnp.inf, 'ok': 1})
  w.flush()
  w.close()
  (row,) = rows(tmp_path)
  assert (row['loss'], row['norm'], row['ok']) == (None, None, 1.0)
  found = read(tmp_path / 'tensorboard')
  assert np.isnan(scalars(found, 'loss')[0][1])


@pytest.mark.parametrize('reader', READERS)
def test_resumed_run_reports_no_step_twice(tmp_path, reader, monkeypatch):
  # Files of one second are ordered by a count in their names, 10 before 9.
  monkeypatch.setattr(
    event_file_writer, '_global_uid', event_file_writer.AtomicCounter(0)
  )
  w = writer.create(tmp_path)
  for step in range(1, 6):
    w.write_scalars(step, {'loss': 1.0})
    w.write_images(step, {'panel': np.zeros((2, 2, 3), np.uint8)})
  w.flush()
  w.close()
  w = writer.create(tmp_path, resume_step=3)
  for step in range(4, 8):
    w.write_scalars(step, {'loss': 2.0})
  w.flush()
  w.close()
  expected = [(s, 1.0 if s <= 3 else 2.0) for s in range(1, 8)]
  assert [(r['step'], r['loss']) for r in rows(tmp_path)] == expected
  found = read(tmp_path / 'tensorboard', reader)
  assert scalars(found, 'loss') == expected
  assert [e.step for e in found.Tensors('panel')] == [1, 2, 3]

  w = writer.create(tmp_path)  # None: nothing is dropped
  w.close()
  assert len(rows(tmp_path)) == 7
  w = writer.create(tmp_path, resume_step=-1)  # the run starts over
  w.write_scalars(0, {'loss': 3.0})
  w.flush()
  w.close()
  assert [(r['step'], r['loss']) for r in rows(tmp_path)] == [(0, 3.0)]
  found = read(tmp_path / 'tensorboard', reader)
  assert scalars(found, 'loss') == [(0, 3.0)]


def test_open_tensorboard_purges_dropped_events(tmp_path):
  w = writer.SummaryWriter(tmp_path)
  for step in range(1, 6):
    w.write_scalars(step, {'loss': 1.0})
  w.flush()
  watching = read(tmp_path, READERS[1])
  w.close()
  # TensorBoard takes files by name: second, then the process's count of them,
  # of which 10 comes before 9. A restarted run is a second later.
  time.sleep(1.1)
  w = writer.SummaryWriter(tmp_path, resume_step=3)
  w.write_scalars(4, {'loss': 2.0})
  w.close()
  watching.Reload()
  assert scalars(watching, 'loss') == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_files_of_a_killed_run(tmp_path):
  w = writer.create(tmp_path)
  for step in range(1, 6):
    w.write_scalars(step, {'loss': 1.0})
  w.flush()
  w.close()
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-9] + b'\xff')
  (events,) = (tmp_path / 'tensorboard').iterdir()
  events.write_bytes(events.read_bytes()[:-9])
  w = writer.create(tmp_path)
  assert [r['step'] for r in rows(tmp_path)] == [1, 2, 3, 4]
  w.close()
  w = writer.create(tmp_path, resume_step=3)
  w.close()
  assert [r['step'] for r in rows(tmp_path)] == [1, 2, 3]
  assert len(scalars(read(tmp_path / 'tensorboard'), 'loss')) == 3


def test_refusals(tmp_path):
  w = writer.SummaryWriter(tmp_path)
  with pytest.raises(ValueError, match=r"'x' has shape \(3, 3\)"):
    w.write_images(1, {'x': np.zeros((3, 3))})
  with pytest.raises(ValueError, match='int64'):
    w.write_images(1, {'x': np.zeros((3, 3, 3), np.int64)})
  w.close()
  w = writer.JsonlWriter(tmp_path / 'm.jsonl')
  with pytest.raises(ValueError, match='step'):
    w.write_scalars(1, {'step': 2})
  w = writer.create(tmp_path)
  with pytest.raises(ValueError, match='size 1'):
    w.write_scalars(1, {'pair': np.zeros(2)})
  w.close()


def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch):
  w = writer.create(tmp_path)
  w.write_scalars(1, {'loss': 1.0})

  def no_space(*args):
    raise OSError(errno.ENOSPC, 'as the system has it')

  monkeypatch.setattr(pathlib.Path, 'open', no_space)
  with pytest.raises(OSError, match='No space left') as error:
    w.write_scalars(2, {'loss': 1.0})
  assert f'cannot write into {tmp_path}' in str(error.value)
  assert 'give another --workdir' in str(error.value)
  w.close()


def test_audio_and_videos_are_skipped(tmp_path, caplog):
  w = writer.SummaryWriter(tmp_path)
  w.write_videos(1, {'film': np.zeros((1, 2, 4, 4, 3))})
  w.write_audios(1, {'song': np.zeros((1, 9, 1))}, sample_rate=8)
  w.close()
  assert 'film' in caplog.text
  assert 'song' in caplog.text


def test_other_processes_only_log(tmp_path, monkeypatch, capsys, caplog):
  caplog.set_level(logging.INFO, 'absl')
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  w = writer.create(tmp_path, resume_step=0)
  w.write_scalars(1, {'loss': 0.5})
  w.flush()
  w.close()
  assert not list(tmp_path.iterdir())
  assert 'loss=0.5' in caplog.text
  writer.Progress(1).update(1)
  assert capsys.readouterr().err == ''


def test_no_tensorflow_and_clu_whole(tmp_path):
  """In a fresh interpreter clu works behind our import, ours in its place."""
  code = (
    'import sys; from distillfss_jax.workdir import writer; '
    'from clu import metric_writers, periodic_actions; '
    "assert 'tensorflow' not in sys.modules; "
    'w = metric_writers.create_default_writer(sys.argv[1]); '
    'report = periodic_actions.ReportProgress(num_train_steps=9, writer=w); '
    'report(1); report(9); w.flush(); w.close()'
  )
  subprocess.run(
    [sys.executable, '-c', code, str(tmp_path)],
    cwd=pathlib.Path(__file__).parents[1],
    check=True,
  )
  assert [step for step, _ in scalars(read(tmp_path), 'steps_per_sec')] == [9]


def test_progress():
  now, lines = [100.0], []
  progress = writer.Progress(
    2500, every_seconds=5, clock=lambda: now[0], show=lines.append
  )
  assert progress.update(0) == 0.0
  assert lines.pop() == 'step    0/2500  - steps/s'
  now[0] += 2
  assert progress.update(20, {'loss': 0.5}) == 10.0
  assert not lines
  now[0] += 8
  assert progress.update(123, {'loss': jnp.float32(0.123456)}) == 12.3
  assert lines.pop() == ('step  123/2500  12.3 steps/s  ETA 3m13s  loss 0.1235')
  now[0] += 1
  assert progress.update(2500) == 2377.0
  assert lines.pop() == 'step 2500/2500  2377 steps/s  done in 11s'


def test_progress_of_a_resumed_run(capsys):
  now = [0.0]
  progress = writer.Progress(50, start=40, clock=lambda: now[0])
  now[0] += 20
  assert progress.update(45) == 0.25
  assert capsys.readouterr().err == 'step 45/50  0.25 steps/s  ETA 20s\n'


@pytest.mark.parametrize(
  ('seconds', 'said'),
  [(0, '0s'), (59.6, '1m00s'), (192, '3m12s'), (3720, '1h02m'),
   (183_600, '2d03h')],
)  # fmt: skip
def test_duration(seconds, said):
  assert writer._duration(seconds) == said
