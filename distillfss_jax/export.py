"""A run's product as one file for other programs, compared before it is left.

    python -m distillfss_jax.export runs/nucleus --to onnx --out nucleus.onnx
    python -m distillfss_jax.export runs/nucleus --to torch --out nucleus.pt2
    python -m distillfss_jax.export runs/nucleus --to stablehlo --out x.shlo

docs/predict.md tells what the files take and give.
"""

import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags, logging

from distillfss_jax import files
from distillfss_jax.data import pipeline, transforms
from distillfss_jax.exporting import graph, onnx, stablehlo, torch
from distillfss_jax.inference import command, inputs, sources
from distillfss_jax.inference.segmenter import as_image
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.workdir import results

EQUAL = 0.9999  # share of labels that a file must have in common with the run
_COMPARED = 8  # images
_TIMED = 5  # calls


def run(
  source,
  to,
  out,
  *,
  int8=False,
  fixed_size=False,
  images=None,
  overwrite=False,
):
  """Writes a run's product, and returns what comparing it has found.

  Args:
    source: the run's folder.
    to: 'onnx', 'stablehlo' or 'torch'.
    out: the file.
    int8: store the weights of an ONNX file as 8-bit integers.
    fixed_size: let the file take images of the model's size alone.
    images: folder, pattern or file of what to compare on; None takes test
      images of the run's dataset.
    overwrite: replace a file that is there.

  Returns:
    What `compare` gives; with int8 also 'scores', {'support' and 'test':
    {'float' and 'int8': mIoU}}.

  Raises:
    ValueError, OSError: with one line that says what is wrong; `out` is then
      what it was.
  """
  if out.exists() and not overwrite:
    raise ValueError(f'{out} exists: give another --out, or --overwrite')
  if int8 and to != 'onnx':
    raise ValueError('--int8 is of --to onnx: the other files hold floats')
  if to == 'onnx':
    for package in ('onnx', 'onnxruntime'):
      graph.needs(package)
  if to == 'torch':
    torch.needs()
  product = sources.Run(pathlib.Path(source).expanduser())
  seen = _images(product, images, out)
  sets = _sets(product) if int8 else {}
  memory = product.memory()
  if memory is not None:
    size = sum(x.nbytes for x in jax.tree.leaves(memory))
    print(f'the memory of the support goes into the file: {_megabytes(size)}')
  with files.writing(out.parent, '--out'):
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.export.') as near:
      made = pathlib.Path(near) / 'float'
      write(product, memory, to, made, fixed_size=fixed_size)
      segmenter = product.segmenter()
      found = compare(segmenter, made, seen)
      if found['equal_labels'] < EQUAL:
        raise ValueError(
          f'the file gives {found["equal_labels"]:.4%} of the labels that JAX '
          f'gives, and {EQUAL:.2%} are the least: it is not kept'
        )
      if int8:
        small = pathlib.Path(near) / 'int8'
        onnx.quantise(made, small)
        found = compare(segmenter, small, seen)
        both = {'float': made, 'int8': small}
        found['scores'] = {
          name: {kind: _miou(path, *pair) for kind, path in both.items()}
          for name, pair in sets.items()
        }
        made = small
      os.replace(made, out)
  return found


def write(product, memory, to, path, *, fixed_size=False):
  """Writes a run's product; uint8 RGB in, labels and probabilities out.

  Args:
    product: a `sources.Run`.
    memory: what its teacher remembers, or None.
    to: 'onnx', 'stablehlo' or 'torch'.
    path: of the file.
    fixed_size: whether it takes images of the model's size alone.
  """
  answer, size = product.answer(memory), product.config.data.image_size
  found = product.results
  record = {
    'name': found.get('name'),
    'role': product.role,
    'image_size': size,
    'classes': list(product.classes),
    'palette': [list(colour) for colour in product.palette],
    'seen': list(sources.usual(product.sizes)),
    'digest': product.digest,
    'scores': {
      name: found[name].get(product.role)
      for name in found.get('evaluations', ())
    },
  }
  choices = {'free_size': not fixed_size, 'record': record}
  if to == 'onnx':
    onnx.save(onnx.lower_segmenter(answer, size, **choices), path)
  else:
    kind = {'stablehlo': stablehlo, 'torch': torch}[to]
    kind.save_segmenter(path, answer, size, **choices)


