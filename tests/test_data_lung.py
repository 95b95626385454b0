"""Preparing and loading Lung from pickled tables: of pandas, and made here."""

import base64
import contextlib
import copyreg
import os
import pickle
import pickletools
import sys
import types
import zipfile
import zlib

import numpy as np
import pytest

from distillfss_jax import datasets
from distillfss_jax.data import download
from distillfss_jax.datasets import lung

# What pandas wrote (zlib, base64), for a table with the columns label1 (text),
# mask, n (number), hu_array_old and hu_array, each of three rows.
WRITTEN = {
  'pandas 1.0.5, protocol 4': (
    'eNqNVN9rE0EQvk3urmls0YLF9qWooKYUDlP6IKKIRgUNRuhrLcdesmZD7y7hbk8NGLAPqQ'
    'T2reNfoH9la3PO7jU20Wt0H+72xzcz3zc7O1/Mb55l6CFXejRs0dhpdiPmvI9owEAuPqeC'
    'vtTzY9g8hAFUpOW2cBPkxjS+EwoWhdSPnYCGtM2iGOTSM7/bPHiTrTP7yj46WJs1bLFPLH'
    'Y8GmO8shuyj+4rtYcG/Iq0JnMV2cwCr4ZJ0Otn5kHiiw6NItrHeG7Emt0wFlHSFGgiLQ0E'
    'uYDhNOQY6sYQasSDr7ALlTqpW0Pgq9JqiX5PSZSFtw8QUyfZeVGSz9BoNF6nOPSn/kSAN1'
    'IqbJ96zK+CNAMaH4AkITLgiasjuV2/BbI0WQJDK2mGKo+N5Ah982W5npeGiIZtlYdd9Z/S'
    'zrca0ooFjQTSk2Ysuj1AejhhOCHaJ0Na/Dq/oTTy9YlCs148An5LcybbqHDnKfDHf+MKGr'
    'chC0l1OgP89qx+Q+mv2VnNAC7yPJno6cWoVkIIUeMyXDHD2RlsHgp5dbZnb+YR5DFbOklP'
    '05/pWTrGvXn89ka1ayeIHKeGUTBMwzZKxjwGe9r3GaKLiF38J/aCxfw8KR6niExTgp4tY+'
    'G/fI8RbSK2rLEsF09+Z26mpvm7vLytkexKMRfZKBoXd6wra5lfVYW4klNiw/MC43f4XV7h'
    'm5rP1qTSL7Uj53b8Hp0yYAOQ9n2nuuNUs1dP8WEAL0vbU/0kBgyk9u0P1E/UyUNZCtqRi4'
    'e4yCU3HNVunssxyB/6zCmdiSL6nR/yH7LkJR1sLSH2MSv2O03VHdQNZGlMWBLrJ+1i48A2'
    'qRrTpGW6ARNUd6p9tKVCYC8cQOI5vwDsC/qv'
  ),
  'pandas 1.2.5, protocol 4': (
    'eNqNVN9r1EAQTu6S9ForWrC0IhQV1CtC8EqRCoLYU6EePcH3Eja5bfdokjuyWWvBgj609m'
    'DfOr76qP9jaxtnNzmattfTfcj++mbmm8ns99X68dM29JAzfRJ3CHeDXkLdzYREFOTkG5KS'
    'd3p9BIvfYA/q0vKirQTkQhnejVOaxCTkbkRiskUTDnJ6NewF2+v5Pjevb6D9/EXDDv1Mue'
    'sTjuGmvJjueGvqDA3YDWkP1zpwB8mAnI1F1N/NzSMRpl2SJGQX43kJDXoxTxMRpGgibQ0E'
    'OYHhNOQIWsY+NE0fvsNHqLfMlr0PbFbanXS3rzKUlQ8rMDjMb6vS/ALtdvt9hkN/Wq9S8A'
    'cqByckPg0bIK2I8G2QZozxmfB0HK8XdkDWhlugaCWtWBWxLQ7QN7sp740qAvKlSTfAOqzF'
    '6fPlUu5sht1hc4o9uzvkXsXNgqx0LzB+eYmxoRg35638HxsTxTxZzIDX7GnOimJiV6NYre'
    'oBsAc6a3MJK7T8Gtjbq7iKxiEf0Tjnwx6OYuOUYo/wY6Gf9UGzhhBTjetw1Rzn5LBxKFWl'
    'pRKrF6NYTR9nJ9mf7DQ7w7Nx3IJB8/YxIs8yw6gYluEYNWNc9ED7PkV0FbGT/8SesxhfI8'
    'XjBJFZZqJnG//t//g+Q7SF2CmNpSPxpsavYN+YRZ9Uirla6hvdLzfZrWva09ov2oY9Yo9Z'
    'nS3SUq+NsTMLO/aElJtzD6TzzG0su41cCwg+GGBT0vGVynDAQOrc+URCoW5WZQ1lysNL3I'
    'wkh/ndL9IxzEv5WaU8hSL6ix2y37Lmiy4KTozqZvOwGyjNUNVtmcqxoILrp+6hnKB2Krka'
    '6qgX0ZRo/dpAW5KmqJAqJW8zJFt6OUfCsLfDvY7oo2eSUk9rDIdDLnz3L8ZtDh4='
  ),
  'pandas 1.5.3, protocol 5': (
    'eNp1VF1v0zAUTdqk6z7ENhAwaQiQeKDwUGnThIaEhGAIaUQUiQfeJstJ3TnMSavE0Zi0Sf'
    'CwL8lvu+zHwrpy7SZtWhU/xHZyfO45N/f6p/u75lpmqNUejds0bQbdhDU7CY0YqPkPVNKP'
    'Zn0FL37BCTSUQ6L9BNTjMjyMJUtiKtJmRGO6z5IU1NJ70Q0OPg/3eFw9yE8QEfrp+AioZZ'
    'LFvTA4EIz4+owG34+zqHc0ZI8yIUOaJPQIWUnCgm6cyiQLpAa6BghqDrkN5Ao86xR2bB/O'
    '4Ss0PNtzvOoZ8GXltuVRTztRlS/bcHkx/F5V9jG0Wq1PAxzm4b2V4F/uoVd7E7Fb74A/UX'
    'dLgnDJkjAAtUg6STfys07HWGxc16zyAL6mKtnGOBR/NBnIwkBeRctT9g5IBPFnjev6mMHW'
    'A/hzBDno4WUBqU0ghoBqGbCUf/4z+Du4GfQHtxjOyAk3y87fwP8EjalWRlQ3SGNZFcuxal'
    'Yd3W1PyxpH7SOwirD5HDZT3FiaNQu2MoL1EWIjn2vNjRid2Yy3CHQQtjDNyNCahj61Joed'
    'z9V8dso/LyzVCX89I1fOaU7vVTSML+oQa1PUlakQwL9hWY6UqbqfhVjiMfaCm4ow0DWqpX'
    'v2+Yj5DHRBrk12XZv9YGnTpyn26gKJ2SHZ1e/wOP+u3GJturaNnQz8Dl/V3cHvFb3h4mbd'
    '1HpNUJ+JDVBORNMDLMgYu41nxHQV6Yo26iy2JpnKifXF0MrOtHGh1mdpG7XKwm4sX22VJP'
    'FeOVVF1ufyeb6UqmqRY348DMb0Ay8ibGe8o7Sz4r4iEZPUWN3DXFIp8SY6AVUjHUH3zfIh'
    'FaJ7mJJ21sNMU8mI8Z3CRZr5zX9VzcOx'
  ),
  'pandas 1.5.3, protocol 2': (
    'eNp1lWl720QUheU1iShQoLRhD7vLYkgoECBQWkqhFXVh2MwSxEieWCay7CONSAM1tEDshH'
    '2n7PvOL6ANfMgPg7kjSy1pGT8jWdKc994zo7k6lHe7PGjwqOp2QlGdC3lbmLu45Lv1Pxhb'
    'DyPXQ75SLxqGYbebIQr/UbQCKcKA+1G1zQPeFGFk7vQ77vy+5MpEMR1u+y0nOj7etOOg23'
    'LnfWE7JDBRcoO43V1MuO3Yly0ehnzRtEPhdoJIhrErTZSTUaZi6qcYsYwljLq222kINzJF'
    'QH9MjNVzKmMHZr2szj6XrWASp/WxgeH0Ac5gOLNi5ayiVehj4xDZkItdpTyrnleK/dM4e2'
    'V5gHMYNlWsgqYdxLm1Wm3vP6rpg7VdYrOzMostFf18CuNau20HzvPGvbKnczvfUwEvYLiQ'
    'AuYp4EVeEiOexMUU4xKGCRXDW0c3JC51Vrwx7SBpuMxTHi5nuELiSieNcBVFuJqhkkQo9r'
    'HVmyDhaKLKUcM1JL2W4TqJ6zNplaQ3MNyYJTeZSMuZElMkvIlhm8TNmfAWEt7KMJ0Jbxu6'
    'ak3hdnJ1B8NMOnMzuPMkb3dpb+Pq6dqfa3+vHVX9mOqrqv+luvphO0W+m2GHxM4s8j0UeR'
    'fDvZnb3d4MoTanqGMJwjDyRtEoG6MG7iPQ/Qx7JPZmIItADzDsyyzUEtDGFLRKkIJCjBnY'
    'T4gHGR6SYBniYUI8wvBohnjshFxOYUkt4eMEqjM8IfFkBnqKQE8zzGamnlkHWk0AOZVPyR'
    'ihjGwCPcvAJZwM5BKowSCyjOZOMHU0ySSn5mXEMA00CeExtCSec4TEfMbxidNmCPQ2WUIn'
    'Xd1pdGl1wRDSO3vyukZ6XSeM4y03PBeG52L6NksKHzM8L7HgWPkBDjAseqU0hxcohxcZDl'
    'IOOfLS88L0pUmh+XVwvETQlxkOSRx2XNt24paqJYFtm5HfctUGf4XmxcoN8CrDaxR1iaHf'
    'x2AWy5V1xa0hDoio6vBImHYgFuw9dMfEyv8PG454vYc3kqLZUNUUb6aW3iJLbzO8Q5ZKS3'
    'jX26Tqx3uVYZVyhD+J97WuzaN5fKB3T4AP6xvU2YttXfTsjt/AR3p3p7fwsVq9TxytDFTp'
    'xpFa3MenDJ95p0425EFTmIyOw5Q/7+GLinekVi8pRiR5KPGlZWhiJDtdfKX2cnIhuvjayi'
    'n+Nwzfij6+Y/g++UCoCoof6mND2/pzgh/1td0Wkuu5+GkWP+sYXMowwi89/Krd23M+b0b4'
    'rYff61vose93FiK7EXfVsnEpbD09Ef5YjmKn+i9vyTFa'
  ),
  'pandas 2.2.3, protocol 5': (
    'eNp1VM9r1EAUTnaT7U9sS0ErigoeXD0stHioIIhWBA2u0IO3MkyysztxJ8mSmVALLeihv2'
    'Buffbf9K5t1zfT/ZFd1jlk3iTffO/7Ju/ND//Xb8+xQ6/1aNqishFlOWu0c5ow0AvvqaIf'
    'bHwBz3/CEdS1R5JODvpRGR6niuUpFbKR0JR2WC5BL78TWdT9fLvG7fruYAcRcSjHW0CvkC'
    'LtxVFXMBKaPRacFknvoEEsfVIIFdM8pwdIS3IWZalUeREpg/QtEvQcklvIBQTOMey4IZzC'
    'LtQDN/CC6gnwFe231EHPWNGVL9twfnb7vardQ2g2m5/6OOwjeKMgPN9Ds+4WYl++Bf5Yr5'
    'cVYczyOAK9RNp5loRFu21N1i9rTnkA39CVYnOciz+czORgpqBi9Gl3BxSC+NP65fyYwTUD'
    '+DMEeWjixRBSm0DcAqplwPLg85/+3/5V/7p/g+msnHirbP01/E/QmGp1RHWFNI5TcTyn5s'
    'yju+1pWeOs1wisImxhAJspbizNmQVbHcGuEeIin+/MjRi92Yw3CPQQtjjNyNCagT5xJoc7'
    'mKuD2Sv/vLhUKPzVjLPyjgf0QcXA+JJJsTFFXZlKAfwr1uVImZ4PixhrPMVu8KWII1OkRn'
    'rgno6YT8BU5MZk37XYdyYbIZXYrYskZfvko3mH2/k37Q9j27ct7GXgd/iaaQ++PmwOHxcP'
    'bLHXBA2Z2ATtJVR2sSBTbDdeENtWJBMt1Dlc2sPUXmquhmZxYowLfX+WtpymHSNu18wlQf'
    'ywiV4VzRX2q/akynqABYkBw8C1nMw88MbBtsXLyBgYXkwkYYpaR3t4ZFQpvHKOQNdIW9CO'
    'De9RIbJ9SVpFDw+UKkasPQlnsggb/wD0kcdF'
  ),
  'pandas 2.2.3, protocol 4': (
    'eNqNVEtv00AQtmM7j1JRKiSIBAJulEukVj1woCAIQgKLIHGvVmt7m7ViO5EfKpFaVJAaGm'
    'nFpcMv5dbSmNm1o6QkBPawD/ubb2Y+zcyJ+eOnqaklNgc08mjScvsxax3ENGQgGq9pSt+o'
    '+zk8+QLHsCVMEnZjEA/m4X6UsjiiQdIKaUS7LE5ArL8K+m7vffFGc3GntCCB7yQzExAbJI'
    'sGvtsLGHGkjQJHWTgYtoiiD7Mg9Wkc0yHSkpi5/ShJ48xNJdJSSBA1JFeQc7C1U2jrDnyD'
    'j7Bl67ZpGyPgG8Ly0uFApiIqH57C+Kz4bwj9CDqdzrscl9rsFyk4431MVt9B7O5L4A/5Tb'
    '4pefntKWtFsTZFJduecfH715k0ydSuFhoDPpbxmMjzeNyuI0SX6284o8BVC9gqFEbl78xn'
    '+AyWxbV+kV/mv/KrfILfVkW3N27fukDkJNe0imZqVa2urfK/p7ivEG0gtvFP7CyK1SrJOC'
    '4Rmec6Mlta7b+4J4g2EbumsGwp3jwtVJurC/58mWaPtHLp5WmUZ9lIyoddkRz8xqIfXcXV'
    'HbebU/vKHzzSXtSdzMeij7A9rCTwXVm1Midbl0QF/QhkiTavN6LHPrGk5dAE23eNROyQvJ'
    'Xf0JwfCWt6V43sYXPDYoQWPu6p6q8G1GHBNggzpEkPhB5h//GMqD4j/cADUZ8+QcoqzEjO'
    'ik42ktl/5ifoh39ddGGcFhJMJauVZ2NOAv69oGFyw6mDrYsDScY8HU4kZClVSeyjSjRNce'
    'wcg6iSg4B21fUuDYL+YUK8bIAa0pQRlVECZ0nmtH4DiJnRfQ=='
  ),
}  # fmt: skip


