"""Every experiment loads, says what it takes, and names what exists."""

import dataclasses
import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from configs import common
from distillfss_jax import (
  backbones,
  datasets,
  distillers,
  systems,
  tasks,
  train,
)
from distillfss_jax import config as configs
from distillfss_jax.distillers import base as distillers_base
from distillfss_jax.pretrained import weights
from distillfss_jax.types import Answer

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = sorted(
  path.stem
  for path in (ROOT / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'common')
)


def load(name, arg=None):
  module = importlib.import_module(f'configs.{name}')
  return module.get_config() if arg is None else module.get_config(arg)


def as_argument(overrides):
  return ','.join(f'{name}={value}' for name, value in overrides.items())


def keys(config, path=''):
  """Yields the paths of all keys; those of constructors' arguments are free."""
  for name, value in config.items():
    if path + name in ('data.args', 'model.backbone.fields'):
      yield path + name
    elif hasattr(value, 'items'):
      yield from keys(value, f'{path}{name}.')
    else:
      yield path + name


def assert_names_exist(config):
  assert config.system in systems.names()
  assert config.model.backbone.name in backbones.variants()
  assert config.data.name in datasets.names()
  configs.check_values(config)


def test_there_are_configs():
  assert {'demo', 'nucleus'} <= set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_loads(name):
  config = load(name)
  assert config.name == name
  assert config.is_locked
  assert config.data.is_locked
  assert config.data.args.is_locked
  assert_names_exist(config)
  known = set(keys(common.base())) - {'model.fields', 'data.args'}
  assert known <= set(keys(config))
  if config.system == 'distillfss':
    assert set(keys(config)) == set(keys(common.get_config()))
  with pytest.raises(AttributeError, match='steps'):
    config.stepz = 3
  with pytest.raises(AttributeError, match='image_size'):
    config.data.imagesize = 3
  json.loads(config.to_json_best_effort())  # what a run's folder keeps


@pytest.mark.parametrize('name', NAMES)
def test_loads_anew(name):
  load(name).unlock().data.args.strange = 1
  assert 'strange' not in load(name).data.args


@pytest.mark.parametrize('name', NAMES)
def test_smoke_is_small(name):
  config = load(name, 'smoke')
  assert config.data.image_size == 64
  assert config.model.backbone.name in (
    'resnet_tiny', 'resnet_tiny_deep', 'resnet_tiny_ssp', 'vgg_tiny',
    'pvt_v2_tiny',
  )  # fmt: skip
  assert config.steps <= 4
  assert not config.epochs
  assert config.checkpoint_every < config.steps
  assert config.is_locked
  assert_names_exist(config)
  whole = load(name)
  for same in ('name', 'system', 'student', 'loss', 'episodes', 'optim'):
    assert config.get(same) == whole.get(same)


# Of 2512.05613's experiments: (steps, subsample, kind of episodes, rule of the
# support) of DistillFSS, and the steps of TransferFSS.
PAPER = {
  'isic': (1000, 3, 'paired', 'per_class', 1000),
  'industrial': (1000, 3, 'paired', 'per_class', 1000),
  'kvasir': (1000, 1, 'leave_one_out', 'even', 1000),
  'lung': (200, 1, 'leave_one_out', 'even', 250),
  'nucleus': (2500, 1, 'leave_one_out', 'even', 2500),
  'pothole': (1000, 1, 'leave_one_out', 'even', 2500),
  'weedmap': (1000, 1, 'paired', 'even', 1000),
}


@pytest.mark.parametrize('name', PAPER)
def test_settings_of_the_paper(name):
  *settings, transfer_steps = PAPER[name]
  for method in ('distill', 'transfer'):
    config = load(name, f'method={method}')
    distills = method == 'distill'
    episodes = config.episodes
    assert config.steps == (settings[0] if distills else transfer_steps)
    found = [episodes.subsample, episodes.kind, config.support.rule]
    assert found == settings[1:]
    assert config.optim.trainable == (('D', 'student') if distills else ('D',))
    assert config.model.fields.voting == (0 if distills else 10)
    assert config.student == 'full'
    assert config.system == f'{method}fss'
    assert config.backbone_mode == 'frozen'
    assert config.loss.to_dict() == {
      'gamma': 2.0, 'teacher': 1 / 3, 'student': 1 / 3, 'coarse': 1 / 3,
      'logits': 0.5, 'maps': 2.0, 'detach': False, 'scale': 'reference',
    }  # fmt: skip
    assert (config.optim.name, config.optim.schedule) == ('adamw', 'constant')
    assert (config.optim.lr, config.optim.weight_decay) == (1e-3, 0.01)
    assert (config.optim.b1, config.optim.b2) == (0.9, 0.999)
    assert config.data.image_size == 384
    assert config.model.backbone.name == 'swin_b'
    assert (
      config.model.fields.concat_support,
      config.model.fields.dropout,
    ) == (False, 0.5)
    assert (config.episodes.draws, config.model.fields.mix_size) == (0, 0)


