"""The training step: a pure function of state and batch, run on all devices.

All variables are flat dicts {parameter path: array}. Many steps run in one
dispatch. It is apart from the loop because the benchmarks run the same step.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from distillfss_jax import optim, parallel, params, systems
from distillfss_jax.ops import platform
from distillfss_jax.pretrained import weights
from distillfss_jax.types import AXIS, Items, Table, TrainState


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled parts of a run; none is called in a Python loop over images.

  draw: () -> {path: array}, the initial variables.
  load: variables -> variables, with the weights that the config names.
  start: variables -> TrainState.
  shared: variables, *arrays -> what all steps read.
  memorize: variables, Support -> memory.
  predict: variables, memory, images, roles -> {role: Prediction}.
  teach: variables, images -> what a batch may bring of its teacher's answers;
    None where these differ from step to step.
  dispatch: state, shared, batches, places, count, seed -> state, logs. Batches
    are [t, b, ...] over t steps, of which `count` are taken; places [t, b]
    int32 are the numbers of the items in their batch, -1 for padding; the seed,
    uint32, is that of all randomness: runs of many seeds share a program. Logs
    are stacked over t: 'loss', 'parts' (means over items), 'counts',
    'grad_norm'.
  rows: items of a batch -> b, which the devices can share.
  roles: what `predict` answers as. beside: what else; see `System`.
  takes: the type of batch.
  rate: step -> learning rate.
  """

  draw: Callable
  load: Callable
  start: Callable
  shared: Callable
  memorize: Callable
  predict: Callable
  teach: Callable | None
  dispatch: Callable
  rows: Callable
  roles: tuple[str, ...]
  beside: tuple[str, ...]
  takes: type
  rate: Callable


def build(
  config,
  ways: int,
  mesh: jax.sharding.Mesh,
  *,
  steps: int | None = None,
  per_epoch: float = 1.0,
) -> Program:
  """Builds the system of a config and maps its step over devices.

  Nothing is compiled yet: that happens at each function's first call.

  Args:
    config: see `configs/common.py`.
    ways: number of foreground classes.
    mesh: the devices.
    steps: of the whole run; by default `config.steps`.
    per_epoch: steps of an epoch.

  Raises:
    ValueError: the config does not fit; the message names the key.
  """
  system, draw = systems.build(config, ways)
  steps = config.steps if steps is None else steps
  graph, abstract = nnx.split(system)
  known = set(params.shapes(nnx.state(system, nnx.Param)))
  tx = optim.build(
    config.optim,
    sorted(system.trains),
    steps,
    per_epoch=per_epoch,
    stacked=system.stacked,
    updates=len(system.updates),
  )

  def module(variables):
    return nnx.merge(graph, params.replace(abstract, variables), copy=True)

  def start(variables):
    def only(keep):
      return {path: x for path, x in variables.items() if keep(path)}

    trained = only(lambda path: path in system.trains)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=trained,
      frozen=only(lambda path: path in known - system.trains),
      buffers=only(lambda path: path not in known),
      opt_state=tx.init(trained),
    )

  micro = config.micro_batch or (1 if platform.on_cpu() else 8)
  step = functools.partial(_step, module, tx, micro)
  return Program(
    draw=draw,
    load=functools.partial(weights.load, config, system),
    start=jax.jit(start),
    shared=jax.jit(lambda variables, *args: module(variables).shared(*args)),
    memorize=jax.jit(lambda variables, x: module(variables).memorize(x)),
    predict=jax.jit(
      lambda variables, memory, images, roles: module(variables).predict(
        images, memory, roles
      ),
      static_argnums=3,
    ),
    teach=jax.jit(lambda variables, images: module(variables).teach(images))
    if system.teaches
    else None,
    dispatch=parallel.mapped(
      functools.partial(_dispatch, step), mesh, cut={2: 1, 3: 1}, donate=(0,)
    ),
    rows=functools.partial(
      _rows, micro=1 if system.coupled else micro, devices=mesh.size
    ),
    roles=system.roles,
    beside=system.beside,
    takes=system.takes,
    rate=optim.schedule(config.optim, steps, per_epoch),
  )


TOGETHER = 10  # steps of a dispatch of `learn`


def learn(
  program: Program,
  mesh: jax.sharding.Mesh,
  initial: dict,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  views: int,
  steps: int,
  seed: int,
  tell: Callable[[int], object] = lambda done: None,
) -> dict:
  """A short training before a run, of a system that takes rows of one image.

  Args:
    program: of the system, whose schedule has as many steps.
    mesh: of one device of this process: it is little work.
    initial: variables.
    images: uint8 [m, S, S, 3].
    labels: [m, S, S].
    views: of a step; the images take turns.
    steps: a multiple of `TOGETHER`.
    seed: of all randomness.
    tell: is told how many are done.

  Returns:
    The variables afterwards.
  """
  state = parallel.replicate(program.start(initial), mesh)
  shared = program.shared(initial, images, labels.astype(np.int32))
  shared = parallel.replicate(jax.device_get(shared), mesh)
  shape = (TOGETHER, views)
  places = np.broadcast_to(np.arange(views, dtype=np.int32), shape)
  for step in range(0, steps, TOGETHER):
    table = step * views + np.arange(TOGETHER * views, dtype=np.int32)
    table = Table((table % len(images)).reshape(*shape, 1))
    state, _ = program.dispatch(
      state, shared, table, places, TOGETHER, np.uint32(seed)
    )
    tell(step + TOGETHER)
  return parallel.local(state.variables)