def fake(module, name, reduced):
  """A class that pickles as an object of pandas does."""
  made = type(name, (), {'__reduce__': reduced})
  made.__module__, made.__qualname__ = module, name
  return made


def new(self):
  return copyreg.__newobj__, (type(self),), self.__dict__


def call(self):
  return self.function, self.arguments


FRAME = fake('pandas.core.frame', 'DataFrame', new)
INDEX = fake('pandas.core.indexes.base', 'Index', call)
ROWS = fake('pandas.core.indexes.range', 'RangeIndex', call)
BLOCKS = fake('pandas.core.internals.managers', 'BlockManager', call)
BLOCK = fake('pandas._libs.internals', 'Block', call)


def new_index():
  """Stands for pandas' function; only its name is pickled."""


def unpickle_block():
  """Stands for pandas' function; only its name is pickled."""


new_index.__module__ = INDEX.__module__
new_index.__qualname__ = '_new_Index'
unpickle_block.__module__ = BLOCK.__module__
unpickle_block.__qualname__ = '_unpickle_block'


@contextlib.contextmanager
def as_pandas():
  """Modules of pandas' names that hold the stand-ins of this file."""
  found = (FRAME, INDEX, ROWS, BLOCKS, BLOCK, new_index, unpickle_block)
  modules = {
    name: types.ModuleType(name)
    for name in ('pandas', *(x.__module__ for x in found))
  }
  for x in found:
    setattr(modules[x.__module__], x.__qualname__, x)
  with pytest.MonkeyPatch.context() as patch:
    for name, module in modules.items():
      patch.setitem(sys.modules, name, module)
    yield


