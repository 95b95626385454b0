"""Tests of the choice of images to annotate."""

import itertools

import numpy as np
import pytest
from PIL import Image

from distillfss_jax import suggest as command
from distillfss_jax.data import download, suggest
from distillfss_jax.datasets import folder


def test_one_of_each_cluster():
  line = np.array([0, 1, 2, 3, 4, 20, 21, 22, 50, 51])[:, None]
  # 4 is the median; 50 saves 92 of the distance left, 21 only 83.
  assert suggest.rank(line, 3).tolist() == [4, 8, 6]


def test_fewer_are_the_first_of_more():
  points = np.random.default_rng(0).normal(size=(40, 6))
  most = suggest.rank(points, 10)
  assert len(set(most.tolist())) == 10
  for count in (1, 3, 7):
    np.testing.assert_array_equal(suggest.rank(points, count), most[:count])


def test_the_gain_is_near_the_best_choices():
  points = np.random.default_rng(1).normal(size=(14, 2))
  distance = suggest._distances(points)

  def gain(chosen):
    return distance.max() - distance[list(chosen)].min(0).mean()

  best = max(map(gain, itertools.combinations(range(14), 3)))
  assert gain(suggest.rank(points, 3)) >= (1 - 1 / np.e) * best


def test_an_outlier_is_not_the_second():
  crowd = np.random.default_rng(2).normal(size=(60, 2))
  crowd[:30] += 8
  points = np.concatenate([crowd, [[40.0, -40.0]]])
  first, second = suggest.rank(points, 2)
  assert {first < 30, second < 30} == {True, False}
  assert 60 not in (first, second)


def test_equal_images_are_taken_in_their_order():
  assert suggest.rank(np.zeros((4, 3)), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize('count', [0, 5])
def test_no_more_than_there_are(count):
  with pytest.raises(ValueError, match=f'{count} images asked for, out of 4'):
    suggest.rank(np.zeros((4, 3)), count)


def test_every_map_has_the_same_weight():
  rng = np.random.default_rng(3)
  maps = [rng.normal(size=(9, 4, 4, c)) * c for c in (2, 50)]
  points = suggest.describe([suggest.pooled(x) for x in maps])
  assert points.shape == (9, 104)
  np.testing.assert_allclose(points.mean(0), 0, atol=1e-9)
  weights = (points**2).mean(0)
  assert weights[:4].sum() == pytest.approx(weights[4:].sum())


def test_a_feature_without_variance_says_nothing():
  blank = suggest.pooled(np.ones((3, 2, 2, 5)))
  assert (suggest.describe([blank]) == 0).all()


# --- the command ------------------------------------------------------------


def _write(path, image):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def _folder(path, count=6):
  """Noise of two kinds, dark and light, in turn; one file is no image."""
  rng = np.random.default_rng(0)
  for i in range(count):
    dark = rng.integers(0, 60, (40, 50, 3), dtype=np.uint8)
    _write(path / 'images' / f'{i}.png', dark if i % 2 else 255 - dark)
  (path / 'images' / 'broken.png').write_bytes(b'no image')
  return path


@pytest.mark.parametrize(
  ('names', 'wanted'),
  [
    (('a.png', 'b.jpg', 'notes.txt'), ['a.png', 'b.jpg']),
    (('images/a.png', 'masks/a.png', 'b.png'), ['images/a.png']),
    (('x/1/images/a.png', 'x/1/masks/b.png'), ['x/1/images/a.png']),
    (('a.png', 'masks/a.png'), ['a.png']),
  ],
)
def test_where_images_lie(tmp_path, names, wanted):
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b'')
  with download.Files(tmp_path, '') as files:
    assert folder.images_of(files) == wanted


def test_images_are_suggested(tmp_path, capsys):
  raw, out = _folder(tmp_path / 'raw'), tmp_path / 'out'
  chosen = command.run(raw, 2, out, 'mine')
  kinds = {int(x.removesuffix('.png')[-1]) % 2 for x in chosen}
  assert kinds == {0, 1}  # one of each kind
  assert (out / 'mine' / 'suggested.txt').read_text().split() == chosen
  with Image.open(out / 'mine' / 'suggested.png') as sheet:
    assert sheet.width > 200
  assert f'1 {chosen[0]}' in capsys.readouterr().out


def test_more_than_there_are(tmp_path):
  raw = _folder(tmp_path / 'raw', 3)
  with pytest.raises(ValueError, match='has 4 images, of which 1 to 4'):
    command.run(raw, 9, tmp_path / 'out')
  with pytest.raises(ValueError, match=r'1 files cannot be read.*broken'):
    command.run(raw, 4, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