def _rows(items, *, micro, devices):
  """Items of a batch with the padding that lets devices share it evenly."""
  each = -(-items // devices)
  micro = min(micro, each)
  return devices * -(-each // micro) * micro


def _dispatch(step, state, shared, batches, places, count, seed=0):
  """Takes `count` steps; the logs of the others stay zero."""
  step = jax.jit(step)  # traced once, for its shapes and for the loop

  def batch_of(i):
    return jax.tree.map(lambda x: x[i], (batches, places))

  _, shapes = jax.eval_shape(step, seed, state, shared, *batch_of(0))
  logs = jax.tree.map(
    lambda x: jnp.zeros((len(places), *x.shape), x.dtype), shapes
  )

  def body(i, carry):
    state, logs = carry
    state, log = step(seed, state, shared, *batch_of(i))
    return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), logs, log)

  return jax.lax.fori_loop(0, count, body, (state, logs))


def _step(module, tx, micro, seed, state, shared, batch, places):
  """The optimiser's updates of a batch, of which this device has a part.

  Independent items are taken `micro` at a time, coupled ones all at once; the
  gradients are summed over both and over the devices. An item's randomness
  depends on the seed, the step and its place in the batch, so none of these
  decides the result.

  Args:
    module: variables -> the system.
    tx: the optimiser.
    micro: items at once.
    seed: of the run.
    state: TrainState, the same on all devices.
    shared: what all steps read.
    batch: arrays [b, ...], this device's items.
    places: [b] int32, their numbers in the whole batch; -1 for padding.

  Returns:
    The new state, and the step's numbers, those of the last update.
  """
  updates = module(state.variables).updates
  log = {}
  for i, update in enumerate(updates):
    number = state.step * len(updates) + i
    key = jax.random.fold_in(jax.random.key(seed), number)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(places)
    items = Items(keys, places >= 0, AXIS, update, places)
    state, log = _update(module, tx, micro, state, shared, batch, items)
  return state.replace(step=state.step + 1), log


def _update(module, tx, micro, state, shared, batch, items):
  """One update of the optimiser; see `_step`."""
  system = module(state.variables)
  count = jnp.maximum(jax.lax.psum(items.valid.sum(), AXIS), 1)
  scale = system.scale(count)

  def losses(trained, batch, items):
    system = module({**state.variables, **trained})
    found, used = system.losses(shared, batch, items), items.valid
    loss = jnp.where(used, found.each, 0).sum() * scale
    log = {
      'loss': loss,
      'parts': {
        name: jnp.where(used, part, 0).sum() / count
        for name, part in found.parts.items()
      },
      'counts': {
        name: (x * used[:, None, None]).sum(0)
        for name, x in found.counts.items()
      },
    }
    return loss, (log, _buffers(system) if system.coupled else {})

  backward = jax.jit(jax.grad(losses, has_aux=True))
  if system.coupled:
    grads, (log, buffers) = backward(state.params, batch, items)
  else:
    grads, log = _by_parts(backward, micro, state.params, batch, items)
    buffers = system.after_step(state.buffers, shared, batch, items)
  grads, log = jax.lax.psum((grads, log), AXIS)
  log['grad_norm'] = optax.tree.norm(grads)
  seen = system.seen(shared, batch, items)
  if seen is not None:
    seen = jax.lax.pmax(seen.astype(jnp.int32), AXIS) > 0
  updates, opt_state = tx.update(
    grads, state.opt_state, state.params, seen=seen
  )
  return state.replace(
    params=optax.apply_updates(state.params, updates),
    buffers={**state.buffers, **buffers},
    opt_state=opt_state,
  ), log


def _by_parts(backward, micro, trained, batch, items):
  """Gradients and log summed over parts of `micro` items."""
  micro = min(micro, len(items.valid))
  parts = jax.tree.map(
    lambda x: x.reshape(-1, micro, *x.shape[1:]), (batch, items)
  )

  def add(total, part):
    grads, (log, _) = backward(trained, *part)
    return jax.tree.map(jnp.add, total, (grads, log)), None

  first = jax.tree.map(lambda x: x[0], parts)
  grads, (log, _) = jax.eval_shape(backward, trained, *first)
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, log))
  return jax.lax.scan(add, nothing, parts)[0]


def _buffers(system):
  """Module state that is no parameter, {path: array}."""
  return params.flatten(nnx.state(system, nnx.Not(nnx.Param)))
