"""Tests of the systems: goldens of the original's loop, and what they promise.

The goldens hold one forward and backward pass, and ten steps of the original's
adaptation, dropout and stochastic depth set to 0 (they have other random
streams). Left out everywhere is the bias of the key projections: a softmax
does not see it, so its gradient is 0 but for rounding, and what AdamW makes of
rounding is noise.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
from flax import nnx

from configs import common
from distillfss_jax import optim, parallel, params, systems, train_step
from distillfss_jax.backbones import resnet, swin
from distillfss_jax.models import base as model_base
from distillfss_jax.models import dcama, distilled
from distillfss_jax.systems import adapted as adapted_lib
from distillfss_jax.systems import base
from distillfss_jax.types import VOID, Items, Support, Table

_BACKBONES = {
  'tinyswin': ('swin_tiny_test', swin),
  'resnet50': ('resnet50', resnet),
  'swin': ('swin_b', swin),
}
_KEY_BIAS = re.compile(r'teacher/attention/\d/key/bias')


# Golden models.


def _rules(arch):
  """Torch names of the original's student model, or of its teacher alone."""
  backbone = _BACKBONES[arch][1].TORCH_NAMES
  return tuple(
    (rf'{prefix}{name}', f'{place}{path}', kind)
    for prefix, place, table in (
      (r'(?:teacher\.)?model\.', 'teacher/', dcama.TORCH_NAMES),
      (r'(?:teacher\.)?feature_extractor\.', 'teacher/backbone/', backbone),
      (r'student\.', 'student/', distilled.TORCH_NAMES),
    )
    for name, path, kind in table
  )


def _place(arch, name):
  """Path, way (or None) and layout of a torch name."""
  [(path, kind)] = [
    (match.expand(path), kind)
    for regex, path, kind in _rules(arch)
    if (match := re.fullmatch(regex, name))
  ]
  path, _, way = path.partition('@')
  return path, int(way) if way else None, kind


def _as_torch(arch, name, arrays):
  """The array of a torch name, in torch's layout."""
  path, way, kind = _place(arch, name)
  x = np.asarray(arrays[path], np.float64)
  x = x if way is None else x[way]
  return x.transpose({'conv': (3, 2, 0, 1), 'linear': (1, 0)}.get(kind))


