"""The compiled parts of a run, built from its config.

All variables are flat dicts {parameter path: array}. A training step is a pure
per-device function of the state, the bank and a table of episodes; many steps
run in one dispatch.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from distillfss_jax import optim, parallel, params, systems
from distillfss_jax.pretrained import weights
from distillfss_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
  """What a run calls; nothing here is called in a Python loop over images.

  draw: () -> {path: array}, the initial variables.
  load: variables -> variables, with the weights that the config names.
  start: variables -> TrainState.
  bank: variables, images, labels -> Bank.
  memorize: variables, Support -> memory.
  predict: variables, memory, images, roles -> {role: Prediction}.
  dispatch: state, bank, tables [t, e, 1+s], valid [t, e], count -> state, logs
    stacked over t; e is a multiple of `episodes`.
  roles: what `predict` answers as.
  """

  draw: Callable
  load: Callable
  start: Callable
  bank: Callable
  memorize: Callable
  predict: Callable
  dispatch: Callable
  roles: tuple[str, ...]
  episodes: int


def build(
  config, ways: int, over: jax.sharding.Mesh, *, streaming: bool = False
) -> Program:
  """Builds the system of a config and maps its step over devices.

  Nothing is compiled yet: that happens at each function's first call. With
  `streaming`, a dispatch takes a bank for each step, stacked.
  """
  for name, value, known in (
    ('loss.scale', config.loss.scale, ('reference', 'mean')),
    ('model.dtype', config.model.dtype, ('float32', 'bfloat16')),
  ):
    if value not in known:
      raise ValueError(
        f'config.{name} is {value!r}; there are: {", ".join(known)}'
      )
  system, moved, draw = systems.build(config, ways)
  graph, abstract = nnx.split(system)
  trains = set(params.shapes(nnx.state(system, nnx.Param)))
  tx = optim.build(config.optim, moved, config.steps)

  def module(variables):
    return nnx.merge(graph, params.replace(abstract, variables))

  def start(variables):
    def only(keep):
      return {path: x for path, x in variables.items() if keep(path)}

    trained = only(lambda path: path in moved)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=trained,
      frozen=only(lambda path: path in trains - moved),
      rest=only(lambda path: path not in trains),
      opt_state=tx.init(trained),
    )

  micro = config.micro_batch or (1 if jax.default_backend() == 'cpu' else 8)
  sweep = functools.partial(_sweep, config, module, tx, micro)
  return Program(
    draw=draw,
    load=functools.partial(weights.load, config, system),
    start=jax.jit(start),
    bank=jax.jit(lambda variables, *args: module(variables).bank(*args)),
    memorize=jax.jit(lambda variables, x: module(variables).memorize(x)),
    predict=jax.jit(
      lambda variables, memory, images, roles: module(variables).predict(
        images, memory, roles
      ),
      static_argnums=3,
    ),
    dispatch=parallel.mapped(
      functools.partial(_dispatch, sweep, streaming), over, donate=(0,)
    ),
    roles=system.roles,
    episodes=over.size * micro,
  )


def variables(state: TrainState) -> dict[str, jax.Array]:
  """All variables of a state."""
  return {**state.params, **state.frozen, **state.rest}


def _dispatch(sweep, streaming, state, bank, tables, valid, count):
  """Takes `count` steps; the logs of the others stay zero."""
  sweep = jax.jit(sweep)  # traced once, for its shapes and for the loop

  def bank_of(i):
    return jax.tree.map(lambda x: x[i], bank) if streaming else bank

  _, shapes = jax.eval_shape(sweep, state, bank_of(0), tables[0], valid[0])
  logs = jax.tree.map(
    lambda x: jnp.zeros((len(tables), *x.shape), x.dtype), shapes
  )

  def step(i, carry):
    state, logs = carry
    state, log = sweep(state, bank_of(i), tables[i], valid[i])
    return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), logs, log)

  return jax.lax.fori_loop(0, count, step, (state, logs))


def _sweep(config, module, tx, micro, state, bank, table, valid):
  """One optimiser step over all episodes of a table.

  Every device takes its share of the episodes, `micro` at a time, and the
  gradients are summed over both. An episode's randomness depends on the seed,
  the step and its place in the table, so neither decides the result.

  Returns:
    The new state, and the step's numbers: 'loss', 'parts' (means over
    episodes), 'confusion' per role (on the queries), 'grad_norm'.
  """
  share = table.shape[0] // jax.lax.axis_size(parallel.AXIS)
  first = jax.lax.axis_index(parallel.AXIS) * share
  mine = (first + jnp.arange(share)).reshape(-1, micro)
  key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  episodes = jnp.maximum(valid.sum(), 1)
  # Parity: the original divides by the length of an axis it takes for the
  # support images; it is that of the colour channels, 3.
  scale = 1 / 3 if config.loss.scale == 'reference' else 1 / episodes

  def losses(trained, index):
    system = module({**trained, **state.frozen, **state.rest})
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    losses, parts, confusion = system.losses(bank, table[index], keys)
    used = valid[index]
    loss = jnp.where(used, losses, 0).sum() * scale
    return loss, {
      'loss': loss,
      'parts': {
        name: jnp.where(used, part, 0).sum() / episodes
        for name, part in parts.items()
      },
      'confusion': {
        role: (counts * used[:, None, None]).sum(0)
        for role, counts in confusion.items()
      },
    }

  backward = jax.jit(jax.grad(losses, has_aux=True))

  def add(total, index):
    return jax.tree.map(jnp.add, total, backward(state.params, index)), None

  nothing = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(backward, state.params, mine[0]),
  )
  total, _ = jax.lax.scan(add, nothing, mine)
  grads, log = jax.lax.psum(total, parallel.AXIS)
  log['grad_norm'] = optax.tree.norm(grads)
  seen = (bank.present[table[:, 1:]].any(1) & valid[:, None]).any(0)
  updates, opt_state = tx.update(
    grads, state.opt_state, state.params, seen=seen
  )
  rest = module(variables(state)).after_step(state.rest, bank, table, valid)
  return TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    frozen=state.frozen,
    rest=rest,
    opt_state=opt_state,
  ), log
