"""The one place where files enter: what they are, and what is wrong."""

import io
import lzma
import struct
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_data_folder import (
  IDS,
  deep_colour,
  drawn,
  encoded,
  grey,
  made,
  photo,
  refused,
  tree,
)
from test_data_nucleus import real_ids
from test_data_nucleus import tree as nuclei
from trees import pack, put

from distillfss_jax.data import download
from distillfss_jax.datasets import folder, nucleus

SIZE = (12, 16)


def bad(contents, mode='RGB'):
  """The one line that a damaged image is told in."""
  with pytest.raises(download.BadFileError) as caught:
    download.decode(contents, 'x.png', mode)
  said = str(caught.value)
  assert said.startswith('x.png: ')
  assert '\n' not in said
  assert 'object at 0x' not in said
  return said


def told(function, *arguments):
  """What a known error says, '' without one; others are raised."""
  try:
    function(*arguments)
  except ValueError as error:
    return str(error)
  return ''


# ----------------------------------------------------------- pages and frames


def paged(form, count=3, **options):
  pages = [Image.fromarray(photo(i)) for i in range(count)]
  buffer = io.BytesIO()
  pages[0].save(buffer, form, save_all=True, append_images=pages[1:], **options)
  return buffer.getvalue()


@pytest.mark.parametrize('form', ['TIFF', 'GIF', 'PNG', 'WEBP'])
def test_stacks_and_animations(form):
  assert '3 pages' in bad(paged(form))
  assert '3 pages' in bad(paged(form), 'L')


@pytest.mark.parametrize('kind', [1, 4, 5])
def test_small_copies_in_a_tiff_are_no_pages(kind):
  """Programs for maps put overviews and masks of transparency beside it."""
  first, second = (Image.fromarray(photo(i)) for i in (0, 1))
  second.encoderinfo = {'tiffinfo': {254: kind}}
  buffer = io.BytesIO()
  first.save(buffer, 'TIFF', save_all=True, append_images=[second])
  found = download.decode(buffer.getvalue(), 'x.tif', 'RGB')
  np.testing.assert_array_equal(found, photo(0))


def test_what_a_phone_keeps_beside_a_photograph():
  contents = paged('MPO', 2)
  assert download.decode(contents, 'x.jpg', 'RGB').shape == (*SIZE, 3)


def stacks(images=False, masks=False):
  files = {k: v for k, v in tree([grey([255])]).items()}
  for id_ in IDS:
    if images:
      files[f'images/{id_}.tif'] = paged('TIFF', 5)
      del files[f'images/{id_}.png']
    if masks:
      files[f'masks/{id_}.tif'] = paged('TIFF', 2)
      del files[f'masks/{id_}.png']
  return files


@pytest.mark.parametrize(
  ('files', 'name'),
  [
    (stacks(images=True), r'images/a\.tif: has 5 pages \(a stack'),
    (stacks(masks=True), r'masks/a\.tif: has 2 pages'),
  ],
)
def test_stacks_in_a_folder(tmp_path, files, name):
  refused(files, tmp_path, name)


# -------------------------------------------------------------------- 16 bits


def deep_ppm(scale):
  pixels = (photo(0).astype('>u2') * scale).tobytes()
  return b'P6 16 12 65535\n' + pixels


@pytest.mark.parametrize(
  'contents',
  [
    deep_colour(photo(0)[..., 0].astype(int) * 16),
    deep_colour(drawn([9, 300])),
    deep_ppm(16),
  ],
)
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_colours_of_16_bits(contents, mode):
  assert 'of 16 bits, of which 8 would be lost' in bad(contents, mode)


def test_grey_of_16_bits():
  """Masks of few values may have any depth, images are as they look."""
  few = encoded(drawn([1, 200]).astype(np.uint16))
  assert 'more than 8 bits' in bad(few)
  np.testing.assert_array_equal(download.decode(few, 'x', 'L'), drawn([1, 200]))
  many = encoded(drawn([1, 256]).astype(np.uint16))
  assert 'more than 8 bits' in bad(many, 'L')
  np.testing.assert_array_equal(
    download.decode(many, 'x', 'I'), drawn([1, 256])
  )


