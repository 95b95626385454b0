"""Predicting new images: what is written, kept, refused; from Python, too."""

import csv
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import distillfss_jax
from distillfss_jax import config as configs
from distillfss_jax import predict
from distillfss_jax.data import forms, transforms
from distillfss_jax.datasets import folder as folder_dataset
from distillfss_jax.datasets import synthetic
from distillfss_jax.evaluators import images as images_lib
from distillfss_jax.evaluators import metrics
from distillfss_jax.inference import command, inputs, outlines, outputs, sources
from distillfss_jax.inference import segmenter as segmenter_lib
from distillfss_jax.ops import resize
from distillfss_jax.ops.metrics import Confusion
from distillfss_jax.tasks import adaptation
from distillfss_jax.types import Prediction
from distillfss_jax.workdir import locking
from tests import segmenters

OPTIONS = {
  'scale': None, 'overwrite': False, 'skip_bad': False, 'batch_size': 0,
  'masks': None, 'meaning': None,
}  # fmt: skip
EVERYTHING = outputs.Wanted(True, True, 'npy', outputs.OUTLINES)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A run of random weights, its data, and its segmenter."""
  run = tmp_path_factory.mktemp('runs') / 'run'
  data = segmenters.make_run(run)
  return run, data, distillfss_jax.load(run)


def _two_classes(images):
  """Logits that say of each pixel whether it is bright, dark, or neither."""
  grey = images.mean(-1, dtype=np.float32)
  grey -= grey.mean((1, 2), keepdims=True)
  grey /= 1 + grey.std((1, 2), keepdims=True)
  return np.stack([np.full_like(grey, 0.5), grey, -grey], -1)


@pytest.fixture(scope='module')
def drawn():
  """A data set of drawn images."""
  return synthetic.load(num_train=1, num_test=3, image_size=80, classes=2)


@pytest.fixture
def model(drawn, monkeypatch):
  """A segmenter that needs no compiling, which 'the run' is taken for."""
  found = segmenter_lib.Segmenter(
    _two_classes, 64, drawn.classes, drawn.palette, (80, 80), 'a digest'
  )
  monkeypatch.setattr(predict.sources, 'load', lambda *_, **__: found)
  return found


def run(given, out, wanted=None, **options):
  return predict.run(
    'the run', list(map(str, given)), out,
    wanted=wanted or outputs.Wanted(), **{**OPTIONS, **options},
  )  # fmt: skip


def contents(folder):
  """{path: bytes} of all files of a folder."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


@pytest.fixture
def pictures(tmp_path, drawn):
  """A folder of images of many forms, some below others."""
  source = drawn.test
  top = tmp_path / 'images'
  (top / 'deep').mkdir(parents=True)
  Image.fromarray(source[0]['image']).save(top / 'a.png')
  wide = Image.fromarray(source[1]['image']).resize((90, 50))
  turned = Image.Exif()
  turned[0x0112] = 6  # to be turned by a quarter
  wide.save(top / 'deep' / 'b.jpg', exif=turned)
  wide.convert('L').save(top / 'deep' / 'c.tif')
  (top / 'notes.txt').write_text('no image')
  return top


# ---------------------------------------------------------------- from Python


def test_a_student_from_python(made, pictures):
  _, data, model = made
  assert model.classes == data.classes
  assert model.palette == data.dataset.palette
  assert model.seen == (80, 80)
  path = pictures / 'deep' / 'b.jpg'
  labels = model.predict(path)
  assert labels.dtype == np.uint8
  assert labels.shape == (90, 50)  # as a viewer shows it
  assert len(np.unique(labels)) > 1
  upright = np.asarray(Image.open(path).transpose(Image.ROTATE_270))
  np.testing.assert_array_equal(model.predict(upright), labels)
  opened = Image.fromarray(upright)
  np.testing.assert_array_equal(model.predict(opened), labels)
  shares = model.probabilities(path)
  assert shares.shape == (90, 50, 3)
  assert shares.dtype == np.float32
  np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
  np.testing.assert_array_equal(shares.argmax(-1), labels)