@functools.lru_cache(maxsize=1)
def _weights(find, arch, kind, ways):
  """{path: array} of a golden model; `find` is the fixture `shared`."""
  tensors = parity.torch_weights(find, arch)
  students = {n: t for n, t in tensors.items() if n.startswith('student.')}
  if kind == 'focal':
    tensors = {n: t for n, t in tensors.items() if n not in students}
    students = {}
  spec = importlib.util.spec_from_file_location(
    'golden_fill', find('goldens/dcama/fill.py')
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for way in range(1, ways):
    for name, tensor in students.items():
      name = name.replace('student.0.', f'student.{way}.')
      tensors[name] = module.fill(name, tensor.shape)
  system, _ = systems.build(_config(arch, 384, kind), ways)
  return params.from_torch(tensors, _rules(arch), params.shapes(system))


def _config(arch, size, kind, mode='frozen', lr=1e-4):
  """The config of a golden model."""
  config = common.get_config()
  config.system = {'distill': 'distillfss', 'focal': 'transferfss'}[kind]
  config.backbone_mode = mode
  config.data.image_size = size
  config.model.backbone.name = _BACKBONES[arch][0]
  config.model.fields.dropout = 0.0
  config.model.fields.mix_size = 96  # the original's, at any image size
  config.optim.lr = lr
  config.optim.weight_decay = 0.01
  config.optim.trainable = ('D', 'student') if kind == 'distill' else ('D',)
  return config


def _merger(config, ways):
  """A function from {path: array} to the system, and the trainable paths."""
  system, _ = systems.build(config, ways)
  moved = system.trains
  graph, abstract = nnx.split(system)
  return lambda v: nnx.merge(graph, params.replace(abstract, v)), moved


def _split(variables, moved):
  trained = {path: variables[path] for path in sorted(moved)}
  return trained, {p: x for p, x in variables.items() if p not in moved}


def _relative(ours, theirs):
  return np.abs(np.asarray(ours, np.float64) / np.asarray(theirs) - 1)


def _record(what, value):
  """For `pytest -rP`: how close it was."""
  print(f'{what}: {value}')


# One forward and backward pass.


def _stripes(masks):
  """The goldens' three ways: the mask, cut into three vertical stripes."""
  size = masks.shape[-1]
  return masks.astype(np.int32) * (np.arange(size) * 3 // size + 1)


def _images(find, size):
  return np.load(find(f'goldens/dcama/inputs_{size}.npz'))


@functools.lru_cache(maxsize=1)
def _passes(find, arch, size, kind, ways=1, mode='frozen', shots=3):
  """A function (bank's labels, shots that exist) -> all of a golden's numbers.

  It is compiled once for any number of existing shots.
  """
  merge, moved = _merger(_config(arch, size, kind, mode), ways)
  inputs = _images(find, size)
  images = np.concatenate([inputs['query_u8'][:1], inputs['support_u8']])
  trained, rest = _split(_weights(find, arch, kind, ways), moved)
  table = np.arange(1 + shots, dtype=np.int32)[None]
  keys = jax.random.split(jax.random.key(0), 1)

  def loss(trained, rest, bank):
    system = merge(trained | rest)
    batch, items = Table(table), Items(keys, np.ones(1, bool))
    found = system.losses(bank, batch, items)
    query, labels, support = system.episode(bank, table, keys)
    how = {'train': True, 'keys': keys}
    memory = system.teacher.memorize(*support, **how)
    seen = system.teacher.segment(query, memory, labels.shape[1:], **how)
    seen = {'logits': seen.logits, 'coarse': seen.coarse, 'parts': found.parts}
    if kind == 'distill':
      learnt, some = system.student(query), memory.present.any((1, 3))
      seen['distilled_coarse'] = learnt
      seen['distilled_logits'] = distilled.conclude(
        system.teacher.decode(query, learnt), learnt, some, labels.shape[1:]
      ).logits
    moved = system.after_step(rest, bank, batch, items)
    return found.each.sum(), seen | {'after': moved}

  make = jax.jit(lambda v, *args: merge(v).shared(*args))
  step = jax.jit(jax.value_and_grad(loss, has_aux=True))

  def run(labels, exist=shots):
    bank = make(trained | rest, images[: 1 + shots], labels[: 1 + shots])
    present = bank.present & (np.arange(1 + shots) <= exist)[:, None]
    (total, seen), grads = step(trained, rest, bank.replace(present=present))
    return total, seen, grads

  return run


def _check_pass(golden, tag, arch, result):
  """Compares one training pass with the golden numbers under a tag."""
  total, seen, grads = result
  worst = {'loss': float(_relative(total, golden[f'{tag}.loss64']))}
  name = f'{tag}.loss_parts_logits_distilled_feature'
  if name in golden:
    for part, theirs in zip(
      ('teacher', 'student', 'coarse'), golden[name], strict=True
    ):
      off = float(_relative(seen['parts'][part][0], theirs))
      worst['loss'] = max(worst['loss'], off)
  for ours in ('logits', 'distilled_logits'):
    if ours in seen:
      worst[ours] = _logits_error(golden, f'{tag}.{ours}', seen[ours])
  for ours in ('coarse', 'distilled_coarse'):
    for i, x in enumerate(seen.get(ours, ())):
      for way in range(x.shape[1]):
        name = f'{tag}.c{way}.{ours}{3 - i}'
        if name in golden:
          off = parity.error(golden, name, parity.channels_first(x[:, way]))
          worst[ours] = max(worst.get(ours, 0), off)
  norms, fulls = [], []
  names = golden[f'{tag}.grad_names'].tolist()
  assert {_place(arch, n)[0] for n in names} == set(grads)
  for name, norm, most in zip(
    names, golden[f'{tag}.grad_l2'], golden[f'{tag}.grad_max'], strict=True
  ):
    if _KEY_BIAS.fullmatch(_place(arch, name)[0]):
      continue
    x = _as_torch(arch, name, grads)
    norms.append(float(_relative(np.linalg.norm(x), norm)))
    stored = f'{tag}.grad.{name}'
    if stored in golden:
      stride = int(golden.get(f'{stored}@stride', 1))
      off = x.ravel()[::stride] - golden[stored].ravel()
      fulls.append(float(np.abs(off).max() / most))
  for what, off in (('norm', norms), ('grad', fulls)):
    worst[what], worst[f'{what}, median'] = max(off), float(np.median(off))
  for name in golden:
    if name.startswith(f'{tag}.after.') and '@' not in name:
      path = _place(arch, name.removeprefix(f'{tag}.after.'))[0]
      off = parity.error(golden, name, seen['after'][path])
      worst['after'] = max(worst.get('after', 0), off)
  for what, off in worst.items():
    _record(f'{tag}.{what}', off)
  # Where rounding opens or closes a ReLU, gradients jump: a relative change of
  # 1e-7 of the weights changes ours by as much as they differ from the golden's
  # (norms up to 1e-3, single values up to 1.4e-2 of the largest). Most do not.
  limits = {
    'loss': 1e-5,
    'norm': 1e-2,
    'norm, median': 2e-4,
    'grad': 5e-2,
    'grad, median': 2e-3,
  }
  bad = {
    what: off
    for what, off in worst.items()
    if not off <= limits.get(what, parity.TOLERANCE)
  }
  assert not bad, (tag, worst)


def _logits_error(golden, name, ours):
  """As `parity.error`, but where ways without shots are -inf (ours: -1e9)."""
  ours = parity.channels_first(ours)
  if np.isfinite(golden[name]).all():
    if ours.shape[1] > 2:
      # The background is that of the largest foreground: where two are as
      # large, rounding says whose.
      first, second = -np.sort(-ours[:, 1:], 1)[:, :2].swapaxes(0, 1)
      tie = np.zeros(ours.shape, bool)
      tie[:, 0] = first - second < 1e-5
      assert tie.mean() < 1e-3
      some = slice(None, None, int(golden.get(f'{name}@stride', 1)))
      at = np.arange(ours.size)[some][tie.ravel()[some]]
      ours = ours.copy()
      ours.ravel()[at] = golden[name].ravel()[tie.ravel()[some]]
    return parity.error(golden, name, ours)
  ours = ours.ravel()
  ours, theirs = ours[:: int(golden.get(f'{name}@stride', 1))], golden[name]
  theirs = theirs.ravel()
  finite = np.isfinite(theirs)
  assert (ours[~finite] < -1e8).all()
  off = np.abs(ours[finite] - theirs[finite]).max()
  return float(off / max(1, np.abs(theirs[finite]).max()))


_slow = pytest.mark.slow


@pytest.mark.parametrize(
  ('name', 'kind', 'mode', 'tags'),
  [
    ('tinyswin_128', 'distill', 'frozen', ''),
    pytest.param('tinyswin_128', 'focal', 'frozen', '', marks=_slow),
    pytest.param('resnet50_128', 'distill', 'frozen', 'bneval.', marks=_slow),
    pytest.param('resnet50_128', 'focal', 'frozen', 'bneval.', marks=_slow),
    pytest.param(
      'resnet50_128', 'distill', 'reference', 'bntrain.', marks=_slow
    ),
    pytest.param('resnet50_128', 'focal', 'reference', 'bntrain.', marks=_slow),
    pytest.param('resnet50_384', 'distill', 'frozen', 'bneval.', marks=_slow),
    pytest.param(
      'resnet50_384', 'distill', 'reference', 'bntrain.', marks=_slow
    ),
    pytest.param('swin_384', 'distill', 'frozen', '', marks=_slow),
    pytest.param('swin_384', 'focal', 'frozen', '', marks=_slow),
  ],
)
def test_golden_pass(shared, name, kind, mode, tags):
  """Losses, maps, gradients and statistics of an episode, 1 and 3 shots.

  One shot is three of which two do not exist.
  """
  arch, size = name.split('_')
  golden = dict(np.load(shared(f'goldens/dcama/student_{name}.npz')))
  shots = 3 if f'{tags}k3.{kind}.loss64' in golden else 1
  inputs = _images(shared, int(size))
  labels = np.concatenate([inputs['query_mask'][:1], inputs['support_mask']])
  run = _passes(shared, arch, int(size), kind, mode=mode, shots=shots)
  for k in sorted({1, shots}):
    tag = f'{tags}k{k}.{kind}'
    _check_pass(golden, tag, arch, run(labels, k))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'tag', 'shots'),
  [
    ('tinyswin_128', 'multi.distill', 5),
    ('resnet50_128', 'multi.bneval.distill', 5),
    ('resnet50_384', 'absent2.bneval.distill', 1),
  ],
)
def test_golden_pass_of_three_ways(shared, name, tag, shots):
  """Three ways, of which one is in few shots, or in none at all."""
  arch, size = name.split('_')
  golden = dict(np.load(shared(f'goldens/dcama/student_{name}.npz')))
  inputs = _images(shared, int(size))
  query, labels = _stripes(inputs['query_mask'][:1]), inputs['support_mask']
  labels = _stripes(labels)
  if tag.startswith('multi'):
    assert (query == golden['multi.gt']).all()
    labels[[0, 2, 4]] *= labels[[0, 2, 4]] != 3
  else:
    labels *= labels != 2
  run = _passes(shared, arch, int(size), 'distill', ways=3, shots=shots)
  total, seen, grads = run(np.concatenate([query, labels]))
  if not tag.startswith('multi'):
    # The original gives the student of a way without shots no gradient, and no
    # name; ours is part of a stack, and 0.
    for path, x in grads.items():
      if path.startswith('student/'):
        assert not np.asarray(x[1]).any(), path
  _check_pass(golden, tag, arch, (total, seen, grads))


