"""Segmenters from what there is: a run's folder, or an exported file."""

import os
import pathlib
import zipfile

import jax
import numpy as np
from flax import nnx

from distillfss_jax import config as configs
from distillfss_jax import datasets, files, params, systems
from distillfss_jax.exporting import onnx, stablehlo, torch
from distillfss_jax.inference.segmenter import Segmenter
from distillfss_jax.pretrained import weights
from distillfss_jax.systems.base import masks_of
from distillfss_jax.tasks import adaptation, base, dense
from distillfss_jax.types import Support

_TASKS = {'adaptation': adaptation.Data, 'dense': dense.Data}
_TINY = 1e-37  # a probability whose logarithm float32 still has


def load(source: str | os.PathLike, *, batch_size: int = 0) -> Segmenter:
  """The segmenter that a run has trained, or that `export` has written.

  Args:
    source: the folder of a finished run that adapted to a support set or was
      trained densely, or a file that was exported from one. A run whose
      product is a student needs nothing but its folder; a teacher also reads
      its support from the dataset.
    batch_size: parts of an image that are answered at once; 0 chooses.

  Raises:
    ValueError: it is neither, unfinished, or damaged.
    OSError: it cannot be read.
  """
  path = pathlib.Path(source).expanduser()
  if not path.exists():
    raise ValueError(
      f"there is no {path}: give a run's folder, or an exported file"
    )
  batch_size = batch_size or (1 if jax.default_backend() == 'cpu' else 8)
  if path.is_dir():
    return Run(path).segmenter(batch_size)
  return _of_file(path, batch_size)


class Run:
  """A finished run of an adaptation, or of dense training.

  Attributes:
    folder: of the run.
    config: of the run.
    results: what results.json holds.
    role: what the system answers as: 'student', or 'teacher'.
    classes: names of labels 1..n.
    palette: the colours of labels 0..n.
    sizes: rows and columns of the images of the support, int [s, 2].
    digest: of the weights.

  Raises:
    ValueError: it is unfinished, damaged, or of another task.
    OSError: it cannot be read.
  """

  def __init__(self, folder: pathlib.Path):
    weights.description(folder)  # says what a folder of no run lacks
    self.folder = folder
    self.config = configs.restored(folder / 'config.json')
    if self.config.task not in _TASKS:
      raise ValueError(
        f'{folder} is a run of the task {self.config.task!r}: only one that '
        'adapted to a support set, or was trained densely, has classes of its '
        'own to predict'
      )
    if not (folder / 'results.json').is_file():
      raise ValueError(
        f'{folder} is not finished, it has no results.json: the command that '
        f'started it goes on, with --workdir {folder}'
      )
    self.results = files.read_json(folder / 'results.json')
    self._data = None
    self._describe()
    self._system, _ = systems.build(self.config, len(self.classes))
    self.role = self._system.roles[0]
    # What was scored, and nothing else: an older step would answer otherwise.
    kept = weights.kept(folder)
    step = self.results.get('checkpoint', self.results).get(
      'step' if kept == 'best' else 'steps'
    )
    graph, abstract = nnx.split(self._system)
    self._variables = params.merge(
      params.flatten(abstract), weights.from_folder(folder, kept, step)
    )
    self._graph, self._abstract = graph, abstract
    self.digest = files.digest_of(
      self.role, self.classes, *map(np.asarray, self._variables.values())
    )

  @property
  def data(self) -> base.Data:
    """The dataset of the run, with its support, which must be what it was."""
    if self._data is None:
      self._data = _TASKS[self.config.task](self.config)
      ids = files.read_json(self.folder / 'ids.json')
      if ids['digest'] != self._data.ids()['digest']:
        raise ValueError(
          f'the dataset {self.config.data.name} is not what {self.folder} was '
          'trained on: prepare it as it was'
        )
    return self._data

  def _describe(self):
    ids = files.read_json(self.folder / 'ids.json')
    if 'classes' in ids:
      self.classes = tuple(ids['classes'])
      self.palette = tuple(map(tuple, ids['palette']))
      self.sizes = np.array(ids['sizes'])
      return
    # An older version wrote down neither classes nor colours.
    dataset = datasets.load(self.config.data.name, **self.config.data.args)
    index = {id_: i for i, id_ in enumerate(dataset.train.ids)}
    rows = [index[id_] for id_ in ids.get('support', ()) if id_ in index]
    self.classes = tuple(dataset.classes)
    self.palette = tuple(tuple(map(int, x)) for x in dataset.palette)
    self.sizes = np.asarray(dataset.train.sizes)[rows or slice(None)]

  def memory(self):
    """What a teacher remembers of the support; None for a student."""
    if self.role == 'student':
      return None
    support = self.data.support
    given = Support(
      images=support.images[None],
      masks=masks_of(support.labels.astype(np.int32), self.data.ways)[None],
      present=self.data.present[None],
    )
    made = jax.jit(lambda variables, x: self._module(variables).memorize(x))
    return made(self._variables, given)

  def answer(self, memory=None):
    """A function of uint8 images [b, S, S, 3] that gives logits.

    Args:
      memory: what `memory` gives.
    """

    def answered(variables, memory, images):
      system = self._module(variables)
      return system.predict(images, memory, (self.role,))[self.role].logits

    compiled = jax.jit(answered)
    return lambda images: compiled(self._variables, memory, images)

  def segmenter(self, batch_size: int = 1) -> Segmenter:
    """The run's product."""
    return Segmenter(
      answer=self.answer(self.memory()),
      size=self.config.data.image_size,
      classes=self.classes,
      palette=self.palette,
      seen=usual(self.sizes),
      digest=self.digest,
      batch_size=batch_size,
    )

  def _module(self, variables):
    state = params.replace(self._abstract, variables)
    return nnx.merge(self._graph, state, copy=True)


def usual(sizes: np.ndarray) -> tuple[int, int]:
  """The median rows and columns of images, from sizes [s, 2]."""
  height, width = np.median(sizes, axis=0).round().astype(int).tolist()
  return height, width


def open_file(
  path: str | os.PathLike,
) -> onnx.Segmenter | stablehlo.Program | torch.Segmenter:
  """An exported file: uint8 images [b, H, W, 3] to labels and probabilities.

  Its `record` says of which `size` images must be, None for any.

  Raises:
    ValueError: it is none of ours, or a package is missing.
    OSError: it cannot be read.
  """
  if not zipfile.is_zipfile(path):
    return onnx.Segmenter(path)
  if torch.wrote(path):
    return torch.Segmenter(path)
  return stablehlo.Program(path)


def _of_file(path, batch_size):
  file = open_file(path)
  record = file.record

  def answer(images):
    # Logits but for a number that is the same for all labels of a pixel.
    return np.log(np.maximum(file(images)[1], _TINY))

  try:
    return Segmenter(
      answer=answer,
      size=record['image_size'],
      classes=tuple(record['classes']),
      palette=tuple(map(tuple, record['palette'])),
      seen=tuple(record['seen']),
      digest=record['digest'],
      batch_size=batch_size,
    )
  except KeyError as error:
    raise ValueError(
      f'{path} lacks {error} in its record: export it again'
    ) from error
