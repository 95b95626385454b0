"""Fixtures of the whole suite, and where the reference material lies."""

import os
import pathlib

import hypothesis
import pytest

# The same examples every time, on machines of any speed; others are found by
# pytest --hypothesis-profile=explore.
_PATIENT = {
  'deadline': None,
  'suppress_health_check': [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile('explore', **_PATIENT)
hypothesis.settings.register_profile('steady', derandomize=True, **_PATIENT)
hypothesis.settings.load_profile('steady')


def pytest_configure(config):
  """Keeps compiled programs in pytest's cache, for the commands tested, too.

  Most of the suite's time is compiling, much of it the same small program in
  another process. `pytest --cache-clear` empties it.
  """
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    folder = config.cache.mkdir('compiled')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'


ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'


@pytest.fixture(scope='session')
def shared():
  """`shared('goldens/x.npz')` is that path, or the test is skipped."""

  def find(name):
    path = SHARED / name
    if not path.exists():
      pytest.skip(f'needs the reference material beside the clone: {path}')
    return path

  return find
