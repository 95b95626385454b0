"""Pages for a browser: one file each, which asks for nothing outside it."""

import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from distillfss_jax.workdir import report
from tests import pages

VOID_TAGS = ('meta', 'link', 'img', 'input', 'br')


class _Reader(html.parser.HTMLParser):
  """Checks that tags are closed in order; keeps attributes and tables."""

  def __init__(self):
    super().__init__()
    self.open, self.attributes, self.rows = [], [], []

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, *x) for x in attrs]
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')
    if tag not in VOID_TAGS:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] in ('td', 'th'):
      self.rows[-1][-1] += data


def read(text):
  """The page as a `_Reader`, checked to be whole and on its own."""
  reader = _Reader()
  reader.feed(text)
  assert not reader.open
  for tag, name, value in reader.attributes:
    if name in ('src', 'href'):
      assert value.startswith(('data:', 'file:')), (tag, value[:80])
    assert name not in ('srcset', 'action')
  assert not re.search(r'https?://|@import|url\(|fetch\(|XMLHttp', text)
  return reader


def _answers(scores):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (8, 10, 3), np.uint8)
  labels = rng.integers(0, 3, (8, 10)).astype(np.uint8)
  labels[0, 0] = 255
  palette = ((0, 0, 0), (200, 10, 10), (10, 200, 10))
  return [
    report.Answered(
      f'<i>{name}</i>',
      image,
      {'truth': labels, 'student': labels},
      {'student': score},
      ('a<b', 'c'),
      palette,
      {'student': np.full((8, 10), 200, np.uint8)},
    )
    for name, score in scores.items()
  ]


@pytest.fixture
def page(tmp_path):
  """The page of a run, as text."""
  picture = Image.new('RGB', (4, 4))
  (tmp_path / 'panels').mkdir()
  picture.save(tmp_path / 'panels' / 'support.png')
  answers = _answers({'good': 0.9, 'none': None, 'bad': 0.125})
  report.write(tmp_path, pages.RESULTS, answers, command='python -m x "<y>"')
  return (tmp_path / 'report.html').read_text()


def test_a_page_of_a_run(page):
  reader = read(page)
  rows = reader.rows
  assert ['student', '0.5000'] in rows
  assert ['untrained student', '0.1000'] in rows
  assert ['brightness', '0.2000'] in rows
  assert ['c', '-', '0.1000'] in rows
  assert ['jax', '1.0'] in rows
  for text in ('at the size &amp; so on', 'a note', 'python -m x &quot;&lt;y'):
    assert text in page
  assert '<h2>Support</h2>' in page
  assert page.count('class="swatch"') == 2
  assert 'Curves' not in page  # there are none


def test_the_worst_comes_first(page):
  names = re.findall(r'<div class="shown"><b>&lt;i&gt;(\w+)', page)
  assert names == ['bad', 'good', 'none']
  sliders = [x for x in read(page).attributes if x[1:] == ('type', 'range')]
  assert len(sliders) == 3
  assert page.count('type="radio"') == page.count('class="over"') == 9
  assert page.count(' checked>') == 3
  assert 'student 0.125' in page
  assert 'confidence of the student: 0.33' in page  # of three labels


def test_layers_are_seen_through():
  labels = np.array([[0, 1], [2, 255]], np.uint8)
  data = report._layer(labels, ((9, 9, 9), (1, 2, 3), (4, 5, 6)))
  found = np.asarray(Image.open(io.BytesIO(data)).convert('RGBA'))
  assert found[0, 0, 3] == 0
  assert found[0, 1].tolist() == [1, 2, 3, 255]
  assert found[1, 0].tolist() == [4, 5, 6, 255]
  assert found[1, 1].tolist() == [128, 128, 128, 255]


def test_confidence_in_few_colours():
  sure = np.arange(128, 256, dtype=np.uint8).reshape(8, 16)
  data = report._confidence(sure, 0.5)
  picture = Image.open(io.BytesIO(data))
  steps = np.asarray(picture)
  assert steps.min() == 0
  assert steps.max() == report._STEPS - 1
  assert (np.diff(steps.ravel().astype(int)) >= 0).all()
  colours = np.asarray(picture.convert('RGB'))
  np.testing.assert_array_equal(colours[0, 0], report._scale_colours()[0])
  np.testing.assert_array_equal(colours[-1, -1], report._scale_colours()[-1])
