"""Pages in a real browser: drawn, sorted, slid, and no request to anyone.

What a page asks for is read in Chromium's own log of the network, which has
every request, whether or not it was answered; no name leads to an address
there, so that none is.
"""

import json
import shutil

import pytest

from tests import pages

webdriver = pytest.importorskip(
  'selenium.webdriver', reason='needs selenium: requirements-dev.txt'
)
BROWSERS = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
FLAGS = (
  'headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run',
  'disable-background-networking', 'disable-component-update', 'disable-sync',
  'window-size=1200,1000', 'host-resolver-rules=MAP * ~NOTFOUND',
)  # fmt: skip
SCORES = {'00ae': 0.9, '1e24': None, 'bad': 0.125}


class Browser:
  """A page in Chromium.

  Attributes:
    driver: of selenium.
  """

  def __init__(self, driver):
    self.driver = driver

  def open(self, url):
    """Shows a page; gives the errors, and the requests made for it."""
    for kind in ('browser', 'performance'):
      self.driver.get_log(kind)  # what was before is forgotten
    self.driver.get(url)
    return self.errors(), self.requests()

  def errors(self):
    """What the console says since it was asked last."""
    return [x['message'] for x in self.driver.get_log('browser')]

  def requests(self):
    """The addresses that were asked for since then."""
    messages = (
      json.loads(x['message'])['message']
      for x in self.driver.get_log('performance')
    )
    return [
      x['params']['request']['url']
      for x in messages
      if x['method'] == 'Network.requestWillBeSent'
    ]

  def all(self, selector, of=None):
    """Elements by a CSS selector."""
    return (of or self.driver).find_elements('css selector', selector)

  def column(self, table, place):
    """The texts of a table's column, from the top."""
    return [x.text for x in self.all(f'tbody td:nth-child({place})', table)]


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  """A `Browser`, the same for all tests."""
  programs = next(filter(None, map(shutil.which, BROWSERS)), None)
  service = shutil.which('chromedriver')
  if not (programs and service):
    pytest.skip('needs Chromium and chromedriver: apt install chromium-driver')
  options = webdriver.ChromeOptions()
  options.binary_location = programs
  folder = tmp_path_factory.mktemp('browser')
  for flag in (*FLAGS, f'user-data-dir={folder}'):
    options.add_argument(f'--{flag}')
  logs = {'browser': 'ALL', 'performance': 'ALL'}
  options.set_capability('goog:loggingPrefs', logs)
  with pytest.MonkeyPatch.context() as patch:
    # Selenium speaks with the driver over the network of this machine.
    patch.setenv('no_proxy', 'localhost,127.0.0.1')
    driver = webdriver.Chrome(options, webdriver.ChromeService(service))
    driver.set_page_load_timeout(30)
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope='module')
def run_page(tmp_path_factory):
  """The address of a run's page."""
  return pages.of_run(tmp_path_factory.mktemp('run'), SCORES).as_uri()


def test_what_is_wrong_is_noticed(browser, tmp_path):
  page = tmp_path / 'page.html'
  page.write_text(
    '<script>nothing()</script><img src="http://nowhere.invalid/x.png">'
  )
  errors, requests = browser.open(page.as_uri())
  assert any('nothing is not defined' in x for x in errors)
  assert 'http://nowhere.invalid/x.png' in requests


def test_a_run_is_drawn_without_a_request(browser, run_page):
  errors, requests = browser.open(run_page)
  assert errors == []
  assert requests[0] == run_page
  assert all(x.startswith('data:') for x in requests[1:])
  drawn = browser.driver.execute_script(
    'return [...document.images].map(x => x.complete && x.naturalWidth)'
  )
  # Support, curves; of each test image itself and four layers.
  assert len(drawn) == 2 + 5 * len(SCORES)
  assert all(drawn)
  first = browser.all('.shown')[0]
  assert first.is_displayed()
  layers = [x.size for x in browser.all('.layers img', first)]
  assert layers[0]['width'] == 320
  assert all(x == layers[0] for x in layers)  # they lie upon each other
  assert browser.all('.scale')[0].size['width'] > 50


def test_a_click_on_a_heading_sorts(browser, run_page):
  browser.open(run_page)
  [table] = [
    x for x in browser.all('table') if browser.all('th', x)[0].text == 'image'
  ]
  name, _, student = browser.all('th', table)
  assert browser.column(table, 1) == ['bad', '00ae', '1e24']
  name.click()
  assert browser.column(table, 1) == ['00ae', '1e24', 'bad']
  name.click()
  assert browser.column(table, 1) == ['bad', '1e24', '00ae']
  student.click()
  assert browser.column(table, 3) == ['0.1250', '0.9000', '-']
  assert student.get_attribute('aria-sort') == 'ascending'
  assert name.get_attribute('aria-sort') is None
  student.click()
  assert browser.column(table, 3) == ['0.9000', '0.1250', '-']
  assert browser.errors() == []
  assert browser.requests() == []


def test_sliders_and_buttons(browser, run_page):
  browser.open(run_page)
  first, second = browser.all('.shown')[:2]

  def opacity(shown):
    return {
      x.get_attribute('data-role'): float(x.value_of_css_property('opacity'))
      for x in browser.all('.over', shown)
    }

  other = opacity(second)
  off = dict.fromkeys(('truth', 'teacher', 'student', 'confidence'), 0)
  assert opacity(first) == {**off, 'truth': 0.6}
  [slider] = browser.all('[type=range]', first)
  slider.send_keys('\ue010')  # End
  assert opacity(first) == {**off, 'truth': 1}
  for role in ('confidence', 'student', 'teacher'):
    browser.all(f'[value={role}]', first)[0].click()
    assert opacity(first) == {**off, role: 1}
  slider.send_keys('\ue011')  # Home
  assert opacity(first) == off
  assert opacity(second) == other
  assert browser.errors() == []
  assert browser.requests() == []


def test_a_sweep(browser, tmp_path):
  scores = {(5, 0): 0.5, (5, 1): 0.6, (10, 0): 0.72, (10, 1): 0.1}
  page = pages.of_sweep(tmp_path, scores)
  errors, requests = browser.open(page.as_uri())
  assert errors == []
  assert all(x.startswith('data:') for x in requests[1:])
  plot = browser.all('img')[0]
  assert plot.get_property('naturalWidth') > 500
  [table] = browser.all('table')
  method = browser.all('th', table)[1]
  before = browser.column(table, 2)
  method.click()
  method.click()
  assert browser.column(table, 2) == sorted(before, reverse=True)
  links = browser.all('li a')
  assert len(links) == len(scores)
  links[0].click()
  assert browser.all('h1')[0].text == 'A run'
