"""A config's data, read on this machine, beside decoding and nothing else."""

import io
import pathlib
import time

from PIL import Image

from distillfss_jax import config as configs
from distillfss_jax import parallel, tasks, train_step
from distillfss_jax.data import core, download, pipeline
from distillfss_jax.tasks.base import Place
from distillfss_jax.types import Table
from distillfss_jax.workdir import results

MOST = 256  # images of a row


def run(config) -> list[dict]:
  """Reads some of a config's images in each way that its run reads them.

  Args:
    config: see `configs/common.py`. Its data have to be there.

  Returns:
    A dict per way, the first three of the same images, each with its label:
      what: 'decoding', PNGs in memory become arrays, in one thread; 'records',
        they are found, checked and decoded, in one thread; 'test batches', with
        resizing, in the threads or processes of a run; 'training batches', of
        random images, with augmentation. An adaptation has no such row: its few
        images are on the device, and what is read are their indices.
      images: how many.
      ms: wall-clock, an image.
      per_second: images.
      of_decoding: how many times as fast as that.
      start_s: until the first are there. A training's first images are not
        counted besides: they were made while its processes started.

  Raises:
    ValueError, OSError: as a run of this config.
  """
  configs.check_values(config)
  data, kind = tasks.load(config)
  held_out = getattr(data, 'dataset', None)
  source = held_out.test if held_out else data.held_out.source
  source = core.Part(source, range(min(MOST, len(source))))
  records = (source[i] for i in range(len(source)))
  pngs = [(_png(record['image']), _png(record['label'])) for record in records]
  rows = [
    _timed('decoding', (_decoded(pair) for pair in pngs)),
    _timed('records', (source[i] for i in range(len(source)))),
    _timed('test batches', _tests(config, source), _images_of),
  ]
  if kind.gives is not Table:
    batches = _training(config, data, kind)
    rows.append(_timed('training batches', batches, _images_of, MOST))
  for row in rows:
    row['of_decoding'] = rows[0]['ms'] / row['ms']
  return rows


def table(rows: list[dict]) -> str:
  """The rows for people."""
  return results.table([row.values() for row in rows], [*rows[0]])


def _png(array):
  out = io.BytesIO()
  Image.fromarray(array).save(out, 'png')
  return out.getvalue()


def _decoded(pair):
  return [
    download.decode(png, 'a test image', mode, limited=False)
    for png, mode in zip(pair, ('RGB', 'L'), strict=True)
  ]


def _tests(config, source):
  return iter(
    pipeline.test_batches(
      source,
      image_size=config.data.image_size,
      batch_size=config.eval.batch_size,
      native=config.eval.native,
      workers=config.data.workers,
    )
  )


def _training(config, data, kind):
  """The batches of a run of at least `MOST` images, or of one step."""
  mesh = parallel.mesh()
  program = train_step.build(
    config, data.ways, mesh, steps=1, per_epoch=data.per_epoch
  )
  place = Place(program, mesh, pathlib.Path(), None)
  return iter(kind(config, data, place, 1).batches())


def _images_of(batch):
  """How many images a batch has; an episode has its shots besides."""
  shots = batch['support_images'].shape[1] if 'support_images' in batch else 0
  return int(batch['valid'].sum()) * (1 + shots)


def _timed(what, elements, count=lambda element: 1, skipped=0):
  """A row of one way, until it has given enough images.

  Args:
    what: its name.
    elements: iterator.
    count: element -> images of it.
    skipped: images that are not counted, of the first.
  """
  begin = time.perf_counter()
  start_s, images, before = None, 0, 0
  for element in elements:
    now = time.perf_counter()
    start_s = start_s or now - begin
    images += count(element)
    if before < skipped <= images:
      begin, before, images = now, skipped, 0
    elif before == skipped and images >= MOST:
      break
  seconds = time.perf_counter() - begin
  return {
    'what': what,
    'images': images,
    'ms': 1e3 * seconds / images,
    'per_second': images / seconds,
    'start_s': start_s,
  }
