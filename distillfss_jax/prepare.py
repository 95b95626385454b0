"""Turns a dataset's raw download into ArrayRecord, once, and shows it.

python -m distillfss_jax.prepare --dataset nucleus --raw stage1_train.zip
python -m distillfss_jax.prepare --dataset nucleus --show
"""

import collections
import dataclasses
import inspect
import pathlib
import sys
import time

import numpy as np
from absl import app, flags, logging

from distillfss_jax import datasets
from distillfss_jax.data import augment, episodes, pipeline
from distillfss_jax.workdir import pictures

_SHOWN, _SIZE = 10, 192  # images of each split on a contact sheet; pixels


def run(dataset, raw, data_dir, **options):
  """Prepares one dataset and prints what came of it.

  Raises:
    ValueError, OSError: with one line that says what is wrong.
  """
  module = datasets.module(dataset)
  if not hasattr(module, 'prepare'):
    print(f'{dataset} is made while it is read: nothing needs preparing.')
    return
  _check_takes(dataset, module.prepare, options)
  start = time.perf_counter()
  manifest, new = module.prepare(raw, data_dir, **options)
  name = manifest['name']
  place = f'{data_dir}/{name}'
  splits = collections.Counter(row['split'] for row in manifest['records'])
  counts = ', '.join(f'{count} {split}' for split, count in splits.items())
  if not new:
    print(
      f'{name} is prepared already: {counts} images in {place}; remove that '
      'folder to do it again.'
    )
    return
  for id_, reason in manifest['skipped'].items():
    print(f'left out {id_}: {reason}')
  seconds = time.perf_counter() - start
  print(f'{name}: {counts} images in {place}, {seconds:.0f} s.')
  if hasattr(module, 'summary'):
    print(module.summary(manifest))


def _check_takes(dataset, function, options):
  known = inspect.signature(function).parameters
  if strange := [f'--{name}' for name in options if name not in known]:
    raise ValueError(f'{dataset} does not take {", ".join(strange)}')


def show(dataset, data_dir, **options):
  """Writes a contact sheet beside the records; returns its path.

  Images of both splits, evenly spaced, with their labels; the classes and how
  many images have them; a histogram of sizes.

  Raises:
    ValueError, OSError: with one line that says what is wrong.
  """
  load = datasets.module(dataset).load
  _check_takes(dataset, load, options)
  if 'data_dir' in inspect.signature(load).parameters:
    options['data_dir'] = data_dir
  made = load(**options)
  rows = [pictures.legend(made.classes, made.palette)]
  for split in ('train', 'test'):
    source = getattr(made, split)
    count = min(_SHOWN, len(source))
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    images = pipeline.load_support(
      dataclasses.replace(made, train=source), chosen, _SIZE
    )
    rows.append(
      pictures.support_panel(
        images.images,
        images.labels,
        names=[f'{split} {id_[:14]}' for id_ in images.ids],
        palette=made.palette,
      )
    )
  present = np.concatenate([made.train.present, made.test.present]).sum(0)
  sizes = np.concatenate([made.train.sizes, made.test.sizes])
  counts = dict(zip(made.classes, present.tolist(), strict=True))
  rows.append(pictures.histogram(sizes, counts))
  path = pathlib.Path(data_dir) / made.name / 'show.png'
  pictures.save(path, pictures.grid(rows))
  return path


def show_episodes(dataset, data_dir):
  """Writes a sheet of test episodes; returns its path, None without any.

  Of evenly spaced ones of the list, the query above its shot.
  """
  module = datasets.module(dataset)
  if not hasattr(module, 'pool'):
    return None
  known = inspect.signature(module.pool).parameters
  options = {'data_dir': data_dir} if 'data_dir' in known else {}
  pool = module.pool(**options)
  table = episodes.listed(pool, shots=1, rule='pair')
  table = table[np.linspace(0, len(table) - 1, _SHOWN).round().astype(int)]
  recipe = augment.get('none')
  batch = next(
    iter(
      pipeline.listed_episodes(
        pool, table, recipe, recipe, image_size=_SIZE, batch_size=len(table)
      )
    )
  )
  named = episodes.by_name(pool, table)
  palette = ((0, 0, 0), (230, 159, 0))
  rows = [
    pictures.support_panel(
      batch['images'],
      batch['labels'],
      names=[f'query: {x["class"]}'[:20] for x in named],
      palette=palette,
    ),
    pictures.support_panel(
      batch['support_images'][:, 0],
      batch['support_labels'][:, 0],
      names=[x['support'][0][-20:] for x in named],
      palette=palette,
    ),
  ]
  path = pathlib.Path(data_dir) / dataset / 'episodes.png'
  pictures.save(path, pictures.grid(rows))
  return path


def _episodes(dataset, data_dir):
  """What to say of the sheet of episodes; a small copy may have too few."""
  try:
    path = show_episodes(dataset, data_dir)
  except ValueError as error:
    return f'no episodes to show: {error}\n'
  return f'and at episodes: {path}\n' if path else ''


def _not_of_tfds(record):
  """What TFDS tells of its insides says nothing of the images."""
  return 'tensorflow_datasets' not in record.pathname or record.levelno > 20


def main(argv):
  """Runs the flags; 1 and one line instead of a traceback on a known error."""
  values = flags.FLAGS
  logging.get_absl_handler().addFilter(_not_of_tfds)
  try:
    if len(argv) > 1:
      raise ValueError(f'what is {argv[1:]}? Options are --dataset, --raw, ...')
    options = {
      name: values[name].value
      for name in ('skip_bad', 'split', 'name', 'unknown')
      if values[name].value
    }
    if values.raw or not values.show:
      run(values.dataset, values.raw, values.data_dir, **options)
    if values.show:
      named = {k: v for k, v in options.items() if k == 'name'}
      print(f'look: {show(values.dataset, values.data_dir, **named)}')
      print(_episodes(values.dataset, values.data_dir), end='')
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('stopped; the same command starts again', file=sys.stderr)
    return 130
  return 0


def define_flags():
  """Defines the flags; not on import, other programs have their own."""
  flags.DEFINE_string('dataset', None, 'Name of a dataset.', required=True)
  flags.DEFINE_string('raw', None, "Folder or zip of the owners' download.")
  flags.DEFINE_string('data_dir', 'data', 'Folder of all prepared datasets.')
  flags.DEFINE_string('split', None, 'Rule that divides train and test.')
  flags.DEFINE_string('name', None, "What to call a folder's dataset.")
  flags.DEFINE_string('unknown', None, "DeepGlobe's black: void | reference.")
  flags.DEFINE_bool('show', False, 'Write a contact sheet of what is there.')
  flags.DEFINE_bool('skip_bad', False, 'Leave out images with bad files.')


if __name__ == '__main__':
  define_flags()
  app.run(main)
