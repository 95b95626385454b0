"""Near-copies between train and test, and splits that keep groups whole."""

import io
import types

import numpy as np
import pytest
from PIL import Image
from test_data_folder import encoded, grey, photo, refused
from test_data_nucleus import real_ids
from test_data_nucleus import tree as nuclei
from trees import put

from distillfss_jax.data import copies, download, notes
from distillfss_jax.datasets import folder, nucleus

SIZE = (40, 60)


def scene(seed, size=SIZE):
  """Something with structure, as images have: smooth at several scales."""
  random = np.random.RandomState(seed)
  whole = np.zeros((*size, 3))
  for cells in (3, 8, 20):
    part = random.randint(0, 256, (cells, cells, 3)).astype(np.uint8)
    part = Image.fromarray(part).resize(size[::-1], Image.Resampling.BICUBIC)
    whole += np.asarray(part)
  return (whole / 3).astype(np.uint8)


def exposed(image, gain, offset=0, noise=0):
  random = np.random.RandomState(noise)
  changed = image * gain + offset + noise * random.randn(*image.shape)
  return np.clip(changed, 0, 255).astype(np.uint8)


def alike(one, other):
  return float(copies.look(one) @ copies.look(other))


@pytest.mark.parametrize(
  'change',
  [
    lambda x: exposed(x, 0.5),
    lambda x: exposed(x, 1.2, 10),
    lambda x: exposed(x, 0.7, 30, noise=8),
    lambda x: np.asarray(Image.fromarray(x).resize((90, 60))),
    lambda x: x[1:, :-1],
    lambda x: np.asarray(Image.fromarray(x).convert('L').convert('RGB')),
  ],
)
def test_one_scene_is_alike(change):
  for seed in range(4):
    assert alike(scene(seed), change(scene(seed))) > copies._ALIKE


def test_other_scenes_are_not():
  looks = np.stack([copies.look(scene(i)) for i in range(60)])
  found = looks.astype(np.float32) @ looks.T.astype(np.float32)
  np.testing.assert_allclose(np.diag(found), 1, atol=2e-3)
  np.fill_diagonal(found, 0)
  assert found.max() < 0.4


def test_what_is_blank_is_like_nothing():
  for pixels in (
    np.zeros((9, 9, 3), np.uint8),
    np.full((300, 200, 3), 77, np.uint8),
    np.full((1, 1, 3), 5, np.uint8),
  ):
    assert not copies.look(pixels).any()
  small = np.random.RandomState(0).randint(0, 256, (5, 7, 3)).astype(np.uint8)
  assert abs(np.linalg.norm(copies.look(small).astype(float)) - 1) < 1e-2


def checked(id_, pixels, mask=''):
  return types.SimpleNamespace(id=id_, look=copies.look(pixels), mask=mask)


def test_near(monkeypatch):
  noisy = exposed(scene(1), 1, noise=60)
  splits = {
    'train': [checked('a', scene(0)), checked('b', scene(1), 'm')],
    'sbd': [checked('c', scene(2))],
    'test': [
      checked('d', exposed(scene(2), 0.6)),
      checked('e', noisy, 'm'),  # alike, and of the same mask
      checked('f', noisy, 'n'),
      checked('g', scene(9), 'm'),  # the same mask alone says nothing
    ],
    'test_more': [checked('h', scene(0)), checked('i', scene(8))],
  }
  assert copies._ALIKE_WITH_ONE_MASK < alike(scene(1), noisy) < copies._ALIKE
  expected = [('d', 'c'), ('e', 'b'), ('h', 'a')]
  found = copies.near(splits)
  assert sorted((test, train) for test, train, _ in found) == expected
  assert [x[2] for x in found] == sorted((x[2] for x in found), reverse=True)
  monkeypatch.setattr(copies, '_BLOCK', 1)
  assert copies.near(splits) == found
  assert copies.near({'train': splits['train']}) == []


def scenes(count=5, exposures=5):
  """A tree of scenes, each under several exposures."""
  files = {}
  for i in range(count):
    for j in range(exposures):
      name = f's{i}_e{j}.png'
      image = exposed(scene(i), 0.5 + 0.1 * j)
      files[f'images/{name}'] = encoded(image)
      files[f'masks/{name}'] = grey([255], SIZE)
  return files


def prepared(files, tmp_path, **options):
  raw = put(files, tmp_path / 'raw')
  return folder.prepare(raw, tmp_path / 'd', name='mine', **options)[0]


def ids_of(manifest, split):
  return [x['id'] for x in manifest['records'] if x['split'] == split]


def test_exposures_on_both_sides_are_told(tmp_path, caplog):
  manifest = prepared(scenes(), tmp_path)
  assert len(manifest['near']) == 5
  for test, train, likeness in manifest['near']:
    assert test[:2] == train[:2]
    assert likeness > 0.9
  said = [x for x in notes.notes(manifest) if 'near-copies' in x]
  assert said[0].startswith('5 of 5 test images are near-copies of a training')
  assert 'groups.txt' in said[0]


