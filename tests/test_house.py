"""The house rules that a machine can check: floors, words, docstrings, README.

The rules are those of the design: one noun, one word; imports go down only;
nothing half-done stays.
"""

import ast
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from launch import collect, sweep, variance

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = 'distillfss_jax'
SOURCES = sorted((ROOT / PACKAGE).rglob('*.py'))
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
TEXTS = sorted(
  path
  for pattern in (
    f'{PACKAGE}/**/*.py', 'configs/*.py', 'tests/*.py', 'launch/*', '.ci/*',
    '*.md', '*.toml', '*.txt',
  )
  for path in ROOT.glob(pattern)
  if path.is_file()
)  # fmt: skip

# Who stands where; what is not named stands on top, beside main.
FLOORS = {
  **dict.fromkeys(('types', 'files'), 0),
  **dict.fromkeys(('exporting', 'ops', 'params', 'parallel'), 1),
  **dict.fromkeys(('backbones', 'data', 'optim', 'workdir'), 2),
  **dict.fromkeys(('datasets', 'models'), 3),
  **dict.fromkeys(('systems', 'pretrained'), 4),
  **dict.fromkeys(('train_step', 'evaluators'), 5),
  'tasks': 6,
  'train': 7,
}  # fmt: skip
TOP = 8

# Floors alone would allow these.
APART = {
  'models': ('data', 'datasets', 'optim', 'workdir', 'parallel'),
  'systems': ('data', 'datasets', 'workdir', 'parallel'),
  'datasets': ('optim', 'workdir', 'backbones', 'parallel'),
  # An evaluator knows a system by what it predicts.
  'evaluators': ('models', 'systems', 'backbones', 'optim', 'pretrained'),
}
# Folders that are one thing in parts; those of the others are of a kind.
PARTS = ('exporting', 'ops', 'data', 'workdir', 'pretrained')
SHARED_FILES = ('__init__', 'base', 'core')  # siblings may import them

# What has a name of its own here is not called by another.
WORDS = {
  'prompt': 'support', 'prompts': 'support',
  'example': 'shot or query', 'examples': 'shots or queries',
  'substitution': 'leave one out', 'substitutions': 'leave one out',
  'substitutor': 'support.leave_one_out',
  'cls': 'class', 'gt': 'label or mask', 'target': 'label or mask',
  'targets': 'labels or masks', 'groundtruth': 'label or mask',
  'metadata': 'record', 'datadict': 'record',
  'feats': 'pyramid', 'feat': 'pyramid', 'lids': 'levels',
  'stackids': 'stages', 'corr': 'coarse', 'corrs': 'coarse',
  'tnet': 'teacher', 'distillator': 'student or distiller',
  'refine': 'adapt', 'refined': 'adapted', 'refinement': 'adaptation',
  'novel': 'target', 'ignore': 'void', 'ignored': 'void',
}  # fmt: skip
COMPOUNDS = ('data_dict', 'support_feats', 'stack_ids', 't_net', 'ground_truth')

# Names that are not ours to choose.
BORROWED = {
  ('train.py', 'metadata'): 'importlib.metadata',
  ('types.py', 'example'): 'plain English: an example of a way',
  ('workdir/writer.py', 'metadata'): "clu's argument and TensorBoard's module",
}


def name_of(path):
  return path.relative_to(ROOT / PACKAGE).as_posix()