def made(kind, function, *arguments):
  x = kind()
  x.function, x.arguments = function, arguments
  return x


def objects(values):
  array = np.empty(len(values), object)
  for i, x in enumerate(values):
    array[i] = x
  return array


def table(columns, protocol=5):
  """The pickle of a DataFrame with these columns, {name: cells}."""
  rows = len(next(iter(columns.values())))
  values = np.stack([objects(cells) for cells in columns.values()])
  labels = {'data': objects(list(columns)), 'name': None}
  ranged = {'name': None, 'start': 0, 'stop': rows, 'step': 1}
  places = slice(0, len(columns), 1)
  frame = FRAME()
  frame._mgr = made(
    BLOCKS,
    BLOCKS,
    (made(BLOCK, unpickle_block, values, places, 2),),
    [
      made(INDEX, new_index, INDEX, labels),
      made(ROWS, new_index, ROWS, ranged),
    ],
  )
  frame._typ, frame.attrs = 'dataframe', {}
  with as_pandas():
    return pickle.dumps(frame, protocol)


def slices(count, seed, low=-1000, high=400):
  random = np.random.RandomState(seed)
  hus, masks = [], []
  for i in range(count):
    size = (6 + i % 2, 8)
    hus.append(random.randint(low, high, size).astype(np.int16))
    masks.append(random.randint(0, 2, size).astype(np.uint8))
  return hus, masks


