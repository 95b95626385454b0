"""What the masks of a folder mean, decided over all of them together.

Two values are one class; small integers and indexed PNG are labels (255 is
void); colours are a class each on black. Never is this decided per file: a mask
that shows one of three classes would mean another thing than its neighbours.
A file, classes.txt, may say it: see `Listed`; where two readings fit, it must.
"""

import collections
import colorsys
import logging
import re
import typing

import numpy as np

from distillfss_jax.data import borders, download

_MOST = 32  # values or colours that are still taken for classes
_KEPT = 4096  # colours of one mask that are looked at: far too many
_VOID = ('void', 'ignore')
_UNLABELLED = (65535, 2**32 - 1)  # what -1 becomes in files without a sign
_EDGE = 0.5  # of the pixels of a value: it is only what edges blend into
_SOME = 4  # pixels amid their like: fewer are no area
_FEW = 8  # blends of labels: so many may be outlines
_FLAT = 0.01  # of the white of lossy masks: so much even grey is a third level


def palette(count):
  """Black and `count` colours that are well apart, 0 to 255 each."""
  made = [(0, 0, 0)]
  for i in range(count):
    # The golden ratio spreads any number of hues.
    rgb = colorsys.hsv_to_rgb((0.55 + 0.618034 * i) % 1, 0.7, 1 - 0.1 * (i % 4))
    made.append(tuple(round(255 * x) for x in rgb))
  return tuple(made)


# ----------------------------------------------------------------- classes.txt


class Listed(typing.NamedTuple):
  """What classes.txt says: of 'name', 'value' or 'colour' lines.

  table: value, or colour as 0xRRGGBB, to label; empty for names alone.
  order: the label of each line, 0 background and 255 void.
  lines: as they are written. file: who says it.
  """

  kind: str
  names: tuple
  table: dict
  order: tuple
  lines: tuple
  file: str


_COLOUR_LINE = re.compile(r'(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,:]+(\S.*)')
_VALUE_LINE = re.compile(r'(-?\d+)[\s,:]+(\S.*)')


def _parse(line):
  """One line of classes.txt: (kind, value or colour or None, name)."""
  if found := _COLOUR_LINE.fullmatch(line):
    r, g, b = map(int, found.groups()[:3])
    if max(r, g, b) > 255:
      raise ValueError(f'classes.txt: no colour in {line!r}: 0 to 255 each')
    return 'colour', r << 16 | g << 8 | b, found[4]
  if found := _VALUE_LINE.fullmatch(line):
    return 'value', int(found[1]), found[2]
  return 'name', None, line


def parse_classes(lines, name):
  """Reads the lines of classes.txt, called `name`, as a Listed.

  A class may be called background or void (or ignore), which it then is. Of
  values and colours, only these need to be said: the others are classes.

  Raises:
    ValueError: they are of several forms, or name no or too many classes.
  """
  lines = [re.sub(r'(^|\s)#.*', '', line).strip() for line in lines]
  lines = [line for line in lines if line]
  parsed = [_parse(line) for line in lines]
  kinds = {kind for kind, _, _ in parsed}
  if len(kinds) != 1:
    odd = {kind: line for (kind, _, _), line in zip(parsed, lines, strict=True)}
    raise ValueError(
      f'{name} must have lines of one form, `name`, `value name` or `r g b '
      f'name`, and has {" and ".join(map(repr, odd.values())) or "none"}'
    )
  kind = kinds.pop()
  names, table, order = [], {}, []
  for line, (_, key, text) in zip(lines, parsed, strict=True):
    small = text.lower().strip('_')
    if small == 'background':
      order.append(0)
    elif small in _VOID:
      order.append(255)
    else:
      names.append(text)
      order.append(len(names))
    if kind != 'name':
      if key in table:
        raise ValueError(f'{name}: {line!r}: its {kind} is there twice')
      table[key] = order[-1]
  twice = [x for x, n in collections.Counter(names).items() if n > 1]
  least = 0 if table else 1
  if twice or not least <= len(names) <= 254:
    wrong = ': 1 to 254 are needed'
    if twice:
      wrong = f', {download.few(twice)} more than once'
    raise ValueError(f'{name} names {len(names)} classes{wrong}')
  if kind == 'name' and 0 in order[1:]:
    raise ValueError(
      f'{name}: background must be its first line, or lines `value name` say '
      'which value it has'
    )
  return Listed(kind, tuple(names), table, tuple(order), tuple(lines), name)


