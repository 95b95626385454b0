"""Weights through files: into our models, out again, and what does not fit."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import parity
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import common
from distillfss_jax import convert, parallel, params, systems, train_step
from distillfss_jax.pretrained import archive, hub, weights
from distillfss_jax.types import Support

ROOT = pathlib.Path(__file__).resolve().parents[1]
_BUFFERS = ('.pe', 'relative_position_index', 'attn_mask')
BACKBONE = 'teacher/backbone/'
_BACKBONES = {
  'tinyswin': ('swin_tiny_test', 128),
  'resnet50': ('resnet50', 128),
  'swin': ('swin_b', 384),
}


def config_of(backbone, size, *, system='distillfss', student='full', **model):
  """A config of one way."""
  config = common.get_config()
  config.system, config.student = system, student
  config.data.image_size = size
  config.model.fields.mix_size = 96 if size == 128 else 0
  config.model.backbone.name = backbone
  config.optim.trainable = ('D',)
  for name, value in model.items():
    node, _, key = name.rpartition('__')
    (config.model[node] if node else config.model)[key] = value
  return config


def loaded(config, ways=1):
  """The program of a config, and its variables with what it loads."""
  built = train_step.build(config, ways, parallel.mesh())
  system, _ = systems.build(config, ways)
  initial = params.flatten(parity.fill_randomly(system, seed=7))
  return built, initial, built.load(initial)


def state_dict(shared, arch):
  """What PyTorch would save of the golden DistilledDCAMA, less its tables."""
  return {
    name: x
    for name, x in parity.torch_weights(shared, arch).items()
    if not name.endswith(_BUFFERS)
  }


# --- goldens, through files ---


def assert_golden(shared, arch, config, roles):
  """The logits of query 0 are the original's."""
  built, _, variables = loaded(config)
  size = config.data.image_size
  inputs = np.load(shared(f'goldens/dcama/inputs_{size}.npz'))
  support = Support(
    inputs['support_u8'][None, :1],
    inputs['support_mask'][None, :1, ..., None].astype(np.float32),
    np.ones((1, 1, 1), bool),
  )
  memory = None
  if 'teacher' in roles:
    memory = built.memorize(variables, support)
  answers = built.predict(variables, memory, inputs['query_u8'][:1], roles)
  for role in roles:
    file, name = {
      'teacher': ('head', 'k1_F.logits'),
      'student': ('student', 'eval.logits'),
    }[role]
    golden = np.load(shared(f'goldens/dcama/{file}_{arch}_{size}.npz'))
    parity.assert_close(
      golden,
      name,
      parity.channels_first(answers[role].logits),
      parity.DEEP_TOLERANCE if arch == 'swin' else parity.TOLERANCE,
    )


@pytest.mark.parametrize(
  ('arch', 'ending'),
  [
    pytest.param('resnet50', '.safetensors', marks=pytest.mark.slow),
    pytest.param('swin', '.pt', marks=pytest.mark.slow),
  ],
)
def test_golden_logits_through_files(shared, tmp_path, arch, ending):
  """PyTorch -> convert -> model, and back to PyTorch -> model."""
  backbone, size = _BACKBONES[arch]
  source, folder = tmp_path / f'theirs{ending}', tmp_path / 'ours'
  given = state_dict(shared, arch)
  archive.write(source, given)
  convert.to_ours(str(source), folder, backbone=backbone, image_size=size)
  config = config_of(backbone, size, init=str(folder))
  assert_golden(shared, arch, config, ('student', 'teacher'))
  back = tmp_path / f'back{ending}'
  convert.to_torch(folder, back)
  again = archive.read(back)
  for name, x in given.items():
    if 'fc.' in name or 'head.' in name or '_extractor.norm.' in name:
      continue  # no segmenter reads the classifier: it is not kept
    np.testing.assert_array_equal(again[name], x, name)


