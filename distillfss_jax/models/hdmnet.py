"""HDMNet: matching at three scales, each teaching the next (2303.14652).

    encode     images -> stages 2, 3, 4, and the base learner's features
    memorize   support, masked as an image -> tokens of three levels, keys
    correlate  similarity maps, and what the support's tokens hand out
    decode     from coarse to fine, then the ensemble with the base learner

A small hierarchical transformer (SegFormer's, 2105.15203) describes query and
support for themselves, apart from each other. Only then are they matched, from
coarse to fine: every foreground place of the support spreads its value over the
query by a softmax over the *query*, so that none of the support is lost where
nothing matches. How well a level matches is a distribution over the query,
which the next finer level learns to have too
(`ops.losses.hierarchical_kl`). Base learner and ensemble are BAM's.

Levels are numbered from fine to coarse: strides 8, 16 and 32 at the backbone's
stride of 8. `t` counts the places of a level.
"""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers, models
from distillfss_jax.layers import torch_rules
from distillfss_jax.models import base, core
from distillfss_jax.ops import correlation, random, resize
from distillfss_jax.types import Array, Pyramid

WIDTH = 64  # channels of a token
HEADS = (2, 4, 8)  # of the levels' own attention
REDUCTIONS = (4, 2, 1)  # of the places that are attended to, along either side
MATCH_HEADS = 2
TEMPERATURE = 0.1  # of the matching
DEPTH = 2  # blocks of a level
EPSILON = 1e-6  # of LayerNorm

_MIX = r'transformer\.mix_transformer\.'


def _block_rules(theirs, ours):
  attention = rf'{theirs}\.attn\.attn\.linear_'
  return (
    *torch_rules('norm', rf'{theirs}\.norm1', f'{ours}/norm1'),
    *torch_rules('norm', rf'{theirs}\.norm2', f'{ours}/norm2'),
    *torch_rules('linear', attention + 'q', f'{ours}/query'),
    *torch_rules('linear', attention + 'k', f'{ours}/key'),
    *torch_rules('linear', attention + 'v', f'{ours}/value'),
    *torch_rules('linear', attention + 'o', f'{ours}/out'),
    *torch_rules('conv', rf'{theirs}\.attn\.sr', f'{ours}/reduce'),
    *torch_rules('norm', rf'{theirs}\.attn\.norm', f'{ours}/norm'),
    *torch_rules('conv', rf'{theirs}\.ffn\.layers\.0', f'{ours}/expand'),
    *torch_rules('conv', rf'{theirs}\.ffn\.layers\.1', f'{ours}/mix'),
    *torch_rules('conv', rf'{theirs}\.ffn\.layers\.4', f'{ours}/project'),
  )


def _chain_rules(theirs, ours):
  return tuple(
    rule
    for i in range(3)
    for kind, name, place in (('conv', 'convs', 0), ('norm', 'norms', 1))
    for rule in torch_rules(
      kind, rf'{theirs}\.{2 * i + place}', f'{ours}/{name}/{i}'
    )
  )


TORCH_NAMES = (
  *core.head_rules('ppm', r'cls\.0', r'cls\.1', r'base_learnear\.2'),
  *torch_rules('conv', r'down_query\.0', 'query_neck'),
  *torch_rules('conv', r'down_supp\.0', 'support_neck'),
  *torch_rules('conv', r'query_merge\.0', 'query_merge'),
  *torch_rules('conv', r'supp_merge\.0', 'support_merge'),
  *torch_rules('conv', 'gram_merge', 'ensemble/scene'),
  *torch_rules('conv', 'cls_merge', 'ensemble/base'),
  *(
    rule
    for kind, theirs, ours in (
      ('conv', r'0\.projection', 'embed'),
      ('norm', r'0\.norm', 'embed_norm'),
      ('norm', rf'{DEPTH + 1}', 'norm'),
    )
    for rule in torch_rules(
      kind, _MIX + rf'down_sample_layers\.(\d)\.{theirs}', rf'levels/\1/{ours}'
    )
  ),
  *(
    rule
    for i in range(DEPTH)
    for rule in _block_rules(
      _MIX + rf'down_sample_layers\.(\d)\.{i + 1}', rf'levels/\1/blocks/{i}'
    )
  ),
  *_block_rules(_MIX + r'match_layers\.(\d)\.0', r'matches/\1/block'),
  *torch_rules(
    'conv', _MIX + r'match_layers\.(\d)\.1\.conv', r'matches/\1/conv'
  ),
  *torch_rules('norm', _MIX + r'match_layers\.(\d)\.1\.bn', r'matches/\1/norm'),
  *_chain_rules(_MIX + r'parse_layers\.(\d)', r'parses/\1'),
  *_chain_rules(_MIX + 'cls', 'score'),
)