# -------------------------------------------------------------- the mask files


class Mask(typing.NamedTuple):
  """A decoded mask as its file has it.

  values: integers [H, W]: grey values, indices, or colours as 0xRRGGBB.
  step: what Pillow multiplied the values of 2 and 4 bits with.
  """

  kind: str  # 'grey', 'index' or 'colour'
  values: np.ndarray
  palette: np.ndarray | None = None  # int [256] of 0xRRGGBB
  step: int = 1
  lossy: bool = False
  inverted: bool = False  # its table shows 0 white and 255 black


class Seen(typing.NamedTuple):
  """The distinct values of one mask, and the pixels that have them.

  between: of `counts`, pixels that a blend of their neighbours would give.
  inner: of `counts`, pixels whose neighbours are all the same.
  flat: pixels of a lossy mask in even grey areas, neither black nor white.
  """

  name: str
  mask: Mask  # its values are the distinct ones, [v]
  counts: np.ndarray
  between: np.ndarray
  inner: np.ndarray
  flat: int = 0


class Coding(typing.NamedTuple):
  """What the masks mean: values of a kind, and the label of each.

  own: the masks' colours of labels 0..n as 0xRRGGBB, or None.
  """

  kind: str
  step: int
  classes: tuple
  table: dict | None  # None: whatever is `threshold` or more has label 1
  own: tuple | None = None
  threshold: int = 128

  @property
  def palette(self) -> tuple:
    """The colours of labels 0..n, (r, g, b) each: the masks' own, or ours."""
    if self.own is not None:
      return tuple(map(_unpack, self.own))
    return palette(len(self.classes))

  @property
  def meaning(self) -> tuple:
    """What the values mean, in words, background first."""
    if self.table is None:
      least = self.threshold
      return f'less than {least} background', f'the rest {self.classes[0]}'
    names = ('background', *self.classes)
    show = _unpack if self.kind == 'colour' else str
    return tuple(
      f'{show(value)} {"void" if label == 255 else names[label]}'
      for value, label in sorted(self.table.items(), key=lambda x: (x[1], x[0]))
    )

  def label(self, mask: Mask) -> np.ndarray:
    """The labels of a mask, uint8 [H, W]."""
    if mask.kind == 'colour' or mask.values.dtype.itemsize > 2:
      return download.changed(mask.values, lambda x: self._of(mask, x))
    # As many as a file of 8 or 16 bits can hold are few.
    every = np.arange(1 << 8 * mask.values.dtype.itemsize)
    return self._of(mask, every)[mask.values]

  def _of(self, mask, values):
    values = _view(mask._replace(values=values), self.kind, self.step)
    if self.table is None:
      return (values >= self.threshold).astype(np.uint8)
    known = np.array(sorted(self.table), np.int64)
    labels = np.array([self.table[value] for value in known], np.uint8)
    return labels[np.searchsorted(known, values).clip(max=len(known) - 1)]


def decode(contents, name):
  """Decodes a mask without changing its values; see `Mask`.

  It is turned as its own EXIF orientation says, as its image is.
  """
  with download.picture(contents, name, upright=True) as (picture, _):
    webp = picture.format == 'WEBP' and b'VP8L' not in contents
    lossy = picture.format in ('JPEG', 'MPO') or webp
    opaque = _opaque(picture)
    if picture.mode in ('P', 'PA'):
      table = np.zeros((256, 3), int)
      colours = np.array(picture.getpalette('RGB'), int).reshape(-1, 3)[:256]
      table[: len(colours)] = colours
      table = _pack(table)
      ramp = np.arange(255, -1, -1) * 0x010101
      return Mask(
        'index',
        download.pixels(picture, opaque),
        table,
        inverted=np.array_equal(table, ramp),
      )
    if picture.mode == '1':
      return Mask('grey', download.pixels(picture) * np.uint8(255))
    if picture.mode in ('L', 'LA') or picture.mode[0] in 'IF':
      return _grey(contents, name, picture, download.pixels(picture, opaque))
    if picture.mode not in ('RGB', 'RGBA'):
      picture = picture.convert('RGB')
    # Lossy colours of a grey mask are off grey by rounding.
    if lossy and download.pixels(picture, _off_grey).max(initial=0) <= 8:
      values = download.pixels(picture, lambda x: opaque(x)[..., 1])
      return Mask('grey', values, lossy=True)
    values = download.pixels(picture, lambda x: _pack(opaque(x)))
    return Mask('colour', values, lossy=lossy)


