"""How folders, images and masks may be called, and what is said of others."""

import logging
import re

import numpy as np
import pytest
from test_data_folder import (
  IDS,
  decided,
  drawn,
  encoded,
  grey,
  made,
  photo,
  refused,
  tree,
  warnings,
)
from trees import put

from distillfss_jax.data import pairs
from distillfss_jax.datasets import folder

E_ACUTE, E_AND_ACUTE = '\u00e9', 'e\u0301'  # they look the same


def named(*names, images='images', masks='masks', suffix='png'):
  """A tree of (image, mask) names."""
  files = {}
  for i, (image, mask) in enumerate(names):
    files[f'{images}/{image}'] = encoded(photo(i))
    files[f'{masks}/{mask}.{suffix}'] = grey([255])
  return files


@pytest.mark.parametrize(
  ('image', 'mask'),
  [
    ('{}_image.png', '{}_mask'),
    ('{}.png', '{}_masks'),
    ('{}.png', '{}_annotation'),
    ('{}_0000.png', '{}'),
    ('{}.png', '{}.png'),
    ('{}.jpg', '{}.jpg'),
    ('image_{}.png', 'mask_{}'),
    ('img-{}.png', 'label-{}'),
    ('{}_training.tif', '{}_manual1'),
    ('{}-rgb.png', '{}-gt'),
    ('IMG_{}.png', '{}_Segmentation'),
    ('image{}.png', 'label{}'),
    ('scan {}.png', 'scan {} mask'),
    ('a/{}_image.png', 'a/{}_mask'),
  ],
)
def test_names_of_pairs(tmp_path, image, mask, caplog):
  caplog.set_level(logging.INFO)
  names = [(image.format(n), mask.format(n)) for n in ('01', '2', '307')]
  _, _, labels = decided(named(*names), tmp_path)
  assert len(labels) == 3
  for label in labels.values():
    np.testing.assert_array_equal(label, drawn([1]))
  guessed = any('is taken for that of' in x for x in caplog.messages)
  exact = pairs._ENDING.fullmatch(mask) and image == '{}.png'
  assert guessed != bool(exact)


@pytest.mark.parametrize(
  'names',
  [
    [('1_image.png', '1_mask'), ('1_img.png', '1_label')],  # two of one name
    [('1_0000.png', '1'), ('1_0001.png', '2')],  # channels of one image
    [('a.png', 'x'), ('b.png', 'y')],
  ],
)
def test_what_is_not_guessed(tmp_path, names):
  message = refused(named(*names), tmp_path, '.')
  assert 'has a mask in masks/' in message or 'no mask for' in message


def test_pairs_that_are_not_made_are_named(tmp_path):
  names = [(f'frame{i}.png', f'drawing{i}') for i in range(4)]
  message = refused(named(*names), tmp_path, 'none of the 4 images has a mask')
  assert (
    'In order they would be images/frame0.png with masks/drawing0.png'
    in message
  )
  files = named(*names)
  del files['masks/drawing3.png']
  assert 'In order' not in refused(files, tmp_path / '2', 'none of the 4')


@pytest.mark.parametrize('images', ['images', 'image', 'Imgs', 'imagesTr'])
@pytest.mark.parametrize('masks', ['mask', 'label', 'labelsTr', 'Segmentation'])
def test_names_of_folders(tmp_path, images, masks):
  files = named(('a.png', 'a'), ('b.png', 'b'), images=images, masks=masks)
  assert sorted(decided(files, tmp_path)[2]) == ['a', 'b']


def test_two_folders_of_images(tmp_path):
  files = named(('a.png', 'a')) | named(('b.png', 'b'), images='image')
  refused(files, tmp_path, 'has image/ and images/: which are the images')


@pytest.mark.parametrize(
  ('image', 'mask'),
  [(E_ACUTE, E_AND_ACUTE), (E_AND_ACUTE, E_ACUTE), (E_ACUTE, E_ACUTE)],
)
def test_letters_that_look_the_same_are(tmp_path, image, mask):
  files = named((f'{image}1.png', f'{mask}1'), (f'{image}2.png', f'{mask}2'))
  files['test.txt'] = f'{mask}2.png'.encode()
  dataset, _ = made(files, tmp_path)
  assert dataset.train.ids == (f'{E_ACUTE}1',)
  assert dataset.test.ids == (f'{E_ACUTE}2',)


