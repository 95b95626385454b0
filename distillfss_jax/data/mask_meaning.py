"""What the masks of a folder mean, decided over all of them together.

Two values are one class; small integers and indexed PNG are labels (255 is
void); colours are a class each on black. Never is this decided per file: a mask
that shows one of three classes would mean another thing than its neighbours.
A file, classes.txt, may say it: see `Listed`.
"""

import collections
import colorsys
import io
import logging
import re
import typing

import numpy as np
from PIL import Image

from distillfss_jax.data import download

UNREADABLE = (
  OSError,
  SyntaxError,
  ValueError,
  Image.DecompressionBombError,
)
_MOST = 32  # values or colours that are still taken for classes
_KEPT = 4096  # colours of one mask that are looked at: far too many
_VOID = ('void', 'ignore')


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
  """

  kind: str
  names: tuple
  table: dict


_COLOUR_LINE = re.compile(r'(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,:]+(\S.*)')
_VALUE_LINE = re.compile(r'(\d+)[\s,:]+(\S.*)')


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
  names, table = [], {}
  for number, (_, key, text) in enumerate(parsed):
    small = text.lower().strip('_')
    if kind == 'name':
      # Lists of labels often begin with the background, which has label 0.
      if number == 0 and small == 'background':
        continue
      if number == len(parsed) - 1 and small in _VOID:
        continue
      names.append(text)
      continue
    if key in table:
      raise ValueError(f'{name}: {lines[number]!r}: its {kind} is there twice')
    if small == 'background':
      table[key] = 0
    elif small in _VOID:
      table[key] = 255
    elif key == 0:
      raise ValueError(
        f'{name}: {lines[number]!r}: 0 and black are background and no class'
      )
    else:
      names.append(text)
      table[key] = len(names)
  twice = [x for x, n in collections.Counter(names).items() if n > 1]
  if twice or not 1 <= len(names) <= 254:
    wrong = ': 1 to 254 are needed'
    if twice:
      wrong = f', {download.few(twice)} more than once'
    raise ValueError(f'{name} names {len(names)} classes{wrong}')
  return Listed(kind, tuple(names), table)


# -------------------------------------------------------------- the mask files


class Mask(typing.NamedTuple):
  """A decoded mask as its file has it.

  values: int [H, W]: grey values, indices, or colours as 0xRRGGBB.
  step: what Pillow multiplied the values of 2 and 4 bits with.
  """

  kind: str  # 'grey', 'index' or 'colour'
  values: np.ndarray
  palette: np.ndarray | None = None  # int [256] of 0xRRGGBB
  step: int = 1
  lossy: bool = False


class Seen(typing.NamedTuple):
  """The distinct values of one mask, and the pixels that have them."""

  name: str
  mask: Mask  # its values are the distinct ones, [v]
  counts: np.ndarray


class Coding(typing.NamedTuple):
  """What the masks mean: values of a kind, and the label of each.

  own: the masks' colours of labels 0..n as 0xRRGGBB, or None.
  """

  kind: str
  step: int
  classes: tuple
  table: dict | None  # None: whatever is 128 or more has label 1
  own: tuple | None = None

  @property
  def palette(self) -> tuple:
    """The colours of labels 0..n, (r, g, b) each: the masks' own, or ours."""
    if self.own is not None:
      return tuple(map(_unpack, self.own))
    return palette(len(self.classes))

  def label(self, mask: Mask) -> np.ndarray:
    """The labels of a mask, uint8 [H, W]."""
    values = _view(mask, self.kind, self.step)
    if self.table is None:
      return (values >= 128).astype(np.uint8)
    known = np.array(sorted(self.table), np.int64)
    labels = np.array([self.table[value] for value in known], np.uint8)
    return labels[np.searchsorted(known, values)]