@pytest.mark.parametrize(
  ('name', 'tag'),
  [
    ('tinyswin_128', 'eval'),
    pytest.param('tinyswin_128', 'multi.eval', marks=_slow),
    pytest.param('resnet50_128', 'eval', marks=_slow),
    pytest.param('resnet50_128', 'multi.eval', marks=_slow),
    pytest.param('resnet50_384', 'eval', marks=_slow),
    pytest.param('resnet50_384', 'absent2.eval', marks=_slow),
    pytest.param('swin_384', 'eval', marks=_slow),
  ],
)
def test_golden_student(shared, name, tag):
  """What the students say at test time, without any support."""
  arch, size = name.split('_')
  golden = dict(np.load(shared(f'goldens/dcama/student_{name}.npz')))
  ways = 1 if tag == 'eval' else 3
  config = _config(arch, int(size), 'distill')
  merge, _ = _merger(config, ways)
  variables = _weights(shared, arch, 'distill', ways)
  predict = jax.jit(
    lambda v, images: merge(v).predict(images, None, ('student',))['student']
  )
  answer = predict(variables, _images(shared, int(size))['query_u8'][:1])
  off = {'logits': _logits_error(golden, f'{tag}.logits', answer.logits)}
  for i, x in enumerate(answer.coarse):
    if f'{tag}.distilled_coarse{3 - i}' in golden:
      off[f'coarse{3 - i}'] = parity.error(
        golden,
        f'{tag}.distilled_coarse{3 - i}',
        parity.channels_first(x[:, 0]),
      )
  for what, value in off.items():
    _record(f'{tag}.{what}', value)
  assert max(off.values()) <= parity.TOLERANCE, off
  if f'{tag}.pred' in golden:
    labels = np.asarray(answer.logits).argmax(-1)
    assert (labels != golden[f'{tag}.pred']).mean() <= 1e-4


# Ten steps.

# How far the losses from the third step on, and what ten steps did to the
# parameters, may be from the golden's: relative, by file. Adaptation with a
# fresh AdamW is chaotic: it divides rounding by rounding, and the losses jump
# (in files with 3e-2 and 8e-2 by factors of 10). A relative change of 1e-7 of
# our own initial parameters moves our own losses by up to 1.1e-2 (distill) and
# 2.5e-2 (focal) at the learning rate 1e-3, where the second number is 0.014,
# with the ResNet-50 0.07 (0.084 in the backbone's training mode); these are
# three times that. At 1e-4 the golden's own distance from its float64 run is up
# to 7e-4. Where there is such a run, three times its distance is allowed if
# that is more.
_NOISE = {
  'tinyswin_distill_sub1_lr1e-3': (3e-2, 0.04),
  'tinyswin_focal_sub1_lr1e-3': (8e-2, 0.04),
  'tinyswin_distill_sub1': (2e-3, 0.04),
  'tinyswin_distill_none': (2e-3, 0.04),
  'tinyswin_focal_none': (2e-3, 0.04),
  'tinyswin_focal_sub1': (2e-3, 0.04),
  'tinyswin_focal_sub3': (2e-3, 0.04),
  'resnet50_distill_sub1_bntrain': (3e-2, 0.25),
  'resnet50_distill_sub1_bneval': (2e-3, 0.2),
  'resnet50_focal_none_bntrain': (3e-2, 0.25),
  'resnet50_focal_sub1_bneval': (2e-3, 0.2),
}


def _trajectory(name):
  """Architecture, kind, learning rate and backbone mode of a golden's name."""
  parts = name.split('_')
  lr = 1e-3 if 'lr1e-3' in parts else 1e-4
  mode = 'reference' if 'bntrain' in parts else 'frozen'
  return parts[0], parts[1], lr, mode


@functools.lru_cache(maxsize=1)
def _adaptation(find, arch, kind, lr, mode, shots):
  """The program, the initial variables and the bank of a golden trajectory."""
  del shots  # the program is compiled anew for each
  config = _config(arch, 128, kind, mode, lr)
  over = parallel.mesh()
  built = train_step.build(config, 1, over)
  variables = dict(_weights(find, arch, kind, 1))
  inputs = _images(find, 128)
  images = inputs['support_u8'][:5]
  merge, _ = _merger(config, 1)
  if kind == 'distill' and mode == 'reference':
    # The original runs the backbone once on all images, for a cache that this
    # model does not read; the running statistics move.
    @jax.jit
    def encode(variables):
      backbone = merge(variables).teacher.backbone
      _, own = backbone.encode_with_statistics(
        parity.normalise(images), together=5
      )
      own = {f'teacher/backbone/{path}': x for path, x in own.items()}
      return resnet.update_statistics(variables, own, np.zeros(1, np.int32))

    variables |= encode(variables)
  bank = built.shared(variables, images, inputs['support_mask'][:5])
  return config, built, variables, bank, merge


def _dispatch(built, state, bank, tables, count):
  """Steps on tables padded to ten, so that any number compiles once."""
  tables = np.pad(
    tables.astype(np.int32), ((0, 10 - len(tables)), (0, 0), (0, 0))
  )
  return built.dispatch(state, bank, Table(tables), places(tables), count)