@pytest.mark.slow
def test_it_answers_as_the_test_does(made):
  """The counts of an evaluation at the images' own sizes, pixel by pixel."""
  _, data, model = made

  def answer(variables, memory, images, roles):
    del variables, memory
    return {role: Prediction(model.answer(images)) for role in roles}

  evaluator = images_lib.Images(
    data.dataset.test,
    answer,
    [metrics.NativeSize(data.classes, adaptation.PROTOCOLS[1])],
    image_size=model.size,
    batch_size=1,
  )
  found = evaluator.run({}, ('student',)).scores['test_native']['student']
  total = Confusion.empty(3)
  for i in range(len(data.dataset.test)):
    record = data.dataset.test[i]
    labels = model.predict(record['image'])
    total.add(Confusion.of(record['label'], labels, 3).counts)
  assert total.miou == pytest.approx(found['miou'], abs=1e-4)


@pytest.mark.slow
def test_a_teacher_reads_its_support(tmp_path):
  run = tmp_path / 'run'
  data = segmenters.make_run(run, 'transferfss', classes=1)
  model = sources.load(run)
  image = data.dataset.test[0]['image']
  assert model.predict(image).shape == (80, 80)
  ids = json.loads((run / 'ids.json').read_text())
  (run / 'ids.json').write_text(json.dumps({**ids, 'digest': 'of others'}))
  with pytest.raises(ValueError, match=r'is not what .* was adapted to'):
    sources.load(run)


def test_a_run_of_an_older_version(made, tmp_path):
  run, data, model = made
  shutil.copytree(run, tmp_path / 'run')
  path = tmp_path / 'run' / 'ids.json'
  ids = json.loads(path.read_text())
  for key in ('classes', 'palette', 'sizes'):
    del ids[key]
  path.write_text(json.dumps(ids))
  older = sources.Run(tmp_path / 'run')
  assert older.classes == data.classes
  assert older.palette == model.palette
  assert older.digest == model.digest
  assert sources.usual(older.sizes) == model.seen
  assert configs.flat(older.config) == configs.saved(run / 'config.json')
  assert not older.config.model.backbone.fields  # a group without keys is there


def test_what_is_no_run(made, tmp_path):
  run, *_ = made
  with pytest.raises(ValueError, match=r"there is no .*nothing: give a run's"):
    sources.load(tmp_path / 'nothing')
  with pytest.raises(ValueError, match=r'is no run .* no config\.json'):
    sources.load(tmp_path)
  other = tmp_path / 'run'
  shutil.copytree(run, other)
  (other / 'results.json').unlink()
  with pytest.raises(ValueError, match=r'is not finished, .* --workdir'):
    sources.load(other)
  config = json.loads((other / 'config.json').read_text())
  config['task'] = 'source'
  (other / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match="is a run of the task 'source'"):
    sources.load(other)
  file = tmp_path / 'x.png'
  Image.new('RGB', (8, 8)).save(file)
  with pytest.raises(ValueError, match=r'x\.png is no ONNX model'):
    sources.load(file)


@pytest.mark.parametrize(
  ('image', 'says'),
  [
    (np.zeros((4, 4, 3)), r'this is float64 \[4, 4, 3\]'),
    (np.zeros((4, 4, 2), np.uint8), 'has 3 channels'),
    (np.zeros((0, 4, 3), np.uint8), r'this is uint8 \[0, 4, 3\]'),
  ],
)
def test_what_is_no_image(made, image, says):
  with pytest.raises(ValueError, match=says):
    made[2].predict(image)


# -------------------------------------------------------------------- windows


def _by_brightness(images):
  """Logits that say of each pixel how bright it is."""
  bright = images.mean(-1) / 32 - 4
  return np.stack([-bright, bright], -1)


def _model(size=32, seen=(40, 40), **more):
  return segmenter_lib.Segmenter(
    _by_brightness, size, ('bright',), ((0, 0, 0), (9, 9, 9)), seen, 'x', **more
  )


def _scene(height, width):
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (9, 9, 3), np.uint8)
  return np.asarray(Image.fromarray(small).resize((width, height)))


@pytest.mark.parametrize('size', [(40, 40), (41, 97), (130, 77), (20, 300)])
def test_windows_are_blended(size):
  """An answer that is local is the same through windows, but for resizing."""
  model, image = _model(size=40), _scene(*size)
  wanted = 1 / (1 + np.exp(-2 * (image.mean(-1) / 32 - 4)))
  found = model.probabilities(image, scale=1)
  assert found.shape == (*size, 2)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(found[..., 1], wanted, atol=1e-5)
  many = _model(size=40, batch_size=5).probabilities(image, scale=1)
  np.testing.assert_allclose(many, found, atol=1e-6)


