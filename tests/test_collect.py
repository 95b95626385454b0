"""Collecting runs: tables to the digit, what is not averaged, what is named."""

import csv
import importlib
import io
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from distillfss_jax import config as configs
from distillfss_jax import files
from launch import collect, missing, results
from launch import paper as paper_lib
from launch import tables as tables_lib


def flags_of(line):
  """The file, arguments, overrides and folder of a command of main."""
  words = shlex.split(line)
  assert words[:4] == ['python', '-m', 'distillfss_jax.main', '--config']
  stem, arg = re.fullmatch(r'configs/(\w+)\.py(?::(.*))?', words[4]).groups()
  where = words.index('--workdir')
  overrides = dict(word[9:].split('=', 1) for word in words[5:where])
  return stem, arg, overrides, words[where + 1]


def config_of(line):
  """The config that a command gives, as a run's config.json would hold it."""
  stem, arg, overrides, _ = flags_of(line)
  config = importlib.import_module(f'configs.{stem}').get_config(arg)
  for key, text in overrides.items():
    value = json.loads(text) if text[:1].isdigit() else text
    config.update_from_flattened_dict({key: value})
  return json.loads(config.to_json_best_effort())


def write(folder, config, student=None, teacher=None, native=None):
  """A run's folder by hand; unfinished without scores."""
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config))
  roles = {'student': student, 'teacher': teacher}
  test = {
    role: {'miou': score, 'fb_iou': score / 2}
    for role, score in roles.items()
    if score is not None
  }
  if test:
    results = {'test': test}
    if native is not None:
      results['test_native'] = {role: {'miou': native} for role in test}
    (folder / 'results.json').write_text(json.dumps(results))
  return folder


def put(root, arg, *scores, stem='nucleus', name=None, changes=None, **kwargs):
  """A run with the config of `arg`, in the folder a sweep would give it."""
  config = importlib.import_module(f'configs.{stem}').get_config(arg)
  config = json.loads(config.to_json_best_effort())
  for key, value in (changes or {}).items():
    *path, last = key.split('.')
    at = config
    for part in path:
      at = at[part]
    at[last] = value
  return write(root / stem / (name or arg), config, *scores, **kwargs)


def made(root, **kwargs):
  report, warnings = collect.collect(root, **kwargs)
  return report, warnings


def cells(report):
  return {
    (row.dataset, row.method, row.backbone, row.settings, shots): str(cell)
    for row in report.rows
    for shots, cell in row.cells.items()
  }


@pytest.fixture
def root(tmp_path):
  """Two seeds of a student and its teacher, one run of TransferFSS."""
  runs = tmp_path / 'runs'
  put(runs, 'method=distill,shots=5,backbone=swin_b,seed=0', 0.70, 0.60)
  put(runs, 'method=distill,shots=5,backbone=swin_b,seed=1', 0.72, 0.65)
  put(runs, 'method=distill,shots=10,backbone=swin_b,seed=0', 0.8, 0.75)
  put(runs, 'method=transfer,shots=5,backbone=swin_b,seed=0', None, 0.5)
  return runs


TITLE = (
  'test mIoU in per cent: mean ± standard deviation over seeds and support '
  'draws'
)
HOLES = [
  'method=distill,shots=10,backbone=swin_b,seed=1',
  'method=transfer,shots=5,backbone=swin_b,seed=1',
  'method=transfer,shots=10,backbone=swin_b,seed=0',
  'method=transfer,shots=10,backbone=swin_b,seed=1',
]


def test_terminal(root):
  report, warnings = made(root)
  assert not warnings
  text = tables_lib.terminal(report).split('\nmissing')[0]
  # (70 + 72) / 2 = 71, sqrt(2) = 1.4; (60 + 65) / 2 = 62.5, 5 / sqrt(2) = 3.5
  assert text.splitlines() == [
    TITLE,
    '',
    'dataset  method              backbone           5 shots    10 shots',
    '-------  ------------------  --------  ----------------  ----------',
    'nucleus  DistillFSS          swin_b    71.0 ± 1.4 (n=2)  80.0 (n=1)',
    'nucleus  DistillFSS teacher  swin_b    62.5 ± 3.5 (n=2)  75.0 (n=1)',
    'nucleus  TransferFSS         swin_b          50.0 (n=1)           -',
  ]


def test_markdown(root):
  report, _ = made(root)
  assert tables_lib.markdown(report).splitlines()[:7] == [
    TITLE,
    '',
    '| dataset | method | backbone | 5 shots | 10 shots |',
    '| --- | --- | --- | ---: | ---: |',
    r'| nucleus | DistillFSS | swin\_b | 71.0 ± 1.4 (n=2) | 80.0 (n=1) |',
    r'| nucleus | DistillFSS teacher | swin\_b | 62.5 ± 3.5 (n=2) '
    '| 75.0 (n=1) |',
    r'| nucleus | TransferFSS | swin\_b | 50.0 (n=1) | - |',
  ]