@flax.struct.dataclass
class Memory:
  """A support set as HDMNet sees it.

  deep: [b, s, n, k, c] of the base learner's features and of stage 4, masked.
  prototypes: [b, s, n, NECK], means of the merged maps under the mask.
  scenes: [b, s, n, c, c], Gram matrices of stage 2.
  tokens: per level [b, s, n, t, WIDTH].
  masks: per level [b, s, n, t] in {0, 1}.
  selections: which shots answer together.
  """

  deep: tuple[Array, Array]
  prototypes: Array
  scenes: Array
  tokens: tuple[Array, ...]
  masks: tuple[Array, ...]
  selections: core.Selections

  @property
  def present(self) -> Array:
    """[b, s, n, v] bool, the shots of each way's votes."""
    return self.selections.present


class Coarse(NamedTuple):
  """All that the query is told of the support; levels are fine to coarse.

  fine, middle, deep: [b, j, h, w, WIDTH], the matched tokens of a level.
  similarity: [b, j, h, w, 2], largest cosines in the base learner's features
    and in stage 4, at the finest level.
  scene: [b, j, 1, 1, 1], how much the scenes differ.
  match_fine, match_middle, match_deep: [b, j, h, w, 1], how well each place
    matches, logits over places; only training looks at them.
  """

  fine: Array
  middle: Array
  deep: Array
  similarity: Array
  scene: Array
  match_fine: Array | None = None
  match_middle: Array | None = None
  match_deep: Array | None = None

  @property
  def matched(self) -> tuple[Array, ...]:
    """The matched tokens, fine to coarse."""
    return self.fine, self.middle, self.deep

  @property
  def matches(self) -> tuple[Array, ...]:
    """How well places match, *coarse to fine*, as `hierarchical_kl` takes it.

    Each [b, j, h, w, 1].
    """
    return self.match_deep, self.match_middle, self.match_fine