def compare(segmenter, path, images):
  """What a file answers beside what the run does, in JAX.

  Args:
    segmenter: the run's.
    path: of the file.
    images: uint8 [H, W, 3] each.

  Returns:
    equal_labels: the share of pixels. probabilities: the largest difference.
    images: how many. bytes: of the file. milliseconds: of an image, the median.
  """
  file = sources.open_file(path)
  equal, pixels, worst = 0, 0, 0.0
  for image in images:
    if file.record['size']:
      image = transforms.resize_image(image, file.record['size'])
    labels, shares = (np.asarray(x)[0] for x in file(image[None]))
    wanted = segmenter.probabilities(image)
    equal += int((labels == wanted.argmax(-1)).sum())
    pixels += labels.size
    worst = max(worst, float(np.abs(shares - wanted).max()))
  clock = []
  for _ in range(_TIMED):
    begin = time.perf_counter()
    jax.block_until_ready(file(image[None]))
    clock.append(time.perf_counter() - begin)
  return {
    'equal_labels': equal / pixels,
    'probabilities': worst,
    'images': len(images),
    'bytes': path.stat().st_size,
    'milliseconds': 1000 * statistics.median(clock),
  }


def _images(product, given, out):
  """The pixels of some images to compare on."""
  if given:
    found = inputs.find([given], out)
    return [as_image(found[i].path) for i in _some(len(found))]
  try:
    test = product.data.dataset.test
  except OSError as error:
    raise ValueError(
      f'there are no images to compare on ({error}): give some with --images'
    ) from error
  return [test[i]['image'] for i in _some(len(test))]


def _some(count):
  """A few indices of so many, evenly spaced."""
  few = np.linspace(0, count - 1, min(count, _COMPARED))
  return few.round().astype(int).tolist()


def _sets(product):
  """{name: (images, labels)} to score on, at the model's size."""
  data, size = product.data, product.config.data.image_size
  test = pipeline.load_images(data.dataset.test, range(data.size), size)
  support = getattr(data, 'support', None)
  return {
    **({'support': (support.images, support.labels)} if support else {}),
    'test': (test.images, test.labels),
  }


def _miou(path, images, labels):
  """The mean IoU of a file over classes."""
  file = sources.open_file(path)
  classes = 1 + len(file.record['classes'])
  total = Confusion.empty(classes)
  for image, label in zip(images, labels, strict=True):
    total.add(Confusion.of(label, file(image[None])[0][0], classes).counts)
  return total.miou


def _megabytes(size):
  return f'{size / 1e6:.1f} MB'


def report(out, found):
  """What comparing has found, in lines for the terminal."""
  lines = [
    f'{out}: {_megabytes(found["bytes"])}, '
    f'{found["milliseconds"]:.0f} ms an image',
    f'compared with JAX on {found["images"]} images: '
    f'{found["equal_labels"]:.4%} of the labels are equal, probabilities '
    f'differ by {found["probabilities"]:.2g} at most',
  ]
  if 'scores' in found:
    rows = [(name, *x.values()) for name, x in found['scores'].items()]
    lines.append(results.table(rows, ('mIoU on', 'float', 'int8')))
  return '\n'.join(lines)


def main(argv):
  """Exports what the flags say; 1 and one line on a known error."""
  values = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) != 2 or not values.out:
      raise ValueError(
        f'give RUN --to onnx|stablehlo|torch --out FILE; got {argv[1:]}'
      )
    command.place(None, argv[1])
    out = pathlib.Path(values.out).expanduser()
    found = run(
      argv[1],
      values.to,
      out,
      int8=values.int8,
      fixed_size=values.fixed_size,
      images=values.images,
      overwrite=values.overwrite,
    )
  except (ValueError, OSError) as error:
    logging.debug('where it failed', exc_info=True)
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(report(out, found))
  return 0


def define_flags():
  """Defines the flags; not on import, other programs have their own."""
  kinds = ('onnx', 'stablehlo', 'torch')
  flags.DEFINE_enum('to', 'onnx', kinds, 'The kind of file.')
  flags.DEFINE_string('out', None, 'The file to write.')
  flags.DEFINE_bool('int8', False, "ONNX's weights as 8-bit integers.")
  flags.DEFINE_bool('fixed_size', False, "Take the model's size alone.")
  flags.DEFINE_string('images', None, 'Images to compare on; else test images.')
  flags.DEFINE_bool('overwrite', False, 'Replace a file that is there.')


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=command.parse)