def places(tables):
  """The numbers of the episodes of each step; all of them count."""
  steps, episodes = tables.shape[:2]
  return np.tile(np.arange(episodes, dtype=np.int32), (steps, 1))


def _moved(arch, golden, prefix, after, before):
  """Distance of parameters from the golden's, over how far those moved."""
  off = moved = 0.0
  for name in golden:
    if not name.startswith(prefix) or '@' in name or 'running_' in name:
      continue
    torch = name.removeprefix(prefix)
    if _KEY_BIAS.fullmatch(_place(arch, torch)[0]):
      continue
    stride = int(golden.get(f'{name}@stride', 1))
    ours, first = (
      _as_torch(arch, torch, x).ravel()[::stride] for x in (after, before)
    )
    off += ((ours - golden[name].ravel()) ** 2).sum()
    moved += ((golden[name].ravel() - first) ** 2).sum()
  return float(np.sqrt(off / moved))


@pytest.mark.parametrize(
  ('name', 'steps'),
  [
    ('tinyswin_distill_sub1_lr1e-3', 3),
    pytest.param('tinyswin_distill_sub1_lr1e-3', 10, marks=_slow),
    pytest.param('tinyswin_distill_sub1', 10, marks=_slow),
    pytest.param('tinyswin_distill_none', 10, marks=_slow),
    pytest.param('tinyswin_focal_none', 10, marks=_slow),
    pytest.param('tinyswin_focal_sub1', 10, marks=_slow),
    pytest.param('tinyswin_focal_sub1_lr1e-3', 10, marks=_slow),
    pytest.param('tinyswin_focal_sub3', 10, marks=_slow),
    pytest.param('resnet50_distill_sub1_bntrain', 10, marks=_slow),
    pytest.param('resnet50_distill_sub1_bneval', 10, marks=_slow),
    pytest.param('resnet50_focal_none_bntrain', 10, marks=_slow),
    pytest.param('resnet50_focal_sub1_bneval', 10, marks=_slow),
  ],
)
def test_golden_trajectory(shared, name, steps):
  """Losses of each step; parameters and statistics at the end."""
  golden = dict(np.load(shared(f'goldens/dcama/traj_{name}.npz')))
  arch, kind, lr, mode = _trajectory(name)
  tables = golden['indices']
  config, built, variables, bank, merge = _adaptation(
    shared, arch, kind, lr, mode, tables.shape[-1]
  )
  wanted = golden['hyper_lr_wd_scale64']
  assert wanted == pytest.approx([lr, config.optim.weight_decay, 1 / 3])
  state, logs = _dispatch(built, built.start(variables), bank, tables, steps)

  theirs = golden['substep_loss64'].sum(1)[:steps]
  off = _relative(logs['loss'][:steps], theirs)
  noise, far = _NOISE[name]
  allowed = np.full(steps, noise)
  if 'substep_loss_f64run64' in golden:
    gap = _relative(golden['substep_loss_f64run64'].sum(1)[:steps], theirs)
    allowed = np.maximum(allowed, 3 * np.maximum.accumulate(gap))
  allowed[:2] = 1e-4
  _record('losses', off.tolist())
  assert (off <= allowed).all(), (off, allowed)

  after = jax.device_get(state.variables)
  running = {
    name: _place(arch, name.removeprefix('after.'))[0]
    for name in golden
    if 'running_' in name and '@' not in name
  }
  if running:
    # They do not depend on the parameters: the steps not taken can follow.
    update = jax.jit(
      lambda v, table: merge(v).after_step(
        v, bank, Table(table), Items(None, np.ones(5, bool))
      )
    )
    for table in tables[steps:].astype(np.int32):
      after |= update(after, table)
    worst = max(parity.error(golden, n, after[p]) for n, p in running.items())
    _record('running', worst)
    assert worst <= 5e-5
  if steps == 10:
    norms = [
      (np.linalg.norm(_as_torch(arch, n, after)), norm)
      for n, norm in zip(
        golden['param_names'].tolist(), golden['param_l2_after64'], strict=True
      )
      if not _KEY_BIAS.fullmatch(_place(arch, n)[0])
    ]
    worst = max(float(_relative(*pair)) for pair in norms)
    distance = _moved(arch, golden, 'after.', after, variables)
    _record('norms', worst)
    _record('distance', distance)
    assert worst <= 1e-3
    assert distance <= far


@pytest.mark.slow
def test_golden_adam(shared):
  """The summed gradient of a step, and the parameters after one and two."""
  golden = dict(np.load(shared('goldens/dcama/adam1_tinyswin.npz')))
  _, built, before, bank, _ = _adaptation(
    shared, 'tinyswin', 'distill', 1e-3, 'frozen', 2
  )
  state = built.start(before)
  assert {
    path
    for name in golden['params_without_grad'].tolist()
    if not (path := _place('tinyswin', name)[0]).endswith('/')  # dropped
  } == set(state.frozen)
  for step in (1, 2):
    state, logs = _dispatch(
      built, state, bank, golden['indices'][step - 1 :], 1
    )
    loss = golden['substep_loss64'][step - 1].sum()
    assert _relative(logs['loss'][0], loss) <= 1e-4
    if step == 1:
      grads = {
        path: x / 0.1 for path, x in _moments(state.opt_state, 'mu').items()
      }
      worst = 0.0
      for name in golden:
        if name.startswith('grad0.') and '@' not in name:
          torch = name.removeprefix('grad0.')
          if _KEY_BIAS.fullmatch(_place('tinyswin', torch)[0]):
            continue
          stride = int(golden.get(f'{name}@stride', 1))
          x = _as_torch('tinyswin', torch, grads).ravel()[::stride]
          y = golden[name].ravel()
          worst = max(worst, float(np.abs(x - y).max() / np.abs(y).max()))
      _record('grad0', worst)
      assert worst <= 1e-2  # see _check_pass
    after = jax.device_get(state.variables)
    distance = _moved('tinyswin', golden, f'after{step}.', after, before)
    _record(f'after{step}', distance)
    assert distance <= 0.04


def _moments(opt_state, which):
  """{path: array} of a moment ('mu' or 'nu') of all parameters."""
  found = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
    names = [getattr(k, 'name', None) for k in keys]
    if which in names:
      found[keys[-1].key] = np.asarray(leaf)
  return found