def test_csv(root):
  report, _ = made(root)
  folder = root / 'nucleus'
  a, b, c, d = (
    str(folder / f'method={x},backbone=swin_b,seed={y}')
    for x, y in (
      ('distill,shots=5', 0), ('distill,shots=5', 1), ('distill,shots=10', 0),
      ('transfer,shots=5', 0),
    )
  )  # fmt: skip
  lines = list(csv.reader(io.StringIO(tables_lib.as_csv(report))))
  assert lines == [
    ['dataset', 'method', 'backbone', 'settings', 'shots', 'n', 'mean', 'std',
     'seeds', 'support_seeds', 'folders', 'paper', 'paper_marks',
     'paper_from'],
    ['nucleus', 'DistillFSS', 'swin_b', '', '5', '2', '71.0000', '1.4142',
     '0 1', '0 0', f'{a};{b}', '', '', ''],
    ['nucleus', 'DistillFSS', 'swin_b', '', '10', '1', '80.0000', '', '0', '0',
     c, '', '', ''],
    ['nucleus', 'DistillFSS teacher', 'swin_b', '', '5', '2', '62.5000',
     '3.5355', '0 1', '0 0', f'{a};{b}', '', '', ''],
    ['nucleus', 'DistillFSS teacher', 'swin_b', '', '10', '1', '75.0000', '',
     '0', '0', c, '', '', ''],
    ['nucleus', 'TransferFSS', 'swin_b', '', '5', '1', '50.0000', '', '0', '0',
     d, '', '', ''],
  ]  # fmt: skip


def test_latex(root):
  report, _ = made(root)
  assert tables_lib.latex(report).splitlines() == [
    r'\begin{tabular}{lllrr}',
    r'\toprule',
    r'dataset & method & backbone & 5 shots & 10 shots \\',
    r'\midrule',
    r'nucleus & DistillFSS & swin\_b & 71.0 $\pm$ 1.4 (n=2) & 80.0 (n=1) \\',
    r'nucleus & DistillFSS teacher & swin\_b & 62.5 $\pm$ 3.5 (n=2) '
    r'& 75.0 (n=1) \\',
    r'nucleus & TransferFSS & swin\_b & 50.0 (n=1) & - \\',
    r'\bottomrule',
    r'\end{tabular}',
    r'\par{\footnotesize test mIoU in per cent: mean $\pm$ standard deviation '
    'over seeds and support draws}',
  ]
  assert r'a_&%$#{}~^\|'.translate(tables_lib.LATEX) == (
    r'a\_\&\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}$|$'
  )


def test_other_scores(root):
  put(
    root, 'method=distill,shots=5,backbone=swin_b,seed=2', 0.9, 0.6, native=0.4
  )
  fb, _ = made(root, metric='fb_iou')
  assert cells(fb)['nucleus', 'DistillFSS', 'swin_b', '', 10] == '40.0 (n=1)'
  assert fb.title.startswith('test FB-IoU')
  native, warnings = made(root, size='test_native')
  key = 'nucleus', 'DistillFSS', 'swin_b', '', 5
  assert cells(native)[key] == '40.0 (n=1)'
  assert len(warnings) == 4
  assert all("no scores under 'test_native'" in x for x in warnings)


def test_missing_cells_and_their_commands(root):
  report, _ = made(root)
  assert len(report.missing) == len(HOLES)
  for (what, line), name in zip(report.missing, HOLES, strict=True):
    assert what.startswith('nucleus, ')
    stem, arg, overrides, folder = flags_of(line)
    assert (stem, arg, overrides) == ('nucleus', name, {})
    assert folder == str(root / 'nucleus' / name)
    config = config_of(line)
    asked = dict(x.split('=') for x in name.split(','))
    assert str(config['support']['shots']) == asked['shots']
    assert str(config['seed']) == asked['seed']
    assert f'{asked["shots"]} shots, seed {asked["seed"]}' in what
  text = tables_lib.terminal(report)
  assert 'missing: 4' in text
  # The commands, run, would fill the rectangle.
  for _, line in report.missing:
    *_, folder = flags_of(line)
    write(root / 'nucleus' / folder.rsplit('/', 1)[1], config_of(line), 0.5,
          0.5)  # fmt: skip
  assert made(root)[0].missing == []


