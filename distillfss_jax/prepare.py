"""Turns a dataset's raw download into ArrayRecord, once.

python -m distillfss_jax.prepare --dataset nucleus --raw stage1_train.zip
"""

import collections
import sys
import time

from absl import app, flags

from distillfss_jax.data import core


def run(dataset, raw, data_dir, **options):
  """Prepares one dataset and prints what came of it.

  Raises:
    ValueError, OSError: with one line that says what is wrong.
  """
  module = core.module(dataset)
  if not hasattr(module, 'prepare'):
    print(f'{dataset} is made while it is read: nothing needs preparing.')
    return
  start = time.perf_counter()
  manifest, new = module.prepare(raw, data_dir, **options)
  place = f'{data_dir}/{dataset}'
  splits = collections.Counter(row['split'] for row in manifest['records'])
  counts = ', '.join(f'{count} {name}' for name, count in splits.items())
  if not new:
    print(f'{dataset} is prepared already: {counts} images in {place}.')
    return
  for id_, reason in manifest['skipped'].items():
    print(f'left out {id_}: {reason}')
  seconds = time.perf_counter() - start
  print(f'{dataset}: {counts} images in {place}, {seconds:.0f} s.')


def main(argv):
  """Runs the flags; 1 and one line instead of a traceback on a known error."""
  values = flags.FLAGS
  try:
    if len(argv) > 1:
      raise ValueError(f'what is {argv[1:]}? Options are --dataset, --raw, ...')
    options = {'skip_bad': values.skip_bad}
    if values.split is not None:
      options['split'] = values.split
    run(values.dataset, values.raw, values.data_dir, **options)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


def define_flags():
  """Defines the flags; not on import, other programs have their own."""
  flags.DEFINE_string('dataset', None, 'Name of a dataset.', required=True)
  flags.DEFINE_string('raw', None, "Folder or zip of the owners' download.")
  flags.DEFINE_string('data_dir', 'data', 'Folder of all prepared datasets.')
  flags.DEFINE_string('split', None, 'Rule that divides train and test.')
  flags.DEFINE_bool('skip_bad', False, 'Leave out images with bad files.')


if __name__ == '__main__':
  define_flags()
  app.run(main)