def module_of(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imports(path):
  """Yields what a file imports: modules as far as they are ours."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: imports are absolute here'
      for alias in node.names:
        whole = f'{node.module}.{alias.name}'
        yield whole if whole in MODULES else node.module


def ours(path):
  return {name for name in imports(path) if name in MODULES}


def unit(module):
  """The first name below the package: what stands on a floor."""
  return (module.split('.') + [''])[1]


def floor(module):
  return FLOORS.get(unit(module), TOP)


def test_the_floors_name_what_exists():
  units = {unit(module) for module in MODULES}
  assert set(FLOORS) <= units, sorted(set(FLOORS) - units)


@pytest.mark.parametrize('path', SOURCES, ids=name_of)
def test_imports_go_down(path):
  here = module_of(path)
  for there in sorted(ours(path) - {PACKAGE}):
    if unit(here) == unit(there):
      continue
    assert floor(there) < floor(here), (
      f'{here} (floor {floor(here)}) imports {there} (floor {floor(there)})'
    )
    assert unit(there) not in APART.get(unit(here), ()), (
      f'{here} must not know {there}'
    )


@pytest.mark.parametrize('path', SOURCES, ids=name_of)
def test_siblings_do_not_import_each_other(path):
  here = module_of(path)
  if unit(here) in PARTS or path.stem == '__init__':
    return  # these build on each other; an __init__ looks its files up
  for there in ours(path) - {PACKAGE}:
    assert unit(here) != unit(there) or MODULES[there].stem in SHARED_FILES, (
      f'{here} imports its sibling {there}; what both need belongs in '
      'base.py or core.py'
    )


def test_no_cycles():
  graph = {module_of(path): ours(path) for path in SOURCES}
  done = set()

  def visit(module, above):
    assert module not in above, ' -> '.join((*above, module))
    if module not in done:
      for other in sorted(graph[module] - {PACKAGE, module}):
        # A folder's files may look each other up by the folder's path.
        if not module.startswith(f'{other}.'):
          visit(other, (*above, module))
      done.add(module)

  for module in graph:
    visit(module, ())


@pytest.mark.parametrize('path', [*SOURCES, *CONFIGS], ids=lambda x: x.stem)
def test_what_nobody_imports(path):
  roots = {name.split('.')[0] for name in imports(path)}
  assert not roots & {'torch', 'tensorflow', 'torchvision', 'linen'}, path
  assert 'configs' not in roots or path in CONFIGS, (
    f'{path}: only --config reads configs'
  )
  assert 'tests' not in roots


def public(tree):
  """Yields (class or None, definition) of all that has to say what it is."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != '_':
      yield None, node
      for method in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and method.name[0] != '_':
          yield node, method


def test_docstrings():
  trees = {x: ast.parse(x.read_text()) for x in (*SOURCES, *CONFIGS)}
  found = [
    (path, of, node) for path, x in trees.items() for of, node in public(x)
  ]
  inherited = {
    node.name for _, of, node in found if of and ast.get_docstring(node)
  }
  missing = [
    f'{path.relative_to(ROOT)}: {node.name}'
    for path, of, node in found
    if not ast.get_docstring(node)
    # What a base class says of a method holds for those that replace it.
    and not (of and of.bases and node.name in inherited)
  ]
  missing += [
    f'{path.relative_to(ROOT)}'
    for path, tree in trees.items()
    if not ast.get_docstring(tree)
  ]
  assert not missing, missing


def named(tree):
  """Yields the names a file chooses, and its docstrings."""
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      yield node.name
    if isinstance(node, ast.FunctionDef):
      arguments = node.args
      every = [
        *arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
        arguments.vararg, arguments.kwarg,
      ]  # fmt: skip
      if any(ast.unparse(x) == 'classmethod' for x in node.decorator_list):
        every = every[1:]
      yield from (argument.arg for argument in every if argument)
    if isinstance(getattr(node, 'ctx', None), ast.Store):
      yield getattr(node, 'id', getattr(node, 'attr', ''))
    if isinstance(node, ast.alias) and node.asname:
      yield node.asname
    if isinstance(
      node, ast.Module | ast.ClassDef | ast.FunctionDef
    ) and ast.get_docstring(node):
      yield ast.get_docstring(node)


def words(text):
  """Splits snake_case, CamelCase and prose into words of small letters."""
  for compound in COMPOUNDS:
    text = text.replace(compound, compound.replace('_', ''))
  found = re.findall(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+', text)
  return {word.lower() for word in found}


def test_words_are_split():
  assert words('supportFeats support_feats the GTLabel, data_dict') == {
    'support', 'feats', 'supportfeats', 'the', 'gt', 'label', 'datadict',
  }  # fmt: skip


@pytest.mark.parametrize('path', [*SOURCES, *CONFIGS], ids=lambda x: x.stem)
def test_words(path):
  name = name_of(path) if path in SOURCES else f'configs/{path.name}'
  for text in named(ast.parse(path.read_text())):
    for word in words(text) & set(WORDS):
      assert (name, word) in BORROWED, (
        f'{path}: {word!r} in {text[:80]!r}; the word here is {WORDS[word]}'
      )


def test_nothing_half_done_and_no_machine():
  unfinished = re.compile(r'\b(?:TO' r'DO|FIX' r'ME|XX' r'X|HA' r'CK)\b')
  machine = re.compile(r'(?<![\w.{}])/(?:work|tmp|home|root|Users|mnt)/')
  for path in TEXTS:
    for number, line in enumerate(path.read_text().splitlines(), 1):
      place = f'{path.relative_to(ROOT)}:{number}: {line.strip()}'
      assert not unfinished.search(line), place
      if path.name != pathlib.Path(__file__).name:
        assert not machine.search(line), place


@pytest.mark.parametrize(
  'arguments',
  [('check',), ('check', '--select', 'ERA')],
  ids=' '.join,
)
def test_ruff(arguments):
  """ERA finds code that was commented out."""
  if importlib.util.find_spec('ruff') is None:
    pytest.skip('needs ruff: pip install -r requirements-dev.txt')
  command = [sys.executable, '-m', 'ruff', *arguments, '.']
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr


SCRIPTS = sorted((ROOT / 'launch').glob('*.sh')) + [ROOT / '.ci' / 'run']


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda x: x.name)
def test_scripts_parse(script):
  done = subprocess.run(
    ['bash', '-n', script], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


def commands(text):
  """The commands of a Markdown text's bash blocks, as lists of words."""
  found = []
  for block in re.findall(r'^```(?:bash|sh)\n(.*?)^```', text, re.M | re.S):
    for line in block.replace('\\\n', ' ').splitlines():
      for part in re.split(r'&&|;', line):
        command = shlex.split(part, comments=True)
        while command and re.fullmatch(r'\w+=.*', command[0]):
          command = command[1:]
        if command:
          found.append(command)
  return found


def test_commands_are_found():
  text = (
    '```bash\nA=1 python -m x --y \\\n  "a b"  # why\ncd z && bash w\n```\n'
  )
  assert commands(text) == [
    ['python', '-m', 'x', '--y', 'a b'], ['cd', 'z'], ['bash', 'w'],
  ]  # fmt: skip


PARSE_FLAGS = """
import importlib, json, os, sys
from absl import flags
TAKES_FILES = ['distillfss_jax.convert']
module, lines = sys.argv[1], json.loads(sys.argv[2])
program = importlib.import_module(module)
if hasattr(program, 'define_flags'):
  program.define_flags()
status = 0
for line in lines:
  if pid := os.fork():  # flags are parsed once per process
    status |= os.waitpid(pid, 0)[1]
    continue
  sys.argv = [module, *line]
  try:
    rest = flags.FLAGS(sys.argv)[1:]
    assert not rest or module in TAKES_FILES, f'not a flag: {rest}'
    if 'config' in flags.FLAGS:
      flags.FLAGS.config.to_dict()
  except BaseException as error:
    print(*line, '->', error, flush=True)
    os._exit(1)
  os._exit(0)
sys.exit(bool(status))
"""


def parse_flags(module, lines):
  """Parses the flags of command lines as the module would."""
  return subprocess.run(
    [sys.executable, '-c', PARSE_FLAGS, module, json.dumps(lines)],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip


NOWHERE = 'runs_of_nobody'  # where no run lies


def plan_sweep(line):
  args = sweep.parser().parse_args(line)
  sweep.plan(args.config, args.grid, args.set, NOWHERE)


def plan_variance(line):
  args = variance._parse(line)
  variance.plan(args.config, args.draws, args.seeds, args.set, NOWHERE)


# What takes command lines as far as they can be without running anything.
PLANNED = {
  'launch.sweep': plan_sweep,
  'launch.variance': plan_variance,
  'launch.collect': collect._parse,
}


def test_readme_commands(monkeypatch):
  monkeypatch.chdir(ROOT)
  readme = ROOT / 'README.md'
  if not readme.exists():
    pytest.skip('there is no README.md')
  found = commands(readme.read_text())
  flags = {}
  for command in found:
    if command[0] in ('bash', 'sh') or command[0].startswith('./'):
      script = command[0] if command[0].startswith('./') else command[1]
      assert (ROOT / script).is_file(), f'no file {script}: {command}'
      if pathlib.Path(script).name == 'demo.sh':
        line = ['--config', 'configs/demo.py', *command[2:]]
        flags.setdefault(f'{PACKAGE}.main', []).append(line)
      for argument in command[2:]:
        if argument.startswith('tests/'):
          assert (ROOT / argument.split('::')[0]).exists(), command
    elif command[:2] == ['python', '-m']:
      if command[2].startswith(f'{PACKAGE}.'):
        flags.setdefault(command[2], []).append(command[3:])
      elif command[2].startswith('launch.'):
        PLANNED[command[2]](command[3:])
      else:
        assert importlib.util.find_spec(command[2].split('.')[0]), command
    elif command[0] == 'python':
      assert (ROOT / command[1]).is_file(), f'no file {command[1]}: {command}'
  assert flags, 'README.md shows no command of this package'
  for module, lines in flags.items():
    assert module in MODULES, f'README.md: no module {module}'
    done = parse_flags(module, lines)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bad_sweeps_are_noticed(monkeypatch):
  monkeypatch.chdir(ROOT)
  for name, line in (
    ('launch.sweep', ['configs/nucleus.py', '--grid', 'shot=5']),
    ('launch.sweep', ['configs/nucleus.py', '--grids', 'shots=5']),
    ('launch.variance', ['configs/nucleus.py', '--set', 'config.step=4']),
    ('launch.collect', ['runs', '--papers']),
  ):
    with pytest.raises((ValueError, SystemExit)):
      PLANNED[name](line)


def test_bad_commands_are_noticed():
  good = ['--config', 'configs/demo.py:smoke', '--config.steps=3']
  bad = (
    ['--config', 'configs/nowhere.py'],
    ['--config', 'configs/demo.py:smok'],
    [*good, '--config.stepz=3'],
    [*good, '--nothing=1'],
    [*good, 'rest'],
  )
  done = parse_flags(f'{PACKAGE}.main', [good, *bad])
  assert done.returncode == 1
  for line in bad:
    assert ' '.join([*line, '->']) in done.stdout
  assert done.stdout.count('->') == len(bad), done.stdout
