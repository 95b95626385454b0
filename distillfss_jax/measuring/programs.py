"""The programs that a config's run calls, each with random input."""

import copy
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillfss_jax import params, systems, train_step
from distillfss_jax.data import pipeline
from distillfss_jax.models import distilled
from distillfss_jax.tasks import adaptation
from distillfss_jax.types import Dense, Episode, Support, Table

WHAT = ('backbone', 'teacher', 'student', 'train')  # of DCAMA and students
OTHERS = ('predict', 'train')  # of all other systems
SHOTS = (1, 5, 10, 50)


def is_pair(config) -> bool:
  """Whether a config has DCAMA's teacher, which students can imitate."""
  systems_of_it = ('transferfss', 'distillfss')
  return config.model.name == 'dcama' and config.system in systems_of_it


def chosen(
  config,
  what: Sequence[str] | None,
  shots: Sequence[int | str] | None,
  students: Sequence[str],
) -> tuple[Sequence[str], list[int], Sequence[str]]:
  """What to look at, with what the config leaves open filled in.

  Args:
    config: see `configs/common.py`.
    what: of `WHAT`, or of `OTHERS`; None for all that the config has.
    shots: sizes of the support of `teacher` or `predict`; None for `SHOTS`, or
      the config's own.
    students: of `models/distilled.py`.

  Raises:
    ValueError: an unknown name, or no number.
  """
  pair = is_pair(config)
  kinds = WHAT if pair else OTHERS
  what = kinds if what is None else what
  if shots is None:
    own = (config.support.shots,) if 'support' in config else ()
    shots = SHOTS if pair else own
  named = (('what', what, kinds), ('students', students, distilled.variants))
  for flag, names, known in named:
    if unknown := sorted(set(names) - set(known)):
      raise ValueError(
        f'--{flag}: no {", ".join(map(repr, unknown))}; there are: '
        f'{", ".join(known)}'
      )
  if not all(str(s).isdecimal() and int(s) for s in shots):
    raise ValueError(f'--shots: {shots} are not all whole numbers from 1 up')
  return what, [int(s) for s in shots], students


def random_step(config, ways: int, takes: type, random):
  """Random input of a training step, as the config's task would give it.

  Args:
    config: see `configs/common.py`.
    ways: foreground classes.
    takes: the type of the system's batches.
    random: NumPy's generator.

  Returns:
    What `Program.shared` takes besides the variables, a batch [b, ...], and
    [b] bool, which of its items count.
  """
  side = config.data.image_size

  def images(*lead):
    return random.integers(0, 256, (*lead, side, side, 3), np.uint8)

  def labels(*lead, most=ways):
    return random.integers(0, 1 + most, (*lead, side, side), np.uint8)

  if takes is Dense:
    b = config.dense.batch_size
    return (), Dense(images(b), labels(b)), np.ones(b, bool)
  shots = config.support.shots
  if takes is Table:
    support = images(shots), labels(shots).astype(np.int32)
    tables = adaptation.episode_tables(config, np.ones((shots, ways), bool))
    step = next(iter(pipeline.step_tables(tables, steps=1)))
    return support, Table(step['table']), step['valid']
  b, known = config.source.batch_size, config.model.fields.get('classes', 2) - 1
  batch = Episode(
    images(b),
    labels(b, most=1),
    images(b, shots),
    labels(b, shots, most=1),
    labels(b, most=known),
    random.integers(0, known, b).astype(np.int32),
  )
  return (np.arange(1, 1 + known, dtype=np.int32),), batch, np.ones(b, bool)