def decode(contents, name):
  """Decodes a mask without changing its values; see `Mask`."""
  png = contents[:8] == b'\x89PNG\r\n\x1a\n' and len(contents) > 25
  depth, sort = (contents[24], contents[25]) if png else (8, None)
  if depth == 16 and sort in (2, 4, 6):
    # Pillow keeps the upper 8 bits of these, and says nothing.
    raise download.BadFileError(
      f'{name}: a colour PNG of 16 bits, save it with 8 or as grey'
    )
  try:
    with Image.open(io.BytesIO(contents)) as picture:
      lossy = picture.format in ('JPEG', 'MPO') or contents[12:16] == b'VP8 '
      mode, palette = picture.mode, None
      if mode in ('P', 'PA'):
        palette = np.zeros((256, 3), int)
        colours = np.array(picture.getpalette('RGB'), int).reshape(-1, 3)[:256]
        palette[: len(colours)] = colours
        palette = _pack(palette)
      elif mode not in ('1', 'L', 'LA', 'RGB', 'RGBA') and mode[0] not in 'IF':
        picture = picture.convert('RGB')
      pixels = np.asarray(picture)
  except UNREADABLE as error:
    reason = str(error).replace('\n', ' ')
    raise download.BadFileError(
      f'{name}: cannot be decoded ({reason})'
    ) from error
  if mode == '1':
    pixels = pixels * np.uint8(255)
  if mode == 'F' and not np.array_equal(pixels, np.rint(pixels)):
    raise download.BadFileError(f'{name}: values are fractions, not labels')
  pixels = pixels.astype(np.int64)
  if mode in ('LA', 'PA', 'RGBA'):
    pixels = _opaque(pixels)
  if palette is not None:
    return Mask('index', pixels, palette)
  if pixels.ndim == 3:
    # Lossy colours of a grey mask are off grey by rounding.
    if lossy and np.ptp(pixels, axis=2).max(initial=0) <= 8:
      return Mask('grey', pixels[..., 1], lossy=True)
    return Mask('colour', _pack(pixels), lossy=lossy)
  step = {2: 85, 4: 17}.get(depth, 1) if sort == 0 else 1
  return Mask('grey', pixels, step=step, lossy=lossy)


def _opaque(pixels):
  """Drops alpha; what is seen through is background, unless all is."""
  alpha, pixels = pixels[..., -1:], pixels[..., :-1]
  if alpha.any():
    pixels = np.where(alpha > 0, pixels, 0)
  return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _pack(colours):
  """Colours [..., 3] as 0xRRGGBB [...]."""
  return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def _unpack(colour):
  return int(colour) >> 16, int(colour) >> 8 & 255, int(colour) & 255


def _view(mask, kind, step=1):
  """The values of a mask as those of another kind: as drawn."""
  values = mask.values
  if mask.kind == kind or not values.any():
    return values // step if kind == 'grey' else values
  if mask.kind == 'index':
    drawn = mask.palette[values]
    return drawn if kind == 'colour' else drawn & 255
  return values * 0x010101 if kind == 'colour' else values & 255


def _is_grey(colours):
  return all(len(set(_unpack(c))) == 1 for c in colours)


def survey(contents, name):
  """The distinct values of a mask file; BadFileError where it has none.

  Returns:
    A Seen.
  """
  mask = decode(contents, name)
  values, counts = _count(mask.values)
  if len(values) > _KEPT:  # too many in any case: keep the frequent ones
    most = np.sort(np.argsort(-counts, kind='stable')[:_KEPT])
    values, counts = values[most], counts[most]
  return Seen(name, mask._replace(values=values), counts)


def _count(values):
  """Distinct values, sorted, and how often; by runs: masks have few."""
  flat = values.ravel()
  starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
  lengths = np.diff(starts, append=flat.size)
  found, which = np.unique(flat[starts], return_inverse=True)
  return found, np.bincount(which, lengths).astype(np.int64)


# ---------------------------------------------------- what mask values mean


def decide(seen, listed):
  """Decides what the masks mean, over all of them.

  Args:
    seen: list of Seen.
    listed: Listed, or None.

  Returns:
    Coding.

  Raises:
    ValueError: where they mean nothing that is known here.
  """
  used = [x for x in seen if x.mask.values.any()]
  if not used:
    raise ValueError(
      f'all {len(seen)} masks are empty: every pixel of them is 0 or black'
    )
  kind = _kind(used, listed)
  steps = {x.mask.step for x in used}
  # Files of 2 or 4 bits that are alike hold labels, among others grey values.
  step = steps.pop() if len(steps) == 1 and kind == 'grey' else 1
  total, where = collections.Counter(), {}
  for one in seen:
    values = _view(one.mask, kind, step).tolist()
    for value, count in zip(values, one.counts.tolist(), strict=True):
      total[value] += count
      where.setdefault(value, one.name)
  decide = _colours if kind == 'colour' else _values
  coding = decide(kind, total, where, used, listed)
  if coding.table is not None:
    missing = set(coding.table.values()) - {
      label for value, label in coding.table.items() if value in total
    }
    if missing := sorted(missing - {0, 255}):
      logging.warning(
        '%d of %d classes are in no mask: %s',
        len(missing),
        len(coding.classes),
        download.few(coding.classes[i - 1] for i in missing),
      )
    for value in total:
      coding.table.setdefault(value, 0)
  if listed and listed.kind == 'colour' and coding.own is None:
    # Colours beside a label map are how its classes are to be drawn.
    coding = coding._replace(own=_listed_palette(listed))
  return coding._replace(step=step)


