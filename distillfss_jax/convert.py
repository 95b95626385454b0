"""Weights of other programs to ours, and ours to PyTorch.

    python -m distillfss_jax.convert swin_fold0_pascal.pt \
      --backbone swin_b --out weights/dcama_swin_b
    python -m distillfss_jax.convert runs/nucleus --to torch model.safetensors

A run reads such files by itself (config.model.init): converting is for what is
read often, and to look at what is in a file.
"""

import json
import pathlib
import sys

import jax
from absl import app, flags, logging
from flax import nnx
from ml_collections import ConfigDict

from distillfss_jax import backbones, files, models, params
from distillfss_jax.models import dcama, distilled
from distillfss_jax.pretrained import archive, hub, weights
from distillfss_jax.workdir import checkpoint


def names() -> tuple[str, ...]:
  """What can be converted: the models, and 'backbone', of any of them."""
  return ('backbone', *models.names())


def build(
  model: str, backbone: str, image_size: int, **fields
) -> tuple[weights.Part, ...]:
  """A model without numbers, as the parts that a system has.

  Args:
    model: of `names`.
    backbone: a name of the tables in backbones/.
    image_size: the images' height and width, in pixels.
    **fields: 'fields' and 'backbone_fields' of the constructors, 'student' (''
      for none) and 'ways', all with defaults.

  Raises:
    ValueError: a name does not exist, or fields do not fit.
  """
  if model not in names():
    raise ValueError(f'no model {model!r}; there are: {", ".join(names())}')

  def make():
    rngs = nnx.Rngs(0)
    if model == 'backbone':
      return backbones.build(
        backbone,
        image_size=image_size,
        rngs=rngs,
        **fields.get('backbone_fields', {}),
      ), None
    config = ConfigDict(
      {
        'name': model,
        'fields': fields.get('fields', {}),
        'dtype': 'float32',
        'backbone': {
          'name': backbone,
          'fields': fields.get('backbone_fields', {}),
        },
      }
    )
    teacher = models.build(config, image_size, rngs)
    if not fields.get('student'):
      return teacher, None
    kind, ways = fields['student'], fields.get('ways', 1)
    return teacher, distilled.build(kind, ways, teacher, rngs)

  made, student = nnx.eval_shape(make)
  if model == 'backbone':
    return (weights.Part('teacher/backbone/', made),)
  if student is None:
    return (weights.Part('teacher/', made),)
  return (
    weights.Part('teacher/', made, 'teacher.'),
    weights.Part('student/', student, 'student.'),
  )


def to_ours(
  source: str,
  out: pathlib.Path,
  *,
  model: str = '',
  backbone: str = '',
  image_size: int = 384,
  dont_load: tuple[str, ...] = (),
) -> dict:
  """Writes a folder that `model.init` reads; returns its description.

  Whether the decoder reads the support's shallow maps, and how many students
  there are, is read off the tensors.

  Args:
    source: a file, or a name of `hub.PUBLISHED`, which also says the rest.
    out: the folder; it must not exist, or be empty.
    model, backbone, image_size: see `build`.
    dont_load: see `weights.load`.

  Raises:
    OSError, ValueError: see `weights.load`.
  """
  known = hub.PUBLISHED.get(source)
  model = model or (known.model if known else 'dcama')
  backbone = backbone or (
    known.fields.get('model.backbone.name', '') if known else ''
  )
  if not backbone:
    raise ValueError(
      f'--backbone is missing; there are: {", ".join(backbones.variants())}'
    )
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ValueError(f'{out} exists: give --out a new folder, or delete it')
  file = hub.find(source.partition('#')[0])
  if file.is_dir():
    raise ValueError(
      f'{file} is a folder of this package already: give it as model.init, or '
      'give --to torch'
    )
  tensors = weights.read_file(source)
  fields = _fields(tensors) if model == 'dcama' else {}
  parts = build(model, backbone, image_size, **fields)
  arrays = weights.from_tensors(tensors, parts, leave=dont_load)
  wanted = _abstract(parts)
  absent = wanted.keys() - arrays.keys()
  arrays = params.merge(
    {path: x for path, x in wanted.items() if path not in absent}, arrays
  )
  described = {
    'converted': {'source': str(source), 'sha256': hub.sha256(file)},
    'student': fields.get('student', ''),
    'data': {'image_size': image_size},
    'model': {
      'name': model,
      'backbone': {'name': backbone, 'fields': {}},
      'fields': fields.get('fields', {}),
    },
  }
  saver = checkpoint.Checkpointer(out / 'checkpoints')
  try:
    saver.save(0, {'params': arrays})
  finally:
    saver.close()
  files.write_atomically(
    out / 'config.json', json.dumps(described, indent=2) + '\n'
  )
  if absent:
    print(f'left out, and to keep initial values: {sorted(absent)}')
  return described


