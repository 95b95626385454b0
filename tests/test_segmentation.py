"""Dense networks in the one loop: alone, and with a teacher and a distiller."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import several
from flax import nnx
from ml_collections import ConfigDict

from distillfss_jax import config as configs
from distillfss_jax import params, systems, train
from distillfss_jax.pretrained import archive, weights
from distillfss_jax.systems import segmentation

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
EPOCHS = 2  # of two steps


def small(name, *arg):
  """A config on eight scenes of 64 pixels, at the smallest width."""
  text = ','.join(('data=synthetic', *arg))
  made = configs.load(f'{ROOT}/configs/{name}.py:{text}')
  made.unlock()
  made.data.image_size = 64
  made.data.args.update(num_train=8, num_test=2, image_size=64)
  if made.model.name == 'polyp_pvt':
    made.dense.recipe, made.loss.sizes = 'polyp_soft', (0.5, 1.0, 1.5)
  else:
    made.data.args.classes = ('striped disc', 'dotted star')
  for model in (made.model, made.teacher):
    if model.name == 'deeplab':
      model.fields.width, model.backbone.name = 16, 'resnet_tiny'
    elif model.name:
      model.backbone.name = 'pvt_v2_tiny'
  if made.distiller.name == 'cirkd':
    made.distiller.fields.update(
      queued_pixels=8, queued_regions=4, drawn_pixels=8, drawn_regions=8
    )
  if made.teacher.name:
    made.teacher.init = made.teacher.init or segmentation.RANDOM
  made.dense.batch_size, made.dense.held_out = 4, 0.0
  made.steps, made.epochs = 2 * EPOCHS, 0.0
  made.optim.schedule = 'constant'  # runs of two lengths begin alike
  made.log_every, made.checkpoint_every = 1, 1
  made.eval.epochs, made.eval.keep_best, made.eval.panels = 0.0, False, 0
  made.eval.saliency = made.eval.short_side = made.eval.native = False
  return made.lock()


def taught(name, teacher='', *arg):
  return small(name, f'teacher={teacher}', *arg)


def moved(config, folder, tmp_path, upto):
  """The paths that differ between the start and a step."""
  made = config.copy_and_resolve_references()
  with made.unlocked():
    made.steps = upto
  train.run(made, folder)
  state = several.state(folder, upto)
  _, draw = systems.build(made, 2)
  start = jax.device_get(draw())
  return {
    path
    for path, x in start.items()
    if not np.array_equal(x, state.get(f'params/{path}', x))
  }


@pytest.mark.slow
def test_released_attnfd_trains_its_connectors_first(tmp_path):
  config = taught('attnfd')
  first = moved(config, tmp_path / 'one', tmp_path, 2)  # the first epoch
  assert first
  assert all(path.startswith('distiller/connectors/') for path in first)
  whole = small('attnfd', 'teacher=')
  train.run(whole, tmp_path / 'two')
  one, two = (
    several.state(tmp_path / 'one', 2),
    several.state(tmp_path / 'two', 4),
  )
  same = {
    path
    for path, x in one.items()
    if path.startswith('params/') and np.array_equal(x, two[path])
  }
  assert same == {f'params/{path}' for path in first}
  # Attention to channels is no convolution: it stays as it was drawn.
  assert not any('channel' in path for path in two if 'params/' in path)
  assert any('attention/aspp/channel1' in path for path in two)
  for path in two:  # batch statistics of the teacher move nothing of it
    if path.startswith('buffers/teacher/'):
      np.testing.assert_array_equal(two[path], one[path])


@pytest.mark.slow
def test_repaired_attnfd_trains_all_together(tmp_path):
  paths = moved(
    taught('attnfd', '', 'recipe=repaired'), tmp_path / 'one', tmp_path, 1
  )
  for part in (
    'model/backbone/', 'model/decoder/', 'distiller/connectors/',
    'model/attention/aspp/channel',
  ):  # fmt: skip
    assert any(path.startswith(part) for path in paths), part
  assert not any(path.startswith('teacher/') for path in paths)


@pytest.mark.slow
def test_a_teacher_is_a_run_of_the_same_data(tmp_path):
  train.run(small('deeplab'), tmp_path / 'teacher')
  before = several.state(tmp_path / 'teacher', 4)
  results = train.run(
    taught('attnfd', tmp_path / 'teacher', 'distiller=kd'), tmp_path / 'run'
  )
  after = several.state(tmp_path / 'run', 4)
  for path, x in before.items():
    kind, _, name = path.partition('/')
    if name.startswith('model/'):
      name = name.replace('model/', 'teacher/', 1)
      kind = {'params': 'frozen'}.get(kind, kind)
      np.testing.assert_array_equal(after[f'{kind}/{name}'], x, err_msg=path)
  assert set(results['test']) == {'student', 'teacher'}
  own = json.loads((tmp_path / 'teacher' / 'results.json').read_text())
  for key in ('pixel_accuracy', 'frequency_weighted_iou'):
    here, there = results['test']['teacher'][key], own['test']['student'][key]
    assert here == pytest.approx(there, abs=1e-6)
  other = taught('attnfd', tmp_path / 'teacher', 'distiller=kd')
  with other.unlocked():
    other.data.name = 'synthetic'
    other.data.args = ConfigDict({'num_train': 8, 'num_test': 2})
  with pytest.raises(ValueError, match=r"its config.data.name is 'scenes'"):
    train.run(other, tmp_path / 'other')


@pytest.mark.slow
def test_a_teacher_without_attention_keeps_what_is_drawn(tmp_path):
  train.run(small('deeplab'), tmp_path / 'teacher')
  train.run(taught('attnfd', tmp_path / 'teacher'), tmp_path / 'attends')
  assert any(
    path.startswith('frozen/teacher/attention/')
    for path in several.state(tmp_path / 'attends', 4)
  )


def test_a_file_of_the_original_is_a_teacher(tmp_path):
  """Names of the original, with its `module.`, go in and come out."""
  config = taught('attnfd', '', 'distiller=attnfd')
  system, draw = systems.build(config, 2)
  arrays = jax.device_get(draw())
  [source] = [x for x in system.sources(config) if x.key == 'teacher.init']
  tensors = weights.to_tensors(arrays, source.parts[:1])
  path = tmp_path / 'teacher.safetensors'
  archive.write(path, {f'module.{name}': x for name, x in tensors.items()})
  with config.unlocked():
    config.teacher.init, config.seed = str(path), 1
  system, draw = systems.build(config, 2)
  loaded = weights.load(config, system, jax.device_get(draw()))
  for name, x in arrays.items():
    if name.startswith('teacher/'):
      np.testing.assert_array_equal(loaded[name], x, err_msg=name)
  # Public teachers have no attention.
  bare = {name: x for name, x in tensors.items() if 'cbam' not in name}
  archive.write(path, bare)
  own = jax.device_get(draw())
  loaded = weights.load(config, system, own)
  for name, x in own.items():
    if name.startswith('teacher/attention/'):
      np.testing.assert_array_equal(loaded[name], x)
    elif name.startswith('teacher/'):
      np.testing.assert_array_equal(loaded[name], arrays[name])


@pytest.mark.parametrize(
  ('name', 'change', 'says'),
  [
    ('kdas', ('dense.recipe', 'none'), 'config.loss.soft is True'),
    ('deeplab', ('dense.recipe', 'polyp_soft'), 'gives soft labels'),
    ('deeplab', ('loss.name', 'hinge'), 'there are: cross_entropy, focal'),
    ('deeplab', ('loss.name', 'structure'), 'the data have 2'),
    ('attnfd', ('distiller.name', 'magic'), 'there are: none, ad, aicsd'),
    ('attnfd', ('teacher.statistics', 'own'), 'there are: batch, running'),
    ('attnfd', ('distiller.fields.norm', 'all'), 'batch, sample, channel'),
    ('kdas', ('data.image_size', 100), 'multiples of 32, such as 352'),
    ('attnfd', ('teacher.init', ''), "'attnfd' learns from a teacher: give"),
  ],
)
def test_what_does_not_fit_is_said_before_anything(
  tmp_path, name, change, says
):
  config = small(name)
  with config.unlocked():
    config.update_from_flattened_dict({change[0]: change[1]})
  with pytest.raises(ValueError, match=re.escape(says)):
    train.run(config, tmp_path / 'run')


def test_kdas_trains_each_batch_at_three_sizes():
  config = small('kdas', 'teacher=')
  system, _ = systems.build(config, 1)
  assert system.updates == (32, 64, 96)
  whole = configs.load(f'{ROOT}/configs/kdas.py')
  assert systems.build(whole, 1)[0].updates == (256, 352, 448)
  assert (whole.optim.clip_value, whole.optim.schedule) == (0.5, 'constant')
  # 1450 images in batches of 16, of which the last is smaller.
  assert whole.dense.batch_size == 16


def test_partition_of_the_released_optimiser():
  """11,176,612 parameters at the rate, 5,431,869 at ten times it."""
  config = configs.load(f'{ROOT}/configs/attnfd.py:data=pascal')
  system, draw = systems.build(config, 20)
  shapes = params.shapes(jax.eval_shape(draw))
  counts = {1.0: 0, 10.0: 0}
  for path in system.trains:
    for regex, factor, *_ in config.optim.groups[1:]:
      if re.fullmatch(regex, path):
        counts[factor] += int(np.prod(shapes[path]))
        break
  assert counts == {1.0: 11_176_612, 10.0: 5_431_869}


@pytest.mark.slow
def test_a_teacher_that_stands_still_is_asked_once(tmp_path, monkeypatch):
  """And what is learnt is the same."""
  config = small('kdas')
  taken = []
  whole = segmentation.Segmentation._taught

  def counted(self, images, *batch):
    taken.append(bool(batch))
    return whole(self, images, *batch)

  monkeypatch.setattr(segmentation.Segmentation, '_taught', counted)
  train.run(config, tmp_path / 'kept')
  assert taken
  assert not any(taken)  # never within a step
  with config.unlocked():
    config.teacher.keep_gb = 0.0
  train.run(config, tmp_path / 'asked')
  assert any(taken)
  kept, asked = (several.losses(tmp_path / x) for x in ('kept', 'asked'))
  assert kept.keys() == asked.keys()
  for step, loss in asked.items():
    assert kept[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
  ('arg', 'teaches'),
  [
    ('distiller=kd', True),
    ('distiller=attnfd', False),  # norms of the batch, and dropout
    ('distiller=attnfd,recipe=repaired', True),
    ('distiller=none', False),
  ],
)
def test_which_teachers_stand_still(arg, teaches):
  system, draw = systems.build(small('attnfd', arg), 2)
  assert system.teaches == teaches
  if not teaches:
    return
  graph, abstract = nnx.split(system)
  images = jax.ShapeDtypeStruct((3, 64, 64, 3), np.uint8)
  [answer] = jax.eval_shape(
    lambda variables, x: nnx.merge(
      graph, params.replace(abstract, variables)
    ).teach(x),
    jax.eval_shape(draw),
    images,
  )
  read = {name for name, x in vars(answer).items() if x is not None}
  assert read == set(system.distiller.reads)
  for x in jax.tree.leaves(answer):
    assert x.shape[0] == 3


CASES = [('attnfd', ''), ('attnfd', 'distiller=cirkd'), ('kdas', '')]
IDS = ['attnfd', 'cirkd', 'kdas']


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'arg'), CASES, ids=IDS)
def test_killed_it_goes_on(name, arg, tmp_path, monkeypatch):
  config = small(name, *filter(None, (arg,)))
  results = train.run(config, tmp_path / 'whole')
  again = several.killed_and_restarted(
    config, tmp_path / 'killed', 3, monkeypatch
  )
  assert again['test'] == results['test']
  several.check_equal(tmp_path / 'killed', tmp_path / 'whole', 4)


def of_devices(name, arg):
  """Two steps of a batch that eight devices can share."""
  config = small(name, *filter(None, (arg,)))
  with config.unlocked():
    config.dense.batch_size, config.data.args.num_train = 8, 16
    config.steps = 2
    config.optim.lr = 1e-3  # of ten times that, rounding grows in a step
    # Adam makes a whole step of a gradient that is 0 but for rounding, as those
    # of biases before a norm.
    config.optim.name = 'sgd'
  return config


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'arg'), CASES, ids=IDS)
def test_devices_and_processes_change_nothing(name, arg, tmp_path):
  """Norms of a whole batch, statistics and queues are those of one device."""
  several.check_devices(
    tmp_path,
    'test_segmentation:of_devices',
    (name, arg),
    2,
    # At 0, XLA makes NaN of the second of KDAS's gradients in a program, and of
    # CIRKD with eight images.
    level=int((name, arg) != CASES[0]),
  )