@pytest.mark.parametrize('name', PAPER)
@pytest.mark.parametrize('method', ['bam', 'hdmnet'])
def test_baselines_of_the_paper(name, method):
  """The same rule for all datasets: nothing trains, rounds of 1 or 5 shots."""
  for shots in (1, 5):
    config = load(name, f'method={method},shots=20,model_shots={shots}')
    assert (config.system, config.steps) == ('transferfss', 0)
    assert config.model.name == method
    fields = config.model.fields.to_dict()
    assert (fields['classes'], fields['shots']) == (61, shots)
    assert not fields.get('restored')  # as released
    assert config.model.backbone.name == 'resnet50_deep'
    assert config.data.image_size == 641
    assert config.support.shots == 20
  config = load(name, f'method={method},smoke')
  assert (config.steps, config.model.backbone.name) == (0, 'resnet_tiny_deep')


def test_shots_of_the_paper():
  """As many as its tables have: 5 to 50, but where classes share them."""
  for name in PAPER:
    module = importlib.import_module(f'configs.{name}')
    shots = {entry['shots'] for entry in module.sweep()}
    other = {'isic': {9, 15, 30, 60}, 'industrial': {10, 20, 40, 80}}
    assert shots == other.get(name, {5, 10, 25, 50})


@pytest.mark.parametrize('name', NAMES)
def test_the_docstring_gives_commands_that_load(name):
  text = importlib.import_module(f'configs.{name}').__doc__
  assert 'python -m distillfss_jax.main' in text
  found = re.findall(r'--config configs/(\w+)\.py(?::(\S+))?', text)
  assert found
  assert name in {config for config, _ in found}
  for config, arg in found:
    load(config, arg or None)


@pytest.mark.parametrize('name', NAMES)
def test_sweep(name):
  module = importlib.import_module(f'configs.{name}')
  if not hasattr(module, 'sweep'):
    pytest.skip(f'configs/{name}.py has no sweep()')
  entries = list(module.sweep())
  loaded = [load(name, as_argument(entry)) for entry in entries]
  texts = {config.to_json_best_effort() for config in loaded}
  assert len(texts) == len(entries) > 1, 'two entries are the same run'
  for config in loaded:
    assert_names_exist(config)


def test_students_exist():
  """The names in common.py's comment and nucleus.py's argument all build."""
  for student in ('full', 'light', 'attention'):
    assert load('nucleus', f'student={student}').student == student
    config = load('demo', 'smoke')
    config.student = student
    systems.build(config, 1)


@pytest.mark.parametrize('name', NAMES)
def test_smoke_builds(name):
  """The fields of a config fit what it names; shapes only, no numbers."""
  config = load(name, 'smoke')
  system, _ = systems.build(config, 1)
  assert system.trains
  assert system.roles


@pytest.mark.parametrize('name', sorted(set(NAMES) - {'demo'}))
def test_every_config_can_do_without_files(name):
  """`data=synthetic` takes data that are drawn; their loading is its test."""
  config = load(name, 'data=synthetic,smoke')
  assert config.data.name in ('synthetic', 'scenes')
  assert 'data_dir' not in config.data.args
  data, task = tasks.load(config)
  system, _ = systems.build(config, data.ways)
  assert system.takes is task.gives


def test_unknown_names_list_what_exists():
  config = load('demo', 'smoke')
  for path, value, known in (
    ('system', 'destillfss', 'distillfss'),
    ('student', 'fool', 'light'),
    ('model.backbone.name', 'resnet5', 'resnet_tiny'),
  ):
    wrong = config.copy_and_resolve_references()
    wrong.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=rf'{value}[\s\S]*{known}'):
      systems.build(wrong, 1)
  with pytest.raises(ValueError, match=r'nukleus[\s\S]*nucleus'):
    datasets.load('nukleus')


