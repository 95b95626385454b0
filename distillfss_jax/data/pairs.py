"""Which mask belongs to which image, by their names.

The same name comes first, then names with _mask or the like appended, then what
remains when both are stripped of such words: 01_image and 01_mask. The last is
a guess: it is made only where it gives each image one mask, and it is said.
"""

import collections
import logging
import pathlib
import re

from distillfss_jax.data import download

_SUFFIX = r'\.(?:png|jpe?g|bmp|tiff?|webp|gif|p[bgpn]m)'
_ENDING = re.compile(
  r'(.+)[_-](?:masks?|segmentations?|seg|labels?|annotations?|gt)',
  re.IGNORECASE,
)
_OF_IMAGES = (
  'images?|imgs?|photos?|pictures?|raw|rgb|orig(?:inal)?|input|training|test'
)
_OF_MASKS = (
  'masks?|labels?|lbl|lab|annotations?|annot|ann|seg|segm|segmentations?|'
  'segmented|gt|ground[_-]?truth|truth|manual1?|output'
)


def match(images, masks):
  """Pairs images and masks.

  Args:
    images: dict of id -> path without suffix.
    masks: dict of file name -> path without suffix, the same beginning.

  Returns:
    ({id: file names of its masks}, file names of masks without an image).
  """
  keys = {id_: download.plain(key) for id_, key in images.items()}
  exact, ended = (collections.defaultdict(list) for _ in range(2))
  for name, key in masks.items():
    key = download.plain(key)
    exact[key].append(name)
    if found := _ENDING.fullmatch(key):
      ended[found[1]].append(name)
  taken = {name for key in keys.values() for name in exact.get(key, ())}
  of = {}
  for id_, key in keys.items():
    names = exact.get(key) or [x for x in ended.get(key, ()) if x not in taken]
    if names:
      of[id_] = names
  used = {name for names in of.values() for name in names}
  guessed = _guess(
    {id_: key for id_, key in keys.items() if id_ not in of},
    {name: key for name, key in masks.items() if name not in used},
  )
  if guessed:
    id_ = min(guessed)
    logging.info(
      '%d masks go by other names than their images: %s is taken for that of '
      '%s, and so on',
      len(guessed),
      guessed[id_],
      images[id_],
    )
  of |= {id_: [name] for id_, name in guessed.items()}
  return of, sorted(set(masks) - used - set(guessed.values()))


def suggested(images, masks, most=3):
  """Names the pairs that names in order would make; '' where none fit.

  Args:
    images: file names.
    masks: file names.
    most: how many pairs to name.
  """
  images, masks = sorted(images), sorted(masks)
  if len(images) != len(masks):
    return ''
  some = [f'{a} with {b}' for a, b in zip(images, masks, strict=True)][:most]
  return ', '.join(some)


def _guess(keys, masks):
  """{id: mask file name} where stripped names fit one to one."""
  # nnU-Net numbers the channels of an image, and there is one.
  of_images = _OF_IMAGES
  if all(key.endswith('_0000') for key in keys.values()):
    of_images += '|0000'
  sides = []
  for names, words in ((keys, of_images), (masks, _OF_MASKS)):
    by_core = collections.defaultdict(list)
    for name, key in names.items():
      by_core[_core(download.plain(key), words)].append(name)
    sides.append(by_core)
  images, found = sides
  return {
    ids[0]: found[core][0]
    for core, ids in images.items()
    if len(ids) == 1 and len(found.get(core, ())) == 1
  }


def _core(key, words):
  """A path without the words that tell an image's name from a mask's."""
  folder, _, stem = key.rpartition('/')
  while found := re.fullmatch(rf'(.+){_SUFFIX}', stem, re.IGNORECASE):
    stem = found[1]  # 001.png.png
  for form in (rf'(.+?)[_. -](?:{words})', rf'(?:{words})[_. -](.+)'):
    if found := re.fullmatch(form, stem, re.IGNORECASE):
      stem = found[1]
      break
  else:
    for form in (rf'(.*\d)(?:{words})', rf'(?:{words})(\d.*)'):
      if found := re.fullmatch(form, stem, re.IGNORECASE):
        stem = found[1]
        break
  return f'{folder}/{stem}'.casefold()


def lookup(known):
  """Finds images by what label tools call them.

  Args:
    known: dict of every way to write an image -> its id.

  Returns:
    Function of a text -> id or None: the path as it is, its last part where
    only one image has that, and what Roboflow made of it.
  """
  exact = {download.plain(text): id_ for text, id_ in known.items()}
  last = collections.defaultdict(set)
  for text, id_ in exact.items():
    last[pathlib.PurePosixPath(text).name].add(id_)

  def find(text):
    text = download.plain(text.replace('\\', '/')).removeprefix('./')
    if text in exact:
      return exact[text]
    name = pathlib.PurePosixPath(text).name
    # cat_jpg.rf.0123abcd.jpg was cat.jpg before Roboflow exported it.
    before = re.sub(r'_([a-z]{3,4})\.rf\.\w+\.\w+$', r'.\1', name)
    for one in (name, before):
      if len(last.get(one, ())) == 1:
        return next(iter(last[one]))
    return None

  return find


def without_ending(key):
  """A mask's path without _mask or the like; '' where it has none."""
  found = _ENDING.fullmatch(key)
  return found[1] if found else ''