def test_all_images_of_16_bits_are_named(tmp_path):
  files = tree([grey([255])])
  files['images/a.png'] = deep_colour(photo(0)[..., 0].astype(int) * 16)
  refused(files, tmp_path, r'images/a\.png: a colour PNG of 16 bits')


# ----------------------------------------------------------------- orientation


def exif(orientation):
  tags = Image.Exif()
  tags[0x0112] = orientation
  return tags


TURNS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
  8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize('orientation', TURNS)
@pytest.mark.parametrize('form', ['PNG', 'WEBP', 'TIFF'])
def test_pictures_are_turned_as_a_viewer_does(orientation, form):
  options = {'lossless': True} if form == 'WEBP' else {}
  contents = encoded(photo(0), form, exif=exif(orientation), **options)
  found, turned = download.photo(contents, 'x')
  np.testing.assert_array_equal(found, TURNS[orientation](photo(0)))
  assert turned == (orientation > 1)


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'TIFF'])
def test_masks_are_turned_with_their_images(tmp_path, form):
  """Editors keep the orientation of a photograph in what is drawn on it."""
  square = (16, 16)
  mask = np.zeros(square, np.uint8)
  mask[1:6, 2:12] = 255
  files = {}
  for i, id_ in enumerate(IDS):
    turn = exif((6, 8, 3, 1, 5)[i])
    files[f'images/{id_}.png'] = encoded(photo(i, square), exif=turn)
    files[f'masks/{id_}.{form.lower()}'] = encoded(mask, form, exif=turn)
  _, records = made(files, tmp_path)
  for i, id_ in enumerate(IDS):
    turn = TURNS[(6, 8, 3, 1, 5)[i]]
    np.testing.assert_array_equal(records[id_]['image'], turn(photo(i, square)))
    np.testing.assert_array_equal(records[id_]['label'], turn(mask) > 0)


def test_a_mask_of_the_stored_orientation_names_exif(tmp_path):
  files = tree([grey([255])])
  files['images/b.png'] = encoded(photo(1), exif=exif(6))
  message = refused(files, tmp_path, r'mask is 16x12, its image 12x16')
  assert 'images/b.png is turned as its EXIF orientation says' in message


@pytest.mark.parametrize(
  'entry',
  [
    (0x0112, 2, 4, b'six\0'),  # text
    (0x0112, 5, 1, struct.pack('<I', 4000)),  # a fraction, beyond the end
    (0x0112, 3, 60000, struct.pack('<I', 8)),  # very many
    (0x0112, 99, 1, b'????'),  # of no type
    (0x8769, 2, 4, b'abc\0'),  # text, where another table is pointed at
  ],
)
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP'])
def test_exif_of_wrong_types_ends_in_no_traceback(entry, form):
  head = b'Exif\0\0II*\0\x08\0\0\0\x01\0'
  tags = head + struct.pack('<HHI', *entry[:3]) + entry[3] + b'\0\0\0\0'
  contents = encoded(photo(0), form, exif=tags)
  said = told(download.photo, contents, 'x')
  assert not said or said.startswith('x: cannot be decoded (')


# ---------------------------------------------------------------- what it is


@pytest.mark.parametrize(
  'contents',
  [
    b'',
    b'no picture',
    b'\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf\0\0\0\x10meta' + b'\xff' * 64,
    b'DDS ' + b'\x7c\0\0\0' + b'\xff' * 140,
    b'icns\0\0\0\x28ic07\0\0\0\x20' + b'x' * 24,
    b'8BPS\0\x01' + b'\xff' * 60,
    b'II*\0' + b'\xff' * 60,
    b'GIF89a' + b'\xff' * 60,
    b'\xff\xd8\xff\xe0' + b'\0' * 60,
    b'BM' + b'\xff' * 60,
    b'RIFF\xff\xff\xff\x7fWEBPVP8 ' + b'\xff' * 60,
    b'P6 99999999999 9999999999 255\n',
  ],
)  # fmt: skip
def test_what_is_no_picture(contents):
  assert 'cannot be decoded' in bad(contents) or 'megapixels' in bad(contents)


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'TIFF', 'WEBP', 'GIF', 'BMP'])
def test_damaged_pictures_raise_nothing_else(form):
  random = np.random.RandomState(0)
  whole = encoded(photo(0), form)
  for _ in range(120):
    damaged = bytearray(whole)
    for at in random.randint(0, len(whole), random.randint(1, 8)):
      damaged[at] = random.randint(256)
    damaged = bytes(damaged[: random.randint(4, len(whole) + 1)])
    for said in (
      told(download.photo, damaged, 'x'),
      told(download.decode, damaged, 'x', 'L'),
    ):
      assert not said or said.startswith('x: ')