def test_arguments():
  config = load(
    'nucleus', 'shots=10,backbone=resnet50,student=light,seed=3,method=distill'
  )
  assert (config.support.shots, config.seed) == (10, 3)
  assert (config.model.backbone.name, config.student) == ('resnet50', 'light')
  assert load('nucleus', 'method=transfer').system == 'transferfss'
  assert load('nucleus') == load('nucleus', '')


@pytest.mark.parametrize(
  ('arg', 'said'),
  [
    ('shot=5', "no config argument 'shot'; there are: .*shots"),
    ('shots=five', "shots needs a whole number, got 'five'"),
    ('shots=-1', "shots needs a whole number, got '-1'"),
    ('shots', "shots needs a whole number, got ''"),
    ('backbone=vgg', "backbone='vgg' is not known; there are: swin_b"),
    ('method=', 'there are: distill, transfer'),
    ('smoke=1', "smoke is a flag, without a value; got '1'"),
    ('smoke shots=5', "no config argument 'smoke shots'"),
  ],
)
def test_argument_errors(arg, said):
  with pytest.raises(ValueError, match=said):
    load('nucleus', arg)


def test_a_flag_can_be_turned_off():
  assert load('nucleus', 'smoke=False') == load('nucleus')
  assert load('nucleus', 'smoke=True') == load('nucleus', 'smoke')


def test_the_demo_is_pretrained_and_its_smoke_needs_no_file():
  backbones = (
    load('demo').model.backbone,
    load('demo', 'smoke').model.backbone,
  )
  assert [(x.name, x.init) for x in backbones] == [
    ('lite0', 'lite0'), ('resnet_tiny', ''),
  ]  # fmt: skip


def test_overrides_keep_their_type():
  config = load('demo')
  with pytest.raises(TypeError):
    config.steps = 'many'
  config.optim.lr = 1
  assert isinstance(config.optim.lr, float)


MAIN = """
import json, os, pathlib, sys
from absl import app
from distillfss_jax import main
for i, line in enumerate(json.loads(sys.argv[1])):
  if pid := os.fork():  # importing is slow, flags are parsed once per process
    os.waitpid(pid, 0)
    continue
  out = os.open(f'{sys.argv[2]}/{i}', os.O_WRONLY | os.O_CREAT)
  os.dup2(out, 1)
  os.dup2(out, 2)
  sys.argv = ['main.py', *line]
  app.run(main.main, flags_parser=main.parse)
  sys.exit()
"""