def test_the_original_files(shared):
  """A whole model and an old-format backbone, as PyTorch wrote them."""
  file = shared('goldens/torch_files/distilled_tinyswin.pt')
  config = config_of('swin_tiny_test', 128, init=str(file))
  assert_golden(shared, 'tinyswin', config, ('student', 'teacher'))
  file = shared('goldens/torch_files/backbone_tinyswin_legacy.pth')
  config = config_of('swin_tiny_test', 128, backbone__init=str(file))
  _, initial, variables = loaded(config)
  theirs = parity.torch_weights(
    shared, 'tinyswin', 'teacher.feature_extractor.'
  )
  np.testing.assert_array_equal(
    variables['teacher/backbone/layers/2/blocks/1/mlp/fc2/kernel'],
    theirs['layers.2.blocks.1.mlp.fc2.weight'].T,
  )
  kept = {path for path in initial if initial[path] is variables[path]}
  assert kept == {p for p in initial if not p.startswith(BACKBONE)}


def test_a_teacher_in_half_precision_behind_a_prefix(shared):
  file = shared('goldens/torch_files/teacher_tinyswin_module_prefix.pt')
  config = config_of('swin_tiny_test', 128, init=str(file))
  skips = convert._fields(archive.read(file))['fields']['concat_support']
  config.model.fields.concat_support = skips
  config.system = 'transferfss'
  _, _, variables = loaded(config)
  theirs = parity.torch_weights(shared, 'tinyswin', 'teacher.')
  ours = variables['teacher/conv4/convs/1/kernel']
  assert ours.dtype == np.float32
  np.testing.assert_array_equal(
    ours,
    theirs['model.conv4.3.weight']
    .transpose(2, 3, 1, 0)
    .astype(np.float16)
    .astype(np.float32),
  )


@pytest.mark.parametrize('arch', _BACKBONES)
@pytest.mark.parametrize('kind', ['distilled', 'teacher_concat'])
def test_what_is_written_is_what_the_original_loads(shared, arch, kind):
  """Names and shapes, all of them; and the tables have their values."""
  names = json.loads(
    shared(f'goldens/dcama/names_{kind}_{arch}.json').read_text()
  )['state_dict']
  backbone, size = _BACKBONES[arch]
  fields = (
    {'student': 'full'}
    if kind == 'distilled'
    else {'fields': {'concat_support': True}}
  )
  parts = convert.build('dcama', backbone, size, **fields)
  empty = {
    path: np.broadcast_to(np.float32(0), shape)
    for path, shape in weights.shapes_of(parts).items()
  }
  written = weights.to_tensors(empty, parts)
  assert {name: list(x.shape) for name, x in written.items()} == names
  if (arch, kind) == ('swin', 'distilled'):
    golden = np.load(shared('goldens/dcama/backbone_swin_384.npz'))
    start = 'teacher.feature_extractor.layers.0.blocks.1.'
    np.testing.assert_array_equal(
      written[start + 'attn.relative_position_index'],
      golden['relative_position_index'],
    )
    parity.assert_close(
      golden, 'attn_mask_layer0_block1', written[start + 'attn_mask'], 0
    )


# --- without goldens ---


def tiny(model='dcama', backbone='swin_tiny_test', **fields):
  """A model's parts without numbers, its arrays, and the same for PyTorch."""
  return _tiny(model, backbone, json.dumps(fields))


@functools.cache
def _tiny(model, backbone, fields):
  size = 64 if backbone.startswith(('resnet', 'dino')) else 128
  parts = convert.build(model, backbone, size, **json.loads(fields))
  rng = np.random.default_rng(0)
  arrays = {
    path: (0.1 * rng.normal(size=shape) + path.endswith('/var')).astype(
      np.float32
    )
    for path, shape in weights.shapes_of(parts).items()
  }
  return parts, arrays, weights.to_tensors(arrays, parts)


def assert_same(found, arrays):
  assert found.keys() == arrays.keys()
  for path, x in arrays.items():
    np.testing.assert_array_equal(found[path], x, path)


@pytest.mark.parametrize('ending', ['.pt', '.safetensors'])
@pytest.mark.parametrize(
  ('model', 'backbone', 'fields'),
  [
    ('dcama', 'swin_tiny_test', {'student': 'full', 'ways': 3}),
    ('dcama', 'resnet_tiny', {'fields': {'concat_support': True}}),
    ('backbone', 'resnet_tiny', {}),
    ('backbone', 'dino_tiny_test', {}),
  ],
)
def test_a_round_trip_changes_no_bit(tmp_path, model, backbone, fields, ending):
  parts, arrays, tensors = tiny(model, backbone, **fields)
  archive.write(tmp_path / f'x{ending}', tensors)
  again = archive.read(tmp_path / f'x{ending}')
  assert_same(weights.from_tensors(again, parts), arrays)
  if model == 'dcama':
    assert convert._fields(again) == {
      'fields': {'concat_support': False},
      **fields,
    }


