"""The prepare command, as a user types it."""

import pathlib
import subprocess
import sys

from test_data_nucleus import pack, real_ids, tree

ROOT = pathlib.Path(__file__).resolve().parents[1]


def prepare(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'distillfss_jax.prepare', *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def error(result):
  """The one line an error is told in."""
  assert result.returncode == 1, result
  assert 'Traceback' not in result.stderr
  lines = [line for line in result.stderr.splitlines() if 'error: ' in line]
  assert len(lines) == 1, result.stderr
  return lines[0]


def test_prepare_and_again(tmp_path):
  files, _ = tree([*real_ids(2, 2), 'unlisted'])
  raw = pack(files, tmp_path / 'x.zip')
  command = ('--dataset', 'nucleus', '--raw', raw, '--data_dir', tmp_path / 'd')
  done = prepare(*command)
  assert done.returncode == 0, done.stderr
  assert (
    f'nucleus: 3 train, 2 test images in {tmp_path}/d/nucleus' in done.stdout
  )
  assert '5/5' in done.stderr  # the bar
  assert done.stderr.count('1 images that splits/nucleus.json') == 1
  again = prepare(*command)
  assert again.returncode == 0
  assert 'prepared already: 3 train, 2 test' in again.stdout


def test_errors_are_one_line(tmp_path):
  files, _ = tree(real_ids(2, 1))
  bad = f'{real_ids(2, 1)[0]}/masks/00abc.png'
  raw = pack({**files, bad: b'x'}, tmp_path / 'x.zip')
  place = ('--data_dir', tmp_path / 'd')
  said = error(prepare('--dataset', 'nucleus', '--raw', raw, *place))
  assert bad in said
  assert 'BBBC038' in error(prepare('--dataset', 'nucleus', *place))
  assert 'there are: nucleus' in error(prepare('--dataset', 'nukleus', *place))
  skipped = prepare('--dataset', 'nucleus', '--raw', raw, *place, '--skip_bad')
  assert skipped.returncode == 0
  assert f'left out {real_ids(2, 1)[0]}: ' in skipped.stdout


def test_synthetic_needs_nothing():
  done = prepare('--dataset', 'synthetic')
  assert done.returncode == 0
  assert 'nothing needs preparing' in done.stdout
