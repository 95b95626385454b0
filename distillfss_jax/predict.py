"""Masks of new images, by a run or by a file that was exported from one.

    python -m distillfss_jax.predict runs/nucleus my_images --out masks
    python -m distillfss_jax.predict nucleus.onnx 'scans/**/*.tif' --out masks

The same command goes on where it was stopped. docs/predict.md tells all of it.
"""

import concurrent.futures
import json
import pathlib
import sys
import time

from absl import app, flags, logging

from distillfss_jax import files
from distillfss_jax.data import download
from distillfss_jax.inference import command, outputs, sources, truth
from distillfss_jax.inference import inputs as inputs_lib
from distillfss_jax.workdir import locking, results, writer

_LARGE = 2  # times as large as what was seen: shrunk so far, details are lost


def run(source, given, out, *, wanted, **options):
  """Predicts images, and writes what is wanted; gives the scores, or None.

  Args:
    source: a run's folder, or an exported file.
    given: folders, patterns and files of images.
    out: the folder to write.
    wanted: an `outputs.Wanted`.
    **options: of the flags: scale, overwrite, skip_bad, batch_size, masks,
      meaning.

  Raises:
    ValueError, OSError: with one line that says what is wrong.
  """
  images = inputs_lib.find(given, out)
  outputs.refuse_foreign(out)
  masks = options['masks'] and pathlib.Path(options['masks']).expanduser()
  if masks and masks.resolve().is_relative_to(out.resolve()):
    raise ValueError(
      f'--masks {masks} lies in --out {out}: predictions would be scored '
      'against themselves; give the folder of the drawn masks'
    )
  images = _readable(images, options['skip_bad'])
  sizes = inputs_lib.sizes(images)
  segmenter = sources.load(source, batch_size=options['batch_size'])
  drawn = None
  if options['masks']:
    drawn = truth.read(
      options['masks'], images, segmenter.classes, options['meaning']
    )
  scale = options['scale']
  if scale is None:
    _hint(segmenter, sizes)
  else:
    segmenter.window(scale)  # says at once what is no scale
  with files.writing(out, '--out'):
    out.mkdir(parents=True, exist_ok=True)
    with locking.Lock(out, '--out'):
      folder = outputs.Folder(
        out, segmenter, wanted, scale=scale, overwrite=options['overwrite']
      )
      images = _predict(folder, images, options['skip_bad'])
      if not images:
        raise ValueError('none of the images can be decoded')
      folder.conclude(images)
      if drawn is None:
        return None
      scores = truth.scores(drawn, images, segmenter.classes, folder.mask)
      files.write_atomically(
        out / 'scores.json', json.dumps(scores, indent=2) + '\n'
      )
      return scores


def _readable(images, skip_bad):
  """The images whose files begin as images do."""
  if not skip_bad:
    return images
  kept = []
  for one in images:
    try:
      inputs_lib.sizes([one])
      kept.append(one)
    except download.BadFileError as error:
      print(f'left out {error}', file=sys.stderr)
  if not kept:
    raise ValueError(f'none of {len(images)} files is an image')
  return kept


def _hint(segmenter, sizes):
  """Says so where images are shrunk by far more than those of the support."""
  large = [
    name
    for name, size in sizes.items()
    if max(size) > _LARGE * max(segmenter.seen)
  ]
  if large:
    height, width = segmenter.seen
    print(
      f'{len(large)} images are more than {_LARGE} times as large as those of '
      f'the support, usually {width}x{height}, and are shrunk as a whole to '
      f'{segmenter.size}x{segmenter.size}: {download.few(large, 3)}. Where '
      'objects have as many pixels as in the support give --scale 1, where '
      'they are twice as large --scale 2',
      file=sys.stderr,
    )