def _grey(contents, name, picture, values):
  """A picture of one value a pixel as a Mask."""
  if picture.mode == 'F':
    whole = np.rint(values)
    if not np.array_equal(values, whole) or not np.isfinite(whole).all():
      raise download.BadFileError(f'{name}: values are fractions, not labels')
    values = values.astype(np.int64)
  grey_png = picture.format == 'PNG' and contents[25] == 0
  step = {2: 85, 4: 17}.get(contents[24], 1) if grey_png else 1
  return Mask(
    'grey',
    values,
    step=step,
    lossy=picture.format in ('JPEG', 'MPO'),
    # TIFF: white is zero, which Pillow turns over.
    inverted=picture.mode == 'L'
    and getattr(picture, 'tag_v2', {}).get(262) == 0,
  )


def _off_grey(part):
  """How far the channels of each pixel are from each other."""
  return np.ptp(np.asarray(part)[..., :3], axis=2)


def _opaque(picture):
  """What takes pixels from its parts without alpha.

  What is seen through is background, unless all is.
  """
  if picture.mode not in ('LA', 'PA', 'RGBA'):
    return np.asarray
  alpha_tells = picture.getextrema()[-1][1] > 0

  def take(part):
    alpha, pixels = np.split(np.asarray(part), [-1], 2)[::-1]
    if alpha_tells:
      pixels = np.where(alpha > 0, pixels, np.uint8(0))
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels

  return take


def _pack(colours):
  """Colours [..., 3] as 0xRRGGBB [...]."""
  colours = np.asarray(colours, np.uint32)
  return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def _unpack(colour):
  return int(colour) >> 16, int(colour) >> 8 & 255, int(colour) & 255


def _view(mask, kind, step=1):
  """The values of a mask as those of another kind: as drawn."""
  values = mask.values
  if mask.kind == kind:
    return values // step if kind == 'grey' else values
  if mask.kind == 'index':
    drawn = mask.palette[values]
    return drawn if kind == 'colour' else drawn & 255
  if kind == 'colour':
    return values.astype(np.int64) * 0x010101
  return values & 255


def _is_grey(colours):
  return all(len(set(_unpack(c))) == 1 for c in colours)


def survey(contents, name):
  """The distinct values of a mask file; BadFileError where it has none.

  Returns:
    A Seen.
  """
  mask = decode(contents, name)
  values, counts = _count(mask.values)
  between, inner, flat = np.zeros(len(values), np.int64), counts, 0
  if 2 < len(values) <= _KEPT:
    between, inner, flat = _between(mask, values, counts)
  if len(values) > _KEPT:  # too many in any case: keep the frequent ones
    most = np.sort(np.argsort(-counts, kind='stable')[:_KEPT])
    values, counts = values[most], counts[most]
    between, inner = between[most], inner[most]
  return Seen(name, mask._replace(values=values), counts, between, inner, flat)


def _count(values):
  """Distinct values, sorted, and how often; by runs: masks have few."""
  total = collections.Counter()
  for strip in download.strips(values):
    flat = strip.ravel()
    starts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], starts])
    lengths = np.diff(starts, append=flat.size)
    found, which = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(which, lengths).astype(np.int64)
    total.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
  found = np.array(sorted(total), values.dtype)
  return found, np.array([total[x] for x in found.tolist()], np.int64)