class Block(nnx.Module):
  """Attention and a convolutional MLP, both residual, on maps [b, h, w, c].

  Args:
    heads: of the attention.
    reduction: side of the squares of places that are attended to as one.
    rate: of dropout.
    rngs: of the initialisation.
  """

  def __init__(self, heads, reduction, *, rate, rngs):
    def norm():
      return layers.LayerNorm(WIDTH, epsilon=EPSILON)

    def linear():
      return layers.Linear(WIDTH, WIDTH, bias=None, rngs=rngs)

    self.heads, self.rate = heads, rate
    self.norm1, self.norm2 = norm(), norm()
    self.query, self.key, self.value = linear(), linear(), linear()
    self.out = linear()
    apart = reduction == 1
    self.reduce = (
      None
      if apart
      else layers.Conv(
        WIDTH, WIDTH, reduction, stride=reduction, padding=0, rngs=rngs
      )
    )
    self.norm = None if apart else norm()
    wide = 4 * WIDTH
    self.expand = layers.Conv(WIDTH, wide, 1, rngs=rngs)
    self.mix = layers.Conv(wide, wide, 3, groups=wide, rngs=rngs)
    self.project = layers.Conv(wide, WIDTH, 1, rngs=rngs)

  def within(self, x: Array, seed: Array | None) -> Array:
    """Attention among the places of x; a seed [b] drops out."""
    y = self.norm1(x)
    seen = y
    if self.reduce is not None:
      seen = self.norm(self.reduce(y))
    q = self._split(self.query(y))
    k, v = self._split(self.key(seen)), self._split(self.value(seen))
    logits = jnp.einsum(
      'baqd,bakd->baqk', q, k, preferred_element_type=jnp.float32
    )
    share = jax.nn.softmax(logits / (q.shape[-1] ** 0.5 + 1e-9))
    y = jnp.einsum('baqk,bakd->baqd', share.astype(v.dtype), v)
    return self._add(x, y, seed)

  def between(
    self, x: Array, support: Array, mask: Array, seed: Array | None
  ) -> tuple[Array, Array]:
    """Matches the query x [b, h, w, c] with a support.

    Args:
      x: the query.
      support: [b, t, c].
      mask: [b, t] in {0, 1}, its foreground.
      seed: [b], drops out; or None.

    Returns:
      x with what it was given, and how well each place matches [b, h, w]: the
      mean cosine with the foreground, over the temperature.
    """
    s = self.norm1(support)
    q = _unit(self._split(self.query(self.norm1(x)))) / TEMPERATURE
    k, v = _unit(self._split(self.key(s))), self._split(self.value(s))
    y = jax.vmap(correlation.match)(q, k, v, mask)
    # The mean over pairs is linear in the key: one product, with its mean.
    total = jnp.einsum('bakd,bk->bad', k.astype(jnp.float32), mask)
    mean = total / (mask.sum(-1)[:, None, None] + 1e-9)
    well = jnp.einsum('baqd,bad->bq', q.astype(jnp.float32), mean) / self.heads
    return self._add(x, y, seed), well.reshape(x.shape[:3])

  def _split(self, x):
    """[b, ..., c] to [b, a, t, d]."""
    x = x.reshape(x.shape[0], -1, self.heads, x.shape[-1] // self.heads)
    return x.swapaxes(1, 2)

  def _add(self, x, y, seed):
    """x, and what was attended to y [b, a, t, d], and what that becomes."""

    def drop(x, use):
      if seed is None:
        return x
      return random.dropout(x, random.fold(seed, use), self.rate).astype(
        x.dtype
      )

    y = y.swapaxes(1, 2).reshape(x.shape)
    x = x + drop(self.out(y), 0)
    y = self.mix(self.expand(self.norm2(x)))
    y = drop(nnx.gelu(y, approximate=False), 1)
    return x + drop(self.project(y), 2)


class Level(nnx.Module):
  """One scale of the transformer: maps [b, h, w, c] to maps, perhaps halved."""

  def __init__(self, i, *, rate, rngs):
    size, stride = (3, 2) if i else (1, 1)
    self.embed = layers.Conv(WIDTH, WIDTH, size, stride=stride, rngs=rngs)
    self.embed_norm = layers.LayerNorm(WIDTH, epsilon=EPSILON)
    self.blocks = nnx.List(
      [
        Block(HEADS[i], REDUCTIONS[i], rate=rate, rngs=rngs)
        for _ in range(DEPTH)
      ]
    )
    self.norm = layers.LayerNorm(WIDTH, epsilon=EPSILON)

  def __call__(self, x: Array, seed: Array | None) -> Array:
    x = self.embed_norm(self.embed(x))
    for i, block in enumerate(self.blocks):
      x = block.within(x, None if seed is None else random.fold(seed, i))
    return self.norm(x)


class Match(nnx.Module):
  """The matching of one level, and what merges it with the similarity."""

  def __init__(self, *, rate, rngs):
    self.block = Block(MATCH_HEADS, 1, rate=rate, rngs=rngs)
    self.conv = layers.Conv(
      WIDTH + 2, WIDTH, 3, kernel=layers.he_fan_out, bias=None, rngs=rngs
    )
    self.norm = layers.BatchNorm(WIDTH)

  def merge(self, x: Array, similarity: Array) -> Array:
    """Matched tokens and similarity maps [b, h, w, .] to [b, h, w, c]."""
    similarity = resize.bilinear(similarity, x.shape[1:3]).astype(x.dtype)
    x = jnp.concatenate([x, similarity], -1)
    return nnx.relu(self.norm(self.conv(x)))


class Chain(nnx.Module):
  """1x1, 3x3, 1x1 convolutions, `normed` of them with BatchNorm."""

  # Parity: the original has no activation between them, so that each chain is
  # linear.

  def __init__(self, outputs, *, normed, rngs):
    wide = 4 * WIDTH
    self.convs, self.norms = nnx.List(), nnx.List()
    inputs = WIDTH
    for width, size in ((wide, 1), (wide, 3), (outputs, 1)):
      self.convs.append(layers.Conv(inputs, width, size, rngs=rngs))
      if len(self.norms) < normed:
        self.norms.append(layers.BatchNorm(width))
      inputs = width

  def __call__(self, x: Array) -> Array:
    for i, conv in enumerate(self.convs):
      x = conv(x)
      if i < len(self.norms):
        x = self.norms[i](x)
    return x


class HDMNet(core.BaseAndMeta):
  """See the module, and `core.BaseAndMeta` for its other arguments.

  Args:
    backbone: the base learner's.
    classes: how many it knows, background included.
    restored: whether a shot's weight is its own; see `core.ShotWeights`.
    token_dropout: rate, in the transformer.
    rngs: of the initialisation.
    **fields: see `core.BaseAndMeta`.
  """

  # Parity: with several shots the original undoes the sorting of the scene
  # differences by a wrong index, so that the weight of the smallest difference
  # goes to the first shot, and so on; nor does it train those weights. Only
  # the scene difference is weighted. `restored=True` repairs the index.
  #
  # Parity: its BatchNorms keep their first running statistics, mean 0 and
  # variance 1, in training too: they are a scale and a bias.

  def __init__(
    self,
    backbone,
    classes,
    *,
    restored: bool = False,
    token_dropout: float = 0.1,
    rngs,
    **fields,
  ):
    super().__init__(backbone, classes, rngs=rngs, **fields)
    self.restored = restored
    self.query_merge = layers.Conv(
      2 * core.NECK + 2, WIDTH, 1, bias=None, rngs=rngs
    )
    self.support_merge = layers.Conv(
      2 * core.NECK, WIDTH, 1, bias=None, rngs=rngs
    )
    each = {'rate': token_dropout, 'rngs': rngs}
    count = range(len(HEADS))
    self.levels = nnx.List([Level(i, **each) for i in count])
    self.matches = nnx.List([Match(**each) for _ in count])
    self.parses = nnx.List([Chain(WIDTH, normed=3, rngs=rngs) for _ in count])
    self.score = Chain(2, normed=2, rngs=rngs)

  def encode_support(self, images: Array, masks: Array) -> Pyramid:
    """Support images [..., H, W, 3] under masks [..., H', W', n].

    Returns:
      The pyramid of the images that each way's mask leaves, the rest of which
      has the mean colour: [..., n, h, w, c] per stage.
    """
    lead = images.shape[:-3]
    x = self.normalised(images.reshape(-1, *images.shape[-3:]))
    masks = resize.nearest(masks.reshape(-1, *masks.shape[-3:]), x.shape[1:3])
    x = x[:, None] * jnp.moveaxis(masks, -1, 1)[..., None].astype(x.dtype)
    pyramid = self.keep(self.backbone(x.reshape(-1, *x.shape[2:])))
    return tuple(
      x.reshape(*lead, masks.shape[-1], *x.shape[2:]) for x in pyramid
    )

  def memorize(
    self,
    pyramid: Pyramid,
    masks: Array,
    present: Array,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> Memory:
    keys = keys if train else None
    lead = pyramid[0].shape[:3]
    s2, s3, s4, s5 = (x.reshape(-1, *x.shape[3:]) for x in pyramid)
    masks = jnp.moveaxis(masks, -1, 2)  # [b, s, n, H, W]
    masks = masks.reshape(-1, *masks.shape[3:])[..., None]

    def seed(use):
      return core.seeds_of(core.seed_at(keys, use), *lead[1:])

    def back(x):  # [b * s * n, ...] to [b, s, n, ...]
      return x.reshape(*lead, *x.shape[1:])

    def flat(x):  # places in one row
      return back(x.reshape(x.shape[0], -1, x.shape[-1]))

    merged = self.merged(self.support_neck, s3, s2, seed(0))
    soft = resize.bilinear(masks, s3.shape[1:3])[..., 0]
    means = core.prototypes(merged, soft)
    hard = resize.nearest(masks, s4.shape[1:3]).astype(s4.dtype)
    kernel = self.support_merge.kernel[...].astype(merged.dtype)[0, 0]
    split = merged.shape[-1]
    mine = means @ kernel[split:]
    x = nnx.relu(merged @ kernel[:split] + mine[:, None, None])
    tokens = self._levels(x, seed(1))
    return Memory(
      deep=(flat(s5 * hard), flat(s4 * hard)),
      prototypes=back(means),
      scenes=back(core.gram(s2)),
      tokens=tuple(flat(x) for x in tokens),
      masks=tuple(
        flat(resize.nearest(masks, x.shape[1:3]))[..., 0] for x in tokens
      ),
      selections=core.select_shots(present, self.shots),
    )

  def correlate(
    self,
    pyramid: Pyramid,
    memory: Memory,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> Coarse:
    keys = keys if train else None
    f2, f3, f4, f5 = (x[:, -1] for x in pyramid)
    b = f2.shape[0]

    def picked(x):
      return memory.selections.pick(x, b)

    scene = core.scene_difference(core.gram(f2)[:, None, None], memory.scenes)
    scene, prototypes = picked(scene), picked(memory.prototypes).mean(2)
    weights = jnp.ones_like(scene)
    if self.kshot is not None:
      weights = self.kshot(scene, restored=self.restored)
    similarity = jnp.stack(
      [
        picked(self.best_cosines(query, deep)).mean(2)
        for query, deep in zip((f5, f4), memory.deep, strict=True)
      ],
      -1,
    )
    j = similarity.shape[1]
    similarity = resize.bilinear(
      similarity.reshape(b * j, *f4.shape[1:3], 2), f3.shape[1:3]
    ).astype(f3.dtype)

    merged = self.merged(self.query_neck, f3, f2, core.seed_at(keys, 2))
    kernel = self.query_merge.kernel[...].astype(merged.dtype)[0, 0]
    parts = jnp.split(kernel, [core.NECK, 2 * core.NECK])
    x = (merged @ parts[0])[:, None]
    x = x + (prototypes.astype(x.dtype) @ parts[1])[:, :, None, None]
    x = x.reshape(b * j, *x.shape[2:]) + 10 * similarity @ parts[2]
    seed = core.seeds_of(core.seed_at(keys, 3), j)
    matched, well = [], []
    for i, query in enumerate(self._levels(nnx.relu(x), seed)):
      tokens, mask = (
        picked(y).reshape(b * j, -1, *y.shape[4:])
        for y in (memory.tokens[i], memory.masks[i])
      )
      drops = core.seeds_of(core.seed_at(keys, 4 + i), j)
      x, w = self.matches[i].block.between(query, tokens, mask, drops)
      matched.append(x.reshape(b, j, *x.shape[1:]))
      well.append(w.reshape(b, j, *w.shape[1:], 1))
    scene = (weights * scene).sum(-1)[..., None, None, None]
    similarity = similarity.reshape(b, j, *similarity.shape[1:])
    return Coarse(*matched, similarity, scene, *well)

  def _levels(self, x, seed):
    """Maps [b, h, w, WIDTH] of each level."""
    found = []
    for i, level in enumerate(self.levels):
      x = level(x, None if seed is None else random.fold(seed, i))
      found.append(x)
    return found

  @property
  def slots(self):
    """The matched tokens of all levels, the similarity, and the scene.

    The last is a constant of each way, as BAM's is.
    """
    fine = self.backbone.channels[2]
    return (
      *(
        base.Slot('maps', WIDTH, 1, fine, every=2**i) for i in range(len(HEADS))
      ),
      base.Slot('maps', 2, 3, core.WIDTH),
      base.Slot('vector', 1),
    )

  def lessons(self, coarse):
    """All but how well places match, of which training alone makes use."""
    return tuple(coarse)[: len(self.slots)]

  def decode(
    self,
    pyramid: Pyramid,
    coarse: Coarse,
    memory: Memory | None = None,
  ) -> Array:
    return self.answer(pyramid, Coarse(*coarse)).final

  def prior(self, coarse: Coarse) -> Array:
    """The cosines in stage 4 from 0 to 1, [b, j, h, w]: nothing is learnt."""
    x = coarse.similarity[..., 1].astype(jnp.float32)
    low, high = (f(x, (2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    return (x - low) / (high - low + 1e-7)

  def answer(
    self,
    pyramid: Pyramid,
    coarse: Coarse,
    *,
    own: Array | None = None,
    train: bool = False,
    keys: Array | None = None,
  ) -> core.Answers:
    """`decode`, with what both learners say.

    Args:
      pyramid: of the queries.
      coarse: what `correlate` gives, or a student.
      own: int [b], see `core.Ensemble`; HDMNet gives it in training alone.
      train: whether dropout acts; then `keys` [b] is one JAX key per episode.
      keys: see `train`.
    """
    b, j = coarse.fine.shape[:2]
    coarse_to_fine = [
      self.matches[i].merge(
        x.reshape(b * j, *x.shape[2:]),
        coarse.similarity.reshape(b * j, *coarse.similarity.shape[2:]),
      )
      for i, x in enumerate(coarse.matched)
    ]
    x = None
    for i in reversed(range(len(self.parses))):
      level = coarse_to_fine[i]
      if x is None:
        x = nnx.relu(self.parses[i](level))
      else:
        # Parity: of all resizing in the original, this alone is by half pixels.
        x = resize.bilinear(x, level.shape[1:3], align_corners=False)
        x = x + nnx.relu(self.parses[i](level + x))
    x = self.score(x)
    meta = x.reshape(b, j, *x.shape[1:])
    seed = core.seed_at(keys if train else None, 7)
    return self.answers(pyramid, meta, coarse.scene, own, seed)

  def torch_tables(self):
    """See `backbones.base.Backbone`."""
    return {
      'original': (
        *core.backbone_rules(self.backbone),
        *TORCH_NAMES,
        *core.shot_rules(self.kshot),
      )
    }

  def torch_buffers(self):
    """See `backbones.base.Backbone`."""
    return {}

  def torch_unused(self, tensors):
    """See `backbones.base.Backbone`."""
    return layers.torch_counts(tensors)


def _unit(x):
  """Vectors [..., d] of length 1, in float32; zero stays zero."""
  x = x.astype(jnp.float32)
  square = jnp.square(x).sum(-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def build(config, image_size, rngs):
  """The model of a config; see `models.build`.

  Raises:
    ValueError: the images are too small for the transformer.
  """
  backbone = models.build_backbone(config, image_size, rngs)
  # Places that are attended to as one lie in squares.
  least, stride = REDUCTIONS[0], backbone.strides[2]
  if -(-image_size // stride) < least:
    raise ValueError(
      f'config.data.image_size={image_size}: HDMNet needs {least} x {least} '
      f'features, which {config.backbone.name} makes of images of '
      f'{(least - 1) * stride + 1} pixels or more'
    )
  return HDMNet(
    backbone,
    **config.fields,
    dtype=config.dtype,
    rngs=rngs,
  )