def test_commands_repeat_what_was_changed(tmp_path):
  """A hole's command has the overrides of its row, shell quotes and all."""
  changes = {
    'optim.lr': 3e-4, 'optim.trainable': ['A', 'student'],
    'support.rule': 'random', 'model.init': 'my weights.pt',
  }  # fmt: skip
  put(tmp_path, 'shots=5', 0.5, changes={**changes, 'support.seed': 3})
  put(tmp_path, 'shots=10', 0.5, changes={**changes, 'support.seed': 4})
  report, _ = made(tmp_path)
  assert [x.count('support seed 4') for x, _ in report.missing] == [1, 0]
  line = report.missing[0][1]
  stem, arg, overrides, folder = flags_of(line)
  assert stem == 'nucleus'
  assert dict(x.split('=') for x in arg.split(','))['shots'] == '5'
  assert overrides == {
    'optim.lr': '0.0003', 'optim.trainable': "('A', 'student')",
    'support.rule': 'random', 'support.seed': '4',
    'model.init': 'my weights.pt',
  }  # fmt: skip
  assert re.fullmatch(r'[A-Za-z0-9_.=,+-]+', folder.rsplit('/', 1)[1])
  assert 'model.init=my_weights.pt' in folder
  done = subprocess.run(
    [sys.executable, '-c', PARSE, *shlex.split(line)[3:]],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  config = json.loads(done.stdout)
  assert config['optim']['trainable'] == ['A', 'student']
  assert config['support'] == {
    'shots': 5, 'rule': 'random', 'seed': 4, 'ids': []
  }  # fmt: skip


PARSE = """
import sys
from absl import flags
from ml_collections import config_flags
config = config_flags.DEFINE_config_file('config')
flags.DEFINE_string('workdir', '', '')
flags.FLAGS(sys.argv)
print(config.value.to_json_best_effort())
"""


def test_the_rectangle_spans_datasets_and_backbones(tmp_path):
  put(tmp_path, 'shots=5,backbone=swin_b', 0.5)
  put(tmp_path, 'shots=5,backbone=resnet50', 0.5, stem='kvasir')
  put(tmp_path, 'smoke', 0.5, stem='demo')
  report, _ = made(tmp_path)
  assert [what for what, _ in report.missing] == [
    'kvasir, DistillFSS, swin_b, 5 shots, seed 0',
    'nucleus, DistillFSS, resnet50, 5 shots, seed 0',
  ]
  names = [config_of(line)['data']['name'] for _, line in report.missing]
  assert names == ['kvasir', 'nucleus']


def test_unlike_runs_are_never_averaged(tmp_path):
  """Every key of a config but the two seeds splits a row."""
  base = results.todays('nucleus', 'shots=5')
  skipped = {*results.NEEDED, 'data.args.split', 'data.args.data_dir'}
  for key, value in base.items():
    if key in skipped:
      continue
    root = tmp_path / key
    other = not value if isinstance(value, bool) else f'{value}x'
    put(root, 'shots=5', 0.4)
    put(root, 'shots=5', 0.6, name='b', changes={key: other})
    report, _ = made(root)
    assert sorted(cells(report)) == [
      ('nucleus', 'DistillFSS', 'swin_b', f'{key}={x}', 5)
      for x in sorted(map(str, (value, other)))
    ]
    assert set(cells(report).values()) == {'40.0 (n=1)', '60.0 (n=1)'}
    assert key in tables_lib.terminal(report)


def test_rules_datasets_and_students_are_rows(tmp_path):
  put(tmp_path, 'shots=5', 0.1)
  put(tmp_path, 'shots=5,student=light', 0.2, 0.3)
  put(tmp_path, 'shots=10,fold=0', 0.5, stem='industrial')
  put(tmp_path, 'shots=10,fold=1', 0.6, stem='industrial')
  report, _ = made(tmp_path)
  assert cells(report) == {
    ('industrial fold=0', 'DistillFSS', 'swin_b', '', 10): '50.0 (n=1)',
    ('industrial fold=1', 'DistillFSS', 'swin_b', '', 10): '60.0 (n=1)',
    ('nucleus', 'DistillFSS', 'swin_b', '', 5): '10.0 (n=1)',
    ('nucleus', 'DistillFSS (light)', 'swin_b', '', 5): '20.0 (n=1)',
    ('nucleus', 'DistillFSS (light) teacher', 'swin_b', '', 5): '30.0 (n=1)',
  }


def test_settings_of_one_row(tmp_path):
  """Keys that differ along a row, not within a cell, are told."""
  put(tmp_path, 'shots=5', 0.1)
  put(tmp_path, 'shots=10', 0.2, changes={'steps': 7})
  report, _ = made(tmp_path)
  assert len(report.rows) == 1
  note = 'steps differs along the row: 2500 at 5 shots, 7 at 10 shots'
  assert note in report.notes[0]
  put(tmp_path, 'shots=10', 0.3, name='b', changes={'steps': 8})
  report, _ = made(tmp_path)
  assert sorted(x.settings for x in report.rows) == [
    'steps=2500', 'steps=7', 'steps=8',
  ]  # fmt: skip
  header, lines, left = report.table()
  assert header[left - 1] == 'settings'
  assert lines[0][left - 1] == 'steps=2500'


def test_repeated_runs_count_once(tmp_path):
  put(tmp_path, 'shots=5', 0.1)
  put(tmp_path, 'shots=5', 0.2, name='z')
  report, warnings = made(tmp_path)
  assert list(cells(report).values()) == ['10.0 (n=1)']
  assert len(warnings) == 1
  assert (
    f'{tmp_path}/nucleus/z repeats {tmp_path}/nucleus/shots=5' in (warnings[0])
  )


def test_unfinished_and_damaged(root, capsys):
  folder = put(root, HOLES[0], name='begun')
  assert folder.name == 'begun'
  config = json.loads((folder / 'config.json').read_text())
  for name, text in (('half', '{"test": {"stud'), ('list', '[1]')):
    write(root / name, config, 0.5)
    (root / name / 'results.json').write_text(text)
  write(root / 'nan', config, 0.5)
  (root / 'nan' / 'results.json').write_text(
    '{"test": {"student": {"miou": NaN}}}'
  )
  write(root / 'old', config, 0.5)
  config['model']['backbone'] = 'swin_b'
  (root / 'old' / 'config.json').write_text(json.dumps(config))
  (root / 'alone').mkdir()
  (root / 'alone' / 'results.json').write_text('{}')
  (root / 'weights').mkdir()  # of distillfss_jax.convert: no run
  (root / 'weights' / 'config.json').write_text('{"model": "dcama"}')
  write(root / 'run' / 'checkpoints' / 'x', config, 0.5)  # not looked into
  collect.main([str(root)])
  out, err = capsys.readouterr()
  warnings = err.splitlines()
  assert all(line.startswith('warning: ') for line in warnings)
  assert len(warnings) == 5
  for name in ('half', 'list', 'nan', 'old', 'alone'):
    assert sum(f'{root}/{name}/' in line for line in warnings) == 1, name
  assert 'delete it and run its command again' in err
  assert 'model.backbone.name is None, not of type str' in err
  assert 'unfinished: 1' in out
  assert f'  {folder}\n' in out
  # It goes on in its own folder.
  report, _ = made(root)
  what, line = report.missing[0]
  assert what.endswith(', unfinished')
  assert flags_of(line)[3] == str(folder)
  assert config_of(line) == json.loads((folder / 'config.json').read_text())
  assert len(report.missing) == 4


def nested(levels, inside='0'):
  """JSON of one object and so many lists in it."""
  return f'{{"a": {"[" * (levels - 1)}{inside}{"]" * (levels - 1)}}}'


# What a file may be that is no JSON of a run, and what is said of it.
NO_JSON = {
  'nothing': ('', 'Expecting value'),
  'half': ('{"test": {"stud', 'Unterminated string'),
  'bytes': (b'\xff\xfe{', 'decode'),
  'zeros': (bytes(100), 'JSON|decode|Expecting'),
  'a list': ('[1]', 'no JSON object'),
  'a number': ('3', 'no JSON object'),
  'null': ('null', 'no JSON object'),
  'lists in lists': ('[' * 100_000, 'nested deeper'),
  'objects in objects': ('{"a":' * 100_000, 'nested deeper'),
  'closed lists': (nested(5000), 'nested deeper'),
  'one level too many': (nested(65), 'nested deeper than 64 levels'),
  'deep names': (
    '{"a":' * 200 + '1' + '}' * 200, 'nested deeper than 64 levels',
  ),
  'thousands of digits': ('{"a": ' + '9' * 5000 + '}', 'number 9+.* large'),
  'hundreds of digits': ('{"a": [1' + '0' * 400 + ']}', 'number 10+.* large'),
  'more than int64': (f'{{"a": {2**63}}}', f'{2**63}'[:9]),
  'a negative one': (f'{{"a": {-(2**63) - 1}}}', 'too large'),
  'a large exponent': ('{"a": {"b": -1e999}}', 'the number -1e999 is too'),
  'a large fraction': ('{"a": ' + '9' * 400 + '.5}', 'too large'),
  'half a character': (r'{"a": ["\ud800"]}', 'surrogates'),
  'half a name': (r'{"a": {"\udfff": 1}}', 'surrogates'),
}  # fmt: skip


@pytest.mark.parametrize('kind', NO_JSON)
def test_json_is_read_or_refused_in_a_line(tmp_path, kind):
  content, said = NO_JSON[kind]
  path = tmp_path / 'x.json'
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=said) as caught:
    files.read_json(path, 'do this')
  line = str(caught.value)
  assert line.startswith(f'{path} is damaged (')
  assert line.endswith('): do this')
  assert '\n' not in line
  assert len(line) < len(str(path)) + 200