def _between(mask, found, counts):
  """Looks where the values of a mask lie; the last three of a `Seen`.

  Those between their neighbours are so in every channel that changes there:
  that is what smoothing makes of an edge.

  Args:
    mask: a Mask.
    found: its distinct values, sorted.
    counts: pixels of each.
  """
  between, inner, flat = np.zeros(len(found), np.int64), counts.copy(), 0
  lossy = mask.lossy and mask.kind == 'grey'
  for values, around in borders.met(mask.values, borders.NEXT):
    every = np.concatenate([values[None], around])
    drawn = mask.palette[every] if mask.kind == 'index' else every
    blends = True
    for shift in (0,) if mask.kind == 'grey' else (16, 8, 0):
      channel = drawn if mask.kind == 'grey' else drawn >> shift & 255
      low, high = channel.min(0), channel.max(0)
      inside = (low < channel[0]) & (channel[0] < high)
      blends &= inside | (low == high)
    at = np.searchsorted(found, values)
    inner -= np.bincount(at, minlength=len(found))
    # Indices may differ and be drawn alike: these are no blends.
    blends &= (drawn != drawn[0]).any(0)
    between += np.bincount(at[blends], minlength=len(found))
    if lossy:
      span = every.max(0).astype(int) - every.min(0)
      flat += int(((span <= 24) & _is_mid(values)).sum())
  if lossy:
    flat += int(inner[_is_mid(found)].sum())
  return between, inner, flat


def _is_mid(values):
  """Whether grey values are neither black nor white."""
  return (values >= 48) & (values < 208)


# ---------------------------------------------------- what mask values mean


def decide(seen, listed):
  """Decides what the masks mean, over all of them.

  Args:
    seen: list of Seen.
    listed: Listed, or None.

  Returns:
    Coding.

  Raises:
    ValueError: where they mean nothing that is known here, or two things.
  """
  used = [x for x in seen if x.mask.values.any()]
  if not used:
    raise ValueError(
      f'all {len(seen)} masks are empty: every pixel of them is 0 or black'
    )
  by_key = listed is not None and bool(listed.table)
  if not by_key and (odd := [x.name for x in seen if x.mask.inverted]):
    raise ValueError(
      f'{odd[0]} has an inverted table, as ImageJ makes it: a viewer shows 0 '
      'white and 255 black. Which of both is background? Say it in classes.txt '
      'beside images/, `255 255 255 background` or `0 0 0 background`'
    )
  kind = _kind(used, listed)
  steps = {x.mask.step for x in used}
  # Files of 2 or 4 bits that are alike hold labels, among others grey values.
  step = steps.pop() if len(steps) == 1 and kind == 'grey' else 1
  found = _Found({}, collections.Counter(), collections.Counter(), {}, used)
  for one in seen:
    values = _view(one.mask, kind, step).tolist()
    counts = (x.tolist() for x in (one.counts, one.between, one.inner))
    for value, count, between, inner in zip(values, *counts, strict=True):
      found.total[value] = found.total.get(value, 0) + count
      found.between[value] += between
      found.inner[value] += inner
      found.where.setdefault(value, one.name)
  decide = _colours if kind == 'colour' else _values
  coding = decide(kind, found, listed)
  if coding.table is not None:
    coding = _present(coding, found.total, listed)
  if listed and listed.kind == 'colour' and coding.own is None:
    # Colours beside a label map are how its classes are to be drawn.
    own = _listed_palette(listed)
    at = [0, *(listed.names.index(x) + 1 for x in coding.classes)]
    coding = coding._replace(own=tuple(own[i] for i in at))
  return coding._replace(step=step)


class _Found(typing.NamedTuple):
  """The values of all masks in one view.

  total: pixels of each. between and inner: see `Seen`. where: a file that has
  it. used: the Seen that are not empty.
  """

  total: dict
  between: collections.Counter
  inner: collections.Counter
  where: dict
  used: list

  def blends(self):
    """The values that are nothing but blends, of areas of other values."""
    made = [
      value
      for value, count in self.total.items()
      if value and self.between[value] >= _EDGE * count
    ]
    return made if self.areas(made) else []

  def areas(self, blends):
    """The values, but for blends, that fill some area and not lines only."""
    return [
      value
      for value, count in self.inner.items()
      if value and count >= _SOME and value not in blends
    ]