def refused(lines, folder):
  """Returns what main says to each command line that is an error."""
  done = subprocess.run(
    [sys.executable, '-c', MAIN, json.dumps(lines), str(folder)],
    cwd=ROOT, capture_output=True, text=True, check=False,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return [(folder / str(i)).read_text() for i in range(len(lines))]


def assert_one_error(text, said):
  """One line, that names all of `said`."""
  lines = text.splitlines()
  assert len(lines) == 1, text
  assert lines[0].startswith('error: '), text
  for word in said:
    assert word in lines[0]


def test_command_line_errors(tmp_path):
  """One error that names what was given and what exists, and no run."""
  demo = '--config=configs/demo.py:smoke'
  broken, empty = tmp_path / 'broken.py', tmp_path / 'empty.py'
  broken.write_text('def get_config(:')
  empty.touch()
  cases = (
    ((), ('--config configs/demo.py',)),
    ((demo, '--config.stepz=3'), ('stepz', 'steps')),
    ((demo, '--config.data.imagesize=3'), ('imagesize', 'image_size')),
    ((demo, '--config.data.args.num_trains=3'), ('num_trains', 'num_train')),
    ((demo, '--config.data.qqq', '3'), ('qqq', 'image_size')),
    ((demo, '--config.steps.x=3'), ('config.steps.x',)),
    ((demo, '--config.steps=many'), ('config.steps', 'many')),
    ((demo, '--config.data=3'), ('config.data', '3')),
    (('--config', 'configs/nowhere.py'), ('nowhere.py', 'configs/demo.py')),
    (('--config', 'configs/demo.py:smok'), ("'smok'", 'there are: smoke')),
    ((demo, '--noconfig.eval.nativ'), ('nativ', 'native')),
    (('-config=configs/demo.py:smok',), ("'smok'", 'there are: smoke')),
    (('--config', f'{broken}:x'), (str(broken), 'SyntaxError')),
    (('--config', f'{empty}'), (str(empty), 'no get_config()')),
    ((demo, '--nothing=1'), ('nothing',)),
    ((demo, 'more'), ('more',)),
  )
  workdir = tmp_path / 'run'
  lines = [[*line, f'--workdir={workdir}'] for line, _ in cases]
  for (_, said), text in zip(cases, refused(lines, tmp_path), strict=True):
    assert_one_error(text, said)
  assert not workdir.exists()


# distillfss_jax/config.py.


def test_load():
  assert configs.load('configs/demo.py') == load('demo')
  assert configs.load('configs/nucleus.py:shots=10,smoke') == load(
    'nucleus', 'shots=10,smoke'
  )
  assert 'sweep' in configs.read_file('configs/nucleus.py')
  assert 'sweep' not in configs.read_file('configs/demo.py')


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('import nowhere_at_all', 'cannot be loaded: ModuleNotFoundError: No mod'),
    ('x = [', 'cannot be loaded: SyntaxError'),
    ('raise RecursionError("deep")', 'cannot be loaded: RecursionError: deep'),
    ('get = 1', 'has no get_config(): it is not a config'),
  ],
)
def test_files_that_are_no_configs(tmp_path, text, said):
  path = tmp_path / 'mine.py'
  path.write_text(text)
  with pytest.raises(ValueError, match=re.escape(f'{path} {said}')):
    configs.load(f'{path}:seed=3')


def test_configs_that_exist_are_listed(tmp_path, monkeypatch):
  for name in ('b.py', 'a.py', '_c.py', 'd.txt'):
    (tmp_path / name).touch()
  said = f'no config {tmp_path}/x.py; there are: {tmp_path}/a.py, {tmp_path}/b'
  with pytest.raises(ValueError, match=re.escape(said)):
    configs.load(f'{tmp_path}/x.py:a')
  with pytest.raises(ValueError, match=r'configs/demo\.py'):
    configs.load('no/such/folder/x.py')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r'no config no/x\.py; there are: none'):
    configs.load('no/x.py')


def test_check_key():
  config = load('demo')
  configs.check_key(config, 'model.backbone.name')
  configs.check_key(config, 'model')
  for key, said in (
    ('modle.name', r"'modle' in config\.modle\.name; there are: .*model"),
    ('model.nam', r"'nam' in config\.model\.nam; there are: .*backbone"),
    ('steps.x', r"no key 'x' in config\.steps\.x; there are: none"),
    ('', r"no key '' in config\.; there are: .*steps"),
  ):
    with pytest.raises(ValueError, match=said):
      configs.check_key(config, key)


RENAMED = {
  'sweeps': 'steps', 'net': 'model', 'model.vote': 'model.fields.voting',
}  # fmt: skip


@pytest.fixture
def after_a_change(monkeypatch):
  """Some keys had other names when folders and commands were made."""
  monkeypatch.setattr(configs, 'RENAMED', RENAMED)


def test_renamed(after_a_change):
  for old, new in {
    'sweeps': 'steps', 'net.heads': 'model.heads', 'net': 'model',
    'net.vote': 'model.fields.voting',  # twice, one after the other
    'steps': 'steps', 'sweeps_all': 'sweeps_all', 'a.sweeps': 'a.sweeps',
    'model.voters': 'model.voters',
  }.items():  # fmt: skip
    assert configs.renamed(old) == new


def test_commands_from_before_a_change(after_a_change):
  demo = '--config=configs/demo.py:smoke'
  line = [
    'main', demo, '--config.sweeps=3', '-config.net.vote', '2',
    '--noconfig.net.init', '--config.net.init=a=b', '--workdir=sweeps',
    '--config.steps=4',
  ]  # fmt: skip
  assert configs.check_flags(line) == [
    'main', demo, '--config.steps=3', '-config.model.fields.voting', '2',
    '--noconfig.model.init', '--config.model.init=a=b',
    '--workdir=sweeps', '--config.steps=4',
  ]  # fmt: skip
  with pytest.raises(ValueError, match=r"'heds' in config\.model\.heds"):
    configs.check_flags(['main', demo, '--config.net.heds=3'])
  # The first look at a line that names no config is not here.
  assert configs.check_flags(['main', '--config.x=3']) == [
    'main', '--config.x=3',
  ]  # fmt: skip