def _predict(folder, images, skip_bad):
  """Writes what is missing; gives the images that have outputs."""
  begin = time.monotonic()
  todo = [one for one in images if folder.missing(one)]
  bad = set()
  progress = writer.Progress(len(todo), noun='image')
  for done, (one, pixels) in enumerate(_decoded(todo), 1):
    try:
      folder.write(one, pixels.result())
    except download.BadFileError as error:
      if not skip_bad:
        raise
      bad.add(one)
      print(f'left out {error}', file=sys.stderr)
    progress.update(done)
  seconds = time.monotonic() - begin
  kept = f', {len(images) - len(todo)} were there' * (len(todo) < len(images))
  print(f'{len(todo) - len(bad)} images in {seconds:.1f} s{kept}: {folder.out}')
  return [one for one in images if one not in bad]


def _decoded(images):
  """Yields each image and a future of its pixels, decoding the next beside."""

  def pixels(one):
    with download.guard(one.path, 'cannot be read'):
      return download.photo(one.path.read_bytes(), str(one.path))[0]

  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    before = None
    for one in images:
      following = one, thread.submit(pixels, one)
      if before:
        yield before
      before = following
    if before:
      yield before


def _table(scores):
  """Scores for the terminal."""
  each = [scores['iou']]
  each += [scores[f'{x}_per_class'] for x in ('f1', 'precision', 'recall')]
  rows = [(name, *(x[name] for x in each)) for name in scores['iou']]
  mean = 'mean', *(scores[x] for x in ('miou', 'f1', 'precision', 'recall'))
  return results.table(
    [*rows, mean], ('class', 'IoU', 'F1', 'precision', 'recall')
  )


def main(argv):
  """Predicts what the flags say; 1 and one line on a known error."""
  values = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) < 3 or not values.out:
      raise ValueError('give RUN|FILE IMAGES... --out DIR; see --help')
    command.place(values.device, argv[1])
    download.allow(values.max_megapixels)
    scores = run(
      argv[1],
      argv[2:],
      pathlib.Path(values.out).expanduser(),
      wanted=outputs.Wanted(
        overlay=values.overlay,
        confidence=values.confidence,
        probabilities=values.probabilities or '',
        outlines=tuple(dict.fromkeys(values.outlines)),
      ),
      scale=values.scale,
      overwrite=values.overwrite,
      skip_bad=values.skip_bad,
      batch_size=values.batch_size,
      masks=values.masks,
      meaning=values.meaning,
    )
  except (ValueError, OSError) as error:
    logging.debug('where it failed', exc_info=True)
    # A file's name may have several lines.
    print('error:', *str(error).splitlines(), file=sys.stderr)
    return locking.IN_USE if isinstance(error, locking.InUseError) else 1
  except KeyboardInterrupt:
    print('stopped; the same command goes on', file=sys.stderr)
    return 130
  if scores is not None:
    print(_table(scores))
  return 0


def define_flags():
  """Defines the flags; not on import, other programs have their own."""
  flags.DEFINE_string('out', None, 'The folder to write.')
  flags.DEFINE_bool('overlay', False, 'Also write images with their masks.')
  flags.DEFINE_bool('confidence', False, 'Also how sure it is, 0..255.')
  flags.DEFINE_enum(
    'probabilities', None, outputs.PROBABILITIES,
    'Also those of all labels: as 16-bit PNG, or npy [H, W, 1+n].',
  )  # fmt: skip
  flags.DEFINE_multi_enum(
    'outlines', [], outputs.OUTLINES, 'Also outlines; may be given repeatedly.'
  )
  flags.DEFINE_float(
    'scale', None,
    'Look through windows, for objects so many times as large as in the '
    'support; without, images are seen whole.',
  )  # fmt: skip
  flags.DEFINE_string('masks', None, 'Folder of drawn masks to score against.')
  flags.DEFINE_string('meaning', None, 'File that says what those mean.')
  flags.DEFINE_bool('overwrite', False, 'Do not keep outputs that are there.')
  flags.DEFINE_bool('skip_bad', False, 'Leave out images with bad files.')
  flags.DEFINE_integer(
    'batch_size', 0, 'Windows at once; 0 chooses.', lower_bound=0
  )
  flags.DEFINE_string('device', None, 'Where to compute: cpu, cuda, tpu.')
  flags.DEFINE_integer(
    'max_megapixels', download.MEGAPIXELS, 'The largest picture to be read.'
  )


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=command.parse)