def _present(coding, total, listed):
  """Leaves out the classes that no mask has: nothing can be learnt of them."""
  there = {coding.table.get(value, 0) for value in total}
  kept = [i for i in range(1, len(coding.classes) + 1) if i in there]
  gone = [x for i, x in enumerate(coding.classes, 1) if i not in there]
  if not kept:
    said = f'{listed.file} names {download.few(listed.lines)}, but ' * (
      listed is not None
    )
    show = _unpack if coding.kind == 'colour' else str
    values = download.few([show(value) for value in sorted(total)], _MOST)
    raise ValueError(
      f'no mask has a pixel of a class: {said}the masks hold {values}. Say '
      'which of these is which class, `value name` a line'
    )
  if gone:
    logging.warning(
      '%d of %d classes are in no mask and are left out: %s',
      len(gone),
      len(coding.classes),
      download.few(gone),
    )
  number = {0: 0, 255: 255, **{i: n for n, i in enumerate(kept, 1)}}
  table = {
    value: number[label]
    for value, label in coding.table.items()
    if value in total and label in number
  }
  table |= {value: 0 for value in total if value not in table}
  own = coding.own and tuple(coding.own[i] for i in (0, *kept))
  classes = tuple(coding.classes[i - 1] for i in kept)
  return coding._replace(classes=classes, table=table, own=own)


def _kind(used, listed):
  """Whether values, indices or colours tell the classes."""
  kinds = {x.mask.kind for x in used}
  drawn = [_view(x.mask, 'colour') for x in used]
  colours = set(np.unique(np.concatenate(drawn)).tolist()) - {0}
  # Where it names no class, the colours that it does not say are classes.
  if (
    listed
    and listed.kind == 'colour'
    and (colours <= set(listed.table) or not listed.names)
  ):
    return 'colour'
  if kinds == {'index'}:
    return _kind_of_indexed(used, listed, colours)
  if kinds == {'grey'}:
    return 'grey'
  if _is_grey(colours):
    return 'grey'
  # Programs save a mask with little colour as grey; others mix in labels.
  of_colour = [
    d for x, d in zip(used, drawn, strict=True) if x.mask.kind != 'grey'
  ]
  known = set(np.unique(np.concatenate(of_colour)).tolist()) | {0}
  for one, values in zip(used, drawn, strict=True):
    if one.mask.kind == 'grey' and not set(values.tolist()) <= known:
      other = next(x for x in used if x.mask.kind != 'grey')
      raise ValueError(
        f'masks are of two kinds: {one.name} is grey and {other.name} has '
        'colours; save all of them as one kind'
      )
  return 'colour'


def _kind_of_indexed(used, listed, colours):
  """Indices, or colours where programs numbered the colours anew."""
  by_value = listed is not None and listed.kind == 'value'
  first = {}  # index -> (colour, name)
  for one in used:
    for index in one.mask.values.tolist():
      colour = int(one.mask.palette[index])
      before = first.setdefault(index, (colour, one.name))
      if before[0] == colour or (listed and listed.kind != 'colour'):
        continue
      if len(colours | {0}) <= len(first.keys() | {0}):
        logging.warning(
          'index %d has another colour in %s than in %s: colours are taken '
          'for classes, not indices',
          index,
          one.name,
          before[1],
        )
        return 'colour'
      raise ValueError(
        f'index {index} is {_unpack(before[0])} in {before[1]} and '
        f'{_unpack(colour)} in {one.name}: are indices or colours the classes? '
        'Say so in classes.txt beside images/, with lines `value name` or '
        '`r g b name`'
      )
  if by_value or (listed and listed.order[0] == 0 and listed.kind == 'name'):
    return 'index'
  lowest = [(c, name) for i, (c, name) in first.items() if i == 0 and c]
  if not lowest:
    return _grey_palette(used, first)
  colour, name = lowest[0]
  if 0 in {int(c) for x in used for c in _view(x.mask, 'colour')}:
    logging.warning(
      'black is not index 0, which is %s (as in %s): colours are taken for '
      'classes and black for background',
      _unpack(colour),
      name,
    )
    return 'colour'
  raise ValueError(
    f'index 0 is {_unpack(colour)} in {name}, and no mask has black: is it the '
    'background? Say so in classes.txt beside images/, with lines like '
    '`0 background` or `0 sky`, `1 road`'
  )