def columns(hus, masks):
  labels = [str(i % 4) for i in range(len(hus))]
  old = [np.asarray(x) for x in hus]
  return {'label1': labels, 'mask': masks, 'hu_array_old': old, 'hu_array': hus}


def tables(train, test):
  return {
    'lung_cancer_train.pkl': table(columns(*train)),
    'lung_cancer_test.pkl': table(columns(*test)),
  }


def put(files, folder):
  folder.mkdir(parents=True, exist_ok=True)
  for name, contents in files.items():
    (folder / name).write_bytes(contents)
  return folder


class Memory:
  """Files that lie nowhere."""

  def __init__(self, contents):
    self.contents = contents

  def read(self, name, most=None):
    return self.contents


def read(contents):
  return lung._table(Memory(contents), 'x.pkl')


def test_pandas_is_not_needed():
  assert 'pandas' not in sys.modules


@pytest.mark.parametrize('version', WRITTEN)
def test_what_pandas_wrote(version):
  hus, masks = read(zlib.decompress(base64.b64decode(WRITTEN[version])))
  for i in range(3):
    hu = np.arange(6 + 2 * (i % 2)).reshape(2, -1) * (i + 1) - 5
    np.testing.assert_array_equal(hus[i], hu)
    np.testing.assert_array_equal(masks[i], hu > 0)
    assert (hus[i].dtype, masks[i].dtype) == (np.int16, np.uint8)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('dtype', ['<i2', '>i4', '<f4', '>f8', '|u1', '|b1'])
