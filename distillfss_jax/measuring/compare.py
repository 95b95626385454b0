"""Two files of speed: what became faster or slower, machine aside.

A time is multiplied with the rate of a matrix product that was measured around
it, so that what is compared is work: how much product the machine would have
done meanwhile. Of two machines that is comparable as far as one is faster than
the other at everything.
"""

import math
import os
import statistics

from distillfss_jax import config as configs
from distillfss_jax import files
from distillfss_jax.workdir import results

LEAST = 0.03  # what is less is no difference, however steady the calls are
# Figures that hardly depend on the moment, and what is a change of them.
STEADY = {
  'gflop': 0.01, 'parameters': 0.0, 'working_mb': 0.01, 'process_mb': 0.1,
}  # fmt: skip


def compare(before: str | os.PathLike, now: str | os.PathLike) -> str:
  """Says what changed between two files, row by row.

  Of either file, noise is the range of the calls and that of the rates around
  them, as shares; all four are added in squares. A change counts beyond that,
  and beyond `LEAST`.

  Args:
    before: .json, as `speed --out` or `speed --suite` writes it.
    now: the other; of another kind, if one wants to.

  Returns:
    A table, and below it what only one file has, and what else is different.

  Raises:
    ValueError: a file is none of speed's.
    OSError: it cannot be read.
  """
  old, new = _read(before), _read(now)
  if not (old['suite'] or new['suite']):
    # Two files of one config each are compared whichever configs these are.
    for found in (old, new):
      for part in ('rows', 'settings'):
        found[part] = {('', *key[1:]): x for key, x in found[part].items()}
  both = [key for key in new['rows'] if key in old['rows']]
  lines = [_line(key, old['rows'][key], new['rows'][key]) for key in both]
  text = [results.table(lines, _HEADER) if lines else 'no row is in both files']
  for key in both:
    text += _steady(key, old['rows'][key], new['rows'][key])
  for path, own, other in ((before, old, new), (now, new, old)):
    for key in own['rows']:
      if key not in other['rows']:
        text.append(f'only in {path}: {_said(key)}')
    text += [f'failed in {path}: {case}' for case in own['failed']]
  for key, settings in new['settings'].items():
    if key in old['settings']:
      for said in configs.differences(old['settings'][key], settings):
        text.append(f'not the same {key[0]}: {said}'.replace(' :', ':'))
  return '\n'.join(text)


_HEADER = (
  'config', 'what', 'shots', 'ms before', 'ms now', 'work', 'noise', 'says'
)  # fmt: skip


def change(before: dict, now: dict) -> tuple[float, float]:
  """How much more work a row is than before, and the noise, both as shares.

  Args:
    before: a row of `bench.run`.
    now: the other.
  """
  works, noise = [], 0.0
  for row in (before, now):
    rate = statistics.mean(row['rates'])
    works.append(statistics.median(row['calls_ms']) * rate)
    for values in (row['calls_ms'], row['rates']):
      spread = (max(values) - min(values)) / statistics.median(values)
      noise += spread**2
  return works[1] / works[0] - 1, max(math.sqrt(noise), LEAST)


def _line(key, before, now):
  share, noise = change(before, now)
  # Twice as fast is as far as twice as slow.
  says = ''
  if abs(math.log1p(share)) > math.log1p(noise):
    says = 'slower' if share > 0 else 'faster'
  times = [statistics.median(row['calls_ms']) for row in (before, now)]
  return [*key, *times, f'{share:+.0%}', f'{noise:.0%}', says]


def _steady(key, before, now):
  """What else of a row is not as it was."""
  for name, tolerance in STEADY.items():
    was, value = before.get(name), now.get(name)
    if was is None or value is None:
      continue
    if abs(value - was) > tolerance * abs(was):
      yield f'{_said(key)}: {name} was {was:.6g}, is {value:.6g}'


def _said(key):
  name, what, shots = key
  said = f'{name} {what}'.strip()
  return f'{said}, {shots} shots' if shots else said


def _read(path):
  """A file's rows by (config, what, shots), and its settings by (config,)."""
  advice = 'measure again with python -m distillfss_jax.speed --out'
  whole = files.read_json(path, advice)
  found = {
    'suite': 'suite' in whole,
    'rows': {},
    'settings': {},
    'failed': list(whole.get('failed', ())),
  }
  try:
    for one in whole.get('suite', [whole]):
      name = one['name']
      found['settings'][name,] = {
        **configs.flat(one['config']),
        'ways': one['ways'],
        'batch_size': one['batch_size'],
      }
      for row in one['rows']:
        for values in (row['calls_ms'], row['rates']):
          if not (values and all(0 < x < math.inf for x in values)):
            raise ValueError('times and rates are above 0')
        key = name, row['what'], row['shots']
        found['rows'][key] = {**row, 'process_mb': one['process_mb']}
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f'{path} holds no times of distillfss_jax.speed ({error!r}): {advice}'
    ) from None
  return found