def test_too_large_a_picture_is_told_how_to_allow_it(monkeypatch):
  monkeypatch.setattr(download._Limit, 'pixels', 10**6)
  flat = encoded(Image.new('L', (2000, 1500)))
  said = bad(flat)
  assert '3 megapixels (2000x1500), 1 are the most' in said
  assert '--max_megapixels 3' in said
  assert download.decode(flat, 'x', 'L', limited=False).shape == (1500, 2000)
  download.allow(3)
  assert download.decode(flat, 'x', 'L').shape == (1500, 2000)
  with pytest.raises(ValueError, match='must be 1 or more'):
    download.allow(0)


def test_large_pictures_are_converted_in_strips(monkeypatch):
  forms = [
    (encoded(photo(0, (70, 50))), 'RGB'),
    (encoded(photo(0, (70, 50))), 'L'),
    (encoded(Image.fromarray(photo(0, (70, 50))).quantize(9)), 'P'),
  ]
  whole = [download.decode(x, 'x', mode) for x, mode in forms]
  monkeypatch.setattr(download, '_STRIP', 300)
  for (contents, mode), expected in zip(forms, whole, strict=True):
    np.testing.assert_array_equal(
      download.decode(contents, 'x', mode), expected
    )
  labels = np.random.RandomState(0).randint(0, 256, (70, 50)).astype(np.uint8)
  np.testing.assert_array_equal(
    download.count(labels), np.bincount(labels.ravel(), minlength=256)
  )


def test_threads_decode_only_so_much_at_once():
  room, most, held = download._Room(100), [0], [0]
  lock = threading.Lock()

  def work(size):
    with room.seat():
      room.take(size)
      with lock:
        held[0] += size
        most[0] = max(most[0], held[0])
      time.sleep(0.01)
      room.take(1)  # its mask: who holds some waits no more
      with lock:
        held[0] -= size

  sizes = [60, 30, 500, 10, 60, 60, 90]
  threads = [threading.Thread(target=work, args=(x,)) for x in sizes]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
  assert most[0] == 500  # by itself
  room.take(10**9)  # who has no seat is not counted
  assert not room._held


# ------------------------------------------------------------------------ zips


def zipped(tmp_path, how=zipfile.ZIP_DEFLATED, **members):
  path = tmp_path / 'x.zip'
  with zipfile.ZipFile(path, 'w', how) as archive:
    for name, contents in members.items():
      archive.writestr(name, contents)
  return path


