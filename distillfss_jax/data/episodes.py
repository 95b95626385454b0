"""Episodes of source data: a class, a query that shows it, and its support.

An episode is a row of integers: the class, the query and the shots, as indices
into a `core.Pool`. For training they are drawn at random, a pure function of
the pool and a generator that the pipeline seeds by the episode's number; for
testing they are a list, made once from a seed. No image is read here.

How the class and the query of an episode are found is a `rule`:

  pair    each pair of an image and a class of it in turn (DCAMA and IFA on
          PASCAL-5i, FSS-1000)
  image   each image in turn, and a class of it at random (BAM, HDMNet)
  class   each class in turn, and an image of it at random (IFA's tests)
  random  a class and an image of it at random (DCAMA on COCO-20i)

The shots are other images of the class. Where a method adapts to a domain of
which it has the shots alone (IFA), the query is one of them, which its recipe
augments; these rules are for training only:

  shot          each class in turn
  shot_of_pair  the class of each pair in turn (IFA on FSS-1000)

Shots are drawn anew for every episode, or each class has the same ones always:
`supports`.
"""

import dataclasses
import functools

import numpy as np

from distillfss_jax.data import core

RULES = ('pair', 'image', 'class', 'random')
SHOT_RULES = ('shot', 'shot_of_pair')
# Episodes that DCAMA and BAM are tested with. HDMNet has 10,000 on COCO-20i;
# IFA 600, and 2,400 on FSS-1000.
COUNT = 1000


@dataclasses.dataclass(frozen=True)
class Random:
  """Draws training episodes; can be pickled.

  Args:
    pool: what to draw from.
    shots: per episode.
    rule: of `RULES` or `SHOT_RULES`.
    supports: int32 [n, s], the shots of each class, of the `SHOT_RULES`; None
      draws them.
    pairs: of 'shot_of_pair', how many of the first pairs are taken in turn; 0
      for all.

  Raises:
    ValueError: for an unknown rule, and for classes with too few images.
  """

  pool: core.Pool
  shots: int
  rule: str
  supports: np.ndarray | None = None
  pairs: int = 0

  def __post_init__(self):
    """Checks the arguments before any work."""
    _check(self.pool, self.shots, self.rule, (*RULES, *SHOT_RULES))
    for name, given, rules in (
      ('supports', self.supports is not None, SHOT_RULES),
      ('pairs', self.pairs, SHOT_RULES[1:]),
    ):
      if given and self.rule not in rules:
        raise ValueError(
          f'episode rule {self.rule!r} takes no {name}; these do: '
          f'{", ".join(rules)}'
        )

  def __len__(self):
    """Episodes of an epoch."""
    if self.rule == 'shot':
      return len(self.pool.classes)
    if self.pairs:
      return min(self.pairs, len(self.pool.pairs))
    if self.rule in ('image', 'random'):
      return len(np.unique(self.pool.pairs[:, 0]))
    return len(self.pool.pairs)

  def __call__(self, i, generator):
    """Draws an episode.

    Args:
      i: its place, 0 .. len - 1, which decides what the rule takes in turn.
      generator: a `numpy.random.Generator`.

    Returns:
      int32 [2+s]: class, query, shots, which are different images.
    """
    if self.rule in SHOT_RULES:
      return self._of_shots(i, generator)
    if self.rule == 'pair':
      query, class_ = self.pool.pairs[i]
    elif self.rule == 'image':
      query, classes = self._candidates[i]
      class_ = generator.choice(classes)
    else:
      count = len(self.pool.classes)
      one = self.rule == 'class'
      class_ = i % count if one else generator.integers(count)
      query = generator.choice(self._images[class_])
    # Parity: IFA and DCAMA draw each shot alone, so that one can come twice;
    # here, as with BAM, shots are different.
    others = self._images[class_]
    others = others[others != query]
    shots = generator.choice(others, self.shots, replace=False)
    return np.array([class_, query, *shots], np.int32)

  def _of_shots(self, i, generator):
    """An episode whose query is one of its shots."""
    class_ = i if self.rule == 'shot' else self.pool.pairs[i, 1]
    if self.supports is None:
      shots = generator.choice(self._images[class_], self.shots, replace=False)
    else:
      shots = self.supports[class_]
    return np.array([class_, generator.choice(shots), *shots], np.int32)

  @functools.cached_property
  def _images(self):
    return _images(self.pool)

  @functools.cached_property
  def _candidates(self):
    return _candidates(self.pool)