# Promises, on small models.

_SIZE, _IMAGES = 64, 5
_WEIGHTS = {'teacher': 1.5, 'student': 1.0, 'coarse': 0.5}


def _small(**changes):
  """A small config; changes are by dotted name, with '__' for the dot."""
  config = common.get_config()
  config.data.image_size = _SIZE
  config.model.backbone.name = 'resnet_tiny'
  config.model.fields.heads = 2
  config.student = 'light'
  config.loss.update(_WEIGHTS)
  with config.unlocked():
    config.model.backbone.fields.width = 4
  for name, value in changes.items():
    *path, last = name.split('__')
    node = config
    for part in path:
      node = node[part]
    if last == 'fields':
      with config.unlocked():
        node[last] = value
    else:
      node[last] = value
  return config


def _support(ways=2, seed=0):
  """Random images; of the ways, image i shows only 1 + i % ways."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (_IMAGES, _SIZE, _SIZE, 3), np.uint8)
  labels = np.zeros((_IMAGES, _SIZE, _SIZE), np.int32)
  for i in range(_IMAGES):
    labels[i, 8 + 4 * i :, 24:] = 1 + i % ways  # into a corner: seen at 2x2
  labels[:, :4] = VOID
  return images, labels


def _filled(config, ways=2):
  """The merger, trainable paths and random variables of a config's system."""
  merge, moved = _merger(config, ways)
  system, _ = systems.build(config, ways)
  system = parity.fill_randomly(system)
  return merge, moved, params.flatten(system)


# Query first. Images 0, 2, 4 show way 1; images 1, 3 show way 2.
_BOTH = np.array(
  [[0, 1, 2], [1, 2, 3], [2, 1, 0], [3, 4, 1], [4, 0, 3]], np.int32
)
_FIRST = np.array(
  [[0, 2, 4], [1, 0, 2], [2, 0, 4], [3, 4, 2], [4, 0, 2]], np.int32
)
_TABLES = np.stack([_BOTH, _FIRST, _BOTH])
_ALL = places(_TABLES)


@pytest.fixture(scope='module')
def adapted():
  """A small program, and its states and logs after 0, 1, 2 and 3 steps.

  The second step's supports show way 1 alone.
  """
  config = _small()
  built = train_step.build(config, 2, parallel.mesh())
  _, _, variables = _filled(config)
  bank = built.shared(variables, *_support())
  state = parallel.replicate(built.start(variables), parallel.mesh())
  states, logs = [jax.device_get(state)], []
  for step in range(3):
    state, log = built.dispatch(
      state, bank, Table(np.roll(_TABLES, -step, axis=0)), _ALL, 1
    )
    states.append(jax.device_get(state))
    logs.append(jax.device_get(log))
  return config, built, variables, bank, states, logs


def test_only_chosen_parameters_change(adapted):
  """The sets D and student; every other variable stays the same, bitwise."""
  *_, states, _ = adapted
  first, last = states[0].variables, states[3].variables
  assert set(first) == set(last)
  kept = {path for path in first if np.array_equal(first[path], last[path])}
  assert kept == {p for p in first if p.startswith('teacher/backbone/')}
  assert states[3].step == 3


def test_dispatch_of_many_steps_is_many_dispatches(adapted):
  """Any count, fresh or continued state: the same numbers, one program."""
  _, built, variables, bank, states, logs = adapted
  state = parallel.replicate(built.start(variables), parallel.mesh())
  state, log = built.dispatch(state, bank, Table(_TABLES), _ALL, 2)
  state, _ = built.dispatch(
    state, bank, Table(np.roll(_TABLES, -2, axis=0)), _ALL, 1
  )
  assert built.dispatch._cache_size() == 1
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
    jax.device_get(state.params),
    states[3].params,
  )
  np.testing.assert_allclose(
    log['loss'], [logs[0]['loss'][0], logs[1]['loss'][0], 0], rtol=1e-6
  )
  assert not np.asarray(log['counts']['support_miou/student'][2]).any()


def test_weights_of_the_loss(adapted):
  *_, logs = adapted
  parts = {name: logs[0]['parts'][name][0] for name in _WEIGHTS}
  assert all(part > 0 for part in parts.values())
  mean = sum(w * parts[name] for name, w in _WEIGHTS.items()) / 3.0
  # Parts are means over the episodes; the loss is their sum over 3.
  np.testing.assert_allclose(
    logs[0]['loss'][0], mean * len(_BOTH) / 3, rtol=1e-6
  )


def test_confusion_counts_the_queries(adapted):
  """Each role's rows are the labels; ways without a shot are background."""
  *_, logs = adapted
  _, labels = _support()
  for step, table in enumerate((_BOTH, _FIRST)):
    queries = labels[table[:, 0]]
    if step == 1:
      queries = np.where(queries == 2, 0, queries)
    rows = [(queries == i).sum() for i in range(3)]
    for role in ('student', 'teacher'):
      counts = logs[step]['counts'][f'support_miou/{role}'][0]
      np.testing.assert_array_equal(counts.sum(1), rows)


def test_student_of_an_unseen_way_stands_still(adapted):
  """No decay, no moments, no count, as torch does without a gradient."""
  *_, states, _ = adapted

  def students(state):
    tree = {p: x for p, x in state.params.items() if p.startswith('student/')}
    inner = state.opt_state.inner_states['student']
    return jax.tree.leaves(tree), jax.tree.leaves(inner)

  def changed(old, new, way):
    return [
      [not np.array_equal(x[way], y[way]) for x, y in zip(a, b, strict=True)]
      for a, b in zip(students(old), students(new), strict=True)
    ]

  for step, way in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
    assert all(map(all, changed(states[step], states[step + 1], way)))
  assert not any(map(any, changed(states[1], states[2], 1)))
  kernel = 'student/levels/0/conv/kernel'
  assert states[0].params[kernel].shape[0] == 2