def test_scale_is_the_size_of_windows(monkeypatch):
  seen = []
  resize = transforms.resize_image
  monkeypatch.setattr(
    transforms,
    'resize_image',
    lambda x, s: seen.append(x.shape) or resize(x, s),
  )
  _model().predict(_scene(100, 100), scale=2)
  assert set(seen) == {(80, 80, 3)}
  assert len(seen) == 4
  with pytest.raises(ValueError, match=r'0\.1 would make windows of 4x4'):
    _model().predict(_scene(100, 100), scale=0.1)
  with pytest.raises(ValueError, match='8x8 is the least, 8192x8192 the most'):
    _model().window(1e9)
  for scale in (0, -1, float('nan'), float('inf')):
    with pytest.raises(ValueError, match='must be a number above 0'):
      _model().window(scale)


def test_bands_join():
  """A tall image comes in several bands, the same as in one piece."""
  image = _scene(700, 30)
  model = _model()
  tops = [band.top for band in model.bands(image)]
  assert tops == [0, 256, 512]
  logits = _by_brightness(transforms.resize_image(image, 32)[None])[0]
  rows, columns = (
    resize.matrix(32, n, align_corners=False) for n in image.shape[:2]
  )
  wanted = np.einsum('Hh,Ww,hwc->HWc', rows, columns, logits)
  np.testing.assert_array_equal(model.predict(image), wanted.argmax(-1))


# ------------------------------------------------------------------- outlines


def _maps(count=60):
  rng = np.random.default_rng(0)
  for i in range(count):
    size = rng.integers(1, 14, 2)
    shares = ((0.4, 0.4, 0.2), (0.2, 0.6, 0.2), (0, 1, 0))[i % 3]
    yield rng.choice(3, size=size, p=shares).astype(np.uint8)


def test_outlines_are_simple_rings():
  for labels in _maps():
    for part in outlines.parts(labels, 2):
      areas = [outlines.signed_area(ring) for ring in part.rings()]
      assert areas[0] > 0
      assert all(area < 0 for area in areas[1:])
      assert sum(areas) == part.area
      for ring in part.rings():
        assert len(np.unique(ring, axis=0)) == len(ring)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of pycocotools
def test_coco_gives_back_every_pixel():
  mask = pytest.importorskip('pycocotools.mask')
  maps = list(_maps())
  names = [f'{i}.png' for i in range(len(maps))]
  made = outlines.coco(zip(names, maps, strict=True), ('x', 'y'))
  made = json.loads(outlines.text(made))
  kinds = set()
  for number, labels in enumerate(maps, 1):
    found = np.zeros_like(labels)
    for one in made['annotations']:
      if one['image_id'] != number:
        continue
      form = one['segmentation']
      kinds.add(type(form))
      runs = mask.frPyObjects(form, *map(int, labels.shape))
      drawn = mask.decode(mask.merge(runs) if isinstance(form, list) else runs)
      assert drawn.sum() == one['area']
      found[drawn == 1] = one['category_id']
    np.testing.assert_array_equal(found, labels)
  assert kinds == {list, dict}


def test_labelme_gives_back_every_pixel():
  kinds = set()
  for labels in _maps():
    found = np.zeros_like(labels)
    made = json.loads(outlines.text(outlines.labelme(labels, ('x', 'y'), 'i')))
    for shape in made['shapes']:
      kinds.add(shape['shape_type'])
      drawn = forms._shape(shape['shape_type'], shape, labels.shape, 'i')
      found[drawn] = ('x', 'y').index(shape['label']) + 1
    np.testing.assert_array_equal(found, labels)
  assert kinds == {'polygon', 'mask'}