@pytest.mark.parametrize('group_by', [r'^s\d', r'(s\d)_e', r's(\d)_|x(.)'])
def test_groups_by_an_expression(tmp_path, group_by):
  manifest = prepared(scenes(), tmp_path, group_by=group_by)
  train, test = (ids_of(manifest, x) for x in ('train', 'test'))
  assert len(test) == 5
  assert not {x[:2] for x in train} & {x[:2] for x in test}
  assert (manifest['near'], manifest['groups']) == ([], 5)
  assert manifest['options']['group_by'] == group_by
  with pytest.raises(ValueError, match='was prepared with group_by'):
    prepared(scenes(), tmp_path, group_by='e.')


def test_groups_of_a_file(tmp_path):
  files = scenes()
  lines = [
    f'{x.removeprefix("images/")} {x[7:9]}' for x in files if 'images' in x
  ]
  lines[0] = lines[0].replace('.png', '')
  lines[1] = 'images/' + lines[1].replace(' ', ', ')
  files['groups.txt'] = '\n\n'.join(lines).encode()
  by_file = prepared(files, tmp_path / '1')
  by_form = prepared(scenes(), tmp_path / '2', group_by=r's\d')
  for split in ('train', 'test'):
    assert ids_of(by_file, split) == ids_of(by_form, split)


def test_groups_and_lists(tmp_path):
  files = scenes(3, 2)
  files['groups.txt'] = b'\n'.join(
    f's{i}_e{j} s{i}'.encode() for i in range(3) for j in range(2)
  )
  files['test.txt'] = b's0_e0\ns0_e1'
  assert ids_of(prepared(files, tmp_path / '1'), 'test') == ['s0_e0', 's0_e1']
  files['test.txt'] = b's0_e0\ns1_e1'
  message = refused(files, tmp_path / '2', '2 groups have images in both')
  assert '(s0, s1)' in message


@pytest.mark.parametrize(
  ('lines', 'message'),
  [
    ('s0_e0 a', r'groups\.txt names a group for 1 of 4 images, and not for s'),
    ('s0_e0 a\nx b', r"'x b' is not `<image> <group>` with an image that is"),
    ('s0_e0', 'is not `<image> <group>`'),
    ('s0_e0 a\ns0_e0 b', 'gives s0_e0 two groups'),
    ('s0_e0 a\ns0_e1 a\ns1_e0 a\ns1_e1 a', "all 4 images are of the group 'a'"),
  ],
)  # fmt: skip
def test_bad_groups(tmp_path, lines, message):
  files = {**scenes(2, 2), 'groups.txt': lines.encode()}
  refused(files, tmp_path, message)


@pytest.mark.parametrize(
  ('group_by', 'message'),
  [('s(', 'no regular expression'), ('s0', 'matches 2 of 4 images, and not')],
)
def test_bad_expressions(tmp_path, group_by, message):
  with pytest.raises(ValueError, match=message):
    prepared(scenes(2, 2), tmp_path, group_by=group_by)


def test_groups_are_held_out_whole():
  random = np.random.RandomState(0)
  for count in range(2, 40):
    group_of = {f'i{i}': f'g{random.randint(count)}' for i in range(100)}
    group_of |= {'x': 'alone', 'y': 'g0'}
    test = download.held_out_groups(group_of)
    train = set(group_of) - set(test)
    assert not {group_of[i] for i in test} & {group_of[i] for i in train}
    assert train
    assert test
    smallest = min(map(list(group_of.values()).count, group_of.values()))
    assert len(test) <= max(21, smallest)
    again = dict(reversed(group_of.items()))
    assert download.held_out_groups(again) == test
  assert download.held_out_groups({'a': 1, 'b': 1, 'c': 2}) == ['c']


def test_other_datasets_are_looked_at_too(tmp_path):
  train, test = real_ids(3, 2)[:3], real_ids(3, 2)[3:]
  files, _ = nuclei([*train, *test])
  first, second = (
    next(x for x in files if x.startswith(f'{i}/images'))
    for i in (train[0], test[0])
  )
  size = Image.open(io.BytesIO(files[first])).size[::-1]
  other = Image.open(io.BytesIO(files[second])).size[::-1]
  files[first] = encoded(scene(3, size))
  files[second] = encoded(exposed(scene(3, other), 0.7))
  raw = put(files, tmp_path / 'raw')
  manifest, _ = nucleus.prepare(raw, tmp_path / 'd')
  assert [x[:2] for x in manifest['near']] == [[test[0], train[0]]]
  said = [x for x in notes.notes(manifest) if 'near-copies' in x]
  assert 'groups.txt' not in said[0]


def test_photos_of_noise_are_scenes_too():
  for seed in range(5):
    one = photo(seed, SIZE)
    assert alike(one, exposed(one, 0.6)) > copies._ALIKE
    assert alike(one, photo(seed + 50, SIZE)) < copies._ALIKE_WITH_ONE_MASK