@pytest.mark.slow
def test_micro_batch_and_scale(adapted):
  """All episodes at once or one at a time; their sum over 3 or their mean."""
  config, _, variables, bank, states, logs = adapted
  config = _small(micro_batch=_IMAGES, loss__scale='mean')
  built = train_step.build(config, 2, parallel.mesh())
  assert built.rows(_IMAGES) == _IMAGES
  state, log = built.dispatch(
    built.start(variables), bank, Table(_TABLES), _ALL, 1
  )
  ratio = 3 / len(_BOTH)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  close(log['loss'][0], logs[0]['loss'][0] * ratio)
  close(log['grad_norm'][0], logs[0]['grad_norm'][0] * ratio)
  for name, part in logs[0]['parts'].items():
    close(log['parts'][name][0], part[0])
  for role, counts in logs[0]['counts'].items():
    np.testing.assert_array_equal(log['counts'][role], counts)
  ours = _moments(state.opt_state, 'mu')
  for path, x in _moments(states[1].opt_state, 'mu').items():
    if not _KEY_BIAS.fullmatch(path):
      close(ours[path], x * ratio, atol=1e-5 * np.abs(x).max(), err_msg=path)


def test_prediction_of_the_student_needs_no_support(adapted):
  _, built, variables, *_ = adapted
  images, labels = _support()
  answers = []
  for shots in ([0, 1], [4, 3]):
    masks = np.asarray(base.masks_of(jnp.asarray(labels[shots]), 2))
    memory = built.memorize(
      variables,
      Support(images[shots][None], masks[None], masks.any((1, 2))[None]),
    )
    answers.append(built.predict(variables, memory, images[:2], built.roles))
  first, second = answers
  jax.tree.map(
    np.testing.assert_array_equal, first['student'], second['student']
  )
  assert np.abs(first['teacher'].logits - second['teacher'].logits).max() > 1e-4
  for answer in first.values():
    assert answer.logits.shape == (2, _SIZE, _SIZE, 3)
  alone = built.predict(variables, None, images[:2], ('student',))
  assert set(alone) == {'student'}
  np.testing.assert_allclose(
    alone['student'].logits, first['student'].logits, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  ('chosen', 'prefixes'),
  [
    ('A', ('conv1', 'conv2', 'conv3', 'mixer')),
    ('B', ('conv', 'mixer')),
    ('C', ('conv1', 'conv2', 'conv3', 'mixer', 'attention')),
    ('D', ('conv', 'mixer', 'attention')),
    ('backbone', ('backbone',)),
    (
      r'teacher/attention/\d/key/.*',
      tuple(f'attention/{i}/key' for i in '012'),
    ),
  ],
)
def test_sets_of_trainable_parameters(chosen, prefixes):
  """What a choice moves; the rest is not in the optimiser's hands."""
  config = _small(optim__trainable=(chosen,))
  built = train_step.build(config, 2, parallel.mesh())
  _, moved, variables = _filled(config)
  state = jax.eval_shape(built.start, variables)
  trains = set(state.params) | set(state.frozen)
  under = tuple(f'teacher/{prefix}' for prefix in prefixes)
  assert moved == set(state.params)
  assert moved == {path for path in trains if path.startswith(under)}
  assert {path.rsplit('/', 1)[1] for path in state.buffers} == {'mean', 'var'}
  assert set(state.variables) == set(variables)
  assert set(_moments_of_shapes(state.opt_state)) == moved


def _moments_of_shapes(opt_state):
  return {
    keys[-1].key
    for keys, _ in jax.tree_util.tree_leaves_with_path(opt_state)
    if any(getattr(k, 'name', None) == 'mu' for k in keys)
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  'chosen', ['A', 'B', 'C', 'backbone', r'teacher/attention/\d/key/kernel']
)
@pytest.mark.parametrize('system', ['transferfss', 'distillfss'])
def test_steps_change_only_what_is_chosen(chosen, system):
  config = _small(optim__trainable=(chosen,), system=system)
  built = train_step.build(config, 2, parallel.mesh())
  _, moved, variables = _filled(config)
  bank = built.shared(variables, *_support())
  assert (bank.queries is None) == (chosen == 'backbone')
  state, logs = built.dispatch(
    built.start(variables), bank, Table(_TABLES), _ALL, 3
  )
  assert np.isfinite(logs['loss']).all()
  after = jax.device_get(state.variables)
  changed = {
    path for path, x in after.items() if not np.array_equal(x, variables[path])
  }
  assert changed == moved


def test_trainable_must_not_be_a_string():
  """Parity: a string would be read by its characters, which match all."""
  config = _small()
  with config.ignore_type():
    config.optim.trainable = 'D'
  with pytest.raises(TypeError, match="'D' is one string; give a tuple"):
    systems.build(config, 2)


def test_unknown_pattern_lists_candidates():
  config = _small(optim__trainable=('teacher/mixer1/0/kernels',))
  with pytest.raises(ValueError, match=r'nearest: teacher/mixer1/0/kernel'):
    systems.build(config, 2)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'system': 'distilfss'}, 'there are: .*distillfss, .*transferfss'),
    ({'student': 'big'}, 'there are: attention, full, light'),
    ({'backbone_mode': 'eval'}, "is 'eval'; there are: frozen, reference"),
    ({'model__fields__voting': 2}, 'set it to 0'),
    ({'model__fields__concat_support': True}, 'set it to False'),
    ({'model__fields__heads': 7}, '7 heads do not divide'),
  ],
)
def test_config_errors(change, message):
  with pytest.raises(ValueError, match=message):
    systems.build(_small(**change), 2)


def test_optimiser_of_a_way_counts_its_own_steps():
  """Each way's student moves as under an AdamW that saw only its steps."""
  config = common.get_config().optim
  rng = np.random.default_rng(0)
  paths = ('student/kernel', 'teacher/kernel')
  start = {p: rng.normal(size=(3, 4)).astype(np.float32) for p in paths}
  tx = optim.build(config, paths, 10, stacked=('student/.*',))
  now, state = start, tx.init(start)
  adamw = optax.adamw(config.lr, weight_decay=config.weight_decay)
  alone = [start['student/kernel'][i] for i in range(3)]
  states = [adamw.init(x) for x in alone]
  for seen in ([1, 0, 1], [0, 0, 1], [1, 0, 0]):
    grads = {p: rng.normal(size=(3, 4)).astype(np.float32) for p in paths}
    updates, state = tx.update(grads, state, now, seen=np.array(seen, bool))
    now = optax.apply_updates(now, updates)
    for i in np.flatnonzero(seen):
      update, states[i] = adamw.update(
        grads['student/kernel'][i], states[i], alone[i]
      )
      alone[i] = optax.apply_updates(alone[i], update)
  np.testing.assert_allclose(now['student/kernel'], np.stack(alone), rtol=1e-6)
  np.testing.assert_array_equal(
    now['student/kernel'][1], start['student/kernel'][1]
  )
  assert (now['teacher/kernel'] != start['teacher/kernel']).all()


