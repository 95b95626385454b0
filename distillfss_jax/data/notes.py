"""What a prepared dataset holds, and what in it a practitioner should look at.

All is read off the manifest: nothing is decoded.
"""

import collections
import re

from distillfss_jax.data import download

_SHOTS = 5  # a class in fewer training images is named
_ENOUGH = 100  # pixels, to say where a class lies
_EDGES = 0.9  # of a class's pixels: it is nothing but edges


def summary(manifest):
  """Says in some lines what a prepared folder holds and what may be wrong.

  Percentages are of images where an older version counted no pixels.
  """
  rows, classes = manifest['records'], manifest['classes']
  pixels = _pixels(rows)
  images = _images(rows)
  splits = collections.Counter(row['split'] for row in rows)
  head = ('label', 'class', 'train images', 'test images')
  lines = [(*head, '% of images' if pixels is None else '% of pixels')]
  for i, name in enumerate(classes, 1):
    train, test = images['train', i], images['test', i]
    if pixels is None:
      share = (train + test) / len(rows)
    else:
      share = pixels[i] / sum(pixels.values())
    lines.append((str(i), name, str(train), str(test), f'{100 * share:.2f}'))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  made = [
    f'{manifest["name"]}: {len(rows)} images ({splits["train"]} train, '
    f'{splits["test"]} test), {len(classes)} '
    + ('class' if len(classes) == 1 else 'classes')
  ]
  if said := manifest.get('meaning'):
    made.append(f'  masks are taken to mean: {download.few(said, 12)}')
  if said := manifest.get('forms'):
    made.append(f'  files: {said}')
  if said := manifest.get('groups'):
    made.append(f'  {said} groups, none of them divided')
  for line in lines:
    cells = [
      cell.ljust(width) if i == 1 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    made.append('  ' + '  '.join(cells))
  if pixels and pixels[255]:
    share = pixels[255] / sum(pixels.values())
    made.append(f'  void: {100 * share:.2f} % of pixels')
  sizes = sorted((row['size'] for row in rows), key=lambda x: (x[0] * x[1], x))
  small, middle, large = (
    f'{columns}x{height}'
    for height, columns in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
  )
  made.append(
    f'  width x height: {small} smallest, {middle} median, {large} largest'
  )
  hints = [*notes(manifest), *_hints(manifest, images)]
  return '\n'.join(made + [f'  note: {x}' for x in hints])


def notes(manifest):
  """Yields what may make the labels or the scores of any dataset wrong."""
  rows, pixels = manifest['records'], _pixels(manifest['records'])
  own = 'meaning' in manifest  # masks of the user's own
  images = _images(rows)
  for i, name in enumerate(manifest['classes'], 1):
    share = pixels[i] / sum(pixels.values()) if pixels else 0
    if share > 0.5:
      yield (
        f'{name} covers {100 * share:.0f} % of all pixels: is it the '
        'background, or are masks inverted (objects and background swapped)?'
        + (' If so, say it in classes.txt or --meaning' if own else '')
      )
    edges = sum(_of(row, 'edges', i) for row in rows)
    if pixels and pixels[i] >= _ENOUGH and edges > _EDGES * pixels[i]:
      yield (
        f'{name} sits only on edges, between other labels: is it no class, '
        'but outlines, or the soft edges of an enlarged mask?'
        + (' classes.txt can call it void' if own else '')
      )
    if sum(images[split, i] for split in _splits(rows)) == 1 < len(rows):
      one = next(row['id'] for row in rows if i in row['present'])
      yield f'{name} occurs in one image, {one}'
  if pixels and pixels[255] > 0.5 * sum(pixels.values()):
    share = 100 * pixels[255] / sum(pixels.values())
    yield f'void covers {share:.0f} % of all pixels: nothing is scored there'
  if near := manifest.get('near'):
    tests = sum(row['split'].startswith('test') for row in rows)
    one, other, alike = near[0]
    yield (
      f'{len(near)} of {tests} test images are near-copies of a training image '
      f'(as {one} of {other}, likeness {alike:.2f} of 1): scores will be too '
      'good'
      + (
        '. Name what belongs together (a scene, a patient, a film) in '
        'groups.txt, `<image> <group>` a line, or by --group_by'
        if own
        else ''
      )
    )
  for id_, reason in manifest.get('voided', {}).items():
    yield f'{id_}: {reason}'


def _splits(rows):
  return {row['split'] for row in rows}


def _images(rows):
  """In how many images of a split each label is: Counter (split, label)."""
  return collections.Counter(
    (row['split'], label) for row in rows for label in row['present']
  )


def _of(row, what, label):
  """What a row says of a label, 0 where that does not occur in it."""
  if label not in row['present'] or what not in row:
    return 0
  return row[what][row['present'].index(label)]


def _pixels(rows):
  """Pixels of each label, 0 and 255 too; None where void is not counted."""
  if any('void' not in row for row in rows):
    return None
  found = collections.Counter()
  for row in rows:
    found.update(dict(zip(row['present'], row['areas'], strict=True)))
    found[255] += row['void']
    found[0] += row['size'][0] * row['size'][1] - sum(row['areas'])
    found[0] -= row['void']
  return found


def _hints(manifest, images):
  """Yields what else is worth a look."""
  rows = manifest['records']
  for i, name in enumerate(manifest['classes'], 1):
    count = images['train', i]
    if count < _SHOTS:
      yield (
        f'{name} is in {count} train image{"s" * (count != 1)}: fewer than '
        f'{_SHOTS} give no {_SHOTS} shots'
        + (
          ''
          if count
          else ', and none no run; list the test images in test.txt, without '
          'some of its'
        )
      )
  if _seem_numbered(manifest['classes'], images):
    yield (
      'each label is in no more images than the one before: if they number '
      'objects, and are no classes, give all objects of a class one value'
    )
  areas = [row['size'][0] * row['size'][1] for row in rows]
  if max(areas) > 10 * min(areas):
    yield (
      f'the largest image has {max(areas) / min(areas):.0f} times the pixels '
      'of the smallest: all are resized to one size when read'
    )
  empty = [row['id'] for row in rows if not row['present']]
  if empty:
    yield (
      f'{len(empty)} images have no class in their mask: {download.few(empty)}'
    )


def _seem_numbered(classes, images):
  """Whether labels look like the numbers of objects in each image."""
  labels = range(1, len(classes) + 1)
  counts = [images['train', i] + images['test', i] for i in labels]
  unnamed = all(re.fullmatch(r'class\d+', name) for name in classes)
  falling = counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
  return unnamed and len(classes) > 3 and falling