def test_arrays_of_all_kinds(protocol, dtype):
  hu = (np.arange(12).reshape(3, 4) % 7).astype(dtype)
  cells = [hu, np.asfortranarray(hu), hu[:, ::2], np.float32(3), None]
  hus, masks = read(table({'hu_array': cells, 'mask': cells}, protocol))
  for found, expected in zip(hus[:3], cells[:3], strict=True):
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
  assert not any(isinstance(x, np.ndarray) for x in hus[3:])
  assert masks[0] is hus[0]  # one array in two places stays one


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('top', ['', 'lungcancer/', 'a b/c/'])
def test_prepare_and_load(tmp_path, packed, top):
  train, test = slices(12, 0), slices(3, 1, -1000, 400)
  train[0][0][0, 0], train[0][1][0, 0] = -1024, 512
  files = tables(train, test)
  if packed:
    raw = tmp_path / 'x.zip'
    with zipfile.ZipFile(raw, 'w') as archive:
      for name, contents in files.items():
        archive.writestr(f'{top}{name}', contents)
  else:
    put(files, tmp_path / 'raw' / top)
    raw = tmp_path / 'raw'
  first, new = lung.prepare(raw, tmp_path / 'data')
  assert new
  assert lung.prepare('gone', tmp_path / 'data') == (first, False)
  loaded = datasets.load('lung', data_dir=tmp_path / 'data')
  assert loaded.classes == ('nodule',)
  assert list(loaded.train.ids) == [f'train-{i}' for i in range(12)]
  assert list(loaded.test.ids) == [f'test-{i}' for i in range(3)]
  for source, (hus, masks) in ((loaded.train, train), (loaded.test, test)):
    again = pickle.loads(pickle.dumps(source))
    for i, record in enumerate(again):
      grey = (hus[i] + 1024.0) / 1536 * 255  # of the train slices
      assert record['image'].shape == (*hus[i].shape, 3)
      for channel in range(3):
        found = record['image'][..., channel]
        np.testing.assert_array_equal(found, grey.astype(np.uint8))
      np.testing.assert_array_equal(record['label'], masks[i])
      assert source.present[i].tolist() == [masks[i].any()]
      assert source.sizes[i].tolist() == list(hus[i].shape)