@given(st.sampled_from(['', 'module.', 'module.model.', '_orig_mod.module.']))
def test_prefixes_are_seen_through(prefix):
  for fields in ({}, {'student': 'full'}):
    parts, arrays, tensors = tiny(**fields)
    wrapped = {prefix + name: x for name, x in tensors.items()}
    assert_same(weights.from_tensors(wrapped, parts), arrays)


def test_timm_names_a_swin_in_its_own_way():
  """The step to the next stage belongs to that stage; the head is deeper."""
  parts, arrays, tensors = tiny('backbone')
  theirs = {}
  for name, x in tensors.items():
    for i in range(3):
      if name.startswith(f'layers.{i}.downsample.'):
        name = name.replace(f'layers.{i}.', f'layers.{i + 1}.')
        break
    theirs[name.replace('head.', 'head.fc.')] = x
  assert theirs.keys() != tensors.keys()
  assert_same(weights.from_tensors(theirs, parts), arrays)


@given(st.data())
@settings(max_examples=30)
def test_whatever_does_not_fit_is_named(data):
  parts, _, tensors = tiny(backbone='resnet_tiny')
  read = sorted(
    name
    for name in tensors
    if not name.endswith(('num_batches_tracked', *_BUFFERS))
    and '.fc.' not in name
  )
  name = data.draw(st.sampled_from(read))
  tensors = dict(tensors)
  x = tensors.pop(name)
  how = data.draw(st.sampled_from(['missing', 'left over', 'mis-shaped']))
  if how == 'left over':
    tensors[name] = x
    name = data.draw(
      st.from_regex(r'[a-z]{3,8}(\.[a-z]{3,8}){0,2}', fullmatch=True)
    )
    tensors[name] = x
  elif how == 'mis-shaped':
    tensors[name] = np.concatenate([x, x])
  with pytest.raises(ValueError, match=how) as error:
    weights.from_tensors(tensors, parts)
  if how == 'left over':
    assert name in str(error.value)


def test_tables_that_differ_are_refused():
  parts, _, tensors = tiny()
  for name in (
    'feature_extractor.layers.1.blocks.1.attn_mask',
    'feature_extractor.layers.0.blocks.0.attn.relative_position_index',
    'model.pe.2.pe',
  ):
    other = tensors[name] + 1
    with pytest.raises(ValueError, match=f'{name} differs by up to'):
      weights.from_tensors({**tensors, name: other}, parts)
    with pytest.raises(ValueError, match=f'{name} is '):
      weights.from_tensors({**tensors, name: other[..., :1]}, parts)
    rest = {k: x for k, x in tensors.items() if k != name}
    weights.from_tensors(rest, parts)


def test_dont_load_by_name_and_by_path():
  parts, arrays, tensors = tiny()
  kept = {path for path in arrays if path.startswith('teacher/mixer1/')}
  odd = {
    **{k: x for k, x in tensors.items() if 'mixer1' not in k},
    'model.mixer1.0.weight': np.zeros((1, 2, 3, 3), np.float32),
    'extra.weight': np.zeros(3, np.float32),
  }
  found = weights.from_tensors(
    odd, parts, leave=('teacher/mixer1/.*', r'extra\..*')
  )
  assert_same(found, {p: x for p, x in arrays.items() if p not in kept})
  with pytest.raises(TypeError, match='give a tuple'):
    weights.from_tensors(odd, parts, leave='extra')
  with pytest.raises(ValueError, match='no regular expression'):
    weights.from_tensors(odd, parts, leave=('(',))