def test_json_as_large_as_it_may_be(tmp_path, monkeypatch):
  path = tmp_path / 'x.json'
  deep = nested(63, f'[{2**63 - 1}, {-(2**63)}, 1e308, NaN, "é", true]')
  path.write_text(deep)
  value = files.read_json(path)['a']
  for _ in range(62):
    [value] = value
  assert value[:3] == [2**63 - 1, -(2**63), 1e308]
  assert value[4:] == ['é', True]
  monkeypatch.setattr(files, 'LARGEST', path.stat().st_size)
  files.read_json(path)
  path.write_text(f'{deep} ')
  with pytest.raises(
    ValueError, match=r'damaged \(more than .* bytes\): delete'
  ):
    files.read_json(path)
  with pytest.raises(FileNotFoundError):
    files.read_json(tmp_path / 'none.json')


# Scores that are none, as results.json may have them under the role 'student'.
NO_SCORES = [
  1e308, -1e300, 1e9, float('inf'), float('-inf'), True, None, '0.5', [0.5], {},
]  # fmt: skip
NO_RESULTS = [
  {}, {'test': 3}, {'test': []}, {'test': {}}, {'test': {'student': [1]}},
  {'test': {'student': None}}, {'test': {'student': {'iou': 0.5}}},
  *({'test': {'student': {'miou': x}}} for x in NO_SCORES),
]  # fmt: skip


def of_damaged(root, capsys, folder):
  """All but the damaged run is there, which is named once."""
  collect.main([str(root)])
  out, err = capsys.readouterr()
  assert '71.0 ± 1.4 (n=2)' in out
  [line] = err.splitlines()
  assert line.startswith('warning: ')
  assert line.count(str(folder)) == 1
  assert line.endswith('; it is left out')


@pytest.mark.parametrize('results', NO_RESULTS, ids=repr)
def test_results_of_wrong_kinds(root, capsys, results):
  folder = put(root, 'shots=25', 0.5)
  (folder / 'results.json').write_text(json.dumps(results))
  of_damaged(root, capsys, folder)