def _odd():
  """A label map [32, 32] of all that is hard to outline."""
  labels = np.zeros((32, 32), np.uint8)
  labels[2:14, 2:14] = 1
  labels[4:12, 4:12] = 0  # a hole, in it the other class with a hole,
  labels[5:11, 5:11] = 2
  labels[7:9, 7:9] = 0
  labels[7, 7] = 1  # and in that a pixel of the first
  labels[2:14, 18:30] = 2
  labels[4, 20] = labels[5, 21] = labels[6, 22] = 0  # holes, corner to corner
  labels[8:10, 18] = labels[13, 24:26] = 1  # bites, filled by the other
  labels[16, 0] = labels[31, 0] = labels[0, 31] = 1  # single pixels, at sides
  labels[20, 4] = labels[21, 5] = labels[22, 4] = 2  # corner to corner
  labels[18:30, 10:12] = labels[18:20, 10:20] = labels[28:30, 10:20] = 1
  labels[18:30, 18:20] = 1
  labels[24, 14] = labels[24, 16] = 1
  labels[16:, 24:] = np.indices((16, 8)).sum(0) % 2 + 1  # a chessboard
  return labels


def _as_seen(images):
  """Logits that take the red of an image for its label."""
  return np.eye(3, dtype=np.float32)[images[..., 0].astype(int) // 100] * 9


@pytest.fixture
def outlined(tmp_path, monkeypatch):
  """A folder of images, that of their outlines, and their label maps."""
  rng = np.random.default_rng(0)
  maps = [_odd(), _odd()[::-1], _odd().T, np.zeros((32, 32), np.uint8)]
  maps += [rng.choice(3, (32, 32), p=(0.3, 0.4, 0.3)) for _ in range(2)]
  maps = {f'{i}': np.uint8(labels) for i, labels in enumerate(maps)}
  top, out = tmp_path / 'again', tmp_path / 'out'
  (top / 'images').mkdir(parents=True)
  for name, labels in maps.items():
    image = np.repeat(100 * labels[..., None], 3, -1)
    Image.fromarray(image).save(top / 'images' / f'{name}.png')
  colours = ((0, 0, 0), (1, 2, 3), (4, 5, 6))
  model = segmenter_lib.Segmenter(
    _as_seen, 32, ('x', 'y'), colours, (32, 32), 'x'
  )
  monkeypatch.setattr(predict.sources, 'load', lambda *_, **__: model)
  run([top / 'images'], out, outputs.Wanted(outlines=outputs.OUTLINES))
  for name, labels in maps.items():
    with Image.open(out / 'masks' / f'{name}.png') as mask:
      np.testing.assert_array_equal(mask, labels)
  return top, out, maps


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of pycocotools
def test_coco_as_its_own_tools_read_it(outlined):
  coco = pytest.importorskip('pycocotools.coco')
  _, out, maps = outlined
  made = coco.COCO(out / 'annotations.json')
  assert [x['name'] for x in made.loadCats(made.getCatIds())] == ['x', 'y']
  assert len(made.imgs) == len(maps)
  for number, image in made.imgs.items():
    labels = maps[image['file_name'].removesuffix('.png')]
    assert (image['height'], image['width']) == labels.shape
    found = np.zeros_like(labels)
    for one in made.loadAnns(made.getAnnIds(imgIds=number)):
      mask = made.annToMask(one) == 1
      assert not found[mask].any()
      found[mask] = one['category_id']
      rows, columns = np.nonzero(mask)
      box = (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
      assert one['bbox'] == list(box)
      assert one['area'] == mask.sum()
    np.testing.assert_array_equal(found, labels)


def test_geojson_is_valid_and_gives_back_every_pixel(outlined):
  """By RFC 7946: rings are closed, the outer one runs anticlockwise."""
  _, out, maps = outlined
  for name, labels in maps.items():
    made = json.loads((out / 'geojson' / f'{name}.geojson').read_text())
    assert made['type'] == 'FeatureCollection'
    found, seen = np.zeros_like(labels), set()
    for feature in made['features']:
      assert feature['type'] == 'Feature'
      assert feature['geometry']['type'] == 'Polygon'
      seen.add(feature['id'])
      drawn = np.zeros(labels.shape, bool)
      for i, ring in enumerate(feature['geometry']['coordinates']):
        assert len(ring) >= 4
        assert ring[0] == ring[-1]
        assert (outlines.signed_area(np.array(ring[:-1])) > 0) == (i == 0)
        for (x, y), (right, down) in itertools.pairwise(ring):
          assert (x == right) != (y == down)
          if x == right:  # what lies right of an edge is turned
            drawn[min(y, down) : max(y, down), x:] ^= True
      assert not found[drawn].any()
      kind = feature['properties']['classification']['name']
      found[drawn] = 1 + ('x', 'y').index(kind)
    assert len(seen) == len(made['features'])
    np.testing.assert_array_equal(found, labels)


def test_labelme_through_prepare_gives_back_every_pixel(outlined, tmp_path):
  top, out, maps = outlined
  shutil.copytree(out / 'labelme', top / 'labels')
  shutil.copy(out / 'classes.txt', top)
  folder_dataset.prepare(str(top), tmp_path / 'data', name='again')
  found = folder_dataset.load(tmp_path / 'data', 'again')
  assert found.classes == ('x', 'y')
  labels = {
    id_: part[i]['label']
    for part in (found.train, found.test)
    for i, id_ in enumerate(part.ids)
  }
  assert labels.keys() == maps.keys()
  for name, wanted in maps.items():
    np.testing.assert_array_equal(labels[name], wanted)


def test_geojson():
  labels = np.zeros((5, 6), np.uint8)
  labels[1:4, 1:5] = 2
  labels[2, 2] = 0
  made = outlines.geojson(labels, ('x', 'y'), ((0, 0, 0), (1, 2, 3), (4, 5, 6)))
  [feature] = made['features']
  assert feature['properties']['classification'] == {
    'name': 'y', 'color': [4, 5, 6],
  }  # fmt: skip
  outer, hole = feature['geometry']['coordinates']
  assert outer[0] == outer[-1]
  assert {tuple(x) for x in outer} == {(1, 1), (5, 1), (5, 4), (1, 4)}
  assert {tuple(x) for x in hole} == {(2, 2), (3, 2), (3, 3), (2, 3)}


# ----------------------------------------------------------------- the command


def test_everything_is_written(drawn, model, pictures, tmp_path, capsys):
  out = tmp_path / 'out'
  run([pictures], out, EVERYTHING)
  assert '3 images in' in capsys.readouterr().out
  with Image.open(out / 'masks' / 'deep' / 'b.png') as mask:
    assert mask.mode == 'P'
    palette = mask.getpalette()[:9]
    labels = np.asarray(mask)
  assert palette == [x for colour in drawn.palette for x in colour]
  path = pictures / 'deep' / 'b.jpg'
  np.testing.assert_array_equal(labels, model.predict(path))
  with Image.open(out / 'overlays' / 'deep' / 'b.jpg') as overlay:
    assert overlay.size == (50, 90)
  shares = np.load(out / 'probabilities' / 'deep' / 'b.npy')
  np.testing.assert_array_equal(shares, model.probabilities(path))
  with Image.open(out / 'confidence' / 'deep' / 'b.png') as sure:
    np.testing.assert_array_equal(sure, np.rint(255 * shares.max(-1)))
  text = (out / 'predictions.csv').read_text()
  rows = list(csv.DictReader(text.splitlines()))
  assert [(x['image'], x['class']) for x in rows] == [
    (image, name)
    for image in ('a.png', 'deep/b.jpg', 'deep/c.tif')
    for name in model.classes
  ]
  row = rows[2]
  assert int(row['pixels']) == (labels == 1).sum()
  if int(row['pixels']):
    sure = shares.max(-1)[labels == 1].mean()
    assert float(row['confidence']) == pytest.approx(sure, abs=1e-3)
  for part in ('geojson/a.geojson', 'annotations.json', 'labelme/a.json'):
    assert (out / part).exists()
  assert not [x for x in out.rglob('.*') if x.is_file()]


def test_probabilities_as_pictures(model, pictures, tmp_path):
  out = tmp_path / 'out'
  run([pictures / 'a.png'], out, outputs.Wanted(probabilities='png'))
  shares = model.probabilities(pictures / 'a.png')
  names = ('background', *model.classes)
  for label, name in enumerate(names):
    path = out / 'probabilities' / 'a' / f'{label}_{name}.png'
    with Image.open(path) as found:
      np.testing.assert_array_equal(
        np.asarray(found), np.rint(65535 * shares[..., label])
      )


def test_it_goes_on_where_it_was_stopped(
  model, pictures, tmp_path, monkeypatch
):
  whole, out = tmp_path / 'whole', tmp_path / 'out'
  run([pictures], whole, EVERYTHING)
  write = outputs.files.write_atomically
  for left in (1, 4, 9):  # files that are written before it is killed
    count = [left]

    def dying(path, data, count=count):
      if not count[0]:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f'.{path.name}.abcd1234').write_bytes(b'half')
        raise KeyboardInterrupt
      count[0] -= 1
      write(path, data)

    monkeypatch.setattr(outputs.files, 'write_atomically', dying)
    with pytest.raises(KeyboardInterrupt):
      run([pictures], out, EVERYTHING)
  monkeypatch.setattr(outputs.files, 'write_atomically', write)
  run([pictures], out, EVERYTHING)
  assert contents(out) == contents(whole)


def test_what_is_there_is_kept(model, pictures, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  run([pictures], out)
  before = contents(out)
  with monkeypatch.context() as patch:
    patch.setattr(segmenter_lib.Segmenter, 'bands', None)  # not called
    run([pictures], out)
  assert contents(out) == before
  run([pictures], out, outputs.Wanted(confidence=True))
  assert (out / 'confidence' / 'a.png').exists()
  with pytest.raises(ValueError, match=r'another --scale made \(scale differ'):
    run([pictures], out, scale=1.0)
  run([pictures], out, scale=0.5, overwrite=True)
  assert contents(out)['masks/a.png'] != before['masks/a.png']


def test_what_was_replaced_is_not_mixed_in(model, pictures, tmp_path):
  """A map that --overwrite did not make anew is made when it is wanted."""
  out, sure = tmp_path / 'out', outputs.Wanted(confidence=True)
  run([pictures], out, sure)
  before = contents(out)
  run([pictures], out, scale=0.5, overwrite=True)
  run([pictures], out, sure, scale=0.5)
  run([pictures], tmp_path / 'other', sure, scale=0.5)
  assert contents(out) == contents(tmp_path / 'other')
  assert contents(out)['confidence/a.png'] != before['confidence/a.png']


def test_a_damaged_record_is_written_again(model, pictures, tmp_path):
  out = tmp_path / 'out'
  run([pictures], out)
  before = contents(out)
  for text in ('{', '{}'):
    (out / 'records' / 'a.json').write_text(text)
    run([pictures], out)
    assert contents(out) == before


def _start(folder, images, out):
  """The command on its own, writing everything."""
  line = [sys.executable, '-m', 'distillfss_jax.predict', folder, images]
  line += ['--overlay', '--confidence', '--probabilities', 'npy']
  line += [f'--outlines={x}' for x in outputs.OUTLINES]
  return subprocess.Popen(
    [*map(str, line), '--out', str(out)], cwd=ROOT,
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
  )  # fmt: skip


@pytest.mark.slow
def test_killed_at_any_moment(made, tmp_path):
  """No file is ever half-written, and all are the same in the end."""
  folder, *_ = made
  rng = np.random.default_rng(0)
  images, whole, out = (tmp_path / x for x in ('images', 'whole', 'out'))
  images.mkdir()
  for i in range(60):
    picture = _scene(*rng.integers(40, 300, 2))
    kind = ('png', 'jpg', 'tif')[i % 3]
    Image.fromarray(picture).save(images / f'{i}.{kind}')
  _, said = _start(folder, images, whole).communicate()
  assert said.decode().count('error') == 0
  wanted = contents(whole)
  kills = 0
  for _ in range(10):
    process = _start(folder, images, out)
    begin = len(list(out.glob('records/*')))
    while len(list(out.glob('records/*'))) == begin:
      assert process.poll() is None
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.2))
    process.kill()
    kills += process.wait() == -signal.SIGKILL
    process.stderr.close()
    for name, found in contents(out).items():
      hidden = name.rpartition('/')[2].startswith('.') or name == 'lock'
      assert hidden or found == wanted[name], name
  assert kills == 10
  assert _start(folder, images, out).communicate()[1]
  assert contents(out) == wanted