def to_torch(folder: pathlib.Path, out: pathlib.Path) -> int:
  """Writes a run, or a converted folder, as PyTorch; returns its tensors.

  Raises:
    OSError, ValueError: the folder holds no model, its students have no
      counterpart in PyTorch, or the file cannot be written.
  """
  if out.suffix not in ('.pt', '.pth', '.safetensors'):
    raise ValueError(f'{out} must end in .pt, .pth or .safetensors')
  described = weights.description(folder)
  arrays = weights.from_folder(folder, weights.kept(folder))
  model = described['model']
  students = [x for path, x in arrays.items() if path.startswith('student/')]
  name = model.get('name', 'dcama')
  parts = build(
    name,
    model['backbone']['name'],
    described['data']['image_size'],
    fields=_constructor(model),
    backbone_fields=model['backbone'].get('fields', {}),
    student=described.get('student', '') if students else '',
    ways=len(students[0]) if students else 1,
  )
  arrays = params.merge(_abstract(parts), arrays)
  tensors = weights.to_tensors(arrays, parts)
  archive.write(out, tensors)
  return len(tensors)


def _constructor(model):
  """The fields of a described model; an older version had them beside."""
  older = ('heads', 'positional', 'concat_support')
  found = {name: model[name] for name in older if name in model}
  return found | dict(model.get('fields', {}))


def _abstract(parts):
  """{path: abstract array} of all parts."""
  return {
    f'{part.path}{path}': x
    for part in parts
    for path, x in params.flatten(part.module).items()
  }


def _fields(tensors):
  """What the tensors of a whole model say about it."""
  ends = {name: x.shape for name, x in tensors.items()}
  students = {
    found[-1]
    for name in ends
    if (found := name.partition('.coarse_extractor.')[0].split('.'))
    and 'coarse_extractor' in name
  }
  mixers = [
    shape[1]
    for name, shape in ends.items()
    if name.endswith('mixer1.0.weight') and len(shape) == 4
  ]
  skips = [
    shape[0]
    for name, shape in ends.items()
    if name.endswith('linears.0.bias') and len(shape) == 1
  ]
  concat = bool(mixers and skips) and mixers[0] > 2 * min(skips) + dcama.WIDTH
  fields = {'fields': {'concat_support': concat}}
  if students:
    fields |= {'student': 'full', 'ways': len(students)}
  return fields


def main(argv):
  """Converts what the flags say."""
  values = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  jax.config.update('jax_platforms', 'cpu')  # nothing here needs more
  expected = 2 if values.to is None else 3
  if len(argv) != expected:
    sys.exit(
      f'error: give SOURCE --out FOLDER, or RUN --to torch FILE; got {argv[1:]}'
    )
  try:
    if values.to:
      out = pathlib.Path(argv[2])
      count = to_torch(pathlib.Path(argv[1]), out)
      print(f'{out}: {count} tensors, as the original loads them')
      return
    if not values.out:
      raise ValueError('--out is missing: the folder to write')
    out = pathlib.Path(values.out)
    described = to_ours(
      argv[1],
      out,
      model=values.model or '',
      backbone=values.backbone or '',
      image_size=values.image_size,
      dont_load=tuple(values.dont_load),
    )
  except (ValueError, TypeError, OSError) as error:
    logging.debug('where it failed', exc_info=True)
    sys.exit(f'error: {error}')
  alone = described['model']['name'] == 'backbone'
  key = 'backbone.init' if alone else 'init'
  print(f'{out} is written; use it by --config.model.{key}={out}')


def parse(argv):
  """Parses flags; whatever is wrong with them is one line on the terminal."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, ValueError) as error:
    sys.exit(f'error: {" ".join(str(error).split())}')


def define_flags():
  """Defines the flags; not on import, other programs have their own."""
  flags.DEFINE_enum('model', None, names(), 'What it is; by default dcama.')
  flags.DEFINE_string('backbone', None, 'A name of the tables in backbones/.')
  flags.DEFINE_integer('image_size', 384, 'Height and width of the images.')
  flags.DEFINE_string('out', None, 'The folder to write.')
  flags.DEFINE_enum('to', None, ['torch'], 'RUN --to torch FILE, the way back.')
  flags.DEFINE_multi_string(
    'dont_load', [], 'Regular expression of names or paths that stay out.'
  )


if __name__ == '__main__':
  define_flags()
  app.run(main, flags_parser=parse)
