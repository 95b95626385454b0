"""Many configs, each timed in a process of its own, in one file."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from distillfss_jax import files

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A config and flags of `distillfss_jax.speed`. A process each, so that its peak
# memory is a case's own and nothing was compiled before.
_RESNET = 'configs/nucleus.py:backbone=resnet50'
CASES = (
  f'{_RESNET} --what=backbone',
  f'{_RESNET} --what=teacher --shots=1',
  f'{_RESNET} --what=teacher --shots=5',
  f'{_RESNET} --what=student --students=full',
  f'{_RESNET} --what=student --students=light',
  f'{_RESNET} --what=train',
  'configs/nucleus.py:recipe=ours',
  'configs/demo.py --what=student,train --students=light',
  'configs/bam.py:data=synthetic',
  'configs/hdmnet.py:data=synthetic',
  'configs/ifa.py:data=synthetic',
  'configs/attnfd.py --ways=20',
  'configs/kdas.py',
)


def run(
  cases: Sequence[str] = CASES, *, repeats: int = 3, out: str | os.PathLike
) -> dict[str, str]:
  """Times one case after the other, and writes all that is known after each.

  Args:
    cases: a config each, and flags of `distillfss_jax.speed` after it, apart by
      spaces.
    repeats: timed calls of a program.
    out: a .json file: {'suite': what `bench.run` returns of each case, and its
      'case'; 'failed': {case: reason}}.

  Returns:
    {case: reason} of those that failed; the others went on.

  Raises:
    ValueError: `out` is no .json file.
    OSError: it cannot be written; it is tried first.
  """
  out = pathlib.Path(out)
  if out.suffix != '.json':
    raise ValueError(f'--out: {out} must end in .json')
  done, failed, begin = [], {}, time.monotonic()

  def write():
    text = json.dumps({'suite': done, 'failed': failed}, indent=2)
    files.write_atomically(out, text + '\n')

  with files.writing(out.parent, '--out'):
    write()
  for i, case in enumerate(cases):
    left = ''
    if i:
      minutes = (time.monotonic() - begin) / i * (len(cases) - i) / 60
      left = f', about {minutes:.1f} min to go'
    _say(f'{i + 1}/{len(cases)} {case}{left}')
    try:
      done.append({'case': case, **_one(case, repeats)})
    except ValueError as error:
      failed[case] = str(error)
      _say(f'  failed: {error}')
    write()
  return failed


def _one(case, repeats):
  """The results of a case, from a process of its own."""
  config, *options = case.split()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'speed.json'
    command = [
      *(sys.executable, '-m', 'distillfss_jax.speed', '--config', config),
      *(*options, f'--repeats={repeats}', f'--out={path}'),
    ]
    finished = subprocess.run(
      command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if finished.returncode:
      said = finished.stderr.strip().splitlines() or ['nothing']
      raise ValueError(
        f'it ended with {finished.returncode}, and said last: {said[-1]}'
      )
    return files.read_json(path)


def _say(line):
  print(line, file=sys.stderr, flush=True)