def _coarse_gradient(detach):
  """Gradient of the coarse term alone, by path."""
  config = _small(loss__detach=detach, model__fields__dropout=0.0)
  merge, moved, variables = _filled(config)
  images, labels = _support()
  trained, rest = _split(variables, moved)
  keys = jax.random.split(jax.random.key(0), 1)

  @jax.jit
  @jax.grad
  def gradient(trained):
    system = merge(trained | rest)
    bank = system.shared(jnp.asarray(images[:3]), jnp.asarray(labels[:3]))
    items = Items(keys, np.ones(1, bool))
    found = system.losses(bank, Table(np.array([[0, 1, 2]])), items)
    return found.parts['coarse'].sum()

  return jax.device_get(gradient(trained))


def test_detached_coarse_maps_only_pull_the_student():
  """Parity: the original pulls the teacher's attention too; the default."""
  pulls, stops = _coarse_gradient(False), _coarse_gradient(True)
  for path in pulls:
    if path.startswith('student/'):
      np.testing.assert_allclose(pulls[path], stops[path], rtol=1e-5, atol=1e-9)
      assert np.abs(stops[path]).max() > 0, path
    elif path.startswith('teacher/attention/'):
      assert not np.asarray(stops[path]).any(), path
      assert _KEY_BIAS.fullmatch(path) or np.abs(pulls[path]).max() > 0, path
    else:
      assert not np.asarray(pulls[path]).any(), path


def _walk(running, own, bank_present, table, valid):
  """Running statistics after the original's forwards, one after the other."""
  running = {path: np.array(running[path], np.float64) for path in own}
  for row, used in zip(table, valid, strict=True):
    if not used:
      continue
    for way in range(bank_present.shape[1]):
      shots = [i for i in row[1:] if bank_present[i, way]]
      if not shots:
        continue  # the original does not run a class without a support
      for i in (row[0], *shots):
        for path, x in running.items():
          running[path] = 0.9 * x + 0.1 * np.asarray(own[path][i], np.float64)
  return running


def test_reference_mode_moves_running_statistics():
  """Parity: as the original's forwards one by one, query and shots per way."""
  config = _small(backbone_mode='reference')
  merge, _, variables = _filled(config)
  images, labels = _support()
  labels[2, 40:60, 20:60] = 2  # an image of both ways
  bank = jax.jit(lambda v, *x: merge(v).shared(*x))(variables, images, labels)
  assert np.asarray(bank.present).sum(0).tolist() == [3, 3]
  own = {}
  encode = jax.jit(
    lambda v, x: merge(v).teacher.backbone.encode_with_statistics(x)
  )
  normal = parity.normalise(images)
  for i in range(_IMAGES):
    pyramid, statistics = encode(variables, normal[i : i + 1])
    for path, x in statistics.items():
      own.setdefault(f'teacher/backbone/{path}', []).append(np.asarray(x[0]))
    for level, x in enumerate(pyramid):
      held = bank.queries[level][i]
      np.testing.assert_allclose(
        held, x[0][-held.shape[0] :], rtol=1e-4, atol=1e-4
      )
  assert set(own) == {p for p in variables if p.endswith(('/mean', '/var'))}
  after_step = jax.jit(
    lambda v, rows, valid: merge(v).after_step(
      v, bank, Table(rows), Items(None, valid)
    )
  )
  present = np.asarray(bank.present)
  for valid in ([1, 1, 1, 1, 1], [1, 0, 1, 1, 0]):
    valid = np.array(valid, bool)
    for table in (_BOTH, _FIRST):
      found = after_step(variables, table, valid)
      wanted = _walk(variables, own, present, table, valid)
      for path, x in found.items():
        if path in wanted:
          np.testing.assert_allclose(x, wanted[path], rtol=1e-5, atol=1e-6)
          assert not np.array_equal(x, variables[path])
        else:
          np.testing.assert_array_equal(x, variables[path])


@pytest.mark.parametrize('mode', ['frozen', 'reference'])
def test_reference_mode_drops_paths(mode):
  """Parity: a Swin in training mode is noisy; a frozen one is not."""
  config = _small(
    backbone_mode=mode,
    system='transferfss',
    optim__trainable=('D',),
    model__fields__dropout=0.0,
    data__image_size=2 * _SIZE,
    model__backbone__name='swin_tiny_test',
    model__backbone__fields={
      'window': 4,
      'embed': 8,
      'depths': (1, 1, 1, 1),
      'heads': (1, 1, 2, 2),
      'drop_path': 0.5,
    },
  )
  merge, _, variables = _filled(config)
  images, labels = (x.repeat(2, 1).repeat(2, 2) for x in _support())

  @jax.jit
  def losses(key):
    system = merge(variables)
    bank = system.shared(jnp.asarray(images), jnp.asarray(labels))
    assert (bank.queries is None) == (mode == 'reference')
    keys = jax.random.split(key, 2)
    batch = Table(np.array([[0, 1, 2], [0, 1, 2]]))
    items = Items(keys, np.ones(2, bool))
    return system.losses(bank, batch, items).each

  first, second = losses(jax.random.key(0)), losses(jax.random.key(1))
  assert np.isfinite(first).all()
  if mode == 'frozen':
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first[0], first[1], rtol=1e-6)
  else:
    assert (np.abs(first - second) > 1e-5).all()
    assert np.abs(first[0] - first[1]) > 1e-5
    np.testing.assert_array_equal(first, losses(jax.random.key(0)))


def test_backbone_is_built_for_the_image_size():
  config = _small(system='transferfss', optim__trainable=('D',))
  config.data.image_size = 768
  config.model.backbone.name = 'swin_b'
  with config.unlocked():
    config.model.backbone.fields = {}
  system, _ = systems.build(config, 1)
  assert system.teacher.backbone.image_size == 768