def _kind(used, listed):
  """Whether values, indices or colours tell the classes."""
  kinds = {x.mask.kind for x in used}
  drawn = [_view(x.mask, 'colour') for x in used]
  colours = set(np.unique(np.concatenate(drawn)).tolist()) - {0}
  if listed and listed.kind == 'colour' and colours <= set(listed.table):
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
  """Indices, or colours where programs gave each file indices of its own."""
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
  return 'index'


def _values(kind, total, where, used, listed):
  """Grey values or indices: binary, a label map, or a class a value."""
  values = sorted(set(total) - {0})
  rest = [v for v in values if v != 255]
  names = listed.names if listed else ()
  by_value = listed is not None and listed.kind == 'value'
  # Names that fit make one value the label that it says.
  if len(values) == 1 and not (
    by_value or (len(names) > 1 and 1 <= values[0] <= len(names))
  ):
    names = _fit(names, 1, f'hold one value besides 0, {values[0]}')
    return Coding(
      kind,
      1,
      names or ('foreground',),
      {values[0]: 1},
      _own(used, kind, values),
    )
  lossy = kind == 'grey' and any(x.mask.lossy for x in used)
  many = kind == 'grey' and len(total) > _MOST and not by_value
  if lossy or (many and not _is_label_map(rest, names)):
    return _soft(total, where, used, names, lossy)
  if by_value:
    return _by_value(kind, values, where, used, listed)
  if kind == 'index' or _is_label_map(rest, names):
    return _label_map(kind, values, rest, where, used, names)
  names = _fit(
    names, len(values), f'hold the values {download.few(values, _MOST)}'
  )
  logging.info(
    'masks hold the values %s: each is a class, in this order',
    download.few(values, _MOST),
  )
  names = names or tuple(f'value{v}' for v in values)
  return Coding(kind, 1, names, {v: i for i, v in enumerate(values, 1)})


def _fit(names, count, what):
  """Gives names that are none or as many as classes; else a ValueError."""
  if names and len(names) != count:
    raise ValueError(
      f'classes.txt names {len(names)} classes ({download.few(names)}), but '
      f'the masks {what}: {count} are needed'
    )
  return names


def _is_label_map(rest, names):
  """Whether values besides 0 and 255 look like labels 1..k."""
  if not rest or rest[0] < 1 or rest[-1] > 254:
    return False
  if names:
    return rest[-1] <= len(names)
  # Grey ramps and soft edges reach up to white, and do not begin with 1, 2.
  return rest[-1] <= _MOST or (rest[-1] < 224 and 2 * len(rest) >= rest[-1])


def _label_map(kind, values, rest, where, used, names):
  count = rest[-1]
  if names and len(names) < count:
    raise ValueError(
      f'classes.txt names {len(names)} classes ({download.few(names)}), but '
      f'the masks hold labels up to {count} (in {where[count]})'
    )
  if kind == 'grey' and len(rest) == 1 and len(values) == 2:
    # Masks of 0 and 1 beside masks of 0 and 255 are of two sources.
    held = [set(_view(x.mask, 'grey').tolist()) for x in used]
    if not any({*values} <= x for x in held):
      raise ValueError(
        f'some masks hold 0 and {rest[0]} ({where[rest[0]]}), others 0 and 255 '
        f'({where[255]}): save all alike, or, if 255 is void, write '
        f'`{rest[0]} <name>` into classes.txt'
      )
  names = names or tuple(f'class{i}' for i in range(1, count + 1))
  table = {i: i for i in range(len(names) + 1)}
  table[255] = 255
  own = _own(used, kind, range(1, len(names) + 1))
  return Coding(kind, 1, names, table, own)