def small(**kwargs):
  return config_of('resnet_tiny', 64, **kwargs)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A teacher, a teacher with students, and a backbone, as PyTorch files."""
  folder = tmp_path_factory.mktemp('weights')
  made = {
    'teacher': ('dcama', {}),
    'distilled': ('dcama', {'student': 'full'}),
    'backbone': ('backbone', {}),
  }
  for name, (model, fields) in made.items():
    _, _, tensors = tiny(model, 'resnet_tiny', **fields)
    archive.write(folder / f'{name}.pt', tensors)
  return folder


def from_file(before, after):
  """The first parts of the paths that have changed."""
  changed = {p for p in before if not np.array_equal(before[p], after[p])}
  return {
    BACKBONE if p.startswith(BACKBONE) else p.split('/')[0] for p in changed
  }


def test_a_config_loads_what_the_file_has(files):
  backbone, teacher, student = BACKBONE, 'teacher', 'student'
  for name, kwargs, expected in (
    ('teacher', {}, {backbone, teacher}),
    ('teacher', {'student': 'light'}, {backbone, teacher}),
    ('distilled', {}, {backbone, teacher, student}),
    (
      'distilled',
      {'system': 'transferfss', 'dont_load': (r'student\..*',)},
      {backbone, teacher},
    ),
  ):
    config = small(init=str(files / f'{name}.pt'), **kwargs)
    _, before, after = loaded(config)
    assert from_file(before, after) == expected
  config = small(backbone__init=str(files / 'backbone.pt'))
  _, before, after = loaded(config)
  assert from_file(before, after) == {backbone}
  # The backbone's own file wins over that of the whole.
  both = small(
    init=str(files / 'teacher.pt'), backbone__init=str(files / 'backbone.pt')
  )
  _, _, both = loaded(both)
  _, arrays, _ = tiny('backbone', 'resnet_tiny')
  for path, x in arrays.items():
    np.testing.assert_array_equal(both[path], x)


def test_what_a_config_asks_must_fit(files):
  for kwargs, said in (
    ({'init': 'nosuch.pt'}, 'no file or folder nosuch.pt'),
    ({'init': str(files)}, 'no folder'),
    ({'init': str(files / 'backbone.pt')}, 'missing: teacher/attention'),
    ({'init': str(files / 'distilled.pt'), 'student': 'light'}, 'left over'),
    ({'init': str(files / 'distilled.pt') + '#ema'}, "no 'ema'"),
    ({'backbone__init': 'resnet50_a1h'}, "model.backbone.name='resnet50'"),
    ({'init': 'resnet50_a1h'}, 'give it as config.model.backbone.init'),
    ({'dont_load': ('x',)}, 'nothing is loaded'),
    (
      {'init': str(files / 'teacher.pt'), 'dont_load': ('nosuch',)},
      'matches no name',
    ),
  ):
    with pytest.raises((ValueError, OSError), match=said):
      loaded(small(**kwargs))


def command(*arguments, cwd=ROOT):
  return subprocess.run(
    [sys.executable, '-m', *map(str, arguments)],
    cwd=cwd,
    env={
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    },
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.slow
def test_the_command_both_ways_and_a_run(files, tmp_path):
  """File -> folder -> a run that starts there -> PyTorch."""
  folder, run = tmp_path / 'ours', tmp_path / 'run'
  done = command(
    'distillfss_jax.convert', files / 'teacher.pt', '--backbone',
    'resnet_tiny', '--image_size', 64, '--out', folder,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert f'--config.model.init={folder}' in done.stdout
  arguments = (
    'distillfss_jax.main', '--config', ROOT / 'configs/demo.py:smoke',
    '--config.student=full', f'--config.model.init={folder}',
    '--config.optim.lr=0.0', '--config.optim.weight_decay=0.0',
    '--workdir', run,
  )  # fmt: skip
  done = command(*arguments)
  assert done.returncode == 0, done.stderr
  out = tmp_path / 'back.safetensors'
  done = command('distillfss_jax.convert', run, '--to', 'torch', out)
  assert done.returncode == 0, done.stderr
  _, _, theirs = tiny('dcama', 'resnet_tiny')
  found = archive.read(out)
  for name, x in theirs.items():
    np.testing.assert_array_equal(found[f'teacher.{name}'], x, name)
  assert 'student.0.coarse_extractor.2.2.bias' in found


def test_errors_are_one_line_and_leave_nothing(files, tmp_path):
  malicious = tmp_path / 'bad.pt'
  malicious.write_bytes(b'\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.')
  out, run = tmp_path / 'out', tmp_path / 'run'
  convert_ = 'distillfss_jax.convert'
  for arguments, said in (
    ((convert_, malicious, '--backbone', 'swin_b', '--out', out), 'posix.sys'),
    ((convert_, files / 'teacher.pt', '--out', out), '--backbone is missing'),
    ((convert_, files / 'teacher.pt', '--backbone', 'x', '--out', out), "'x'"),
    ((convert_, files / 'teacher.pt', '--backbone', 'swin_b'), '--out'),
    ((convert_,), 'SOURCE'),
    ((convert_, tmp_path, '--to', 'torch', out), 'must end in'),
    ((convert_, tmp_path, '--to', 'torch', f'{out}.pt'), 'no config.json'),
    ((convert_, 'resnet50_a1h', '--out', out), 'put it at weights'),
    (
      ('distillfss_jax.main', '--config', ROOT / 'configs/demo.py:smoke',
       f'--config.model.init={malicious}', '--workdir', run), 'posix.system',
    ),
  ):  # fmt: skip
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert 'Traceback' not in done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
    assert len(lines) == 1, done.stderr
    assert said in lines[0]
  assert not out.exists()
  assert not run.exists()


def test_published_names(monkeypatch, tmp_path):
  monkeypatch.setenv('DISTILLFSS_WEIGHTS', str(tmp_path))
  for name, entry in hub.PUBLISHED.items():
    config = common.get_config()
    for key in entry.fields:
      weights._field(config, key)  # exists
    assert entry.licence
    assert entry.url.startswith('https://'), name
  entry = hub.PUBLISHED['resnet50_a1h']
  with pytest.raises(FileNotFoundError, match=str(tmp_path / entry.file)):
    hub.find('resnet50_a1h')
  (tmp_path / entry.file).write_bytes(b'something else')
  with pytest.raises(ValueError, match='not 35c100f8'):
    hub.find('resnet50_a1h')
  by_hand = tmp_path / 'owner' / 'repo' / 'x.pt'
  by_hand.parent.mkdir(parents=True)
  by_hand.write_bytes(b'')
  monkeypatch.setattr(
    hub.huggingface_hub, 'hf_hub_download', lambda *_: pytest.fail('network')
  )
  with pytest.raises(FileNotFoundError, match='no file or folder'):
    hub.find('./owner/repo')


def test_the_hub_out_of_reach(monkeypatch, tmp_path):
  def unreachable(repo, file):
    assert (repo, file) == ('owner/repo', 'sub/model.safetensors')
    raise hub.errors.LocalEntryNotFoundError('...')

  monkeypatch.setattr(hub.huggingface_hub, 'hf_hub_download', unreachable)
  with pytest.raises(OSError, match='put it at weights/owner/repo/sub/model'):
    hub.find('owner/repo/sub/model.safetensors')
  found = tmp_path / 'model.safetensors'
  found.write_bytes(b'')
  monkeypatch.setattr(
    hub.huggingface_hub, 'hf_hub_download', lambda *_: str(found)
  )
  assert hub.find('owner/repo') == found


def test_rules_read_backwards_are_the_same_rules():
  """Every table of every file, from paths to names to paths."""
  for backbone in ('resnet_tiny', 'swin_tiny_test', 'dino_tiny_test'):
    [part], arrays, _ = tiny('backbone', backbone)
    arrays = {p.removeprefix(part.path): x for p, x in arrays.items()}
    for rules in part.module.torch_tables().values():
      names = params.to_torch(arrays, rules)
      assert len(names) == len(arrays)
      back = params.from_torch(names, rules, params.shapes(part.module))
      assert_same(back, arrays)


def test_students_of_our_own_do_not_go_back():
  parts = convert.build('dcama', 'resnet_tiny', 64, student='light')
  with pytest.raises(ValueError, match='LightDistiller has no counterpart'):
    weights.to_tensors({}, parts[1:])


def test_loading_can_be_traced():
  """What is loaded takes no part in a program: shapes alone will do."""
  config = small()
  built = train_step.build(config, 1, parallel.mesh())
  assert jax.eval_shape(lambda: built.load(built.draw()))
