"""Whole runs through the command line: finished, refused, killed, damaged.

All runs lie in one folder, so that they share the compiled programs that main
keeps beside them.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util
from test_configs import assert_one_error, refused

from configs import demo
from distillfss_jax import train
from distillfss_jax.workdir import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 8
# A test in the middle gives the killed run time to be killed in.
SMOKE = (
  '--config=configs/demo.py:smoke',
  f'--config.steps={STEPS}',
  '--config.eval.every=4',
)
SCORES = ('miou', 'fb_iou', 'accuracy', 'f1', 'precision', 'recall')
LAST_LINE = 'tensorboard --logdir'


def start(workdir, *arguments, devices=1, more_flags=''):
  """Starts a run on CPU devices; its output is read with `finish`."""
  flags = f'--xla_force_host_platform_device_count={devices} {more_flags}'
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  command = [sys.executable, '-m', 'distillfss_jax.main', *arguments]
  return subprocess.Popen(
    [*command, '--workdir', str(workdir)],
    cwd=ROOT, env=environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def finish(process):
  out, err = process.communicate(timeout=900)
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(workdir, *arguments, **kwargs):
  return finish(start(workdir, *arguments, **kwargs))


def error(done):
  """The one line an error is told in."""
  assert done.returncode == 1, done
  assert 'Traceback' not in done.stderr + done.stdout, done.stderr
  assert LAST_LINE not in done.stdout
  lines = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  assert len(lines) == 1, done.stderr
  return lines[0]


def contents(folder):
  """All files of a folder with their bytes and times."""
  return {
    path.relative_to(folder).as_posix(): (
      path.stat().st_mtime_ns, path.read_bytes(),
    )
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }  # fmt: skip


def scores(workdir):
  """What a run found, without what depends on the clock."""
  results = json.loads((workdir / 'results.json').read_text())
  return {
    name: value
    for name, value in results.items()
    if name not in ('seconds', 'test_images_per_second')
  }


def rows(workdir):
  """The lines of metrics.jsonl, without what depends on the clock."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {
      name: value
      for name, value in json.loads(line).items()
      if name not in ('time', 'steps_per_second', 'data_wait')
    }
    for line in lines
  ]


def leaves(workdir, step=STEPS):
  """All arrays of a checkpoint, verified."""
  saver = checkpoint.Checkpointer(workdir / 'checkpoints')
  try:
    return saver._read(step)[1]
  finally:
    saver.close()


def steps_saved(workdir):
  found = (workdir / 'checkpoints').glob('*')
  return sorted(int(path.name) for path in found if path.name.isdecimal())


def log(workdir):
  return '\n'.join(
    path.read_text() for path in sorted(workdir.glob('log.*.INFO.*'))
  )


def assert_same(a, b, step=STEPS):
  """Two runs ended alike, bit for bit, and told every step once."""
  assert scores(a) == scores(b)
  assert rows(a) == rows(b)
  arrays, others = leaves(a, step), leaves(b, step)
  assert arrays.keys() == others.keys()
  for path, array in arrays.items():
    np.testing.assert_array_equal(array, others[path], err_msg=path)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  return tmp_path_factory.mktemp('runs')


@pytest.fixture(scope='module')
def finished(home):
  """The uninterrupted run that others are compared with."""
  done = run(home / 'finished', *SMOKE)
  assert done.returncode == 0, done.stderr
  return home / 'finished', done


def test_a_run_leaves_its_folder(finished):
  workdir, done = finished
  assert 'Traceback' not in done.stderr
  for word in ('student', 'teacher', 'untrained', 'brightness', 'mIoU'):
    assert word in done.stdout
  assert f'{workdir}/panels' in done.stdout
  assert f'{STEPS}/{STEPS}' in done.stderr  # progress
  config = json.loads((workdir / 'config.json').read_text())
  assert config['steps'] == STEPS
  assert config['model']['backbone']['name'] == 'resnet_tiny'
  ids = json.loads((workdir / 'ids.json').read_text())
  assert len(ids['support']) == config['support']['shots']
  assert len(ids['test']) == 4
  assert not set(ids['support']) & set(ids['test'])
  assert 'student/levels' in (workdir / 'log.INFO').read_text()
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  waits = [json.loads(line).get('data_wait') for line in lines]
  assert any(waits)
  assert all(0 <= x <= 1 for x in waits if x is not None)
  # The newest two checkpoints stay, and nothing half-written.
  assert steps_saved(workdir) == [STEPS - 2, STEPS]
  assert not list((workdir / 'checkpoints').glob('*tmp*'))
  assert not list(workdir.rglob('.results*'))


def test_a_page_for_a_browser(finished):
  workdir, _ = finished
  page = (workdir / 'report.html').read_text()
  assert '<pre>python -m distillfss_jax.main --config=configs/demo.py' in page
  assert not re.search('https?://', page)
  for text in (
    'Support', 'Curves', 'worst first', 'type="range"',
    'confidence of the student',
  ):  # fmt: skip
    assert text in page