def test_labels_of_an_episode():
  """Ways that no shot shows are background; void stays void, whatever shots.

  Void must not become background: nothing says that it is. It neither trains
  nor scores, and stays so.
  """
  config = _small()
  merge, _, variables = _filled(config, ways=3)
  system = merge(variables)
  labels = np.zeros((3, _SIZE, _SIZE), np.int32)
  labels[0, :8], labels[0, 8:16], labels[0, 16:24] = 1, 2, 3
  labels[0, 24:32] = VOID
  labels[1, :8], labels[2, :8] = 2, 3
  pyramid = tuple(jnp.zeros((3, 1, 2, 2, 4)) for _ in range(4))
  present = np.asarray(base.masks_of(jnp.asarray(labels), 3)).any((1, 2))
  bank = adapted_lib.Bank(
    jnp.zeros((3, 1, 1, 3), jnp.uint8),
    jnp.asarray(labels),
    jnp.asarray(present),
    pyramid,
    None,
    {},
  )
  keys = jax.random.split(jax.random.key(0), 3)
  table = np.array([[0, 1], [0, 2], [0, 0]])
  _, found, (_, masks, seen) = system.episode(bank, table, keys)
  expected = np.stack([labels[0]] * 3)
  expected[0][np.isin(expected[0], (1, 3))] = 0
  expected[1][np.isin(expected[1], (1, 2))] = 0
  np.testing.assert_array_equal(found, expected)
  assert (found[:, 24:32] == VOID).all()
  np.testing.assert_array_equal(seen[:, 0], present[[1, 2, 0]])
  assert masks.shape == (3, 1, _SIZE, _SIZE, 3)
  assert masks[2, 0, 24:32].sum() == 0


# Students.

_CHANNELS = (8, 16, 32, 64)


def _slots(channels):
  """What DCAMA declares: a map for each block of the last three stages."""
  return tuple(
    model_base.Slot('maps', 1, stage, channels[stage], per_block=True)
    for stage in (1, 2, 3)
  )


def _student(kind, ways, seed=0):
  build = functools.partial(distilled.variants[kind], ways, _slots(_CHANNELS))
  return parity.fill_randomly(
    nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), seed
  )


def _pyramid(episodes=2):
  rng = np.random.default_rng(1)
  return tuple(
    rng.normal(size=(episodes, 2, 8 >> i, 8 >> i, c)).astype(np.float32)
    for i, c in enumerate(_CHANNELS)
  )


_look = jax.jit(lambda student, pyramid: student(pyramid))


@pytest.mark.parametrize('kind', sorted(distilled.variants))
def test_stacked_students_are_separate_students(kind):
  """Shapes; each way's maps are those of a student of its own."""
  ways, pyramid = 3, _pyramid()
  student = _student(kind, ways)
  found = _look(student, pyramid)
  assert [x.shape for x in found] == [
    (2, ways, *x.shape[2:4], 2) for x in pyramid[1:]
  ]
  for way in range(ways):
    alone = _student(kind, 1)
    params.set_params(
      alone,
      {path: x[way : way + 1] for path, x in params.flatten(student).items()},
    )
    for x, y in zip(found, _look(alone, pyramid), strict=True):
      np.testing.assert_allclose(x[:, way], y[:, 0], rtol=1e-5, atol=1e-5)
  assert np.abs(found[0][:, 0] - found[0][:, 1]).max() > 1e-2


@pytest.mark.parametrize('kind', sorted(distilled.variants))
def test_gradients_of_students(kind):
  """Finite, and every parameter has one (but what a softmax does not see)."""
  graph, state = nnx.split(_student(kind, 2))

  @jax.jit
  @jax.grad
  def gradient(state):
    maps = nnx.merge(graph, state)(_pyramid())
    return sum((x**2).sum() for x in maps)

  for path, x in params.flatten(gradient(state)).items():
    assert np.isfinite(x).all(), path
    if not path.endswith('/key_bias'):
      assert np.abs(x).max() > 1e-6, path


def test_size_of_students():
  """Counts of the paper's encoders; nothing is allocated."""

  def count(kind, channels):
    build = functools.partial(distilled.variants[kind], 1, _slots(channels))
    return params.count(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))))

  resnet50, swin_b = (256, 512, 1024, 2048), (128, 256, 512, 1024)
  assert count('full', resnet50) == 49_552_387
  assert count('full', swin_b) == 12_389_891
  assert count('attention', resnet50) == 22_152_707
  assert 40 < count('full', resnet50) / count('light', resnet50) < 60


def test_attention_student_is_multi_head_attention():
  """Against the textbook form, without folding or linearity."""
  student, pyramid = _student('attention', 2), _pyramid()
  heads = distilled.AttentionLevel.heads
  found = _look(student, pyramid)
  arrays = {
    path: np.asarray(x, np.float64)
    for path, x in params.flatten(student).items()
  }
  for i, x in enumerate(pyramid[1:]):
    level = {
      path.removeprefix(f'levels/{i}/'): a
      for path, a in arrays.items()
      if path.startswith(f'levels/{i}/')
    }
    d = x.shape[-1] // heads
    for way in range(2):
      p = {path: a[way] for path, a in level.items()}
      q = x.astype(np.float64) @ p['query'] + p['query_bias']
      k = p['keys'] @ p['key'] + p['key_bias']
      v = p['keys'] @ p['value'] + p['value_bias']
      mixed = []
      for head in range(heads):
        own = slice(head * d, (head + 1) * d)
        logits = q[..., own] @ k[:, own].T / np.sqrt(d)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed.append(share @ v[:, own])
      y = np.concatenate(mixed, -1) @ p['out'] + p['out_bias']
      y = y @ p['score/kernel'][0, 0] + p['score/bias']
      np.testing.assert_allclose(
        found[i][:, way],
        y[..., 0].transpose(0, 2, 3, 1),
        rtol=1e-4,
        atol=1e-5,
      )


def test_runs_of_many_seeds_share_a_program():
  """What is compiled for one is found in the cache for the next."""
  texts = set()
  for seed in (0, 7):
    config = _small()
    config.seed = seed
    built = train_step.build(config, 2, parallel.mesh())
    variables = jax.eval_shape(built.draw)
    bank = jax.eval_shape(built.shared, variables, *_support())
    state = jax.eval_shape(built.start, variables)
    inputs = state, bank, Table(_TABLES), _ALL, np.int32(1), np.uint32(seed)
    texts.add(built.dispatch.trace(*inputs).lower().as_text())
  assert len(texts) == 1
