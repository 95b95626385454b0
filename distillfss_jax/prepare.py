"""Turns a dataset's raw download into ArrayRecord, once, and shows it.

python -m distillfss_jax.prepare --dataset nucleus --raw stage1_train.zip
python -m distillfss_jax.prepare --dataset nucleus --show
"""

import collections
import inspect
import pathlib
import sys
import time

import numpy as np
from absl import app, flags, logging
from PIL import Image

from distillfss_jax import datasets
from distillfss_jax.data import (
  augment,
  download,
  episodes,
  notes,
  pipeline,
  prepared,
)
from distillfss_jax.workdir import pictures

# What a dataset's `prepare` may take.
_OPTIONS = ('skip_bad', 'split', 'name', 'unknown', 'meaning', 'group_by')
_CLASSES = 60  # on the sheet of classes, a picture each
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
  else:
    for note in notes.notes(manifest):
      print(f'  note: {note}')
  print(f'look: {show_classes(manifest, data_dir)}, a picture of each class.')
  if str(data_dir) != 'data':
    print(f'main finds it with --config.data.args.data_dir={data_dir}')


def _check_takes(dataset, function, options):
  known = inspect.signature(function).parameters
  if strange := [f'--{name}' for name in options if name not in known]:
    raise ValueError(f'{dataset} does not take {", ".join(strange)}')


def show_classes(manifest, data_dir):
  """Writes a sheet of what each label is taken to mean; returns its path.

  Of each class the image that has most of it, cut to where it lies; of many
  classes the first.
  """
  place = pathlib.Path(data_dir).expanduser() / manifest['name']
  path = next(place.glob(f'*/{prepared.MANIFEST}'))
  names, palette = manifest['classes'], manifest['palette']
  source = prepared.Prepared(path.parent, manifest['records'], len(names))
  shares = source.areas / source.sizes.astype(np.int64).prod(1, keepdims=True)
  images, labels, captions = [], [], []
  for label, name in enumerate(names[:_CLASSES], 1):
    i = int(shares[:, label - 1].argmax())
    if not shares[i, label - 1]:
      continue
    record = source[i]
    box = _around(record['label'] == label)
    part = np.where(record['label'][box] == label, np.uint8(label), 0)
    size = (_SIZE, _SIZE)
    images.append(
      np.asarray(Image.fromarray(record['image'][box]).resize(size))
    )
    part = Image.fromarray(part).resize(size, Image.Resampling.NEAREST)
    labels.append(np.asarray(part))
    captions.append(f'{label} {name}\n{record["id"]}')
  path = place / 'classes.png'
  sheet = pictures.support_panel(
    images, labels, names=captions, palette=palette
  )
  pictures.save(path, sheet)
  return path


def _around(mask):
  """The square around what a mask has, with as much beside it: two slices."""
  box = []
  spans = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
  side = max([2 * (x[-1] - x[0] + 1) for x in spans] + [64])
  for found, most in zip(spans, mask.shape, strict=True):
    first = (found[0] + found[-1] + 1 - side) // 2
    first = int(np.clip(first, 0, max(0, most - side)))
    box.append(slice(first, first + side))
  return tuple(box)


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
    images = pipeline.load_images(source, chosen, _SIZE)
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


def _suggest(values):
  if values.dataset != 'folder':
    raise ValueError(
      f'--suggest is for --dataset folder, got {values.dataset!r}: the images '
      'of that one are annotated'
    )
  # JAX takes seconds to load, which the other ways of this command do without.
  from distillfss_jax import suggest

  suggest.run(values.raw, values.suggest, values.data_dir, values.name)


def main(argv):
  """Runs the flags; 1 and one line instead of a traceback on a known error."""
  values = flags.FLAGS
  logging.get_absl_handler().addFilter(_not_of_tfds)
  try:
    if len(argv) > 1:
      raise ValueError(f'what is {argv[1:]}? Options are --dataset, --raw, ...')
    options = {
      name: values[name].value for name in _OPTIONS if values[name].value
    }
    download.allow(values.max_megapixels)
    if values.suggest is not None:
      _suggest(values)
      return 0
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
  flags.DEFINE_string('meaning', None, 'File that says what masks mean.')
  flags.DEFINE_string(
    'group_by', None, 'Regular expression that finds the group of an image.'
  )
  flags.DEFINE_alias('group-by', 'group_by')
  flags.DEFINE_integer(
    'max_megapixels', download.MEGAPIXELS, 'The largest picture to be read.'
  )
  flags.DEFINE_integer(
    'suggest', None, 'Only say which so many images of a folder to annotate.'
  )
  flags.DEFINE_bool('show', False, 'Write a contact sheet of what is there.')
  flags.DEFINE_bool('skip_bad', False, 'Leave out images with bad files.')


if __name__ == '__main__':
  define_flags()
  app.run(main)
