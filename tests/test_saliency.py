"""Scores of soft maps, against the evaluator's own and against plain loops."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from distillfss_jax.evaluators import base, images, metrics
from distillfss_jax.evaluators import saliency as evaluation
from distillfss_jax.ops import resize, saliency
from distillfss_jax.types import Prediction

EPS = np.finfo(float).eps


def golden_case():
  """A map [60, 80] of 8 bits and a mask, of which all scores are known."""
  y, x = np.mgrid[:60, :80]
  mask = np.hypot(y - 28, x - 37) < 14
  far = np.hypot(y - 30, x - 40)
  levels = np.round(255 / (1 + np.exp((far - 13) / 2.5)))
  return levels.astype(np.uint8), mask


def test_golden(shared):
  path = shared('goldens/attnfd_kdas/golden_kdas.json')
  golden = json.loads(path.read_text())['metrics']
  levels, mask = golden_case()
  found = saliency.score(levels, mask)
  ours = {
    'Sm': found.s_measure,
    'wFm': found.weighted_f,
    'mae': found.mae,
    'dic05': found.dice_at_half,
  }
  for name, curve in zip(evaluation._SHORT, found.curves, strict=True):
    ours |= {f'mean{name}': curve.mean(), f'max{name}': curve.max()}
  inside, outside = (
    np.bincount(levels[x], minlength=256) for x in (mask, ~mask)
  )
  ours['S_obj'] = mask.mean() * saliency._of_object(inside, saliency.LEVELS)
  ours['S_obj'] += (~mask).mean() * saliency._of_object(
    outside, 1 - saliency.LEVELS
  )
  ours['S_reg'] = saliency._of_regions(levels, mask)
  assert set(golden) <= set(ours)
  for name, value in golden.items():
    assert ours[name] == pytest.approx(value, abs=1e-9), name


def test_thresholds_are_those_of_the_evaluator():
  """In float64, where the last bit of a threshold decides a tie."""
  exact = np.arange(255, -1, -1) / 255
  assert (exact != saliency.THRESHOLDS).sum() == 104
  assert (saliency.LEVELS[::-1] < saliency.THRESHOLDS).sum() == 66


def noise(seed, shape=(13, 17)):
  random = np.random.RandomState(seed)
  mask = scipy.ndimage.gaussian_filter(random.randn(*shape), 2) > 0
  smooth = scipy.ndimage.gaussian_filter(mask.astype(float), 1)
  levels = 255 * np.clip(smooth + 0.3 * random.rand(*shape), 0, 1)
  return levels.astype(np.uint8), mask


def slow_curves(levels, mask):
  """[5, 256] by passes over the image, as the specification has them."""
  found = []
  for threshold in np.linspace(1, 0, 256):
    binary = levels / 255 >= threshold
    hits, marked, there = (x.sum() for x in (binary & mask, binary, mask))
    right = (~binary & ~mask).sum()
    wrong = marked - hits
    four = np.zeros(4)
    if hits:
      four[:] = (
        2 * hits / (there + marked), hits / (there - hits + marked),
        hits / there, right / max(right + wrong, 1),
      )  # fmt: skip
    if not mask.any():
      of = 1.0 - binary
    elif mask.all():
      of = binary.astype(float)
    else:
      x, y = binary - binary.mean(), mask - mask.mean()
      of = (2 * x * y / (x**2 + y**2 + EPS) + 1) ** 2 / 4
    found.append([*four, of.sum() / (mask.size - 1 + EPS)])
  return np.array(found).T


@pytest.mark.parametrize('seed', range(4))
def test_curves_are_those_of_passes_over_the_image(seed):
  levels, mask = noise(seed)
  found = saliency.score(levels, mask).curves
  np.testing.assert_allclose(found, slow_curves(levels, mask), atol=1e-12)


@pytest.mark.parametrize('value', [False, True])
def test_masks_of_one_kind(value):
  levels, _ = noise(0)
  mask = np.full(levels.shape, value)
  found = saliency.score(levels, mask)
  np.testing.assert_allclose(
    found.curves, slow_curves(levels, mask), atol=1e-12
  )
  mean = (levels / 255).mean()
  assert found.s_measure == pytest.approx(mean if value else 1 - mean)
  assert np.isfinite(found.weighted_f)
  assert value or found.weighted_f == found.dice_at_half == 0


def slow_weighted_f(levels, mask):
  """Over the whole image, with a kernel of two axes."""
  error = np.abs(levels / 255 - mask)
  far, at = scipy.ndimage.distance_transform_edt(~mask, return_indices=True)
  nearest = error[tuple(at)]
  i = np.arange(-3, 4)
  kernel = np.exp(-(i[:, None] ** 2 + i**2) / (2 * 5**2))
  spread = scipy.ndimage.convolve(
    nearest, kernel / kernel.sum(), mode='nearest'
  )
  least = np.where(mask & (spread < error), spread, error)
  weight = np.where(mask, 1, 2 - np.exp(np.log(0.5) / 5 * far))
  weighed = least * weight
  hits = mask.sum() - weighed[mask].sum()
  recall = 1 - weighed[mask].mean()
  precision = hits / (hits + weighed[~mask].sum() + EPS)
  return 2 * recall * precision / (recall + precision + EPS)


@pytest.mark.parametrize('seed', range(6))
def test_weighted_f_is_that_of_the_whole_image(seed):
  levels, mask = noise(seed, (23, 31))
  mask &= np.pad(np.ones((9, 11), bool), ((seed, 14 - seed), (20, 0)))
  mask[seed + 4, 25] = True
  assert saliency.weighted_f(levels, mask) == pytest.approx(
    slow_weighted_f(levels, mask), abs=1e-12
  )


def test_a_region_without_a_pixel_is_left_out():
  """The mask's centroid is in the first row: the original's is no number."""
  levels, _ = noise(0)
  mask = np.zeros(levels.shape, bool)
  mask[0, 5:9] = True
  assert 0 <= saliency.score(levels, mask).s_measure <= 1


def test_a_perfect_map():
  _, mask = noise(0)
  found = saliency.score(255 * mask.astype(np.uint8), mask)
  assert found.dice_at_half == found.curves[0].max() == 1
  assert found.mae == 0
  assert found.s_measure == pytest.approx(1)
  assert found.weighted_f == pytest.approx(1)


def test_soft_dice():
  assert saliency.soft_dice(2.0, 5.0, 3) == round(5 / 9, 4)
  assert saliency.soft_dice(0.0, 0.0, 0) == 1


class Blobs:
  """Images of several sizes, whose red is what is predicted of them."""

  sizes = np.array([(20, 24), (33, 17), (24, 20), (9, 40)], np.int32)
  ids = ('a/1', 'b/x/1', 'a/2', 'b/../../1')

  def __init__(self, void=False, empty=False):
    self._void, self._empty = void, empty

  def __len__(self):
    return len(self.ids)

  def __getitem__(self, i):
    rows, columns = self.sizes[i]
    y, x = np.mgrid[:rows, :columns]
    far = np.hypot(y - rows / 2, x - columns / 2)
    label = (far < 5 + i).astype(np.uint8)
    if self._empty and i == 1:
      label[:] = 0
    if self._void and i == 2:
      label[0, :3] = 255
    image = np.zeros((rows, columns, 3), np.uint8)
    image[..., 0] = 255 / (1 + np.exp((far - 4 - i) / 2))
    return {'image': image, 'label': label, 'id': self.ids[i]}


def predict(variables, memory, x, roles):
  """The foreground's logit is red, that of the background a number."""
  red = x[..., 0].astype(jnp.float32) / 32
  logits = jnp.stack([jnp.full_like(red, 2.5), red], -1)
  answers = {'student': logits, 'teacher': -logits}
  return {role: Prediction(answers[role]) for role in roles}


