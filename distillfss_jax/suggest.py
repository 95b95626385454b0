"""Which images of a folder to annotate: those that stand for the others.

    python -m distillfss_jax.prepare --dataset folder --raw DIR --suggest 5

Needs images only. They are compared by what a frozen ImageNet backbone sees in
them; how they are ranked is in `data/suggest.py`.
"""

import pathlib

import jax
import numpy as np
from absl import logging
from flax import nnx
from PIL import Image

from distillfss_jax import backbones, files, params
from distillfss_jax.data import download, suggest
from distillfss_jax.datasets import folder
from distillfss_jax.models import base
from distillfss_jax.pretrained import weights
from distillfss_jax.workdir import pictures

BACKBONE = 'lite0'
SIZE, TOGETHER = 224, 16  # pixels that are looked at; images at once
MOST = 20000  # images: all are compared with all


def run(raw: str, count: int, data_dir: str, name: str | None = None) -> list:
  """Ranks the images of a folder; writes a list and a contact sheet.

  Args:
    raw: a folder or zip of images.
    count: how many to suggest.
    data_dir: where `suggested.txt` and `suggested.png` go, in a folder `name`.
    name: of that folder; by default the raw folder's own.

  Returns:
    Their file names below `raw`, the best first.

  Raises:
    ValueError, OSError: with one line that says what is wrong.
  """
  with download.Files(raw, folder.Folder.DOWNLOAD) as found:
    names = folder.images_of(found)
    if not 1 <= count <= len(names):
      raise ValueError(
        f'--suggest {count}: {raw} has {len(names)} images, of which 1 to '
        f'{len(names)} can be suggested'
      )
    if len(names) > MOST:
      raise ValueError(
        f'{raw} has {len(names)} images, and up to {MOST} can be compared: '
        'give a folder with a part of them'
      )
    small, bad = download.photos(
      found,
      names,
      lambda x: np.asarray(Image.fromarray(x).resize((SIZE, SIZE))),
    )
  names = [x for x in names if x in small]
  if len(names) < count:
    raise ValueError(
      f'{raw}: {len(bad)} files cannot be read ({download.few(bad, 3)}), and '
      f'{len(names)} images are left for --suggest {count}'
    )
  if bad:
    logging.warning('left out, unreadable: %s', download.few(bad))
  points = suggest.describe(_features([small[x] for x in names]))
  chosen = [names[i] for i in suggest.rank(points, count)]
  place = pathlib.Path(data_dir).expanduser()
  place /= name or pathlib.Path(raw).expanduser().resolve().stem
  place.mkdir(parents=True, exist_ok=True)
  files.write_atomically(
    place / 'suggested.txt', ''.join(f'{x}\n' for x in chosen)
  )
  nothing = np.zeros((SIZE, SIZE), np.uint8)
  sheet = pictures.support_panel(
    [small[x] for x in chosen],
    [nothing] * count,
    names=[f'{i} {x.split("/")[-1]}' for i, x in enumerate(chosen, 1)],
  )
  pictures.save(place / 'suggested.png', sheet)
  print(f'annotate first, of {len(names)} images of {raw}:')
  for i, x in enumerate(chosen, 1):
    print(f'{i:4} {x}')
  print(f'list: {place}/suggested.txt\nlook: {place}/suggested.png')
  return chosen


def _features(images):
  """The last maps of strides 8, 16 and 32, pooled: [N, 1, 1, 2c] each."""
  backbone = nnx.eval_shape(
    lambda: backbones.build(BACKBONE, image_size=SIZE, rngs=nnx.Rngs(0))
  )
  part = weights.Part('', backbone)
  graph, abstract = nnx.split(backbone)
  arrays = weights.from_tensors(weights.read_file(BACKBONE), [part])
  arrays = params.replace(abstract, arrays)

  @jax.jit
  def look(images):
    maps = nnx.merge(graph, arrays)(base.normalise(images, backbone))
    return [x[:, -1] for x in maps[1:]]

  parts = []
  for i in range(0, len(images), TOGETHER):
    batch = np.stack(images[i : i + TOGETHER])
    rows = len(batch)
    batch = np.pad(batch, ((0, TOGETHER - rows), (0, 0), (0, 0), (0, 0)))
    parts.append([suggest.pooled(np.asarray(x[:rows])) for x in look(batch)])
  return [np.concatenate(x) for x in zip(*parts, strict=True)]
