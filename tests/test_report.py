"""Pictures by hand-computable pixels, tables by eye, results by the book."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distillfss_jax import files
from distillfss_jax.workdir import pictures, results

RED, BLUE = (255, 0, 0), (0, 0, 255)
COLOURS = ((0, 0, 0), RED, BLUE)


def test_overlay_by_hand():
  image = np.full((5, 5, 3), 100, np.uint8)
  label = np.zeros((5, 5), np.uint8)
  label[1:4, 1:4] = 1
  result = pictures.overlay(image, label, COLOURS, alpha=0.5)
  expected = image.copy()
  expected[1:4, 1:4] = RED  # the outline, full
  expected[2, 2] = (178, 50, 50)  # 100 + 0.5 * (255 - 100) = 177.5, to even
  np.testing.assert_array_equal(result, expected)
  assert (image == 100).all()  # the input is left alone


def test_overlay_outlines_where_regions_meet_and_not_the_border():
  image = np.zeros((4, 6, 3), np.uint8)
  label = np.repeat([[1, 1, 1, 2, 2, 2]], 4, axis=0)
  result = pictures.overlay(image, label, COLOURS, alpha=0)
  np.testing.assert_array_equal(result[:, 2], [RED] * 4)
  np.testing.assert_array_equal(result[:, 3], [BLUE] * 4)
  assert not result[:, :2].any()
  assert not result[:, 4:].any()


def test_overlay_hatches_void_in_grey():
  image = np.full((4, 4, 3), 50, np.uint8)
  result = pictures.overlay(image, np.full((4, 4), 255, np.uint8), COLOURS)
  dark, light = 50 + 0.6 * 40, 50 + 0.6 * 150
  rows, columns = np.indices((4, 4))
  expected = np.where((rows + columns) // 2 % 2, light, dark)
  np.testing.assert_array_equal(result, np.stack([expected] * 3, -1))


def test_overlay_refuses():
  image = np.zeros((2, 3, 3), np.uint8)
  with pytest.raises(ValueError, match=r'\[2, 3, 3\] and \[3, 3\]'):
    pictures.overlay(image, np.zeros((3, 3), int))
  with pytest.raises(ValueError, match='float32'):
    pictures.overlay(image.astype(np.float32), np.zeros((2, 3), int))
  with pytest.raises(ValueError, match='label 3 has no colour'):
    pictures.overlay(image, np.full((2, 3), 3), COLOURS)


def test_palette():
  assert len(pictures.PALETTE) == len(set(pictures.PALETTE)) == 21
  with pytest.raises(ValueError, match='label 21'):
    pictures.overlay(np.zeros((1, 1, 3), np.uint8), np.full((1, 1), 21))


def blank(height, width, value=0):
  return np.full((height, width, 3), value, np.uint8)


def inked(picture):
  """Returns the bounding box of what is not white: top, bottom, left, right."""
  rows, columns = np.nonzero((picture < 200).any(-1))
  return rows.min(), rows.max(), columns.min(), columns.max()


def test_panel_scales_and_keeps_proportions():
  picture = pictures.panel(
    [('a', blank(10, 20)), ('b', blank(64, 32))], height=32
  )
  assert picture.dtype == np.uint8
  black = (picture[-20] == 0).all(-1)
  assert black.sum() == 64 + 16
  below = (picture[-1] == 255).all()
  assert below


@given(
  title=st.text(
    st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=60
  ),
  width=st.integers(24, 200),
)
@settings(max_examples=40)
def test_captions_are_never_cut(title, width):
  caption = np.asarray(pictures._caption(title, width))
  assert caption.shape[1] == width
  if title.strip():
    lines = list(pictures._wrapped(title.split(), pictures._font(9), width))
    assert ''.join(lines).replace(' ', '') == title.replace(' ', '')
    assert all(pictures._font(9).getlength(line) <= width for line in lines)


def test_long_names_fit():
  name = 'a_very_long_identifier_of_an_image'
  picture = pictures.panel([(name, blank(9, 9))], height=90)
  caption = picture[: -90 - pictures._GAP]
  top, _, left, right = inked(caption)
  assert top >= 1
  assert left >= pictures._GAP - 1
  assert right <= 90 + pictures._GAP


def test_grid_pads_with_white():
  picture = pictures.grid([blank(2, 3), blank(1, 5)])
  assert picture.shape == (3, 5, 3)
  assert (picture[:2, 3:] == 255).all()
  assert not picture[2].any()
  with pytest.raises(ValueError, match='at least one'):
    pictures.grid([])
  with pytest.raises(ValueError, match='at least one'):
    pictures.panel([])


def test_support_panel():
  images = [blank(8, 8, 90)] * 7
  labels = [np.eye(8, dtype=int)] * 7
  three = pictures.support_panel(images[:3], labels[:3], per_row=3, height=40)
  seven = pictures.support_panel(images, labels, per_row=3, height=40)
  assert seven.shape == (3 * three.shape[0], three.shape[1], 3)
  assert (seven == pictures.PALETTE[1]).all(-1).any()
  with pytest.raises(ValueError, match='argument'):
    pictures.support_panel(images, labels[:2])


def test_query_panel():
  label = np.zeros((16, 16), int)
  label[4:12, 4:12] = 1
  predictions = {'teacher': (label, 0.9), 'student': (label * 0, None)}
  picture = pictures.query_panel(
    blank(16, 16, 90), label, predictions, palette=COLOURS, height=64
  )
  assert picture.shape[1] == 4 * (64 + pictures._GAP) + pictures._GAP
  red = (picture == RED).all(-1).any(0)
  columns = [red[i * 74 + 10 : i * 74 + 74].any() for i in range(4)]
  assert columns == [False, True, True, False]  # truth and teacher
  nan = {'teacher': (label, 0.9), 'student': (label * 0, float('nan'))}
  same = pictures.query_panel(
    blank(16, 16, 90), label, nan, palette=COLOURS, height=64
  )
  np.testing.assert_array_equal(picture, same)


def test_legend():
  picture = pictures.legend(['cell', 'nucleus'], COLOURS, width=300)
  assert picture.shape[1] == 300
  assert (picture[12, 12] == RED).all()
  taller = pictures.legend(['a long name of a class'] * 2, COLOURS, width=200)
  assert taller.shape[0] > picture.shape[0]
  wide = pictures.legend(['an even longer name of a class'], COLOURS, width=50)
  assert inked(wide)[3] < wide.shape[1] - 1


def test_save(tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
  pictures.save(tmp_path / 'new' / 'p.png', picture)
  np.testing.assert_array_equal(Image.open(tmp_path / 'new' / 'p.png'), picture)


def test_curves(tmp_path):
  lines = []
  for step in range(100):
    loss = None if step == 50 else 2.0 ** (-step / 10)
    lines.append({
      'step': step, 'time': 0.0, 'loss': loss, 'loss/kl': 0.1,
      'steps_per_sec': 12.5, 'lr': 1e-3,
    })  # fmt: skip
  lines.append({'step': 99, 'time': 0.0, 'test/miou': 0.7, 'test/f1': 0.8})
  metrics = tmp_path / 'metrics.jsonl'
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  metrics.write_text(text + '{"step": 100, "lo')  # killed in the middle
  pictures.curves(metrics, tmp_path / 'plots' / 'curves.png')
  with Image.open(tmp_path / 'plots' / 'curves.png') as picture:
    assert picture.width > picture.height > 300
    colours = {colour for _, colour in picture.convert('RGB').getcolors(99999)}
  # The lines are there, in the first colours of the plots.
  assert pictures.PALETTE[5] in colours
  assert pictures.PALETTE[6] in colours
  metrics.write_text('{"step": 1, "time": 0.0, "loss": null}\n')
  with pytest.raises(ValueError, match='no metrics'):
    pictures.curves(metrics, tmp_path / 'none.png')


@pytest.mark.parametrize(
  ('name', 'group'),
  [('loss', 'loss'), ('loss/kl', 'loss'), ('test/loss', 'loss'),
   ('steps_per_sec', 'speed'), ('steps_per_second', 'speed'),
   ('test/miou', 'test'), ('lr', 'lr')],
)  # fmt: skip
def test_groups_of_curves(name, group):
  assert pictures._group(name) == group


def test_smoothing_keeps_a_constant():
  np.testing.assert_allclose(pictures._smooth(np.ones(100)), 1)
  assert len(pictures._smooth(np.ones(41))) == 41


ROWS = [['cell', 0.81234, 3], ['a|b', None, 12], ['x', 123.456, 5]]


def test_table():
  assert results.table(ROWS, ['class', 'IoU', 'n']).splitlines() == [
    'class     IoU   n',
    '-----  ------  --',
    'cell   0.8123   3',
    'a|b         -  12',
    'x       123.5   5',
  ]
  assert results.table([], ['a', 'bc']) == 'a  bc\n-  --'
  with pytest.raises(ValueError, match='1 cells, the header 2'):
    results.table([['x']], ['a', 'b'])


def test_markdown():
  assert results.markdown(ROWS[:2], ['class', 'IoU', 'n']).splitlines() == [
    '| class | IoU | n |',
    '| --- | ---: | ---: |',
    '| cell | 0.8123 | 3 |',
    r'| a\|b | - | 12 |',
  ]


@pytest.mark.parametrize(
  ('cell', 'said'),
  [(0.5, '0.5000'), (1e-5, '1e-05'), (0.0, '0.0000'), (-250.04, '-250.0'),
   (True, 'True'), (7, '7'), (np.float32(0.25), '0.2500'), (None, '-')],
)  # fmt: skip
def test_cells(cell, said):
  assert results._text(cell) == said


def test_results(tmp_path):
  found = {
    'miou': np.float32(1 / 3),
    'steps': jnp.int32(7),
    'name': 'demo',
    'undefined': None,
    'list': (np.float64(0.1) * 3, 2),
    'per class': {'cell': {'iou': 0.8, 'f1': 0.9}, 'pore': {'iou': 0.7}},
    'speed': {'seconds': 1.23456789e-7},
  }
  results.write_results(tmp_path, found)
  assert json.loads((tmp_path / 'results.json').read_text()) == {
    'miou': 0.333333,
    'steps': 7,
    'name': 'demo',
    'undefined': None,
    'list': [0.3, 2],
    'per class': {'cell': {'iou': 0.8, 'f1': 0.9}, 'pore': {'iou': 0.7}},
    'speed': {'seconds': 1.23457e-07},
  }
  text = (tmp_path / 'results.md').read_text()
  assert '| miou | 0.3333 |' in text
  assert '## per class\n\n|  | iou | f1 |' in text
  assert '| pore | 0.7000 | - |' in text
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'results.json',
    'results.md',
  ]


@pytest.mark.parametrize('bad', [float('nan'), np.inf, jnp.nan, object()])
def test_results_refuse(tmp_path, bad):
  results.write_results(tmp_path, {'fine': 1.0})
  with pytest.raises(ValueError, match='results/per class/cell/1 is'):
    results.write_results(tmp_path, {'per class': {'cell': [0.0, bad]}})
  assert json.loads((tmp_path / 'results.json').read_text()) == {'fine': 1.0}


def test_atomic_writes(tmp_path, monkeypatch):
  path = tmp_path / 'deep' / 'file.txt'
  files.write_atomically(path, 'é')
  assert path.read_bytes() == 'é'.encode()
  files.write_atomically(path, b'\x00')
  assert path.read_bytes() == b'\x00'

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files.os, 'fsync', full)
  with pytest.raises(OSError, match='No space left'):
    files.write_atomically(path, 'new')
  assert path.read_bytes() == b'\x00'
  assert [p.name for p in path.parent.iterdir()] == ['file.txt']


def test_what_is_a_dict_has_a_table_of_its_own(tmp_path):
  found = {
    'test': {
      'student': {'miou': 0.5, 'iou': {'cell': 0.25, 'pore': None}},
      'teacher': {'miou': 0.75, 'iou': {'cell': 0.5, 'pore': 1.0}},
    }
  }
  results.write_results(tmp_path, found)
  text = (tmp_path / 'results.md').read_text()
  assert '{' not in text
  assert '|  | miou |\n| --- | ---: |\n| student | 0.5000 |' in text
  assert '### iou\n\n|  | cell | pore |' in text
  assert '| student | 0.2500 | - |' in text