def test_names_that_differ_in_form_only(tmp_path):
  files = named((f'{E_ACUTE}.png', 'x'), (f'{E_AND_ACUTE}.png', 'y'))
  refused(files, tmp_path, 'their letters differ in Unicode form only')


# ----------------------------------------------------------------------- forms


@pytest.mark.parametrize(
  ('suffix', 'form'),
  [('gif', 'GIF'), ('ppm', 'PPM'), ('pgm', 'PPM'), ('jfif', 'PNG')],
)
def test_more_forms(tmp_path, suffix, form):
  files = {}
  for i, id_ in enumerate(IDS):
    files[f'images/{id_}.png'] = encoded(photo(i))
    mask = drawn([255]).astype(np.uint8)
    files[f'masks/{id_}.{suffix}'] = encoded(mask, form)
  raw = put(files, tmp_path / 'raw')
  manifest, _ = folder.prepare(raw, tmp_path / 'd', name='mine')
  assert manifest['forms'] == f'images 5 png; masks 5 {suffix}'
  dataset = folder.load(tmp_path / 'd', 'mine')
  for part in (dataset.train, dataset.test):
    for record in part:
      np.testing.assert_array_equal(record['label'], drawn([1]))


def test_images_of_other_forms(tmp_path):
  files = tree([grey([255])])
  for i, (suffix, form) in enumerate(
    [('gif', 'GIF'), ('ppm', 'PPM'), ('bmp', 'BMP'), ('webp', 'WEBP')]
  ):
    del files[f'images/{IDS[i]}.png']
    options = {'lossless': True} if form == 'WEBP' else {}
    pixels = photo(i)
    if form == 'GIF':  # it has 256 colours
      pixels = pixels // 64 * 64
    files[f'images/{IDS[i]}.{suffix}'] = encoded(pixels, form, **options)
  _, records = made(files, tmp_path)
  for i, id_ in enumerate(IDS):
    expected = photo(i) // 64 * 64 if not i else photo(i)
    np.testing.assert_array_equal(records[id_]['image'], expected)


@pytest.mark.parametrize(
  ('where', 'suffix'),
  [('images', 'heic'), ('masks', 'npy'), ('masks', 'nii.gz'), ('images', '')],
)
def test_forms_that_are_not_read(tmp_path, where, suffix):
  files = tree([grey([255])])
  for name in [x for x in files if x.startswith(where)]:
    del files[name]
    files[f'{name[:-4]}.{suffix}'.rstrip('.')] = b'\0\0\0\x18ftypheic'
  last = re.escape(suffix.split('.')[-1])
  message = refused(
    files, tmp_path, f'{where}/ holds 5 files, none of a form that is read: '
    f'{last}'
  )  # fmt: skip
  assert 'Save them as PNG' in message
  assert 'has no images/ with masks/' not in message


def test_some_images_are_of_a_form_that_is_not_read(tmp_path, caplog):
  files = tree([grey([255])])
  files['images/x.heic'] = b''
  assert len(decided(files, tmp_path)[2]) == 5
  assert 'images/x.heic' in warnings(caplog)[0]


# ------------------------------------------------------------ masks beside them


@pytest.mark.parametrize('place', ['images/', 'Imgs/', 'one/images/'])
def test_masks_beside_images(tmp_path, place):
  files = {}
  for i, id_ in enumerate(IDS):
    files[f'{place}{id_}.jpg'] = encoded(photo(i), 'JPEG')
    files[f'{place}{id_}.png'] = grey([255])
  _, _, labels = decided(files, tmp_path / '1')
  assert sorted(labels) == IDS
  files = {}
  for i, id_ in enumerate(IDS):
    files[f'{place}{id_}.png'] = encoded(photo(i))
    files[f'{place}{id_}_mask.png'] = grey([255])
  _, _, labels = decided(files, tmp_path / '2')
  assert sorted(labels) == IDS
  np.testing.assert_array_equal(labels['a'], drawn([1]))


def test_images_alone_are_not_divided_into_masks(tmp_path):
  files = {f'images/{x}.jpg': encoded(photo(i)) for i, x in enumerate(IDS)}
  files['images/a.png'] = grey([255])
  refused(files, tmp_path / '1', 'has no images/ with masks/')
  del files['images/a.png']
  files['images/a_mask.jpg'] = grey([255])
  refused(files, tmp_path / '2', 'has no images/ with masks/')