def test_scores(drawn, model, tmp_path):
  for name in ('images', 'masks'):
    (tmp_path / name).mkdir()
  total = Confusion.empty(3)
  for i in range(3):
    record = drawn.test[i]
    Image.fromarray(record['image']).save(tmp_path / 'images' / f'{i}.png')
    Image.fromarray(record['label']).save(tmp_path / 'masks' / f'{i}_mask.png')
    predicted = model.predict(record['image'])
    total.add(Confusion.of(record['label'], predicted, 3).counts)
  out = tmp_path / 'out'
  images, masks = tmp_path / 'images', str(tmp_path / 'masks')
  found = run([images], out, masks=masks)
  assert found['miou'] == total.miou
  assert set(found['images']) == {'0.png', '1.png', '2.png'}
  assert json.loads((out / 'scores.json').read_text()) == found
  assert 'mean' in predict._table(found)
  (tmp_path / 'names.txt').write_text('1 cat\n2 dog\n')
  with pytest.raises(ValueError, match="show 'cat'; the classes are"):
    run([images], out, masks=masks, meaning=tmp_path / 'names.txt')
  (tmp_path / 'masks' / '2_mask.png').unlink()
  with pytest.raises(ValueError, match='no mask for 1 of 3 images: 2'):
    run([images], out, masks=masks)