@pytest.mark.parametrize(
  'how', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_damaged_members(tmp_path, how):
  contents = np.random.RandomState(0).bytes(4000)
  path = zipped(tmp_path, how, a=contents)
  whole = path.read_bytes()
  random = np.random.RandomState(0)
  for _ in range(60):
    damaged = bytearray(whole)
    for at in random.randint(31, 4000, 3):
      damaged[at] ^= random.randint(1, 256)
    path.write_bytes(damaged)
    with download.Files(path, '') as files:
      said = told(files.read, 'a')
      assert not said or said.startswith('a: cannot be read (')


def _all_read(path):
  with download.Files(path, 'get it') as files:
    for name in files.names:
      files.read(name)
      files.checksum(name)


def test_damaged_zips(tmp_path):
  whole = zipped(tmp_path, a=b'x' * 100, b=b'y' * 100).read_bytes()
  path = tmp_path / 'damaged.zip'
  random = np.random.RandomState(0)
  for _ in range(200):
    damaged = bytearray(whole)
    for at in random.randint(0, len(whole), 4):
      damaged[at] = random.randint(256)
    path.write_bytes(damaged)
    assert '\n' not in told(_all_read, path)


def test_members_that_unpack_to_more_than_they_may(tmp_path, monkeypatch):
  monkeypatch.setattr(download, '_LONGEST', 1 << 20)
  path = zipped(tmp_path, a=b'0' * (3 << 20), b=b'0' * 9)
  with download.Files(path, '') as files:
    with pytest.raises(download.BadFileError, match=r'a: .*more than 1 MiB'):
      files.text('a')
    with pytest.raises(download.BadFileError, match=r'a: .*more than 2 MiB'):
      files.read('a', 1 << 21)
    assert len(files.read('a', None)) == 3 << 20
    assert files.text('b') == '0' * 9
  # The list of members may say less than a member unpacks to.
  lying = bytearray(path.read_bytes())
  size = struct.pack('<I', 3 << 20)
  while (at := lying.find(size)) >= 0:
    lying[at : at + 4] = struct.pack('<I', 100)
  path.write_bytes(lying)
  with (
    download.Files(path, '') as files,
    pytest.raises(download.BadFileError, match='a: cannot be read'),
  ):
    files.text('a')


def test_memory_that_runs_out_is_one_line(tmp_path, monkeypatch):
  put({'a.txt': b'x'}, tmp_path)

  def read_bytes(self):
    raise MemoryError

  with download.Files(tmp_path, '') as files:
    monkeypatch.setattr('pathlib.Path.read_bytes', read_bytes)
    with pytest.raises(download.BadFileError, match='not enough memory'):
      files.text('a.txt')


@pytest.mark.parametrize('name', [b'images/\xe9.png', b'masks/\xff\xfe.png'])
def test_names_that_are_no_text(tmp_path, name, caplog):
  raw = put(tree([grey([255])]), tmp_path / 'raw')
  with open(str(raw).encode() + b'/' + name, 'wb') as file:
    file.write(encoded(photo(8)))
  manifest, _ = folder.prepare(raw, tmp_path / 'd', name='mine')
  assert len(manifest['records']) == 5
  said = [x.getMessage() for x in caplog.records if 'no text' in x.getMessage()]
  assert len(said) == 1
  assert '\\udc' in said[0]


# ------------------------------------------------- the guard, in other datasets


def test_other_datasets_have_the_same_guard(tmp_path):
  """What is wrong with a file is told for a dataset of the benchmark, too."""
  ids = real_ids(4, 2)
  files, _ = nuclei(ids)
  first = next(x for x in files if x.startswith(f'{ids[0]}/im'))
  second = next(x for x in files if x.startswith(f'{ids[1]}/im'))
  files[first] = paged('TIFF')
  files[second] = deep_colour(photo(0)[..., 0].astype(int) * 16)
  with pytest.raises(ValueError, match='2 of 6 images') as caught:
    nucleus.prepare(pack(files, tmp_path / 'x.zip'), tmp_path / 'd')
  assert '3 pages' in str(caught.value)
  assert 'of 16 bits' in str(caught.value)


def test_a_guard_names_the_file_and_one_reason():
  for error, said in (
    (OSError('broken\nfile'), 'broken file'),
    (KeyError('size'), "KeyError: 'size'"),
    (lzma.LZMAError(), 'LZMAError'),
    (struct.error('unpack'), 'error: unpack'),
    (MemoryError(), 'there is not enough memory for it'),
    (ValueError('<_io.BytesIO object at 0x7f>'), 'it'),
    (ValueError('\ud800'), '\\ud800'),
  ):
    with (
      pytest.raises(download.BadFileError) as caught,
      download.guard('x', 'is bad'),
    ):
      raise error
    assert str(caught.value) == f'x: is bad ({said})'
  with pytest.raises(KeyboardInterrupt), download.guard('x', 'is bad'):
    raise KeyboardInterrupt