def test_results(finished):
  workdir, _ = finished
  results = json.loads((workdir / 'results.json').read_text())
  assert results['name'] == 'demo'
  assert results['steps'] == STEPS
  assert results['test_images'] == 4
  assert results['test_images_per_second'] > 0
  assert set(results['seconds']) == {'start', 'adapt', 'test'}
  assert all(value > 0 for value in results['seconds'].values())
  assert {'python', 'jax', 'flax'} <= set(results['versions'])
  assert results['device']
  every = [
    *results['test'].values(),
    *results['test_native'].values(),
    *results['references']['untrained'].values(),
    results['references']['brightness'],
  ]
  assert set(results['test']) == {'student', 'teacher'}
  assert set(results['test_native']) == {'student', 'teacher'}
  assert len(every) == 7
  for of_one in every:
    assert set(SCORES) | {'iou'} <= set(of_one)
    assert all(0 <= of_one[name] <= 1 for name in SCORES)
    assert set(of_one['iou']) == {'nucleus'}
  text = (workdir / 'results.md').read_text()
  assert 'student' in text
  assert 'teacher' in text


def test_numbers_on_the_way(finished):
  workdir, _ = finished
  found = rows(workdir)
  losses = {
    row['step']: row['train/loss'] for row in found if 'train/loss' in row
  }
  assert list(losses) == [2, 4, 6, STEPS]
  assert losses[STEPS] < losses[2]
  told = [(row['step'], tuple(row)) for row in found]
  assert len(told) == len(set(told)), 'a step is told twice'
  tested = {row['step'] for row in found if 'test/student_miou' in row}
  assert tested == {4, STEPS}
  events = event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard'), {'tensors': 0, 'images': 0}
  )
  events.Reload()
  tags = events.Tags()['tensors']
  assert {'train/loss', 'test/student_miou', 'support'} <= set(tags)
  assert any(tag.startswith('test/test-0') for tag in tags)  # pictures
  same = {
    event.step: float(tensor_util.make_ndarray(event.tensor_proto))
    for event in events.Tensors('train/loss')
  }
  assert same == pytest.approx(losses)


def test_pictures(finished):
  workdir, _ = finished
  panels = workdir / 'panels'
  names = {path.name for path in panels.iterdir()}
  evenly = {'test_test-00000.png', 'test_test-00003.png'}
  assert {'support.png', 'curves.png'} | evenly <= names
  # As many of the lowest score, which is in images.csv for each.
  rows = (workdir / 'images.csv').read_text().splitlines()
  assert rows[0] == 'id,student,teacher'
  scores = {x.split(',')[0]: float(x.split(',')[1]) for x in rows[1:]}
  assert len(scores) == 4
  worst = sorted(scores, key=scores.get)[:2]
  assert {f'test_{x}.png' for x in worst} | evenly == {
    x for x in names if x.startswith('test_')
  }
  for name in names:
    with Image.open(panels / name) as picture:
      assert min(picture.size) >= 64
      assert np.asarray(picture).std() > 5, f'{name} is blank'


def test_a_finished_run_is_left_alone(finished):
  workdir, first = finished
  before = contents(workdir)
  again = run(workdir, *SMOKE)
  assert again.returncode == 0, again.stderr
  assert 'finished' in again.stdout
  assert contents(workdir) == before
  # The same scores, without a step.
  assert first.stdout in again.stdout
  assert 'step' not in again.stderr


def test_another_config_is_refused(finished):
  workdir, _ = finished
  before = contents(workdir)
  done = run(workdir, *SMOKE, '--config.optim.lr=0.5')
  said = error(done)
  assert not done.stdout
  assert str(workdir) in said
  assert 'optim.lr was 0.00' in said
  assert ', is 0.5' in said
  assert 'another --workdir' in said
  assert contents(workdir) == before


def test_killed_and_restarted(home, finished):
  workdir = home / 'killed'
  process = start(workdir, *SMOKE)
  while not steps_saved(workdir):
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  finish(process)
  assert process.returncode == -signal.SIGKILL
  assert not (workdir / 'results.json').exists()
  left = steps_saved(workdir)
  assert 0 < left[-1] < STEPS, 'it was killed too late to test anything'
  again = run(workdir, *SMOKE)
  assert again.returncode == 0, again.stderr
  assert f'goes on from step {left[-1]}' in log(workdir)
  assert_same(workdir, finished[0])
  assert not list((workdir / 'checkpoints').glob('*tmp*'))