@pytest.mark.parametrize('name', ['config.json', 'results.json'])
@pytest.mark.parametrize('kind', NO_JSON)
def test_files_of_runs_that_are_no_json(root, capsys, kind, name):
  content, _ = NO_JSON[kind]
  folder = put(root, 'shots=25', 0.5)
  (folder / name).write_bytes(
    content if isinstance(content, bytes) else content.encode()
  )
  of_damaged(root, capsys, folder)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('name', None), ('system', 3), ('student', []), ('seed', 1.5),
    ('seed', True), ('data', 'nucleus'), ('data.name', {'x': 1}),
    ('model', []), ('model.backbone', None), ('support', 5),
    ('support.shots', '5'), ('support.rule', 0), ('support.seed', None),
  ],
)  # fmt: skip
def test_configs_of_wrong_types(root, capsys, key, value):
  folder = put(root, 'shots=25', 0.5, changes={key: value})
  of_damaged(root, capsys, folder)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('name', '../secret'), ('name', '__init__'), ('name', 'demo:smoke'),
    ('name', 'x\ny'), ('data.args', 3), ('data.args.split', [{'a': []}]),
    ('optim', None), ('optim.trainable', {'D': [1]}), ('steps', -(2**62)),
    ('support.shots', -3), ('seed', 2**62), ('loss.gamma', float('nan')),
    ('model.init', ['a', ['b']]), ('model.backbone.fields', {'a': {'b': 1}}),
  ],
)  # fmt: skip
def test_configs_of_odd_values(root, capsys, key, value):
  """They are runs of their own, whatever it was that they ran."""
  for arg in ('shots=25', 'shots=50'):
    put(root, arg, *([0.5] if arg == 'shots=25' else []), changes={key: value})
  collect.main([str(root), '--format', 'markdown,csv,latex'])
  out, err = capsys.readouterr()
  assert not err
  assert '71.0 ± 1.4 (n=2)' in out
  assert '50.0 (n=1)' in out
  collect.main([str(root), '--paper'])
  assert '50.0 (n=1)' in capsys.readouterr().out


def test_a_name_runs_no_file(root, tmp_path, capsys):
  """Names of configs come from folders that anybody may have written."""
  (tmp_path / 'secret.py').write_text('raise SystemExit("this file was run")')
  put(root, 'shots=25', 0.5, changes={'name': str(tmp_path / 'secret')})
  collect.main([str(root)])
  assert '50.0 (n=1)' in capsys.readouterr().out


def test_runs_from_before_an_option_and_a_new_name(root, monkeypatch):
  """They are averaged with later ones, and go on by the same commands."""
  folder = root / 'nucleus' / 'method=distill,shots=5,backbone=swin_b,seed=1'
  config = json.loads((folder / 'config.json').read_text())
  config['sweeps'] = config.pop('steps')
  del config['micro_batch'], config['source']
  (folder / 'config.json').write_text(json.dumps(config))
  monkeypatch.setattr(configs, 'RENAMED', {'sweeps': 'steps'})
  report, warnings = made(root)
  assert not warnings
  assert not report.notes
  key = 'nucleus', 'DistillFSS', 'swin_b', '', 5
  assert cells(report)[key] == '71.0 ± 1.4 (n=2)'
  assert len(report.missing) == len(HOLES)
  assert missing.cell_of(results.load(folder)) == {
    'method': 'distill', 'shots': 5, 'backbone': 'swin_b', 'seed': 1,
  }  # fmt: skip
  # An argument of a constructor has no default of the config's.
  del config['data']['args']['split']
  (folder / 'config.json').write_text(json.dumps(config))
  assert ('nucleus split=frozen', *key[1:]) in cells(made(root)[0])


def failed(capsys, *arguments):
  with pytest.raises(SystemExit) as caught:
    collect.main([str(x) for x in arguments])
  assert str(caught.value.code).startswith('error: ')
  assert '\n' not in caught.value.code
  assert not capsys.readouterr().out
  return caught.value.code


def test_errors(root, tmp_path, capsys):
  assert 'no folder' in failed(capsys, tmp_path / 'nowhere')
  empty = tmp_path / 'empty'
  empty.mkdir()
  said = failed(capsys, empty)
  line = said.partition('runs are made by: ')[2]
  assert config_of(line)['name'] == 'nucleus'
  put(empty, 'shots=5')
  assert f'1 unfinished: {empty}/nucleus/shots=5' in failed(capsys, empty)
  said = failed(capsys, root, '--metric', 'nosuch')
  assert 'none of the 4 finished runs' in said
  assert 'miou, fb_iou' in said
  said = failed(capsys, root, '--format', 'pdf')
  assert "no format 'pdf'; there are: terminal, markdown" in said
  assert 'needs --out' in failed(capsys, root, '--format', 'plot')
  said = failed(capsys, root, '--paper', '--metric', 'fb_iou')
  assert 'miou only' in said
  assert '--help' in failed(capsys, root, '--papers')
  file = tmp_path / 'file'
  file.touch()
  assert 'no folder' in failed(capsys, file)


def test_files(root, tmp_path, capsys):
  out = tmp_path / 'a' / 'tables'
  collect.main([str(root), '--out', str(out), '--paper'])
  assert capsys.readouterr().out.startswith(TITLE)
  assert sorted(x.name for x in out.iterdir()) == [
    'report.html', 'scores.png', 'table.csv', 'table.md', 'table.tex',
  ]  # fmt: skip
  with Image.open(out / 'scores.png') as picture:
    assert min(picture.size) > 300
    assert np.asarray(picture.convert('RGB')).std() > 5
  page = (out / 'report.html').read_text()
  assert not re.search('https?://', page)
  assert page.count('<table>') == page.count('<img src="data:image/png') == 1
  collect.main([str(root), '--format', 'csv,markdown'])
  assert TITLE in capsys.readouterr().out
  only = tmp_path / 'only'
  collect.main([str(root), '--out', str(only), '--format', 'latex'])
  assert [x.name for x in only.iterdir()] == ['table.tex']
  assert not capsys.readouterr().out


# The paper.


PAPER = paper_lib.load()
DATASETS = [
  'nucleus', 'kvasir', 'lung', 'pothole', 'weedmap', 'isic', 'industrial',
]  # fmt: skip
SHOTS = {'isic': [9, 15, 30, 60], 'industrial': [10, 20, 40, 80]}


