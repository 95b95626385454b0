"""Fixtures of the whole suite, and where the reference material lies."""

import pathlib

import pytest

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