def run(source, size=16, roles=('student',), **how):
  protocol = base.Protocol('test', 'model', 'how', {'miou': 'mIoU'})
  evaluator = images.Images(
    source, predict, [metrics.ModelSize(('blob',), protocol)],
    image_size=size, batch_size=3, native=True,
  )  # fmt: skip
  maps = evaluation.Saliency(source, 'test_saliency', **how)
  return evaluator.run({}, roles, beside=[maps])


SETS = {'a': (0, 2), 'b': (1, 3)}


def by_hand(source, i, size):
  """The map of an image as the specification has it."""
  image = source[i]['image']
  seen = np.asarray(Image.fromarray(image).resize((size, size), 2))
  x = seen[..., :1].astype(np.float32) / 32 - 2.5
  x = np.asarray(
    resize.bilinear(jnp.asarray(x), image.shape[:2], align_corners=False)
  )[..., 0]
  x = 1 / (1 + np.exp(-x))
  return (x - x.min()) / (x.max() - x.min() + 1e-8)


def test_sets_masks_and_their_table(tmp_path):
  source = Blobs()
  found = run(
    source, sets=SETS, folder=tmp_path, masks=True, roles=('student', 'teacher')
  )
  assert [x.name for x in found.protocols] == [
    'test', 'test_saliency', 'test_saliency/a', 'test_saliency/b',
  ]  # fmt: skip
  assert 'mean of 2 test sets' in found.protocols[1].says
  assert 'test sets' not in found.protocols[2].says
  assert found.images == 4
  curves, dices = [], []
  for i, place in enumerate(['a/1', 'b/x/1', 'a/2']):
    levels = np.asarray(Image.open(tmp_path / 'masks' / f'{place}.png'))
    soft = by_hand(source, i, 16)
    assert levels.dtype == np.uint8
    assert levels.shape == tuple(source.sizes[i])
    assert (levels.min(), levels.max()) == (0, 255)
    assert np.abs(levels - np.round(255 * soft)).max() <= 1
    mask = source[i]['label'] == 1
    curves.append(saliency.score(levels, mask).curves)
    dices.append(
      saliency.soft_dice((soft * mask).sum(), soft.sum(), mask.sum())
    )
  scores = found.scores['test_saliency/a']['student']
  mean = (curves[0] + curves[2]) / 2
  assert scores['meanDic'] == pytest.approx(mean[0].mean(), abs=1e-9)
  assert scores['maxDic'] == pytest.approx(mean[0].max(), abs=1e-9)
  assert scores['maxEm'] == pytest.approx(mean[4].max(), abs=1e-9)
  assert scores['soft_dice'] == pytest.approx(
    (dices[0] + dices[2]) / 2, abs=2e-4
  )
  both = found.scores['test_saliency']['student']
  other = found.scores['test_saliency/b']['student']
  assert both['Sm'] == pytest.approx((scores['Sm'] + other['Sm']) / 2)
  teacher = found.scores['test_saliency']['teacher']
  assert teacher['meanDic'] < both['meanDic']
  lines = list(
    csv.DictReader((tmp_path / 'saliency.csv').read_text().splitlines())
  )
  assert [(x['role'], x['set'], x['id']) for x in lines[:4]] == [
    ('student', x[0], x) for x in source.ids
  ]
  assert len(lines) == 8
  of_first = float(lines[0]['meanDic']), float(lines[2]['meanDic'])
  assert np.mean(of_first) == pytest.approx(scores['meanDic'], abs=1e-6)
  # No name leads out of the folder.
  assert sorted(
    str(x.relative_to(tmp_path)) for x in tmp_path.rglob('*') if x.is_file()
  ) == [
    'masks/a/1.png', 'masks/a/2.png', 'masks/b/1.png', 'masks/b/x/1.png',
    'saliency.csv',
  ]  # fmt: skip