@pytest.mark.slow
def test_damaged_checkpoint(home, finished):
  """Falls back to the one before, and says so."""
  workdir = home / 'damaged'
  shutil.copytree(finished[0], workdir)
  (workdir / 'results.json').unlink()
  data = workdir / 'checkpoints' / str(STEPS) / 'state'
  largest = max(data.rglob('*'), key=lambda path: path.stat().st_size)
  raw = bytearray(largest.read_bytes())
  middle = len(raw) // 2
  raw[middle : middle + 64] = bytes(x ^ 255 for x in raw[middle : middle + 64])
  largest.write_bytes(raw)
  again = run(workdir, *SMOKE)
  assert again.returncode == 0, again.stderr
  assert f'step {STEPS} ' in again.stderr
  assert 'is damaged' in again.stderr
  assert f'goes on from step {STEPS - 2}' in log(workdir)
  assert_same(workdir, finished[0])


@pytest.mark.slow
def test_killed_between_logs(home):
  """Where saving and logging do not fall together, the numbers still agree."""
  odd = (*SMOKE, '--config.log_every=4', '--config.checkpoint_every=3')
  whole, workdir = home / 'odd', home / 'odd-killed'
  assert run(whole, *odd).returncode == 0
  process = start(workdir, *odd)
  while not steps_saved(workdir):
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  finish(process)
  assert steps_saved(workdir)[-1] < STEPS
  assert run(workdir, *odd).returncode == 0
  assert_same(workdir, whole)


@pytest.mark.slow
def test_two_devices(home, finished):
  """Devices share the episodes; what they find together is the same."""
  workdir = home / 'two'
  done = run(workdir, *SMOKE, devices=2)
  assert done.returncode == 0, done.stderr
  for found, wanted in zip(rows(workdir), rows(finished[0]), strict=True):
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
  for size in ('test', 'test_native'):
    for role, wanted in scores(finished[0])[size].items():
      found = scores(workdir)[size][role]
      for name in SCORES:
        assert found[name] == pytest.approx(wanted[name], abs=1e-3)


def test_workdir_is_a_file(tmp_path):
  place = tmp_path / 'file'
  place.write_text('mine')
  said = error(run(place, *SMOKE))
  assert str(place) in said
  assert '--workdir' in said
  assert place.read_text() == 'mine'


def test_workdir_cannot_be_written(tmp_path):
  place = tmp_path / 'locked'
  place.mkdir()
  if os.geteuid():
    place.chmod(0o555)
  else:
    place = pathlib.Path('/proc')  # nothing stops root elsewhere
  said = error(run(place / 'run', *SMOKE))
  assert str(place / 'run') in said
  assert '--workdir' in said


def test_what_cannot_run_says_so_at_once(tmp_path):
  """One error that names what was given and what exists; no folder is left."""
  empty, workdir = tmp_path / 'empty', tmp_path / 'run'
  cases = [
    (
      (
        '--config=configs/nucleus.py:smoke',
        f'--config.data.args.data_dir={empty}',
      ),
      ('not prepared', str(empty), 'python -m distillfss_jax.prepare'),
    ),
    ((*SMOKE, '--config.support.shots=65'), ('65 shots', '64 training images')),
    ((*SMOKE, '--config.support.shots=0'), ('shots=0', 'must be 1 to')),
  ]
  for name, exists in (
    ('system', 'distillfss'),
    ('student', 'light'),
    ('episodes.kind', 'leave_one_out'),
    ('model.backbone.name', 'resnet_tiny'),
    ('data.name', 'synthetic'),
    ('support.rule', 'even'),
    ('backbone_mode', 'frozen'),
    ('loss.scale', 'reference'),
    ('model.dtype', 'float32'),
  ):
    cases.append(((*SMOKE, f'--config.{name}=nosuch'), ('nosuch', exists)))
  lines = [[*line, f'--workdir={workdir}'] for line, _ in cases]
  for (_, said), text in zip(cases, refused(lines, tmp_path), strict=True):
    assert_one_error(text, said)
  assert not workdir.exists()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
  """With what was good before it, and what to try; then, other data."""
  config = demo.get_config('smoke')
  config.optim.lr, config.optim.schedule = 1e30, 'constant'
  config.steps, config.checkpoint_every, config.log_every = 9, 1, 1
  config.eval.untrained = config.eval.brightness = False
  with pytest.raises(ValueError, match=r'loss is nan at step \d+.*optim\.lr'):
    train.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run/results.json').exists()
  kept = checkpoint.load(tmp_path / 'run/checkpoints')
  assert kept['step'] < 9
  told = [row['train/loss'] for row in rows(tmp_path / 'run')]
  assert np.isfinite(told).all()

  ids = tmp_path / 'run/ids.json'
  were = json.loads(ids.read_text())
  for key, value in (('test', ['another']), ('digest', 'other pixels')):
    ids.write_text(json.dumps({**were, key: value}))
    with pytest.raises(ValueError, match=f'on other data: {key} of ids.json'):
      train.run(config, tmp_path / 'run')
  # What an older version did not write down is not compared.
  del were['digest']
  ids.write_text(json.dumps(were))
  with pytest.raises(ValueError, match='loss is nan'):
    train.run(config, tmp_path / 'run')