def test_labelme_becomes_a_dataset(drawn, model, tmp_path):
  """What `prepare` makes of the outlines is what was predicted."""
  top = tmp_path / 'again'
  (top / 'images').mkdir(parents=True)
  for i in range(3):
    record = drawn.test[i]
    Image.fromarray(record['image']).save(top / 'images' / f'{i}.png')
  out = tmp_path / 'out'
  run([top / 'images'], out, outputs.Wanted(outlines=('labelme',)))
  shutil.copytree(out / 'labelme', top / 'labels')
  shutil.copy(out / 'classes.txt', top)
  folder_dataset.prepare(str(top), tmp_path / 'data', name='again')
  found = folder_dataset.load(tmp_path / 'data', 'again')
  for part in (found.train, found.test):
    for i, id_ in enumerate(part.ids):
      with Image.open(out / 'masks' / f'{id_}.png') as mask:
        np.testing.assert_array_equal(part[i]['label'], np.asarray(mask))


def test_images_that_are_shrunk_are_named(model, tmp_path, capsys):
  Image.new('RGB', (200, 100)).save(tmp_path / 'x.png')
  run([tmp_path / 'x.png'], tmp_path / 'out')
  said = capsys.readouterr().err
  assert '1 images are more than 2 times as large as those of the sup' in said
  run([tmp_path / 'x.png'], tmp_path / 'other', scale=1.0)
  assert 'times as large' not in capsys.readouterr().err