def test_a_mask_is_whole_or_not_there(tmp_path, monkeypatch):
  """Killed as a mask is written, nothing half-written has its name."""

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr('os.fsync', killed)
  with pytest.raises(KeyboardInterrupt):
    run(Blobs(), folder=tmp_path, masks=True)
  assert not [x for x in tmp_path.rglob('*') if x.is_file()]


def test_the_map_is_not_asked_for(tmp_path):
  found = run(Blobs(), folder=tmp_path)
  assert [x.name for x in found.protocols] == ['test', 'test_saliency']
  assert [x.name for x in tmp_path.iterdir()] == ['saliency.csv']
  again = run(Blobs())
  assert again.scores == found.scores


def test_what_chooses_is_the_soft_dice_alone(tmp_path):
  whole = run(Blobs()).scores['test_saliency']['student']
  found = run(Blobs(), soft=True)
  assert found.scores['test_saliency']['student'] == {
    'soft_dice': whole['soft_dice']
  }
  assert list(found.protocols[1].columns) == ['soft_dice']


def test_odd_masks_are_told():
  notes = ' '.join(run(Blobs(void=True, empty=True)).notes)
  assert '1 test images have void' in notes
  assert '1 test images have no foreground' in notes
  assert 'saliency' not in ' '.join(run(Blobs()).notes)


def test_images_of_one_value_have_no_map():
  """An image whose map is even is all 0, not no number."""
  levels, sums = evaluation.maps(
    jnp.zeros((1, 4, 4, 2)),
    jnp.array([[3, 5]]),
    jnp.ones((1, 8, 8), jnp.uint8),
  )
  assert not np.asarray(levels).any()
  assert np.isfinite(sums).all()