class Programs:
  """Goes through a config's programs; a subclass says what is done with each.

  Args:
    config: see `configs/common.py`; training takes its support and episodes.
    mesh: the devices of a training step.
    ways: foreground classes.
    batch_size: queries of a call.
  """

  def __init__(
    self, config, mesh: jax.sharding.Mesh, *, ways: int, batch_size: int
  ):
    self.config, self.mesh = config, mesh
    self.ways, self.batch_size = ways, batch_size
    self.random = np.random.default_rng(0)

  def visit(
    self, what: Sequence[str], shots: Iterable[int], students: Sequence[str]
  ) -> None:
    """Looks at one program after the other; see `chosen` for what."""
    if 'backbone' in what:
      self._backbone()
    if 'teacher' in what:
      built = self._build(self._variant('transferfss'))
      for s in shots:
        self._few_shot('teacher', s, *built, ('teacher',))
    for student in students if 'student' in what else ():
      self._student(student)
    if 'predict' in what:
      self._predict(shots)
    if 'train' in what and not is_pair(self.config):
      self._train(self.config)
    elif 'train' in what:
      self._train(self._variant('transferfss'))
      for student in students:
        self._train(self._variant('distillfss', student), student)

  def look(self, case, call, inputs, counted, items, kept=None, before=()):
    """Does with a program what it is for.

    Args:
      case: its name, or that and the number of shots.
      call: jitted; with a training state as first input it returns the next.
      inputs: arrays or their shapes, and roles.
      counted: paths of parameters within the first input.
      items: images or sweeps of a call.
      kept: of the support.
      before: parameters that were read to make the inputs.

    Returns:
      The result or its shapes, and the parameters read.
    """
    raise NotImplementedError

  def step(self, program, variables, arrays, batch, valid):
    """A training step's inputs, and what is kept of the support."""
    raise NotImplementedError

  def draw(self, program):
    """A program's variables."""
    raise NotImplementedError

  def _backbone(self):
    config = self._variant('transferfss')
    graph, abstract = nnx.split(systems.build(config, self.ways)[0])

    def encode(variables, images):
      module = nnx.merge(graph, params.replace(abstract, variables))
      return module.teacher.encode(images)

    _, variables, counted = self._build(config)
    images = self._images(self.batch_size)
    inputs = variables, images
    self.look('backbone', jax.jit(encode), inputs, counted, len(images))

  def _predict(self, shots):
    """What the config's system says of images, in all its roles."""
    program, variables, counted = self._build(self.config)
    if program.takes is Dense or program.roles == ('student',):
      images = self._images(self.batch_size)
      inputs = variables, None, images, program.roles
      self.look('predict', program.predict, inputs, counted, len(images))
      return
    for s in shots:
      self._few_shot('predict', s, program, variables, counted, program.roles)

  def _few_shot(self, name, s, program, variables, counted, roles):
    """A support of s shots, and then queries."""
    images = self._images(1, s)
    masks = self.random.random((*images.shape[:4], self.ways)) < 0.5
    support = Support(
      images,
      jnp.asarray(masks, jnp.float32),
      jnp.ones((1, s, self.ways), bool),
    )
    inputs, case = (variables, support), ('memorize', s)
    memory, read = self.look(case, program.memorize, inputs, counted, s)
    images, case = self._images(self.batch_size), (name, s)
    inputs, items = (variables, memory, images, roles), len(images)
    self.look(case, program.predict, inputs, counted, items, memory, read)

  def _student(self, student):
    config = self._variant('distillfss', student)
    program, variables, counted = self._build(config)
    images = self._images(self.batch_size)
    inputs = variables, None, images, ('student',)
    name = f'student {student}'
    self.look(name, program.predict, inputs, counted, len(images))

  def _train(self, config, student=''):
    """A step: all of a batch forward and backward, and the optimiser."""
    program, variables, _ = self._build(config)
    arrays, batch, valid = random_step(
      config, self.ways, program.takes, self.random
    )
    inputs, kept = self.step(program, variables, arrays, batch, valid)
    moved = {f'params/{path}' for path in inputs[0].params}
    name = f'train {config.system} {student}'.strip()
    shots = None if program.takes is Dense else config.support.shots
    self.look((name, shots), program.dispatch, inputs, moved, 1, kept)

  def _variant(self, system, student=''):
    """The config, as one of both systems."""
    config = copy.deepcopy(self.config)
    config.system = system
    trained = [name for name in config.optim.trainable if 'student' not in name]
    if student:
      config.student = student
      config.model.fields.voting = 0
      config.model.fields.concat_support = False
      trained.append('student')
    config.optim.trainable = tuple(trained)
    return config

  def _build(self, config):
    """A config's program, its variables, and the paths of its parameters."""
    program = train_step.build(config, self.ways, self.mesh)
    variables = self.draw(program)
    buffers = jax.eval_shape(program.start, variables).buffers
    return program, variables, variables.keys() - buffers.keys()

  def _images(self, *lead):
    shape = (*lead, *(self.config.data.image_size,) * 2, 3)
    return jnp.asarray(self.random.integers(0, 256, shape, np.uint8))


def arrays_of(inputs) -> list:
  """Inputs without roles: a compiled program has those in it."""
  return [x for x in inputs if not _is_roles(x)]


def case_of(case) -> tuple[str, int | None]:
  """A case's name and its number of shots; see `Programs.look`."""
  return (case, None) if isinstance(case, str) else case


def _is_roles(x):
  return isinstance(x, tuple) and bool(x) and isinstance(x[0], str)