def test_the_paper_is_complete():
  assert list(PAPER['datasets']) == DATASETS
  tables = {table['source']: table for table in PAPER['tables']}
  assert list(tables) == ['readme', 'project_page', 'notebook']
  for table in PAPER['tables']:
    assert table['selected'] == 'best of a grid on the test set'
    assert table['from']
    for row in table['rows']:
      assert set(row) == {
        'dataset', 'method', 'backbone', 'shots', 'scores',
      }  # fmt: skip
      assert len(row['shots']) == len(row['scores'])
      assert set(row['shots']) <= {*SHOTS.get(row['dataset'], [5, 10, 25, 50])}
      assert all(x is None or 0 <= x < 100 for x in row['scores'])
  assert len(tables['readme']['rows']) == 7 * 3
  assert len(tables['notebook']['rows']) == 5 * 4
  keys = {
    (row['dataset'], row['method'], row['backbone'])
    for row in tables['project_page']['rows']
  }
  methods = {
    *(('BAM', ''), ('HDMNet', ''), ('LabelAnything', ''), ('PATNet', '')),
    *(('DMTNet', ''), ('DCAMA', 'resnet50'), ('DCAMA', 'swin_b')),
    *(('DistillFSS', 'resnet50'), ('DistillFSS', 'swin_b')),
  }
  assert keys == {(x, *method) for x in DATASETS for method in methods}
  assert len(tables['project_page']['rows']) == len(keys)
  for row in tables['project_page']['rows']:
    assert row['shots'] == SHOTS.get(row['dataset'], [5, 10, 25, 50])
    assert None not in row['scores']


@pytest.mark.parametrize(
  ('place', 'score', 'source'),
  [
    (('nucleus', 'DistillFSS', 'swin_b', 5), '69.6*', 'readme'),
    (('nucleus', 'DistillFSS', 'swin_b', 10), '71.2*', 'project_page'),
    (('nucleus', 'DistillFSS', 'resnet50', 50), '21.1*', 'project_page'),
    (('nucleus', 'TransferFSS', 'swin_b', 50), '79.4*', 'readme'),
    (('nucleus', 'TransferFSS', 'swin_b', 10), '79.0*‡', 'notebook'),
    (('nucleus', 'TransferFSS', 'resnet50', 25), '19.7*‡', 'notebook'),
    (('kvasir', 'PATNet', '', 25), '49.7*', 'project_page'),
    (('lung', 'DCAMA', 'resnet50', 10), '0.0*', 'project_page'),
    (('pothole', 'BAM', '', 50), '2.2*', 'readme'),
    (('weedmap', 'TransferFSS', 'swin_b', 5), '51.0*', 'readme'),
    (('isic', 'DistillFSS', 'swin_b', 60), '23.4*†', 'readme'),
    (('isic', 'TransferFSS', 'resnet50', 15), '15.7*†‡', 'notebook'),
    (('industrial', 'DistillFSS', 'swin_b', 40), '40.9*†', 'project_page'),
    (('industrial', 'TransferFSS', 'swin_b', 80), '48.2*†', 'readme'),
  ],
)  # fmt: skip
def test_the_papers_numbers(place, score, source):
  dataset, method, backbone, shots = place
  found = paper_lib.published(PAPER, dataset)[method, backbone][shots]
  assert (str(found), found.source) == (score, source)


def test_the_configs_say_the_same():
  """Two hands wrote the docstrings and the tables."""
  for dataset in DATASETS:
    text = importlib.import_module(f'configs.{dataset}').__doc__
    numbers = set(re.findall(r'\d+\.\d', text))
    tables = paper_lib.published(PAPER, dataset)
    for backbone in ('swin_b', 'resnet50'):
      for cell in tables['DistillFSS', backbone].values():
        assert tables_lib.tenths(cell.score) in numbers, (dataset, cell)


def test_the_paper_as_in_the_spec(shared):
  text = shared('specs/distillfss.md').read_text()
  block = re.search(r'## 13.*?```json\n(.*?)```', text, re.S).group(1)
  page = json.loads(block)['project_page']
  short = {'resnet50': '_R50', 'swin_b': '_Swin', '': ''}
  rows = next(
    t['rows'] for t in PAPER['tables'] if t['source'] == 'project_page'
  )
  names = {name.lower(): name for name in page}
  for row in rows:
    values = page[names[row['dataset']]]
    assert values[row['method'] + short[row['backbone']]] == row['scores']


def test_halves_go_up():
  found = [tables_lib.tenths(x) for x in (15.95, 14.35, 0.05, 0.0, 99.949, 100)]
  assert found == ['16.0', '14.4', '0.1', '0.0', '99.9', '100.0']


