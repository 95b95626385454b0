"""The spread over support draws and seeds: formulas, missing runs, pictures."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from launch import variance

# ml_collections loads the configs of commands so.
pytestmark = pytest.mark.filterwarnings(
  'ignore:the load_module:DeprecationWarning'
)

NAN = np.nan
# Means of the draws 2 and 6, of the seeds 2, 4 and 6, of all 4; rests 1, 0, -1
# and -1, 0, 1. MD = 24, MS = 8, MR = 2.
HAND = np.array([[1.0, 2, 3], [3, 6, 9]])


def test_formulas_by_hand():
  found = variance.spread(HAND)
  assert found.mean == 4
  assert found.std == pytest.approx((44 / 5) ** 0.5)
  assert found.over_draws == pytest.approx(8**0.5)
  assert found.over_seeds == pytest.approx((1 + 3) / 2)
  assert found.draw == pytest.approx((22 / 3) ** 0.5)
  assert found.seed == pytest.approx(3**0.5)
  assert found.rest == pytest.approx(2**0.5)
  assert (found.clipped, found.of) == ((), (2, 3))


def test_draws_and_seeds_change_places():
  found, turned = variance.spread(HAND), variance.spread(HAND.T)
  assert turned.draw == pytest.approx(found.seed)
  assert turned.seed == pytest.approx(found.draw)
  assert turned.rest == pytest.approx(found.rest)


def test_nothing_but_draws():
  found = variance.spread(np.outer([1.0, 2, 4], np.ones(4)))
  assert found.draw == pytest.approx((7 / 3) ** 0.5)
  assert found.seed == pytest.approx(0, abs=1e-6)
  assert found.rest == pytest.approx(0, abs=1e-6)
  assert found.over_seeds == 0
  assert found.clipped == ()
  same = variance.spread(np.full((3, 2), 0.1))
  assert same.draw == pytest.approx(0, abs=1e-6)
  assert same.clipped == ()


def test_negative_components_are_shown_as_0():
  found = variance.spread([[1, 2], [2, 1]])  # MD = MS = 0, MR = 1
  assert (found.draw, found.seed, found.rest) == (0, 0, 1)
  assert found.clipped == ('draw', 'seed')


def test_simulated_components_are_found():
  """On average, and each variance by itself."""
  random = np.random.default_rng(0)
  draws, seeds, known = 30, 25, {'draw': 2.0, 'seed': 1.0, 'rest': 0.5}
  found = {name: [] for name in known}
  for _ in range(400):
    table = (
      7
      + known['draw'] * random.standard_normal((draws, 1))
      + known['seed'] * random.standard_normal((1, seeds))
      + known['rest'] * random.standard_normal((draws, seeds))
    )
    estimate = variance.spread(table)
    assert not estimate.clipped
    for name, values in found.items():
      values.append(getattr(estimate, name) ** 2)
  for name, value in known.items():
    mean, std = np.mean(found[name]), np.std(found[name], ddof=1)
    assert abs(mean - value**2) < 4 * std / 20, name
    # An estimate of degrees of freedom like a mean square's.
    if name != 'rest':
      freedom = (draws if name == 'draw' else seeds) - 1
      assert std == pytest.approx(value**2 * (2 / freedom) ** 0.5, rel=0.2)


def test_too_few_for_some():
  one = variance.spread([[3.0]])
  assert (one.mean, one.std, one.over_draws, one.over_seeds) == (
    3, None, None, None,
  )  # fmt: skip
  draws = variance.spread([[1.0], [3.0]])
  assert draws.over_draws == pytest.approx(2**0.5)
  assert draws.over_seeds is None
  assert draws.rest is None
  seeds = variance.spread([[1.0, 3.0]])
  assert seeds.over_draws is None
  assert seeds.over_seeds == pytest.approx(2**0.5)
  with pytest.raises(ValueError, match='no run of the table'):
    variance.spread([[NAN, NAN]])


def test_missing_runs_leave_the_rest():
  holed = np.vstack([HAND, [5, NAN, NAN], [NAN, NAN, NAN]])
  found, whole = variance.spread(holed), variance.spread(HAND)
  assert found.mean == pytest.approx(29 / 7)
  assert found.over_draws == pytest.approx(np.std([2, 6, 5], ddof=1))
  assert found.over_seeds == whole.over_seeds
  # Two complete draws are more than one complete seed.
  assert (found.draw, found.seed, found.rest) == (
    whole.draw, whole.seed, whole.rest,
  )  # fmt: skip
  assert found.of == (2, 3)
  turned = variance.spread(holed.T)
  assert turned.of == (3, 2)
  assert turned.seed == whole.draw
  scattered = variance.spread([[1, NAN], [NAN, 2]])
  assert scattered.rest is None
  assert scattered.mean == 1.5


ARGUMENTS = ('--draws', '2', '--seeds', '3', '--set', 'smoke', '--via', 'print')


@pytest.fixture
def grid(tmp_path):
  """The grid of 2 draws x 3 seeds, its runs written by hand."""
  made = variance.plan('configs/demo.py', 2, 3, ['smoke'], tmp_path)
  for (draw, seed), run in made.runs.items():
    config = importlib.import_module('configs.demo').get_config('smoke')
    config.support.rule, config.support.seed = 'random', draw
    config.seed = seed
    score = HAND[draw, seed] / 100
    roles = {'teacher': {'miou': score / 2}, 'student': {'miou': score}}
    run.folder.mkdir(parents=True)
    for name, value in (
      ('config.json', json.loads(config.to_json_best_effort())),
      ('results.json', {'test': roles}),
      ('ids.json', {'support': [f'image{draw}a', f'image{draw}b']}),
    ):
      (run.folder / name).write_text(json.dumps(value))
  return made


def test_report(grid, tmp_path, capsys):
  code = variance.main(['configs/demo.py', *ARGUMENTS, '--root', str(tmp_path)])
  assert code == 0
  out = capsys.readouterr().out.splitlines()
  assert out[1:-2] == [
    'test mIoU of the student in per cent, configs/demo.py smoke: 2 draws x 3 '
    'seeds, 6 of 6 runs',
    '',
    'support seed  seed 0  seed 1  seed 2  mean',
    '------------  ------  ------  ------  ----',
    '           0     1.0     2.0     3.0   2.0',
    '           1     3.0     6.0     9.0   6.0',
    '',
    '                                                per cent',
    '----------------------------------------------  --------',
    'mean                                                 4.0',
    'deviation over all runs                              3.0',
    'over support draws (of their means over seeds)       2.8',
    'over seeds (within a draw, mean over draws)          2.0',
    'component: support draw                              2.7',
    'component: seed                                      1.7',
    'component: rest                                      1.4',
    '',
    'best draw: support seed 1, 6.0: image1a image1b',
    'worst draw: support seed 0, 2.0: image0a image0b',
  ]
  assert out[-1] == f'picture: {tmp_path}/demo/variance.png'
  with Image.open(tmp_path / 'demo' / 'variance.png') as picture:
    assert min(picture.size) > 300
    assert np.asarray(picture.convert('RGB')).std() > 5


def test_runs_that_lack_are_named(grid, tmp_path, capsys):
  gone, half, other = (grid.runs[x].folder for x in ((1, 0), (1, 1), (1, 2)))
  for path in gone.iterdir():
    path.unlink()
  gone.rmdir()
  (half / 'results.json').unlink()
  results = json.loads((other / 'results.json').read_text())
  (other / 'results.json').write_text('{"te')
  arguments = ['configs/demo.py', *ARGUMENTS, '--root', str(tmp_path)]
  assert variance.main(arguments) == 0
  out = capsys.readouterr().out
  assert '3 of 6 runs' in out
  assert 'missing: 3 of 6 runs' in out
  assert 'support seed 1, seed 0: not run' in out
  assert 'support seed 1, seed 1: unfinished' in out
  assert f'support seed 1, seed 2: {other}/results.json is damaged' in out
  assert out.count(str(gone)) == 2  # of the sweep, and among the missing
  assert 'components need two draws and two seeds' in out
  assert 'no draw is better than another: 2.0' in out
  # A folder of another run does not count.
  (other / 'results.json').write_text(json.dumps(results))
  config = json.loads((other / 'config.json').read_text())
  config['support']['seed'] = 7
  (other / 'config.json').write_text(json.dumps(config))
  found = variance.read(grid, 'test', 'miou')
  assert "('random', 7, 2)" in found.missing[1, 2]
  assert np.isnan(found.table[1]).all()


@pytest.mark.parametrize('name', ['config.json', 'results.json', 'ids.json'])
@pytest.mark.parametrize(
  'text',
  [
    '[' * 100_000, '{"a":' * 5000 + '1' + '}' * 5000, '3', '[]', '{"te',
    '{"test": {"student": {"miou": 1e308}}, "support": 3}',
    '{"test": {"student": {"miou": 1' + '0' * 400 + '}}}',
    '{"test": {"student": {"miou": "0.5"}}, "support": null}',
    '{"test": {"student": 0.5}, "support": {"a": 1}}',
  ],
  ids=lambda x: x[:45],
)  # fmt: skip
def test_files_of_wrong_kinds(grid, name, text):
  folder = grid.runs[1, 1].folder
  (folder / name).write_text(text)
  found = variance.read(grid, 'test', 'miou')
  if name == 'ids.json':  # which only says what was drawn
    assert not found.missing
    assert found.support[1] == ['image1a', 'image1b']
  else:
    assert list(found.missing) == [(1, 1)]
    assert str(folder / name) in found.missing[1, 1]
    assert '\n' not in found.missing[1, 1]


def test_drawn_ids_that_are_no_texts(grid):
  for run in grid.runs.values():
    (run.folder / 'ids.json').write_text('{"support": [1, null]}')
  found = variance.read(grid, 'test', 'miou')
  assert found.support[0] == ['1', 'None']
  assert 'support seed 1, 6.0: 1 None' in variance.report(
    grid, found, 'test', 'miou'
  )


def test_teachers_of_transfer(grid):
  for run in grid.runs.values():
    path = run.folder / 'results.json'
    results = json.loads(path.read_text())
    del results['test']['student']
    path.write_text(json.dumps(results))
  found = variance.read(grid, 'test', 'miou')
  assert found.role == 'teacher'
  np.testing.assert_allclose(found.table, HAND / 2)


def test_plan(tmp_path):
  """As agreed with the sweep: rule, support seed, seed, then what is shared."""
  made = variance.plan(
    'configs/nucleus.py', 2, 2, ['shots=5', 'config.steps=4'], tmp_path
  )
  run = made.runs[1, 0]
  assert run.folder == tmp_path / 'nucleus' / (
    'support.rule=random,support.seed=1,seed=0,shots=5,steps=4'
  )
  assert made.folder == tmp_path / 'nucleus'
  assert made.shape == (2, 2)
  assert len({x.folder for x in made.runs.values()}) == 4
  # The demo has no argument for the seed, only the key.
  demo = variance.plan('configs/demo.py', 1, 2, ['smoke'], tmp_path)
  assert demo.runs[0, 1].cell['config.seed'] == '1'


def failed(*arguments):
  done = subprocess.run(
    [sys.executable, '-m', 'launch.variance', *map(str, arguments)],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 1, done
  assert not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ')
  return line


def test_errors(tmp_path):
  assert 'no config configs/nowhere.py; there are' in failed(
    'configs/nowhere.py', '--root', tmp_path
  )
  demo = 'configs/demo.py', '--root', tmp_path
  assert 'stepz' in failed(*demo, '--set', 'config.stepz=3')
  assert 'twice' in failed(*demo, '--set', 'smoke', 'smoke')
  rule = failed(*demo, '--set', 'config.support.rule=even')
  assert 'config.support.rule' in rule
  assert 'no spread' in failed(*demo, '--draws', '1', '--seeds', '1')
  assert "'0'" in failed(*demo, '--draws', '0')
  assert not list(tmp_path.iterdir())


def test_nothing_has_run(tmp_path, capsys):
  arguments = ['configs/demo.py', *ARGUMENTS, '--root', str(tmp_path)]
  assert variance.main(arguments) == 0
  out, err = capsys.readouterr()
  assert out.count('python') == 6
  assert 'nothing to report' in err
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_real_runs(tmp_path):
  """Two draws of the demo, from the command to the picture."""
  command = [sys.executable, '-m', 'launch.variance', 'configs/demo.py']
  command += ['--draws', '2', '--seeds', '1', '--set', 'smoke']
  command += ['config.support.shots=4', '--root', str(tmp_path)]
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert '2 of 2 runs' in done.stdout
  assert 'draw' in done.stdout.splitlines()[-3]
  assert (tmp_path / 'demo' / 'variance.png').exists()
  ids = [
    json.loads(path.read_text())['support']
    for path in (tmp_path / 'demo').glob('*/ids.json')
  ]
  assert len(ids) == 2
  assert ids[0] != ids[1]
