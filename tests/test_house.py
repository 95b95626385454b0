"""The house rules that a machine can check: floors, words, docstrings, pages.

The rules are those of the design: one noun, one word; imports go down only;
nothing half-done stays.
"""

import ast
import functools
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
    '*.md', 'docs/*.md', '*.toml', '*.txt',
  )
  for path in ROOT.glob(pattern)
  if path.is_file()
)  # fmt: skip

# Who stands where; what is not named stands on top, beside main.
FLOORS = {
  **dict.fromkeys(('types', 'files'), 0),
  **dict.fromkeys(('config', 'ops', 'params', 'parallel'), 1),
  **dict.fromkeys(('layers', 'data', 'exporting', 'optim'), 2),
  **dict.fromkeys(('workdir', 'feeding'), 2),
  **dict.fromkeys(('backbones', 'datasets', 'distillers', 'pretrained'), 3),
  'models': 4,
  'systems': 5,
  **dict.fromkeys(('train_step', 'evaluators'), 6),
  **dict.fromkeys(('held_out', 'tasks', 'unlabelled'), 7),
  **dict.fromkeys(('inference', 'suggest', 'train'), 8),
  'measuring': 9,
}  # fmt: skip
TOP = 10

# Floors alone would allow these.
APART = {
  'layers': ('parallel',),
  'models': ('data', 'datasets', 'optim', 'workdir', 'parallel'),
  'systems': ('data', 'datasets', 'workdir', 'parallel'),
  'datasets': ('optim', 'workdir', 'backbones', 'parallel'),
  # An evaluator knows a system by what it predicts.
  'evaluators': ('models', 'systems', 'backbones', 'optim', 'pretrained'),
}
# Folders that are one thing in parts; those of the others are of a kind.
PARTS = (
  'exporting', 'inference', 'measuring', 'ops', 'data', 'workdir', 'pretrained',
)  # fmt: skip
# Siblings may import these.
SHARED_FILES = ('__init__', 'base', 'core', 'adapted', 'meta', 'metrics')

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
  ('configs/ifa.py', 'target'): 'its argument: what a source is adapted to',
  ('data/mask_meaning.py', 'ignore'): 'what people write into classes.txt',
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
TAKES_FILES = [
  f'distillfss_jax.{x}' for x in ('convert', 'export', 'predict', 'speed')
]
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
    alone = {'--suite', '--compare'} & set(line)  # of speed: without a config
    if 'config' in flags.FLAGS and not alone:
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


# Scripts that hand their arguments on to main, and what they put before them.
HAND_ON = {
  'launch/demo.sh': ['--config', 'configs/demo.py'],
  'launch/slurm.sh': [],
  'launch/tpu.sh': [],
}
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def on_page(path):
  """The commands of a page as (module, line), and the files it names."""
  lines, named = [], []
  for command in commands(path.read_text()):
    named += [x for x in command if x.startswith(('launch/', 'tests/', './'))]
    if command[:2] == ['python', '-m']:
      lines.append((command[2], command[3:]))
    elif command[0] == 'python':
      named.append(command[1])
    for i, word in enumerate(command):
      if word in HAND_ON:
        line = HAND_ON[word] + command[i + 1 :]
        lines.append((f'{PACKAGE}.main', line))
  return lines, named


@functools.cache
def parsed(module):
  """What `parse_flags` finds of a module's lines on all pages, at once."""
  found = (line for page in PAGES for line in on_page(page)[0])
  return parse_flags(module, [line for name, line in found if name == module])


@pytest.mark.parametrize('page', PAGES, ids=lambda x: x.name)
def test_readme_commands(page, monkeypatch):
  """Whatever a page shows can be typed: modules, flags, keys, files."""
  monkeypatch.chdir(ROOT)
  lines, named = on_page(page)
  assert lines or named or page.stem == 'parity', f'no command on {page.name}'
  for name in named:
    assert (ROOT / name.split('::')[0]).exists(), f'{page.name}: no {name}'
  for module, line in lines:
    if module.startswith(f'{PACKAGE}.'):
      assert module in MODULES, f'{page.name}: no module {module}'
      done = parsed(module)
      assert done.returncode == 0 or '->' in done.stdout, done.stderr
      wrong = [
        x
        for x in done.stdout.splitlines()
        if x.startswith(' '.join([*line, '->']))
      ]
      assert not wrong, f'{page.name}: {wrong[0]}'
    elif module.startswith('launch.'):
      PLANNED[module](line)
    else:
      assert importlib.util.find_spec(module.split('.')[0]), module


def prose(page):
  """A page without its blocks of code."""
  return re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)


def anchors(page):
  """The names that GitHub gives to a page's headings."""
  heads = re.findall(r'^#+ (.*)$', prose(page), re.M)
  return {re.sub(r'[^\w\- ]', '', x.lower()).replace(' ', '-') for x in heads}


@pytest.mark.parametrize('page', PAGES, ids=lambda x: x.name)
def test_links_lead_somewhere(page):
  for link in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
    if link.startswith(('https://', 'http://')):
      continue
    file, _, anchor = link.partition('#')
    there = (page.parent / file).resolve() if file else page
    assert there.exists(), f'{page.name}: {link}'
    if anchor:
      assert anchor in anchors(there), f'{page.name}: {link}'


def test_every_page_is_in_the_readme():
  text = PAGES[0].read_text()
  for page in PAGES[1:]:
    assert f'](docs/{page.name})' in text, f'README.md does not name {page}'


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