def supports(pool, *, shots, seed=0):
  """Draws the shots of each class, once.

  Args:
    pool: what to draw from.
    shots: of each class, different images.
    seed: 0 .. 2**32 - 1.

  Returns:
    int32 [n, s]: indices into the pool's source.

  Raises:
    ValueError: for classes with too few images.
  """
  _check(pool, shots, SHOT_RULES[0], SHOT_RULES)
  generator = np.random.RandomState(seed)
  found = [generator.choice(x, shots, replace=False) for x in _images(pool)]
  return np.array(found, np.int32)


def leave_one_out(supports):
  """Each shot in turn as the query of the others of its class.

  Args:
    supports: int32 [n, s], from `supports`.

  Returns:
    int32 [n * s, 1+s]: class, query, shots.

  Raises:
    ValueError: there is one shot alone.
  """
  count, shots = supports.shape
  if shots < 2:
    raise ValueError('of one shot none can be left out: take 2 or more')
  rows = [
    [c, supports[c, k], *np.delete(supports[c], k)]
    for c in range(count)
    for k in range(shots)
  ]
  return np.array(rows, np.int32)


def listed(pool, *, shots, rule, count=COUNT, seed=0, supports=None):
  """Makes the list of episodes that a method is tested with.

  Args:
    pool: what to draw from.
    shots: per episode.
    rule: of `RULES`; what it takes in turn starts again until there are enough.
    count: of episodes.
    seed: 0 .. 2**32 - 1. DCAMA has 0, IFA 0 to 4; BAM 510, 365, 382, 322 and
      988, HDMNet also 98, 742, 17, 595 and 106.
    supports: int32 [n, s], the shots of each class, which are then no part of
      the pool; None draws them.

  Returns:
    int32 [count, 2+s]: class, query, shots.

  Raises:
    ValueError: for an unknown rule, and for classes with too few images.
  """
  # Parity: all but 'image' spend the generator as the originals do, so that the
  # same images in the same order, and the same seed, give the same episodes:
  # each shot is drawn alone among all images of the class, again while it is
  # the query, and one can come twice. BAM draws in eight workers, which nobody
  # can repeat: 'image' is the same in distribution, with different shots.
  least = shots + 1 if supports is None else 1
  _check(pool, shots, rule, RULES, least)
  images, generator = _images(pool), np.random.RandomState(seed)
  candidates = _candidates(pool) if rule == 'image' else None
  rows = []
  for i in range(count):
    if rule == 'pair':
      query, class_ = pool.pairs[i % len(pool.pairs)]
    elif rule == 'image':
      query, classes = candidates[i % len(candidates)]
      class_ = classes[generator.randint(len(classes))]
    else:
      class_ = i % len(pool.classes)
      if rule == 'random':
        class_ = _one(np.arange(len(pool.classes)), generator)
      query = _one(images[class_], generator)
    chosen = [] if supports is None else supports[class_].tolist()
    while len(chosen) < shots:
      shot = _one(images[class_], generator)
      if shot != query and not (rule == 'image' and shot in chosen):
        chosen.append(shot)
    rows.append([class_, query, *chosen])
  return np.array(rows, np.int32).reshape(count, 2 + shots)