@pytest.mark.parametrize('dtype', [np.int16, np.float32, np.float64])
def test_values_beyond_the_train_slices_are_clipped(tmp_path, dtype):
  size = (2, 3)
  low, high = -30000, 30000  # their difference is beyond int16
  hu = np.array([[low, 0, high], [0, 1, 29999]], dtype)
  beyond = np.array([[-32000, low, high], [32000, 0, 1]], dtype)
  ones = np.ones(size, np.uint8)
  raw = put(tables(([hu], [ones]), ([beyond], [ones == 1])), tmp_path / 'raw')
  lung.prepare(raw, tmp_path / 'data')
  loaded = lung.load(tmp_path / 'data')
  assert loaded.train[0]['image'][..., 0].tolist() == [
    [0, 127, 255], [127, 127, 254],
  ]  # fmt: skip
  assert loaded.test[0]['image'][..., 0].tolist() == [
    [0, 0, 255], [255, 127, 127],
  ]  # fmt: skip
  assert loaded.test[0]['label'].tolist() == ones.tolist()


def test_bad_rows_are_named_and_left_out(tmp_path):
  train, test = slices(7, 0), slices(3, 1)
  train[0][0] = train[0][0][:, :5]
  train[0][1] = train[0][1].astype(np.float32)
  train[0][1][2, 2] = np.nan
  train[0][2] = None
  train[0][3] = np.stack([train[0][3]] * 3)
  train[1][4] = train[1][4] * 255
  test[1][1] = [[0, 1]]
  raw = put(tables(train, test), tmp_path / 'raw')
  with pytest.raises(ValueError, match='6 of 10 images') as caught:
    lung.prepare(raw, tmp_path / 'data')
  message = str(caught.value)
  assert '\n' not in message
  for part in (
    'train-0: mask is 8x6, its image 5x6',
    'train-1: hu_array has values that are not finite',
    'train-2: hu_array is no array, not [H, W]',
    'train-3: hu_array is an array of int16 and shape [3, 7, 8]',
    'train-4: mask has 0, 255, expected 0 and 1',
    'test-1: mask is no array',
    '--skip_bad',
  ):
    assert part in message
  lung.prepare(raw, tmp_path / 'data', skip_bad=True)
  loaded = lung.load(tmp_path / 'data')
  assert loaded.train.ids == ('train-5', 'train-6')
  assert loaded.test.ids == ('test-0', 'test-2')


class Attack:
  def __init__(self, function, *arguments):
    self.reduced = function, arguments

  def __reduce__(self):
    return self.reduced


@pytest.mark.parametrize('place', ['cell', 'name', 'all'])
def test_code_is_refused_and_not_run(tmp_path, place):
  mark = tmp_path / 'was_run'
  attack = Attack(os.mkdir, str(mark))
  hus, masks = slices(2, 0)
  if place == 'cell':
    contents = table(columns([hus[0], attack], masks))
  elif place == 'name':
    contents = table({'mask': masks, attack: hus})
  else:
    contents = pickle.dumps(attack)
  name = 'lung_cancer_test.pkl'
  files = {**tables((hus, masks), (hus, masks)), name: contents}
  raw = put(files, tmp_path / 'raw')
  with pytest.raises(ValueError, match=r'it refers to \w+\.mkdir') as caught:
    lung.prepare(raw, tmp_path / 'data')
  assert name in str(caught.value)
  assert '\n' not in str(caught.value)
  assert not mark.exists()


@pytest.mark.parametrize(
  'name',
  [
    'builtins eval',
    'builtins getattr',
    'numpy.core.multiarray fromfile',
    'numpy load',
    'numpy dtype.__init__',
    'pandas.core.frame DataFrame.__setstate__',
    'copyreg _reconstructor',
    'operator attrgetter',
    'distillfss_jax.data.lung _table',
    'no_such_module x',
  ],
)
def test_names_that_are_refused(name):
  module, last = name.split(' ')
  contents = b'\x80\x04' + b''.join(
    b'\x8c' + bytes([len(x)]) + x.encode() for x in (module, last)
  )
  with pytest.raises(
    download.BadFileError, match='which a table of arrays'
  ) as e:
    read(contents + b'\x93.')
  assert f'{module}.{last}' in str(e.value)
  assert 'no_such_module' not in sys.modules