def test_the_papers_numbers_are_marked(root):
  report, _ = made(root, paper=True)
  ours = cells(report)
  paper = 'nucleus', 'DistillFSS, paper', 'swin_b', ''
  assert [ours[*paper, x] for x in (5, 10, 25, 50)] == [
    '69.6*', '71.2*', '68.2*', '80.0*',
  ]  # fmt: skip
  methods = [(row.method, row.backbone) for row in report.rows]
  assert methods[:5] == [
    ('DistillFSS', 'swin_b'),
    ('DistillFSS, paper', 'swin_b'),
    ('DistillFSS teacher', 'swin_b'),
    ('TransferFSS', 'swin_b'),
    ('TransferFSS, paper', 'swin_b'),
  ]
  assert {x.removesuffix(', paper') for x, _ in methods[5:]} == {
    'BAM', 'HDMNet', 'LabelAnything', 'PATNet', 'DMTNet', 'DCAMA',
    'DistillFSS', 'TransferFSS',
  }  # fmt: skip
  for row in report.rows:
    assert row.paper == ('paper' in row.method)
    assert all(('*' in str(x)) == row.paper for x in row.cells.values())
  text = tables_lib.terminal(report)
  notes = [x for x in text.splitlines() if x.startswith(('* ', '† ', '‡ '))]
  assert [x[0] for x in notes] == ['*', '‡']
  assert 'best of a grid' in notes[0]
  assert 'selected on the test set' in notes[0]
  assert r'69.6\*' in tables_lib.markdown(report)
  assert r'79.0*$^\ddagger$' in tables_lib.latex(report)
  lines = list(csv.DictReader(io.StringIO(tables_lib.as_csv(report))))
  line = next(x for x in lines if x['paper'] == '69.57')
  assert (line['n'], line['paper_marks'], line['paper_from']) == (
    '0', '*', 'readme',
  )  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'shown'), [('bam', 'BAM'), ('hdmnet', 'HDMNet')]
)
def test_baselines_stand_beside_the_papers(root, name, shown):
  """Under their own names, the paper's row next to ours."""
  put(root, f'method={name},shots=5', None, 0.12)
  put(root, f'method={name},shots=10', None, 0.14)
  report, _ = made(root, paper=True)
  rows = [(row.method, row.backbone) for row in report.rows]
  at = rows.index((shown, 'resnet50_deep'))
  assert rows[at + 1] == (f'{shown}, paper', '')
  assert rows.count((f'{shown}, paper', '')) == 1
  found = cells(report)
  assert found['nucleus', shown, 'resnet50_deep', '', 10] == '14.0 (n=1)'
  named = [x for x in report.missing if f' {shown},' in x[0]]
  assert not named


def test_a_missing_run_of_a_baseline_has_its_command(root):
  put(root, 'method=bam,shots=5,seed=0', None, 0.12)
  put(root, 'method=bam,shots=5,seed=1', None, 0.13)
  put(root, 'method=bam,shots=10,seed=0', None, 0.14)
  report, _ = made(root)
  lines = [line for what, line in report.missing if ' BAM,' in what]
  assert len(lines) == 1
  config = config_of(lines[0])
  assert (config['model']['name'], config['steps']) == ('bam', 0)
  assert (config['support']['shots'], config['seed']) == (10, 1)


def test_shots_that_are_counted_otherwise(tmp_path):
  put(tmp_path, 'shots=9', 0.1, stem='isic')
  put(tmp_path, 'shots=10,fold=0', 0.1, stem='industrial')
  put(tmp_path, 'shots=10,fold=1', 0.1, stem='industrial')
  put(tmp_path, 'shots=5', 0.1, stem='weedmap')
  report, _ = made(tmp_path, paper=True)
  paper = {row.dataset for row in report.rows if row.paper}
  # The paper's is of fold 0.
  assert paper == {'isic', 'industrial fold=0', 'weedmap'}
  for row in report.rows:
    if row.paper:
      counted = row.dataset != 'weedmap'
      assert all(('†' in str(x)) == counted for x in row.cells.values())
  note = next(x for x in report.notes if x.startswith('†'))
  assert '6/9/21/45 images' in note
  assert '5/15/30/65 images' in note
  assert any('weedmap' in x and 'test_native' in x for x in report.notes)


def test_missing_cells_of_the_paper(root):
  """All are named, with commands that give them."""
  report, _ = made(root, paper=True)
  wanted = set()
  for dataset in DATASETS:
    for (method, backbone), found in paper_lib.published(
      PAPER, dataset
    ).items():
      if method in results.SYSTEMS:
        wanted |= {(dataset, method, backbone, shots) for shots in found}
  nucleus = {x for x in wanted if x[0] == 'nucleus' and x[2] == 'swin_b'}
  lacking = wanted - {
    x for x in nucleus
    if x[3] in (5, 10) and x[1:] != ('TransferFSS', 'swin_b', 10)
  }  # fmt: skip
  named, folders = set(), set()
  for what, line in report.missing:
    dataset, method, backbone, shots = what.split(', ')
    shots = int(shots.split()[0])
    named.add((dataset, method, backbone, shots))
    config = config_of(line)
    assert config['data']['name'] == dataset
    assert config['system'] == results.SYSTEMS[method]
    assert config['model']['backbone']['name'] == backbone
    assert config['support']['shots'] == shots
    assert config['data']['args'].get('fold', 0) == 0
    ours = dataset == 'nucleus' and backbone == 'swin_b'
    # As our other runs of the row, or from the paper's teacher.
    assert config['model']['init'] == ('' if ours else f'dcama_{backbone}')
    folders.add(flags_of(line)[3])
  assert named == lacking
  assert len(folders) == len(report.missing)
  assert str(root / 'nucleus' / (
    'method=distill,shots=5,backbone=resnet50,model.init=dcama_resnet50'
  )) in folders  # fmt: skip


def test_starts_at_once():
  """No JAX: it runs beside jobs, and where there is none."""
  code = (
    'import sys; from launch import collect; sys.exit("jax" in sys.modules)'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=False)
  assert done.returncode == 0


def dense(root, name, score, chosen_on, *, arg='data=synthetic', **changes):
  """A run of pspnet, which learns without a support."""
  folder = put(root, arg, score, stem='pspnet', name=name, changes=changes)
  path = folder / 'results.json'
  found = json.loads(path.read_text())
  if chosen_on:
    found['checkpoint'] = {'step': 1, 'chosen_on': chosen_on}
  path.write_text(json.dumps(found))
  return folder