def generalised(pool, *, shots, count=COUNT, seed=0):
  """Makes the list of episodes of BAM's generalised test.

  Every image in turn is a query. One that shows something else than the pool's
  classes, or nothing, is asked for any of them, which it need not show; others
  for one that they show.

  Args:
    pool: what to draw from; of its images all count, whatever the pairs are.
    shots: per episode, other images of the class, whatever its area.
    count: of episodes.
    seed: 0 .. 2**32 - 1; BAM's are those of `listed`.

  Returns:
    int32 [count, 2+s]: class, query, shots.

  Raises:
    ValueError: for classes with too few images.
  """
  present = np.asarray(pool.source.present)
  mine = present[:, np.asarray(pool.values) - 1]
  images = [np.flatnonzero(shows) for shows in mine.T]
  _check_enough([len(x) for x in images], pool.classes, shots, shots + 1)
  # Of any other class, or of none at all.
  others = present.sum(1) > mine.sum(1)
  free = others | ~mine.any(1)
  generator, rows = np.random.RandomState(seed), []
  for i in range(count):
    query = i % len(present)
    asked = (
      np.arange(len(images)) if free[query] else np.flatnonzero(mine[query])
    )
    class_ = _one(asked, generator)
    chosen = []
    while len(chosen) < shots:
      shot = _one(images[class_], generator)
      if shot != query and shot not in chosen:
        chosen.append(shot)
    rows.append([class_, query, *chosen])
  return np.array(rows, np.int32).reshape(count, 2 + shots)


def by_name(pool, table):
  """Episodes as people read them, for a run's folder.

  Args:
    pool: what they were drawn from.
    table: int32 [e, 2+s].

  Returns:
    List of {'class': name, 'query': id, 'support': [id, ...]}.
  """
  ids = pool.source.ids
  return [
    {
      'class': pool.classes[row[0]],
      'query': ids[row[1]],
      'support': [ids[i] for i in row[2:]],
    }
    for row in np.asarray(table)
  ]


def _check(pool, shots, rule, rules, least=None):
  """Raises ValueError where episodes are not to be had.

  `least` is how many images a class needs: the shots, and the query if that is
  not one of them.
  """
  if rule not in rules:
    raise ValueError(f'episode rule {rule!r} is not one of {rules}')
  if shots < 1:
    raise ValueError(f'need at least 1 shot, got {shots}')
  if rule == 'image' and len(set(pool.values.tolist())) < len(pool.classes):
    raise ValueError(
      "episode rule 'image' asks which classes an image shows, but in these "
      "records all have one label: take 'pair', 'class' or 'random'"
    )
  counts = np.bincount(pool.pairs[:, 1], minlength=len(pool.classes))
  if least is None:
    least = shots + (rule not in SHOT_RULES)
  _check_enough(counts, pool.classes, shots, least)


def _check_enough(counts, classes, shots, least):
  """Raises ValueError where a class has too few images for its episodes."""
  # Parity: the originals would look for another image for ever.
  few = [
    f'{name} ({count})'
    for name, count in zip(classes, counts, strict=True)
    if count < least
  ]
  if few:
    needing = {shots: f'{shots} shots', shots + 1: f'{shots} shots and a query'}
    raise ValueError(
      f'{needing.get(least, "queries")} need {least} images of a class, but '
      f'there are fewer of {", ".join(few[:5])}; {len(few)} classes in all: '
      'take fewer shots'
    )


def _images(pool):
  """The images of each class, in the pool's order."""
  pairs = pool.pairs
  return [pairs[pairs[:, 1] == c, 0] for c in range(len(pool.classes))]


def _candidates(pool):
  """[(image, its classes)], the images in the pool's order.

  Parity: an image is there by a class that is large in it, but may be asked
  for any of the classes that it shows.
  """
  present = np.asarray(pool.source.present)[:, np.asarray(pool.values) - 1]
  images = dict.fromkeys(pool.pairs[:, 0].tolist())
  return [(i, np.flatnonzero(present[i])) for i in images]


def _one(images, generator):
  return images[generator.choice(len(images), 1, replace=False)[0]]