def _grey_palette(used, first):
  """'grey' for indices that are drawn as grey values, else 'index'.

  So edges that were smoothed before the colours were numbered are seen.
  """
  drawn = [first[i][0] for i in sorted(first)]
  rising = drawn == sorted(set(drawn))
  return 'grey' if len(drawn) > 2 and rising and _is_grey(drawn) else 'index'


def _values(kind, found, listed):
  """Grey values or indices: binary, a label map, or a class a value."""
  values = sorted(set(found.total) - {0})
  rest = [v for v in values if v != 255]
  names = listed.names if listed else ()
  lines = len(listed.order) if listed else 0
  if listed and listed.kind == 'value':
    return _by_value(kind, found, listed)
  _refuse_unlabelled(values, found.where)
  # Names that fit make one value the label that it says.
  if len(values) == 1 and not (len(names) > 1 and 1 <= values[0] <= lines):
    names = _fit(listed, 1, f'hold one value besides 0, {values[0]}')
    table = {0: 0, values[0]: 1}
    own = _own(found.used, kind, [0, values[0]])
    return Coding(kind, 1, names or ('foreground',), table, own)
  lossy = kind == 'grey' and any(x.mask.lossy for x in found.used)
  many = kind == 'grey' and len(found.total) > _MOST
  is_map = _is_label_map(rest, lines)
  if lossy or (many and not is_map):
    return _soft(found, listed, lossy)
  blends = found.blends() if kind == 'grey' else []
  if blends and not (is_map and (names or len(blends) == 1)):
    if is_map and len(blends) <= _FEW:  # they may be nested outlines
      raise _smooth_error(found, blends)
    return _smoothed(found, listed, blends)
  if kind == 'index' or is_map:
    return _label_map(kind, values, rest, found, listed)
  if listed and listed.order[-1] == 255 and 255 in values:
    values.remove(255)  # the void of its last line
  names = _fit(
    listed, len(values), f'hold the values {download.few(values, _MOST)}'
  )
  logging.info(
    'masks hold the values %s: each is a class, in this order',
    download.few(values, _MOST),
  )
  names = names or tuple(f'value{v}' for v in values)
  table = {0: 0, 255: 255, **{v: i for i, v in enumerate(values, 1)}}
  return Coding(kind, 1, names, table)


def _refuse_unlabelled(values, where):
  """Raises ValueError for -1, in whatever form: is 0 then a class?"""
  odd = [v for v in values if v < 0]
  rest = set(values).difference(_UNLABELLED)
  if rest and max(rest) < 255:
    odd += [v for v in values if v in _UNLABELLED]
  if odd:
    raise ValueError(
      f'masks hold {odd[0]} (in {where[odd[0]]}) beside '
      f'{download.few(sorted({0, *values}.difference(odd)))}: if that is what '
      f'has no label, say so in classes.txt beside images/, `{odd[0]} void`, '
      'and name the other values, `0 background` or `0 sky`, `1 road`'
    )


def _fit(listed, count, what):
  """Gives names that are none or as many as classes; else a ValueError."""
  names = listed.names if listed else ()
  if names and len(names) != count:
    raise ValueError(
      f'{listed.file} names {len(names)} classes ({download.few(names)}), but '
      f'the masks {what}: {count} are needed'
    )
  return names


def _is_label_map(rest, lines):
  """Whether values besides 0 and 255 look like labels 1..k."""
  if not rest or rest[0] < 1 or rest[-1] > 254:
    return False
  if lines:
    return rest[-1] <= lines
  # Grey ramps and soft edges reach up to white, and do not begin with 1, 2.
  return rest[-1] <= _MOST or (rest[-1] < 224 and 2 * len(rest) >= rest[-1])


def _label_map(kind, values, rest, found, listed):
  if kind == 'grey' and len(rest) == 1 and len(values) == 2:
    # Masks of 0 and 1 beside masks of 0 and 255 are of two sources.
    held = [set(_view(x.mask, 'grey').tolist()) for x in found.used]
    if not any({*values} <= x for x in held):
      raise ValueError(
        f'some masks hold 0 and {rest[0]} ({found.where[rest[0]]}), others 0 '
        f'and 255 ({found.where[255]}): save all alike, or, if 255 is void, '
        f'write `{rest[0]} <name>` into classes.txt'
      )
  if listed:
    names, table = listed.names, _by_position(rest, 255 in values, listed)
  else:
    names = tuple(f'class{i}' for i in rest)
    table = {value: i for i, value in enumerate(rest, 1)}
    if gaps := sorted(set(range(1, max(rest, default=1))).difference(rest)):
      logging.info(
        'no mask has the labels %s: they are no class', download.few(gaps)
      )
  table = {0: 0, 255: 255, **table}
  by_label = {label: value for value, label in table.items()}
  order = [by_label.get(i, 0) for i in range(len(names) + 1)]
  return Coding(kind, 1, names, table, _own(found.used, kind, order))


