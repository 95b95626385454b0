"""From a config to an optax chain, and which parameters it moves."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax

from distillfss_jax import params as params_lib

_MIXING = (r'teacher/conv[123]/.*', r'teacher/mixer[123]/.*')

# The sets of trainable parameters that the paper compares, by name.
SETS = {
  'A': _MIXING,
  'B': (*_MIXING, r'teacher/conv[45]/.*'),
  'C': (*_MIXING, r'teacher/attention/.*'),
  'D': (*_MIXING, r'teacher/conv[45]/.*', r'teacher/attention/.*'),
  'student': (r'student/.*',),
  'backbone': (r'teacher/backbone/.*',),
}


def trainable(chosen: Iterable[str], paths: Iterable[str]) -> set[str]:
  """The parameter paths that entries of a config's `trainable` choose.

  Args:
    chosen: names of `SETS` and regular expressions that match whole paths.
    paths: all parameter paths.

  Raises:
    TypeError: `chosen` is one string.
    ValueError: an entry matches nothing.
  """
  # Parity: the original iterates over a string's characters, and a character
  # is part of nearly every name, so everything trains. A string is an error.
  if isinstance(chosen, str):
    raise TypeError(
      f'optim.trainable={chosen!r} is one string; give a tuple of set names '
      f'({", ".join(SETS)}) and regular expressions, such as ({chosen!r},)'
    )
  patterns = [p for entry in chosen for p in SETS.get(entry, (entry,))]
  return params_lib.select(patterns, paths)


def schedule(config, steps: int) -> optax.Schedule:
  """The learning rate of each step: as the papers' constant, or decaying.

  Raises:
    ValueError: `config.schedule` is not known.
  """
  known = {
    'constant': lambda: optax.constant_schedule(config.lr),
    'cosine': lambda: optax.cosine_decay_schedule(config.lr, steps),
  }
  if config.schedule not in known:
    raise ValueError(
      f'config.optim.schedule is {config.schedule!r}; there are: '
      f'{", ".join(known)}'
    )
  return known[config.schedule]()


def build(
  config, paths: Iterable[str], steps: int
) -> optax.GradientTransformation:
  """The optimiser of {path: array}; students of unseen ways stand still.

  Its update takes `seen` [n] bool: which ways occurred in the step.

  Raises:
    ValueError: `config.name` is not known.
  """
  rate = schedule(config, steps)
  optimisers = {
    'adamw': lambda: optax.adamw(
      rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
    ),
    # As torch has it: the decay is part of the gradient.
    'sgd': lambda: optax.chain(
      optax.add_decayed_weights(config.weight_decay),
      optax.sgd(rate, momentum=config.momentum, nesterov=True),
    ),
  }
  if config.name not in optimisers:
    raise ValueError(
      f'config.optim.name is {config.name!r}; there are: '
      f'{", ".join(optimisers)}'
    )
  chosen = optimisers[config.name]()
  kinds = {
    path: 'student' if path.startswith('student/') else 'shared'
    for path in paths
  }
  known = {'shared': chosen, 'student': _per_way(chosen)}
  return optax.partition(
    {k: known[k] for k in sorted(set(kinds.values()))}, kinds
  )


def _per_way(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """An optimiser of its own, with its own step count, for each way."""
  # Parity: torch's AdamW skips a parameter without a gradient: no decay, no
  # moments, no count. Students are stacked, so that is decided per way.

  def init(params):
    return jax.vmap(tx.init)(params)

  def update(updates, state, params=None, *, seen, **extra):
    del extra
    new, moved = jax.vmap(tx.update)(updates, state, params)

    def where(x, y):
      return jnp.where(seen.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return (
      jax.tree.map(lambda x: where(x, 0), new),
      jax.tree.map(where, moved, state),
    )

  return optax.GradientTransformationExtraArgs(init, update)