def reference(*parts):
  """The operations that put a name on the stack."""
  return f'c{parts[0]}\n{parts[1]}\n'.encode()


DAMAGED = {
  'nothing': b'',
  'text': b'label,mask\n1,2\n',
  'number': b'\x80\x04K\x01.',
  'stand-in itself': reference('pandas.core.frame', 'DataFrame') + b'.',
  'no state': reference('pandas.core.frame', 'DataFrame') + b')\x81.',
  'state of a name': reference('pandas.core.frame', 'DataFrame')
  + b'}X\x04\x00\x00\x00_mgrK\x01sb.',
  'attributes of a name': reference('pandas.core.frame', 'DataFrame')
  + b'N}X\x06\x00\x00\x00columnK\x01s\x86b.',
  'attributes of a slice': reference('builtins', 'slice')
  + b'(K\x00K\x01K\x01tRN}X\x06\x00\x00\x00placesK\x01s\x86b.',
  'much memory': b'\x80\x04\x8e' + b'\xff' * 7 + b'\x0f.',
  'type': reference('numpy', 'dtype') + b'(X\x02\x00\x00\x00M8tR.',
  'persistent': b'\x80\x04K\x01Q.',
  'extension': b'\x80\x04\x82\x01.',
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_damaged_pickles(kind):
  before = dict(vars(lung._DataFrame))
  with pytest.raises(download.BadFileError, match=r'^x\.pkl: it ') as caught:
    read(DAMAGED[kind])
  assert '\n' not in str(caught.value)
  assert dict(vars(lung._DataFrame)) == before


def test_cut_off_or_changed_anywhere():
  """Damage gives the arrays or one error, never another exception."""
  random = np.random.RandomState(0)
  for protocol in (2, 5):
    whole = table(columns(*slices(2, 0)), protocol)
    for i in range(0, len(whole) - 1, 7):
      with pytest.raises(download.BadFileError):
        read(whole[:i])
    places = [place for _, _, place in pickletools.genops(whole)]
    for _ in range(600):
      changed = bytearray(whole)
      for place in random.choice(places, 2):
        changed[place] = random.choice(bytearray(b'cRb\x81.0(t]}aesu2h\x93NK'))
      with contextlib.suppress(download.BadFileError):
        read(bytes(changed))


def test_other_columns():
  hus, _ = slices(2, 0)
  with pytest.raises(
    download.BadFileError, match=r"columns hu_array, m; .*'mask'"
  ):
    read(table({'hu_array': hus, 'm': hus}))


def test_wrong_layout_and_split(tmp_path):
  (tmp_path / 'empty').mkdir()
  both = tables(slices(2, 0), slices(2, 1))
  half = put({'lung_cancer_train.pkl': b''}, tmp_path / 'half' / 'a')
  put({'lung_cancer_test.pkl': b''}, tmp_path / 'half' / 'b')
  flat = [np.zeros((3, 3))] * 2
  same = tables((flat, flat), (flat, flat))
  for raw, message in (
    (None, '--raw is not given'),
    (tmp_path / 'empty', 'has no folder with lung_cancer_train.pkl and'),
    (half.parent, 'has no folder with lung_cancer_train.pkl and'),
    (put(same, tmp_path / 'same'), r'all train slices are 0\.0 everywhere'),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      lung.prepare(raw, tmp_path / 'data')
    assert '5rr22hgzwr' in str(caught.value)
  raw = put({**both, 'lung_cancer_test.pkl': b'\x80'}, tmp_path / 'torn')
  with pytest.raises(ValueError, match=r'lung_cancer_test\.pkl: it is damaged'):
    lung.prepare(raw, tmp_path / 'data')
  with pytest.raises(ValueError, match="'odd' is not one of"):
    lung.prepare(tmp_path, tmp_path / 'data', split='odd')
  with pytest.raises(FileNotFoundError, match='--dataset lung'):
    lung.load(tmp_path / 'data')


def test_raw_is_never_written_into(tmp_path):
  raw = put(tables(slices(2, 0), slices(2, 1)), tmp_path / 'lungcancer')
  with pytest.raises(ValueError, match='inside the raw folder'):
    lung.prepare(raw, raw / 'prepared')