# -------------------------------------------------------------------- bad input


def test_names_of_outputs(tmp_path):
  for name in ('a/x.png', 'a/b/y.jpg', 'c/x.bmp', 'c/.z.png'):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (5, 4)).save(path)
  out = tmp_path / 'out'

  def names(*given):
    return [
      x.name for x in inputs.find([f'{tmp_path}/{x}' for x in given], out)
    ]

  assert names('a') == ['b/y', 'x']
  assert names('a/x.png', 'a/b') == ['x', 'y']
  assert names('a/x.png', 'a') == ['b/y', 'x']
  assert names('a/**/*.[jp]*g') == ['b/y', 'x']
  assert names('*/x.*') == ['a/x', 'c/x']
  with pytest.raises(ValueError, match='would both be written as x'):
    names('a', 'c')
  with pytest.raises(ValueError, match='nowhere does not exist'):
    names('nowhere')
  with pytest.raises(ValueError, match=r'no file is named as .*\*\.gif'):
    names('*.gif')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='empty holds no image'):
    names('empty')
  with pytest.raises(ValueError, match=r'out lies in .*read the next time'):
    inputs.find([str(tmp_path)], out)
  assert inputs.sizes(inputs.find([f'{tmp_path}/a'], out)) == {
    'b/y': (4, 5), 'x': (4, 5),
  }  # fmt: skip