def _by_position(rest, has_void, listed):
  """{value: label} where the lines of a list of names are labels in order."""
  order, most = listed.order, rest[-1] if rest else 0
  base = 0 if order[0] == 0 else 1
  if most > len(order) - 1 + base:
    raise ValueError(
      f'{listed.file} names {len(listed.names)} classes '
      f'({download.few(listed.names)}), but the masks hold labels up to {most}'
    )
  # A list may begin at 0 without saying so; it fits then, too, if it is longer.
  needed = len(order) - (order[-1] == 255 and has_void)
  if base and most < needed:
    first, second = (listed.lines * 2)[:2]
    raise ValueError(
      f'{listed.file} has {len(order)} lines, and the masks hold labels up to '
      f'{most}: is {first!r} label 0, or label 1? Write `value name` lines, '
      f'`0 {first}`, `1 {second}` and so on or `1 {first}` and so on, or '
      '`background` as the first line where that is label 0'
    )
  return dict(enumerate(order, base))


def _by_value(kind, found, listed):
  table, names = dict(listed.table), listed.names
  if names or 0 not in table.values():
    table.setdefault(0, 0)
  if names:
    table.setdefault(255, 255)
  odd = [v for v in sorted(found.total) if v not in table]
  if odd and names:
    count = len(found.total.keys() - {0})
    raise ValueError(
      f'{listed.file} names {len(names)} classes of the values '
      f'{download.few(listed.table)}, but the masks hold {count} '
      f'values besides 0, also {download.few(odd)} (in {found.where[odd[0]]})'
    )
  if odd:  # it only says what is no class
    names = tuple(f'value{v}' for v in odd) if odd[1:] else ('foreground',)
    table |= {v: i for i, v in enumerate(odd, 1)}
  by_label = {label: value for value, label in reversed(table.items())}
  order = [by_label.get(i, 0) for i in range(len(names) + 1)]
  return Coding(kind, 1, names, table, _own(found.used, kind, order))


def _own(used, kind, values):
  """The colours that indexed masks give to the values of 0..n, or None."""
  if kind != 'index' or max(values) > 255:
    return None
  for one in used:
    colours = tuple(int(one.mask.palette[v]) for v in values)
    if len(set(colours)) == len(colours):
      return colours
  return None


def _soft(found, listed, lossy):
  """Masks with soft edges or JPEG noise: binary, or a ValueError."""
  total = found.total
  pixels = sum(total.values())
  low = sum(n for v, n in total.items() if v < 32)
  high = sum(n for v, n in total.items() if 224 <= v <= 255)
  if lossy:
    name = next(x.name for x in found.used if x.mask.lossy)
    what = f'values that lossy compression changed, as in {name}'
  else:
    what = f'{len(total)} grey values, as in {found.where[max(total)]}'
  flat = sum(x.flat for x in found.used)
  binary = low and high and low + high >= 0.9 * pixels and max(total) <= 255
  if binary and flat > max(_FLAT * high, 16):
    one = max(found.used, key=lambda x: x.flat).name
    raise ValueError(
      f'masks hold {what}, and grey areas beside black and white ({flat} '
      f'pixels, most of them in {one}): a third class cannot be told from what '
      'compression changed. Save masks as PNG with exactly one value per class'
    )
  if not binary:
    blends = found.blends()
    if blends and not lossy:
      return _smoothed(found, listed, blends)
    common = [
      v for v, _ in sorted(total.items(), key=lambda x: (-x[1], x[0]))[:5]
    ]
    raise ValueError(
      f'masks hold {what} (most often {download.few(sorted(common))}), which '
      'are neither black and white nor labels: save them as PNG with a '
      f'value per class, at most {_MOST}, or as labels 1, 2, ... named in '
      'classes.txt; where every object has a number, give all objects of a '
      'class the same'
    )
  names = _fit(listed, 1, f'hold {what}, and are taken for black and white')
  logging.warning(
    'masks hold %s: taken for black and white, 128 and more is %s',
    what,
    (names or ('foreground',))[0],
  )
  return Coding('grey', 1, names or ('foreground',), None)