def test_main_takes_a_command_from_before_a_change():
  code = """
import sys
from absl import app
from distillfss_jax import config, main
config.RENAMED['net.vote'] = 'model.fields.voting'
sys.argv = ['main.py', '--config', 'configs/demo.py', '--config.net.vote=7']
app.run(lambda _: print(main._CONFIG.value.model.fields.voting),
        flags_parser=main.parse)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
    check=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip
  assert done.stdout == '7\n'


def test_flat():
  assert configs.flat({'a': {'b': 1, 'c': {'d': [2]}, 'e': {}}, 'f': None}) == {
    'a.b': 1, 'a.c.d': [2], 'f': None,
  }  # fmt: skip
  found = configs.flat(load('demo'))
  assert found['optim.trainable'] == ['D', 'student', 'backbone']
  assert found['data.args.zoom'] == 2.0
  assert configs.flat(found) == found


def test_differences():
  config = load('demo')
  text = json.loads(config.to_json_best_effort())
  assert configs.differences(text, config) == []
  text['steps'] = 7
  text['optim']['trainable'] = ['D']
  text['model']['gone'] = 'x'
  del text['model']['fields']['voting'], text['eval']
  assert configs.differences(text, config) == [
    "model.gone was 'x', is absent",
    "optim.trainable was ['D'], is ['D', 'student', 'backbone']",
    'steps was 7, is 600',
  ]
  assert configs.differences({'model': 3}, config) == [
    'model was 3, is absent'
  ]  # fmt: skip
  assert configs.differences({}, {'a': 1}) == []


def test_differing():
  same = {'a': 1, 'b': [1, {}], 'c': 0}
  assert configs.differing([same, dict(same)]) == []
  assert configs.differing([]) == []
  assert configs.differing([same, {**same, 'b': [1], 'c': False}]) == [
    'b', 'c',
  ]  # fmt: skip
  # What is absent is not the same as any value.
  assert configs.differing([{'x': None}, {}]) == ['x']
  assert configs.differing([{}, {'x': ''}]) == ['x']


def test_a_run_survives_a_new_option_and_a_new_name(tmp_path, after_a_change):
  """And nothing else: what it had and no longer has is said."""
  config = load('demo', 'smoke')
  kept = json.loads(config.to_json_best_effort())
  kept['sweeps'] = kept.pop('steps')
  kept['net'] = kept.pop('model')
  kept['net']['vote'] = kept['net']['fields'].pop('voting')
  del kept['micro_batch'], kept['source']  # not yet there
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(kept))
  assert configs.saved(path)['model.fields.voting'] == 0
  assert 'net.vote' not in configs.saved(path)
  train._check_same(config, tmp_path)
  # An option that came later, and is not as it was when it was not there.
  del kept['optim']['clip_norm']
  path.write_text(json.dumps(kept))
  train._check_same(config, tmp_path)
  with config.unlocked():
    config.optim.clip_norm = 1.0
  with pytest.raises(ValueError, match=r'clip_norm was 0\.0, is 1\.0'):
    train._check_same(config, tmp_path)
  config.optim.clip_norm = 0.0
  for key, value, said in (
    ('sweeps', 5, 'steps was 5, is 4'), ('old', 1, 'old was 1, is absent'),
  ):  # fmt: skip
    path.write_text(json.dumps({**kept, key: value}))
    with pytest.raises(ValueError, match=f'differs in: {said}$'):
      train._check_same(config, tmp_path)
  path.write_text('{"steps": ')
  with pytest.raises(ValueError, match=r'config\.json is damaged'):
    train._check_same(config, tmp_path)


def test_it_loads_without_jax():
  code = (
    'import sys; from distillfss_jax import config; print("jax" in sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
    check=True,
  )  # fmt: skip
  assert done.stdout == 'False\n'


@pytest.mark.parametrize(
  ('key', 'value', 'said'),
  [
    ('checkpoint_every', 0, 'config.checkpoint_every=0, .* at least 1'),
    ('eval.panels', -1, 'config.eval.panels=-1, .* 0 to 1000'),
    ('data.image_size', 10**9, 'config.data.image_size=1000000000, .* to 4096'),
    ('support.shots', 0, 'config.support.shots=0'),
    ('optim.lr', -1.0, 'config.optim.lr=-1.0, .* at least 0'),
    ('optim.lr', float('nan'), 'config.optim.lr=nan'),
    ('seed', -1, 'config.seed=-1'),
  ],
)
def test_numbers_that_no_run_can_have(key, value, said):
  config = load('demo', 'smoke')
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=said):
    configs.check_values(config)
  configs.check_values(load('demo'))


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ({'eval.patience': 3, 'eval.every': 2}, 'patience=3 waits .*keep_best'),
    ({'eval.epochs': 1.0, 'eval.every': 2}, 'every=2 and .*epochs=1.0 both'),
  ],
)
def test_options_that_would_do_nothing(values, said):
  config = load('demo', 'smoke')
  config.update_from_flattened_dict(values)
  with pytest.raises(ValueError, match=said):
    configs.check_values(config)


def test_no_temperature_turns_labels_around():
  """A negative one would, without a word."""
  config = load('nucleus', 'recipe=ours')
  config.views.temperature = -1.0
  with pytest.raises(ValueError, match=r'views\.temperature=-1\.0, .* to 1000'):
    configs.check_values(config)


@pytest.mark.parametrize('size', [50, 63, 100])
def test_sizes_that_the_decoder_cannot_double(size):
  config = load('demo', 'smoke')
  config.data.image_size = size
  with pytest.raises(ValueError, match=f'image_size={size}.* multiple'):
    systems.build(config, 1)


def test_a_backbone_that_stays_random_is_warned_about(caplog):
  config = load('nucleus', 'smoke')
  system, _ = systems.build(config, 1)
  weights.load(config, system, {})
  assert 'teacher/backbone keeps random values' in caplog.text
  caplog.clear()
  config = load('demo', 'smoke')  # trains its backbone
  weights.load(config, systems.build(config, 1)[0], {})
  assert not caplog.text


def test_flags_reach_all_of_a_distiller():
  """The table of the configs has what the constructors have, as they do."""
  assert set(common.DISTILLERS) == set(distillers.names())
  for name, fields in common.DISTILLERS.items():
    module = importlib.import_module(f'distillfss_jax.distillers.{name}')
    [kind] = [
      x
      for x in vars(module).values()
      if isinstance(x, type) and x.__module__ == module.__name__
      and issubclass(x, distillers_base.Distiller)
    ]  # fmt: skip
    assert set(kind.reads) <= {x.name for x in dataclasses.fields(Answer)}
    known = inspect.signature(kind.__init__).parameters.values()
    assert fields == {
      x.name: x.default for x in known if x.default is not x.empty
    }


def older(path, config, later):
  """Writes the config.json of a run from before some options."""
  nested = {}
  for key, value in configs.flat(config).items():
    if key not in later:
      *groups, last = key.split('.')
      place = nested
      for group in groups:
        place = place.setdefault(group, {})
      place[last] = value
  path.write_text(json.dumps(nested))


@pytest.mark.parametrize(
  ('name', 'arg', 'later'),
  [
    ('nucleus', 'recipe=ours', ('views.temperature', 'eval.calibration')),
    ('nucleus', 'recipe=unet', ('views.temperature', 'eval.calibration')),
    ('nucleus', '', ('eval.calibration',)),
    ('kdas', 'data=synthetic', ('teacher.keep_gb',)),
  ],
)
def test_runs_from_before_these_options_go_on(tmp_path, name, arg, later):
  now = load(name, arg)
  older(tmp_path / 'config.json', now, later)
  before = configs.saved(tmp_path / 'config.json')
  assert not configs.differences(before, now)


@pytest.mark.parametrize('name', NAMES)
def test_a_run_from_before_all_options_gets_those_of_its_config(tmp_path, name):
  """None that its config does not have: no command would give it."""
  now = load(name)
  older(tmp_path / 'config.json', now, configs.ADDED)
  assert (
    configs.saved(tmp_path / 'config.json').keys() <= configs.flat(now).keys()
  )
