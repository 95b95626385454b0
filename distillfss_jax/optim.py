"""From a config to an optax chain, and which parameters it moves."""

import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from distillfss_jax import params as params_lib


def trainable(
  chosen: Iterable[str],
  paths: Iterable[str],
  sets: Mapping[str, Iterable[str]],
) -> set[str]:
  """The parameter paths that entries of a config's `trainable` choose.

  Args:
    chosen: names of `sets` and regular expressions that match whole paths.
    paths: all parameter paths.
    sets: of a system: {name: regular expressions}.

  Raises:
    TypeError: `chosen` is one string.
    ValueError: an entry matches nothing.
  """
  # Parity: the original iterates over a string's characters, and a character
  # is part of nearly every name, so everything trains. A string is an error.
  if isinstance(chosen, str):
    raise TypeError(
      f'optim.trainable={chosen!r} is one string; give a tuple of set names '
      f'({", ".join(sets)}) and regular expressions, such as ({chosen!r},)'
    )
  patterns = [p for entry in chosen for p in sets.get(entry, (entry,))]
  return params_lib.matching(patterns, paths)


def duration(text: str | int, per_epoch: float) -> int:
  """Steps of a duration: '200', '200 steps', '1.5 epochs'.

  Raises:
    ValueError: it is none.
  """
  found = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|)\s*', str(text))
  if not found:
    raise ValueError(
      f"{text!r} is no duration: give steps or epochs, as '200' or '1.5 epochs'"
    )
  number = float(found[1])
  if found[2].startswith('epoch'):
    number *= per_epoch
  return round(number)


def schedule(config, steps: int, per_epoch: float = 1.0) -> optax.Schedule:
  """The learning rate of each step.

  'constant' (as in DistillFSS), 'cosine' and 'poly' (of `power`) to zero at the
  last step, 'stairs' by a factor at each of `stairs`; `warmup` rises to it from
  zero.

  Parity: 'poly' counts steps from 0, as AttnFD does. BAM and HDMNet count from
  1, so that their last step has rate 0: one step in thousands.

  Args:
    config: `config.optim`.
    steps: of the whole run.
    per_epoch: steps of an epoch.

  Raises:
    ValueError: `config.schedule` is not known, or a duration is none.
  """
  known = {
    'constant': lambda: optax.constant_schedule(config.lr),
    'cosine': lambda: optax.cosine_decay_schedule(config.lr, steps),
    'poly': lambda: optax.polynomial_schedule(
      config.lr, 0.0, config.power, steps
    ),
    'stairs': lambda: optax.piecewise_constant_schedule(
      config.lr,
      {duration(at, per_epoch): factor for at, factor in config.stairs},
    ),
  }
  if config.schedule not in known:
    raise ValueError(
      f'config.optim.schedule is {config.schedule!r}; there are: '
      f'{", ".join(known)}'
    )
  rate, rise = known[config.schedule](), duration(config.warmup, per_epoch)
  if not rise:
    return rate
  return lambda step: rate(step) * jnp.minimum(1.0, (step + 1) / rise)


def build(
  config,
  paths: Iterable[str],
  steps: int,
  *,
  per_epoch: float = 1.0,
  stacked: Sequence[str] = (),
  updates: int = 1,
) -> optax.GradientTransformation:
  """The optimiser of {path: array}.

  Its update takes `seen` [n] bool: which ways occurred in the step. Parameters
  that are stacked over ways are optimised way by way, and those of ways that
  did not occur stand still.

  Args:
    config: `config.optim`. Its `groups` is a tuple of (regex, factor of the
      learning rate, weight decay or None for the common one, begin, end): the
      first row whose regex matches a whole path counts for it. From `begin` to
      `end`, durations, it moves ('' for the run's own); else it stands still,
      and its moments with it.
    paths: of the parameters.
    steps: of the whole run.
    per_epoch: steps of an epoch.
    stacked: regular expressions of paths with a leading axis of ways.
    updates: of a step.

  Raises:
    ValueError: a name in the config is not known, a group matches nothing, or
      a duration is none.
  """
  paths = tuple(paths)
  rate = schedule(config, steps, per_epoch)
  groups = [tuple(group) for group in config.groups]
  for group in groups:
    if len(group) != 5:
      raise ValueError(
        f'config.optim.groups: {group} must be (regex, factor, weight decay '
        'or None, begin, end)'
      )
    params_lib.matching([group[0]], paths)

  def group_of(path):
    hits = (i for i, row in enumerate(groups) if re.fullmatch(row[0], path))
    return next(hits, None)

  kinds, known = {}, {}
  for path in paths:
    of_ways = any(re.fullmatch(regex, path) for regex in stacked)
    group = group_of(path)
    kind = 'student' if of_ways else 'shared'
    kind += '' if group is None else f'_{group}'
    kinds[path] = kind
    if kind not in known:
      row = ('', 1.0, None, '', '') if group is None else groups[group]
      _, factor, decay, begin, end = row
      tx = _optimiser(config, rate, factor, decay, updates)
      tx = _per_way(tx) if of_ways else tx
      if begin or end:
        first = duration(begin or 0, per_epoch) * updates
        last = duration(end or steps, per_epoch) * updates
        tx = _between(tx, first, last)
      known[kind] = tx
  chosen = optax.partition({k: known[k] for k in sorted(known)}, kinds)
  clips = []
  if config.clip_value:
    clips.append(optax.clip(config.clip_value))
  if config.clip_norm:
    clips.append(optax.clip_by_global_norm(config.clip_norm))
  return optax.chain(*clips, chosen) if clips else chosen


def _optimiser(config, rate, factor, decay, updates):
  """The optimiser of a group, by its name."""
  scaled = rate
  if updates > 1 or factor != 1:
    # An optimiser counts updates, a schedule steps.
    scaled = lambda count: factor * rate(count // updates)  # noqa: E731
  decay = config.weight_decay if decay is None else decay
  optimisers = {
    'adamw': lambda: optax.adamw(
      scaled, b1=config.b1, b2=config.b2, weight_decay=decay
    ),
    # As torch has it: the decay is part of the gradient.
    'sgd': lambda: optax.chain(
      optax.add_decayed_weights(decay),
      optax.sgd(scaled, momentum=config.momentum, nesterov=config.nesterov),
    ),
  }
  if config.name not in optimisers:
    raise ValueError(
      f'config.optim.name is {config.name!r}; there are: '
      f'{", ".join(optimisers)}'
    )
  return optimisers[config.name]()


def _between(
  tx: optax.GradientTransformation, begin: int, end: int
) -> optax.GradientTransformationExtraArgs:
  """An optimiser that acts in the updates [begin, end) alone."""
  tx = optax.with_extra_args_support(tx)

  def init(params):
    return jnp.zeros((), jnp.int32), tx.init(params)

  def update(updates, state, params=None, **extra):
    count, inner = state
    new, moved = tx.update(updates, inner, params, **extra)
    acts = (count >= begin) & (count < end)

    def where(x, y):
      return jnp.where(acts, x, y)

    return (
      jax.tree.map(lambda x: where(x, jnp.zeros_like(x)), new),
      (count + 1, jax.tree.map(where, moved, inner)),
    )

  return optax.GradientTransformationExtraArgs(init, update)


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