def _by_value(kind, values, where, used, listed):
  odd = [v for v in values if v not in listed.table and v != 255]
  if odd:
    raise ValueError(
      f'classes.txt names {len(listed.names)} classes of the values '
      f'{download.few(listed.table)}, but the masks hold {len(values)} values '
      f'besides 0, also {download.few(odd)} (in {where[odd[0]]})'
    )
  table = {255: 255, **listed.table}
  by_label = sorted(
    (label, value) for value, label in listed.table.items() if 0 < label < 255
  )
  own = _own(used, kind, [value for _, value in by_label])
  return Coding(kind, 1, listed.names, table, own)


def _own(used, kind, values):
  """The colours that indexed masks give to 0 and `values`, or None."""
  values = [0, *values]
  if kind != 'index' or max(values) > 255:
    return None
  for one in used:
    colours = tuple(int(one.mask.palette[v]) for v in values)
    if len(set(colours)) == len(colours):
      return colours
  return None


def _soft(total, where, used, names, lossy):
  """Masks with soft edges or JPEG noise: binary, or a ValueError."""
  pixels = sum(total.values())
  low = sum(n for v, n in total.items() if v < 32)
  high = sum(n for v, n in total.items() if 224 <= v <= 255)
  if lossy:
    name = next(x.name for x in used if x.mask.lossy)
    what = f'values that lossy compression changed, as in {name}'
  else:
    what = f'{len(total)} grey values, as in {where[max(total)]}'
  if not (low and high and low + high >= 0.9 * pixels and max(total) <= 255):
    common = [v for v, _ in total.most_common(5)]
    raise ValueError(
      f'masks hold {what} (most often {download.few(sorted(common))}), which '
      'are neither black and white nor labels: save them as PNG with a '
      f'value per class, at most {_MOST}, or as labels 1, 2, ... named in '
      'classes.txt; where every object has a number, give all objects of a '
      'class the same'
    )
  names = _fit(names, 1, f'hold {what}, and are taken for black and white')
  logging.warning(
    'masks hold %s: taken for black and white, 128 and more is %s',
    what,
    (names or ('foreground',))[0],
  )
  return Coding('grey', 1, names or ('foreground',), None)


def _colours(kind, total, where, used, listed):
  """Colours: a class each, black is background."""
  found = sorted((c for c in total if c), key=lambda c: (-total[c], c))
  if listed and listed.kind == 'colour':
    odd = [c for c in found if c not in listed.table]
    if odd:
      raise ValueError(
        f'classes.txt names {len(listed.names)} classes, but the masks hold '
        f'{len(found)} colours besides black, also '
        f'{download.few(map(_unpack, odd))} (in {where[odd[0]]})'
      )
    own = _listed_palette(listed)
    return Coding(kind, 1, listed.names, dict(listed.table), own)
  if len(found) > _MOST:
    lossy = [x.name for x in used if x.mask.lossy]
    raise ValueError(
      f'masks hold {len(found)} colours besides black, {_MOST} are the most '
      f'(most often {download.few(map(_unpack, found), 3)}): '
      + (f'{lossy[0]} is lossy, ' if lossy else 'their edges may be soft, ')
      + 'save masks as PNG with exactly one colour per class'
    )
  names = listed.names if listed else ()
  if listed and (len(names) > 1 or len(found) > 1):
    raise ValueError(
      f'classes.txt names {len(names)} classes and the masks hold '
      f'{len(found)} colours: write `r g b name` for each of '
      f'{download.few(map(_unpack, found), _MOST)}'
    )
  if not names and len(found) == 1:
    names = ('foreground',)
  if not names:
    names = tuple('rgb_{}_{}_{}'.format(*_unpack(c)) for c in found)
    logging.info('masks hold %d colours: each is a class', len(found))
  table = {c: i for i, c in enumerate(found, 1)}
  return Coding(kind, 1, names, table, (0, *found))


def _listed_palette(listed):
  """The colours of labels 0..n of classes.txt, black where it has no 0."""
  of = {label: colour for colour, label in reversed(listed.table.items())}
  return (of.get(0, 0), *(of[i] for i in range(1, len(listed.names) + 1)))