def test_runs_without_a_support_and_what_chose_them(tmp_path):
  """A mark where test images chose, in every form; no mark elsewhere."""
  dense(tmp_path, 'a', 0.5, 'test', seed=0)
  dense(tmp_path, 'b', 0.7, 'test_short_side', seed=1)
  changes = {'dense.held_out': 0.1, 'dense.select': 'validation'}
  dense(tmp_path, 'c', 0.4, 'validation', **changes)
  dense(tmp_path, 'd', 0.6, 'validation_saliency', seed=1, **changes)
  report, warnings = made(tmp_path)
  assert not warnings
  found = sorted(str(x) for row in report.rows for x in row.cells.values())
  assert found == ['50.0 ± 14.1 (n=2)', '60.0 ± 14.1 (n=2) §']
  assert report.notes[0] == tables_lib.ON_TESTS_SAYS
  for make in (tables_lib.terminal, tables_lib.markdown, tables_lib.page):
    text = make(report)
    assert 'all images' in text
    assert '§ the test images chose' in text
  assert r'(n=2) \S{}' in tables_lib.latex(report)


def test_no_mark_without_a_choice(tmp_path):
  dense(tmp_path, 'a', 0.5, '')
  report, _ = made(tmp_path)
  assert '§' not in tables_lib.terminal(report)


def test_the_command_of_a_run_without_a_support(tmp_path):
  """What another backbone has is missing, with its command."""
  changes = {'dense.held_out': 0.1, 'dense.select': 'validation'}
  for seed in (0, 1):
    dense(tmp_path, f's{seed}', 0.5, 'test', arg='backbone=vgg16', seed=seed)
  dense(tmp_path, 'v', 0.5, 'validation', arg='fold=0', seed=0, **changes)
  report, _ = made(tmp_path)
  [(what, line)] = report.missing
  assert what.startswith('pascal, pspnet')
  stem, arg, overrides, _ = flags_of(line)
  assert stem == 'pspnet'
  assert 'seed=1' in arg
  assert overrides['dense.held_out'] == '0.1'


@pytest.mark.parametrize(
  ('distiller', 'role', 'says'),
  [
    ('kd', 'student', 'kd'),
    ('kd', 'teacher', 'kd teacher'),
    ('none', 'student', 'no distiller'),
  ],
)
def test_a_distiller_is_a_row(distiller, role, says):
  config = {'system': 'segmentation', 'distiller.name': distiller, 'steps': 9}
  assert results.method(results.kind_of(config), role) == says


def test_protocols_are_never_averaged(tmp_path):
  """Runs of IFA that saw what they are tested on, and runs that did not."""
  for protocol, scores in (('released', (0.6, 0.7)), ('fixed', (0.4, 0.5))):
    for seed, score in enumerate(scores):
      arg = f'target=isic,stage=adapt,protocol={protocol},seed={seed}'
      put(tmp_path / 'runs', arg, None, score, stem='ifa')
  report, warnings = made(tmp_path / 'runs')
  assert not warnings
  found = {
    row.settings: str(cell)
    for row in report.rows
    for cell in row.cells.values()
  }
  assert len(found) == 2
  for settings, cell in found.items():
    fixed = 'source.protocol=fixed' in settings
    assert fixed != ('source.protocol=released' in settings)
    assert cell.startswith('45.0' if fixed else '65.0')
  assert {row.method for row in report.rows} == {'IFA'}


def few(runs, recipe, draw, score, choice=None):
  """A run of a recipe for few images; `choice` is what it left open."""
  name = f'recipe={recipe},shots=5,seed=0,config.support.seed={draw}'
  changes = {'support.rule': 'random', 'support.seed': draw, **(choice or {})}
  arg = f'recipe={recipe},shots=5,seed=0'
  folder = put(runs, arg, score, name=name, changes=changes)
  if choice:
    told = {'choice': choice, 'scores': {}}
    (folder / 'held_out.json').write_text(json.dumps(told))
  return folder


def test_recipes_for_few_images_are_rows(tmp_path):
  """Each draw chooses for itself, and is a draw of one cell all the same."""
  runs = tmp_path / 'runs'
  choices = {'views.look': 'polarity', 'views.temperature': 1.25}
  few(runs, 'ours', 1, 0.7, choices)
  few(runs, 'ours', 2, 0.8, choices | {'views.look': 'recolour'})
  few(runs, 'unet', 1, 0.6)
  report, warnings = made(runs)
  assert not warnings
  rows = {(x[1], x[3]): cell for x, cell in cells(report).items()}
  assert rows == {
    ('ours', ''): '75.0 ± 7.1 (n=2)',
    ('U-Net', ''): '60.0 (n=1)',
  }
  [(what, line)] = report.missing
  assert 'U-Net' in what
  assert 'support seed 2' in what
  stem, arg, overrides, _ = flags_of(line)
  assert (stem, overrides['support.seed']) == ('nucleus', '2')
  assert 'recipe=unet' in arg
  assert not any(key.startswith('views') for key in overrides)


def test_a_choice_that_is_damaged_is_told(tmp_path, capsys):
  folder = few(tmp_path, 'ours', 1, 0.7, {'views.look': 'polarity'})
  few(tmp_path, 'ours', 2, 0.7, {'views.look': 'polarity'})
  (folder / 'held_out.json').write_text('{}')
  _, warnings = made(tmp_path)
  assert len(warnings) == 1
  assert 'held_out.json tells no choice' in warnings[0]