def test_files_that_are_no_images(model, pictures, tmp_path, capsys):
  bad = pictures / 'bad.png'
  bad.write_text('no image')
  out = tmp_path / 'out'
  with pytest.raises(ValueError, match=r'bad\.png: is no image that can be'):
    run([pictures], out)
  assert not out.exists()
  png = (pictures / 'a.png').read_bytes()
  bad.write_bytes(png[: len(png) // 2])  # its head is good
  with pytest.raises(ValueError, match=r'bad\.png: cannot be decoded'):
    run([pictures], out)
  run([pictures], out, skip_bad=True)
  assert 'left out' in capsys.readouterr().err
  assert not (out / 'masks' / 'bad.png').exists()
  assert (out / 'masks' / 'deep' / 'c.png').exists()
  assert 'bad' not in (out / 'predictions.csv').read_text()
  with pytest.raises(ValueError, match='none of the images can be decoded'):
    run([bad], tmp_path / 'other', skip_bad=True)


def test_no_room(model, pictures, tmp_path, monkeypatch):
  def full(path, data):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(outputs.files, 'write_atomically', full)
  with pytest.raises(OSError, match=r'cannot write into .*another --out'):
    run([pictures], tmp_path / 'out')


def test_no_room_for_probabilities(model, pictures, tmp_path, monkeypatch):
  """They wait in a mapped file, where a write without room kills."""

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.posix_fallocate', full, raising=False)
  out = tmp_path / 'out'
  with pytest.raises(OSError, match=r'cannot write into .*another --out'):
    run([pictures], out, EVERYTHING)
  assert sorted(contents(out)) == ['settings.json']


def test_devices_that_are_not_there():
  before = jax.config.jax_platforms
  assert jax.devices()
  command.place('cpu', 'x')
  jax.config.update('jax_platforms', before)


@pytest.mark.parametrize(
  'name',
  ['masks/a.png', 'classes.txt', 'annotations.json', 'records/notes.txt',
   'settings.json'],
)  # fmt: skip
@pytest.mark.parametrize('overwrite', [False, True])
def test_what_others_made_is_never_replaced(
  model, pictures, tmp_path, name, overwrite
):
  """Such as masks that were drawn, in the folder of a dataset."""
  out = tmp_path / 'dataset'
  (out / name).parent.mkdir(parents=True)
  (out / name).write_text('{}')
  (out / '.env.template').write_text('mine')
  before = contents(out)
  with pytest.raises(ValueError, match='predict did not write'):
    run([pictures], out, EVERYTHING, overwrite=overwrite)
  assert contents(out) == before


def test_files_of_others_beside_the_outputs_stay(model, pictures, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  (out / '.env.template').write_text('mine')
  (out / '.settings.json.abcd1234').write_text('half')
  run([pictures], out)
  assert (out / '.env.template').read_text() == 'mine'
  assert not (out / '.settings.json.abcd1234').exists()


def test_another_image_of_the_same_name(model, drawn, tmp_path):
  """It is an error, not the mask of the first; a changed one is done anew."""
  out = tmp_path / 'out'
  for i in range(2):
    (tmp_path / f'day{i}').mkdir()
    picture = Image.fromarray(drawn.test[i]['image'])
    picture.save(tmp_path / f'day{i}' / 'a.png')
  run([tmp_path / 'day0'], out)
  first = contents(out)
  with pytest.raises(ValueError, match=r'holds the outputs of .*day0/a\.png'):
    run([tmp_path / 'day1'], out)
  assert contents(out) == first
  shutil.move(tmp_path / 'day0', tmp_path / 'moved')  # the same image
  run([tmp_path / 'moved'], out)
  assert contents(out) == first
  shutil.copy(tmp_path / 'day1/a.png', tmp_path / 'moved/a.png')
  with pytest.raises(ValueError, match='another --out, or --overwrite'):
    run([tmp_path / 'moved'], out)
  run([tmp_path / 'moved'], out, overwrite=True)
  changed = contents(out)
  assert changed['masks/a.png'] != first['masks/a.png']
  other = drawn.test[0]['image']
  Image.fromarray(other).save(tmp_path / 'moved/a.png')
  run([tmp_path / 'moved'], out)
  assert contents(out)['masks/a.png'] == first['masks/a.png']


def test_predictions_are_not_scored_against_themselves(
  model, pictures, tmp_path
):
  out = tmp_path / 'out'
  run([pictures], out)
  with pytest.raises(ValueError, match='against themselves'):
    run([pictures], out, masks=str(out / 'masks'))


def test_one_process_at_a_time(model, pictures, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  with locking.Lock(out), pytest.raises(locking.InUseError, match='--out'):
    run([pictures], out)


@pytest.mark.parametrize('mode', ['I;16', 'I', 'F'])
def test_pictures_of_more_than_8_bits_are_refused(mode):
  picture = Image.fromarray(np.full((8, 9), 3000, np.uint16))
  picture = picture if mode == 'I;16' else picture.convert('I').convert(mode)
  with pytest.raises(ValueError, match='more than 8 bits'):
    segmenter_lib.as_image(picture)