def _smoothed(found, listed, blends):
  """Masks of one value whose edges were smoothed: binary, or a ValueError."""
  areas = found.areas(blends)
  most = areas[0]
  # Some ways to enlarge go beyond what is on both sides of an edge.
  beyond = [
    v
    for v in found.total
    if v not in (0, most, *blends) and min(v, abs(v - most)) > 0.3 * most
  ]
  if len(areas) > 1 or len(blends) < 2 or beyond:
    raise _smooth_error(found, blends)
  names = _fit(listed, 1, f'hold {most} with soft edges')
  names = names or ('foreground',)
  logging.warning(
    'masks hold %d with soft edges (%d values between it and 0): %d and more '
    'is %s',
    most,
    len(blends),
    (most + 1) // 2,
    names[0],
  )
  return Coding('grey', 1, names, None, threshold=(most + 1) // 2)


def _smooth_error(found, blends):
  """What to say where values sit only on edges."""
  some = sorted(blends)
  solid = sorted(set(found.total).difference(blends))
  show = _unpack if max(found.total) > 0xFFFF else str
  return ValueError(
    f'masks hold {download.few(map(show, some))} (in {found.where[some[0]]}) '
    f'only on edges, between {download.few(map(show, solid))}: if a program '
    'smoothed or enlarged the masks, save them without that (nearest '
    'neighbour); if these are classes, or to be void, say so in classes.txt '
    'beside images/, a line for each value or colour'
  )


def _colours(kind, found, listed):
  """Colours: a class each, black is background."""
  total, where = found.total, found.where
  stated = listed is not None and listed.kind == 'colour'
  table = dict(listed.table) if stated else {}
  if 0 not in table.values() or listed.names:
    table.setdefault(0, 0)
  new = sorted(
    (c for c in total if c not in table), key=lambda c: (-total[c], c)
  )
  if stated and listed.names:
    if new:
      count, some = len(total.keys() - {0}), download.few(map(_unpack, new))
      raise ValueError(
        f'{listed.file} names {len(listed.names)} classes, but the masks hold '
        f'{count} colours besides black, also {some} (in {where[new[0]]})'
      )
    return Coding(kind, 1, listed.names, table, _listed_palette(listed))
  lossy = [x.name for x in found.used if x.mask.lossy]
  if len(new) > _MOST or (lossy and len(new) > 1):
    raise ValueError(
      f'masks hold {len(new)} colours besides black, {_MOST} are the most '
      f'(most often {download.few(map(_unpack, new), 3)}): '
      + (f'{lossy[0]} is lossy, ' if lossy else 'their edges may be soft, ')
      + 'save masks as PNG with exactly one colour per class'
    )
  if blends := [c for c in found.blends() if c in new]:
    raise _smooth_error(found, blends)
  names = listed.names if listed else ()
  if names and (len(names) > 1 or len(new) > 1):
    raise ValueError(
      f'{listed.file} names {len(names)} classes and the masks hold '
      f'{len(new)} colours: write `r g b name` for each of '
      f'{download.few(map(_unpack, new), _MOST)}'
    )
  if not names and len(new) == 1:
    names = ('foreground',)
  if not names:
    names = tuple('rgb_{}_{}_{}'.format(*_unpack(c)) for c in new)
    logging.info('masks hold %d colours: each is a class', len(new))
  table |= {c: i for i, c in enumerate(new, 1)}
  background = next((c for c, label in table.items() if label == 0), 0)
  return Coding(kind, 1, names, table, (background, *new))


def _listed_palette(listed):
  """The colours of labels 0..n of classes.txt, black where it has no 0."""
  of = {label: colour for colour, label in reversed(listed.table.items())}
  return (of.get(0, 0), *(of[i] for i in range(1, len(listed.names) + 1)))
