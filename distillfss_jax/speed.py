"""What a model and its training cost on this machine, and to compile.

    python -m distillfss_jax.speed --config configs/nucleus.py:backbone=resnet50
    python -m distillfss_jax.speed --config configs/bam.py --what train
    python -m distillfss_jax.speed --suite --out now.json
    python -m distillfss_jax.speed --compare before.json now.json
    python -m distillfss_jax.speed --config configs/nucleus.py --roofline
    python -m distillfss_jax.speed --config configs/nucleus.py --reading

Random images go through the config's model; no dataset is read. Compilation
and the first call stay apart from the timed calls, each of which waits for its
result. A support is memorized once, so a `teacher` row is a query alone, and
the `memorize` row before it is what its support cost. A DCAMA teacher and its
students are measured beside each other, all other systems as the config has
them.

--suite times a fixed list of configs, --compare says what changed between two
files, --roofline runs nothing: it tells what a GPU or TPU cannot beat, and
--reading times the config's data alone.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from distillfss_jax.measuring import (
  bench,
  compare,
  programs,
  reading,
  roofline,
  suite,
)

_CASES = ('what', 'shots', 'students', 'ways', 'batch_size')


def main(argv):
  """Does what the flags say; 1 and one line on a known error."""
  values = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  # What a start costs is to be measured, and XLA's memory to be known.
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    _check(values, argv[1:])
    if values.compare:
      print(compare.compare(*argv[1:]))
    elif values.suite:
      return int(bool(suite.run(repeats=values.repeats, out=values.out)))
    else:
      _one(values)
  except (ValueError, TypeError, OSError) as error:
    logging.debug('where it failed', exc_info=True)
    sys.exit(f'error: {error}')
  return 0


def _check(values, rest):
  """Raises a ValueError where flags do not belong together."""
  modes = ('suite', 'compare', 'roofline', 'reading')
  given = [f'--{name}' for name in modes if values[name].value]
  if len(given) > 1:
    raise ValueError(f'give one of {", ".join(given)}')
  if values.compare and len(rest) != 2:
    raise ValueError('--compare takes two files, such as A.json B.json')
  if rest and not values.compare:
    raise ValueError(f'unknown arguments {rest}; see --help')
  others = {
    '--suite': ('config', *_CASES),
    '--compare': ('config', *_CASES, 'out', 'repeats'),
    '--reading': (*_CASES, 'out', 'repeats'),
  }
  for mode in given:
    for name in others.get(mode, ()):
      if values[name].present:
        raise ValueError(f'{mode} takes no --{name}')
  if values.suite and not values.out:
    raise ValueError('--suite needs a file, such as --out now.json')
  if values.config is None and not (values.suite or values.compare):
    raise ValueError('--config is missing, such as --config configs/nucleus.py')


def _one(values):
  """One config, timed or told in advance."""
  options = {x: values[x].value for x in (*_CASES, 'out')}
  options['name'] = config_flags.get_config_filename(flags.FLAGS['config'])
  if values.reading:
    print(reading.table(reading.run(values.config)))
  elif values.roofline:
    print(roofline.table(roofline.run(values.config, **options)))
  else:
    found = bench.run(values.config, repeats=values.repeats, **options)
    print(bench.table(found))


def parse(argv):
  """Parses flags; whatever is wrong with them is one line on the terminal."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, TypeError, OSError) as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


def define_flags():
  """Defines the flags; not on import, other programs have their own."""
  config_flags.DEFINE_config_file('config', None, 'The model and training.')
  what = (
    f'Of {", ".join(programs.WHAT)}; of other systems '
    f'{", ".join(programs.OTHERS)}.'
  )
  flags.DEFINE_list('what', None, what)
  flags.DEFINE_list('shots', None, "Sizes of a few-shot method's support.")
  flags.DEFINE_list('students', 'full,light', 'Of full, light, attention.')
  flags.DEFINE_integer('ways', 1, 'Foreground classes.', lower_bound=1)
  flags.DEFINE_integer('batch_size', 1, 'Queries of a call.', lower_bound=1)
  flags.DEFINE_integer('repeats', 3, 'Timed calls of a case.', lower_bound=1)
  flags.DEFINE_string('out', None, 'speed.json for everything, or speed.md.')
  flags.DEFINE_bool('suite', False, 'Time the whole list of configs.')
  flags.DEFINE_bool('compare', False, 'Say what changed from file to file.')
  flags.DEFINE_bool('roofline', False, 'Run nothing: bounds of GPU and TPU.')
  flags.DEFINE_bool('reading', False, "Read the config's data, no more.")


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=parse)
