"""Which images are the support set, and which episodes one step is made of.

Everything here is a pure function of its arguments: two machines, or a run that
was killed and went on, choose the same images. Numpy only.
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np

KINDS = ('leave_one_out', 'paired', 'random', 'views')
RULES = ('even', 'random', 'per_class', 'per_class_reference', 'listed')


class TorchRandom:
  """The stream behind `torch.manual_seed(seed)` on the CPU.

  The reference draws its episodes from it, so that a run of ours can see the
  same pairs in the same order. `drawn` counts the 32-bit words used so far.
  """

  def __init__(self, seed):
    self._bits = np.random.MT19937()
    legacy = np.random.RandomState(seed & 0xFFFFFFFF)
    self._bits.state = legacy.get_state(legacy=False)
    self.drawn = 0

  def skip(self, count):
    """Drops `count` words."""
    self._bits.random_raw(count, output=False)
    self.drawn += count

  def permutation(self, n):
    """Gives what `torch.randperm(n)` would, as an int64 array [n]."""
    order = np.arange(n)
    words = self._bits.random_raw(max(n - 1, 0))
    self.drawn += len(words)
    for i, word in enumerate(words):
      j = i + int(word) % (n - i)
      order[i], order[j] = order[j], order[i]
    return order


def hus(last, count):
  """Spreads `count` indices over 0..last by halving (DistillFSS's rule).

  Both ends first, then the middle of each gap from left to right, round after
  round; an incomplete round falls in the left part. Nested for 5, 10, 25, 50.

  Returns a sorted list of at most `count` indices: fewer where there are not
  that many; [0, 0] for last 0 and count > 1, like the original.
  """
  if last < 0 or count < 1:
    raise ValueError(f'need last >= 0 and count >= 1, got {last} and {count}')
  if count == 1:
    return [0]
  chosen = [0, last]
  while len(chosen) < count:
    new = []
    for low, high in itertools.pairwise(chosen):
      middle = (low + high) // 2
      if middle not in chosen:
        new.append(middle)
      if len(chosen) + len(new) >= count:
        break
    if not new:
      break
    chosen = sorted(chosen + new)
  return chosen[:count]


def choose(dataset, shots, seed=0, rule='even', listed=()):
  """Chooses the support set out of the training images.

  Args:
    dataset: a `core.Dataset`; only ids and the list of labels that occur in
      each image are read, no image is decoded.
    shots: how many images.
    seed: of rule 'random', 0 .. 2**32 - 1; a larger `shots` with the same seed
      contains the smaller. Rule 'even' does not use it.
    rule: 'even' is the reference's: `hus` over the training images in their
      order. 'random' draws without replacement from the sorted ids.
      'per_class' takes shots / n of each class, by `hus` over its images that
      no class before it took; 'per_class_reference' takes fewer, as the
      reference does. 'listed' takes the first of `listed`.
    listed: ids of training images.

  Returns:
    (indices int32 [shots] into dataset.train, tuple of their ids).

  Raises:
    ValueError: for an unknown rule, for fewer than one shot or more than there
      are images, and for a class that no chosen image contains.
  """
  ids = tuple(dataset.train.ids)
  if rule not in RULES:
    raise ValueError(f'support rule {rule!r} is not one of {RULES}')
  if shots < 1:
    raise ValueError(f'need at least 1 shot, got {shots}')
  if shots > len(ids):
    raise ValueError(
      f'{shots} shots asked for, but {dataset.name} has {len(ids)} training '
      'images: ask for fewer shots'
    )
  if listed and rule != 'listed':
    raise ValueError(
      f"support.ids are given, and support.rule is {rule!r}: take 'listed'"
    )
  if rule == 'even':
    indices = hus(len(ids) - 1, shots)
  elif rule == 'listed':
    indices = _listed(ids, shots, listed, dataset.name)
  elif rule != 'random':
    indices = _per_class(dataset, shots, rule)
  else:
    by_id = sorted(range(len(ids)), key=ids.__getitem__)
    drawn = np.random.RandomState(seed).permutation(len(ids))[:shots]
    indices = [by_id[i] for i in drawn]
  chosen = tuple(ids[i] for i in indices)
  leaked = sorted(set(chosen) & set(dataset.test.ids))
  if leaked:
    raise AssertionError(f'test images in the support set: {leaked}')
  present = np.asarray(dataset.train.present)
  absent = [
    f'{name!r} ({present[:, c].sum()} of {len(ids)} training images have it)'
    for c, name in enumerate(dataset.classes)
    if not present[indices, c].any()
  ]
  if absent:
    change = 'another seed or ' if rule == 'random' else "rule 'random' or "
    raise ValueError(
      f'no support for class {", ".join(absent)} among the {shots} chosen '
      f'images of {dataset.name}: take {change}more shots'
    )
  return np.asarray(indices, np.int32), chosen


def _listed(ids, shots, listed, name):
  """Indices of the first `shots` of the listed ids."""
  known = {id_: i for i, id_ in enumerate(ids)}
  if len(set(listed)) < shots:
    raise ValueError(
      f"support.rule='listed' and {shots} shots, but support.ids has "
      f'{len(set(listed))}: give as many'
    )
  if strange := [x for x in listed if x not in known]:
    raise ValueError(
      f'support.ids: {strange[0]!r} is no training image of {name}; there are '
      f'{ids[0]!r} to {ids[-1]!r}'
    )
  return [known[x] for x in dict.fromkeys(listed)][:shots]


def _per_class(dataset, shots, rule):
  """As many images of each class, in the order of the classes."""
  # Parity: classes follow each other by their labels; for Industrial the
  # reference takes them by their names, so that its episodes have other orders.
  # Parity: for ISIC the reference divides the shots by the number of classes
  # and background, so that of 9 shots over 3 classes it uses 6.
  ways = len(dataset.classes)
  each, rest = divmod(shots, ways + (rule == 'per_class_reference'))
  if each < 1 or (rest and rule == 'per_class'):
    raise ValueError(
      f'support rule {rule!r} shares {shots} shots among the {ways} classes of '
      f'{dataset.name}: ask for a multiple of {ways}'
    )
  chosen = []
  for way, name in enumerate(dataset.classes):
    left = np.flatnonzero(np.asarray(dataset.train.present)[:, way])
    left = [int(i) for i in left if i not in chosen]
    if len(left) < each:
      raise ValueError(
        f'{each} shots of class {name!r} asked for, but {dataset.name} has '
        f'{len(left)} training images of it left: ask for fewer shots'
      )
    chosen += [left[i] for i in hus(len(left) - 1, each)]
  return chosen


def _thin(supports, subsample, generator):
  """Keeps `subsample` of the supports the way the reference does.

  Parity: (Q2) the first support always stays and the others are drawn without
  the offset of one that this calls for: the first can come twice, the last
  never. `random_episodes` is the repaired form.
  """
  if subsample is None:
    return supports
  drawn = generator.permutation(len(supports) - 1)[: subsample - 1]
  return [supports[0], *(supports[i] for i in drawn)]


def _width(images, subsample):
  """Supports per episode; checks both numbers."""
  if images < 2:
    raise ValueError(
      f'episodes need at least 2 support images, got {images}: one image '
      'cannot be its own support; take more shots'
    )
  if subsample is None:
    return images - 1
  if subsample < 1:
    raise ValueError(f'subsample must be None or at least 1, got {subsample}')
  return min(subsample, images - 1)


def leave_one_out(images, subsample, generator):
  """Makes every image the query once, in the reference's order.

  Args:
    images: number of support images, m >= 2.
    subsample: supports kept per episode, None for all m - 1.
    generator: a `TorchRandom`; used only with `subsample`.

  Returns:
    int32 [m, 1+s], query first.
  """
  _width(images, subsample)
  order, rows = list(range(images)), []
  for t in range(images):
    order.insert(0, order.pop(t))
    rows.append([order[0], *_thin(order[1:], subsample, generator)])
  return np.asarray(rows, np.int32)


def paired(present, subsample, draws, generator):
  """Draws pairs of images that share a class, in the reference's order.

  Draw t looks for class t mod n: two different images that contain it become
  the query and the first support; the others follow in the order the draws
  before left them. With fewer than two such images the draw is skipped.

  Args:
    present: [m, n] bool, which class occurs in which image.
    subsample: supports kept per episode, None for all m - 1.
    draws: how many; the reference takes m, or 1 + n in its other setting.
    generator: a `TorchRandom`.

  Returns:
    (int32 [draws, 1+s], query first; bool [draws], False for a skipped draw,
    whose row is zeros).
  """
  present = np.asarray(present, bool)
  images, ways = present.shape
  width = _width(images, subsample)
  pairs = []
  for t in range(draws):
    holders = np.flatnonzero(present[:, t % ways])
    if len(holders) < 2:
      pairs.append(None)
    else:
      pairs.append(holders[generator.permutation(len(holders))[:2]].tolist())
  table = np.zeros((draws, 1 + width), np.int32)
  valid = np.array([pair is not None for pair in pairs], bool)
  order = list(range(images))
  for t, pair in enumerate(pairs):
    if pair is not None:
      order = [*pair, *(i for i in order if i not in pair)]
      table[t] = [order[0], *_thin(order[1:], subsample, generator)]
  return table, valid


def random_episodes(present, subsample, queries, generator):
  """Draws the supports of each query uniformly among all other images.

  Parity: (Q2) this is what the reference's subsampling was meant to be: without
  replacement, any other image, never the query. One support, the first, is
  drawn among the images that share a class with the query (with one class in
  every image: all of them), so that an episode always has something to find;
  for a query without foreground it is one that has some.

  Args:
    present: [m, n] bool, which class occurs in which image.
    subsample: supports per episode, None for all m - 1.
    queries: image index of each episode's query, [e].
    generator: a `numpy.random.RandomState`.

  Returns:
    (int32 [e, 1+s], query first; bool [e], False where no other image would do,
    whose row is zeros).
  """
  present = np.asarray(present, bool)
  width = _width(len(present), subsample)
  table = np.zeros((len(queries), 1 + width), np.int32)
  valid = np.zeros(len(queries), bool)
  for row, query in enumerate(queries):
    wanted = present[query] if present[query].any() else slice(None)
    partners = np.flatnonzero(present[:, wanted].any(axis=1))
    partners = partners[partners != query]
    if not len(partners):
      continue
    first = partners[generator.randint(len(partners))]
    others = np.setdiff1d(np.arange(len(present)), (query, first))
    rest = generator.permutation(others)[: width - 1]
    table[row] = [query, first, *rest]
    valid[row] = True
  return table, valid


def half_of_others(
  annotated: int, others: int, *, draws: int, seed: int = 0
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
  """Rows of views, half of which are of images that nobody annotated.

  Args:
    annotated: images, numbers 0 .. annotated - 1; they take turns.
    others: images, whose numbers follow; in an order drawn anew for each round.
    draws: rows of a step, at least 2; of an odd number annotated ones get the
      one more.
    seed: 0 .. 2**32 - 1.

  Returns:
    A function as `episode_tables` gives it.

  Raises:
    ValueError: fewer than two rows.
  """
  if draws < 2:
    raise ValueError(
      f'episodes.draws={draws}: views of annotated and of other images need 2 '
      'rows at least'
    )
  half = draws // 2

  @functools.lru_cache(2)
  def order(round_):
    return np.random.RandomState([seed, round_]).permutation(others)

  def rows(step):
    own = (step * (draws - half) + np.arange(draws - half)) % annotated
    rounds, places = np.divmod(step * half + np.arange(half), others)
    drawn = [
      annotated + order(int(round_))[place]
      for round_, place in zip(rounds, places, strict=True)
    ]
    made = np.concatenate([own, drawn]).astype(np.int32)
    return made[:, None], np.ones(draws, bool)

  return rows


def episode_tables(present, *, kind, subsample=None, seed=0, draws=None):
  """Gives each optimisation step its episodes.

  Args:
    present: [m, n] bool, which class occurs in which support image.
    kind: 'leave_one_out' or 'paired' (the reference's, on torch's random
      stream), 'random' (the repaired form), or 'views' (queries in turn, and no
      supports: s is 0).
    subsample: supports per episode, None for all others.
    seed: 0 .. 2**32 - 1.
    draws: episodes per step; None for m. 'leave_one_out' always has m; 'random'
      takes its queries in turn, going on where the step before stopped.

  Returns:
    A function step -> (int32 [e, 1+s], bool [e]), pure, so that a run can be
    resumed at any step. Invalid rows must not count in the loss.

  Raises:
    ValueError: when the arguments do not fit, or would give no episode at all.
  """
  present = np.asarray(present, bool)
  images = len(present)
  if kind != 'views':
    _width(images, subsample)
  if kind not in KINDS:
    raise ValueError(f'kind of episodes {kind!r} is not one of {KINDS}')
  if draws is not None and kind == 'leave_one_out':
    raise ValueError(
      f'leave_one_out has one episode per image, {images} here: draws must be '
      f'None, got {draws}'
    )
  if draws is not None and draws < 1:
    raise ValueError(f'draws must be None or at least 1, got {draws}')
  count = images if draws is None else draws

  def views(step):
    queries = (step * count + np.arange(count, dtype=np.int32)) % images
    return queries[:, None].astype(np.int32), np.ones(count, bool)

  if kind == 'views':
    return views

  def one_step(generator):
    if kind == 'paired':
      return paired(present, subsample, count, generator)
    rows = leave_one_out(images, subsample, generator)
    return rows, np.ones(images, bool)

  def random(step):
    queries = (step * count + np.arange(count)) % images
    generator = np.random.RandomState([seed, step])
    return random_episodes(present, subsample, queries, generator)

  if kind == 'random':
    some = any(random(step)[1].any() for step in range(images))
  else:
    probe = TorchRandom(seed)
    some = one_step(probe)[1].any()
    words = (
      probe.drawn
    )  # the same for every step: lengths do not depend on luck
  if not some:
    raise ValueError(
      f'{kind} finds no two support images with a class in common: take more '
      "shots, or 'leave_one_out'"
    )

  def reference(step):
    generator = TorchRandom(seed)
    generator.skip(step * words)
    return one_step(generator)

  return random if kind == 'random' else reference
