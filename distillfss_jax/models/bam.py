"""BAM: what is it not? A base learner says (2203.07615).

    encode     images -> stages 2, 3, 4, and the base learner's features
    memorize   support, masked before stage 4 -> a prototype, keys, a scene
    correlate  prior mask, prototype and scene difference, over the shots
    decode     meta learner, then the ensemble with the base learner

The meta learner is PFENet's (2008.01449) in small: a prototype of the masked
support and a *prior mask*, each query place's largest cosine with the support
in stage 4. What is new is what follows: the base learner's probability of its
own classes is taken as background, and how much the meta learner is believed
follows from how much the two scenes differ, as Gram matrices of stage 2 tell.
"""

from typing import NamedTuple

import flax
import jax.numpy as jnp
from flax import nnx

from distillfss_jax import layers, models
from distillfss_jax.layers import torch_rules
from distillfss_jax.models import base, core
from distillfss_jax.ops import random, resize
from distillfss_jax.types import Array, Pyramid

RATES = (6, 12, 18)  # dilations of the ASPP

TORCH_NAMES = (
  *core.head_rules(
    r'learner_base\.0',
    r'learner_base\.1\.0',
    r'learner_base\.1\.1',
    r'learner_base\.1\.4',
  ),
  *torch_rules('conv', r'down_query\.0', 'query_neck'),
  *torch_rules('conv', r'down_supp\.0', 'support_neck'),
  *torch_rules('conv', r'init_merge\.0', 'merge'),
  *torch_rules('conv', r'ASPP_meta\.layer6_(\d)\.0', r'aspp/\1'),
  *torch_rules('conv', r'res1_meta\.0', 'project'),
  *torch_rules('conv', r'res2_meta\.0', 'residual/0'),
  *torch_rules('conv', r'res2_meta\.2', 'residual/1'),
  *torch_rules('conv', r'cls_meta\.0', 'score/0'),
  *torch_rules('conv', r'cls_meta\.3', 'score/1'),
  *torch_rules('conv', 'gram_merge', 'ensemble/scene'),
  *torch_rules('conv', 'cls_merge', 'ensemble/base'),
)


@flax.struct.dataclass
class Memory:
  """A support set as BAM sees it.

  keys: [b, s, n, t, c], stage 4 of the masked support, masked again.
  prototypes: [b, s, n, NECK], means of the merged maps under the mask.
  scenes: [b, s, 1, c, c], Gram matrices of stage 2.
  selections: which shots answer together.
  """

  keys: Array
  prototypes: Array
  scenes: Array
  selections: core.Selections

  @property
  def present(self) -> Array:
    """[b, s, n, v] bool, the shots of each way's votes."""
    return self.selections.present


class Coarse(NamedTuple):
  """All that the query is told of the support.

  prior: [b, j, h, w, 1], the prior mask.
  prototype: [b, j, 1, 1, NECK].
  scene: [b, j, 1, 1, 1], how much the scenes differ.
  """

  prior: Array
  prototype: Array
  scene: Array


class BAM(core.BaseAndMeta):
  """See the module, and `core.BaseAndMeta` for its arguments."""

  def __init__(self, backbone, classes, *, rngs, **fields):
    super().__init__(backbone, classes, rngs=rngs, **fields)

    def conv(inputs, size, dilation=1, **start):
      return layers.Conv(
        inputs, width, size, dilation=dilation, rngs=rngs, **start
      )

    width = core.NECK
    self.merge = conv(2 * width + 1, 1, bias=None)
    he = {'kernel': layers.he_fan_in}
    self.aspp = nnx.List(
      [
        conv(width, 1, **he),
        conv(width, 1, **he),
        *(conv(width, 3, rate, **he) for rate in RATES),
      ]
    )
    self.project = conv(len(self.aspp) * width, 1, bias=None)
    self.residual = nnx.List([conv(width, 3, bias=None) for _ in range(2)])
    self.score = nnx.List(
      [conv(width, 3, bias=None), layers.Conv(width, 2, 1, rngs=rngs)]
    )

  def encode_support(self, images: Array, masks: Array) -> Pyramid:
    """Support images [..., H, W, 3] under masks [..., H', W', n].

    Returns:
      Stages 2 and 3 [..., 1, h, w, c] of the whole images, and stage 4
      [..., n, h, w, c] of stage 3 under the mask of each way.
    """
    lead = images.shape[:-3]
    backbone = self.backbone
    x = backbone.stem(self.normalised(images.reshape(-1, *images.shape[-3:])))
    found = []
    for i in range(3):
      x = backbone.activate(backbone.stage(i, x)[-1])
      found.append(x)
    _, s2, s3 = found
    s2 = resize.bilinear(s2, s3.shape[1:3])
    masks = resize.bilinear(masks.reshape(-1, *masks.shape[-3:]), s3.shape[1:3])
    masked = s3[:, None] * jnp.moveaxis(masks, -1, 1)[..., None].astype(x.dtype)
    x = masked.reshape(-1, *s3.shape[1:])
    s4 = backbone.activate(backbone.stage(3, x)[-1])
    return tuple(x.reshape(*lead, -1, *x.shape[1:]) for x in (s2, s3, s4))

  def memorize(
    self,
    pyramid: Pyramid,
    masks: Array,
    present: Array,
    *,
    train: bool = False,
    keys: Array | None = None,
  ) -> Memory:
    s2, s3, s4 = pyramid
    b, s = s2.shape[:2]
    seed = core.seeds_of(core.seed_at(keys if train else None, 0), s)
    merged = self.merged(
      self.support_neck,
      *(x.reshape(-1, *x.shape[3:]) for x in (s3, s2)),
      seed,
    ).reshape(b, s, 1, *s2.shape[3:5], -1)

    def brought(size):  # to [b, s, n, h, w]
      return jnp.moveaxis(resize.bilinear(masks, size), -1, 2)

    deep = s4 * brought(s4.shape[3:5])[..., None].astype(s4.dtype)
    return Memory(
      keys=deep.reshape(*deep.shape[:3], -1, deep.shape[-1]),
      prototypes=core.prototypes(merged, brought(s3.shape[3:5])),
      scenes=core.gram(s2),
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
    f2, f3, f4 = (x[:, -1] for x in pyramid[:3])
    b = f2.shape[0]
    priors = self._priors(f4, memory.keys, f3.shape[1:3])
    scene = core.scene_difference(core.gram(f2)[:, None, None], memory.scenes)
    priors, prototypes, scene = (
      memory.selections.pick(x, b) for x in (priors, memory.prototypes, scene)
    )
    weights = jnp.ones_like(scene)
    if self.kshot is not None:
      weights = self.kshot(scene)

    def mean(x):
      return jnp.einsum('bjk,bjk...->bj...', weights.astype(x.dtype), x)

    return Coarse(
      prior=mean(priors).astype(f2.dtype),
      prototype=mean(prototypes)[:, :, None, None],
      scene=mean(scene)[..., None, None, None],
    )

  def _priors(self, query, keys, size):
    """Prior masks [b, s, n, *size, 1] of each shot for each way."""
    x = self.best_cosines(query, keys)[..., None]
    low, high = (f(x, (3, 4), keepdims=True) for f in (jnp.min, jnp.max))
    return resize.bilinear((x - low) / (high - low + 1e-7), size)

  @property
  def slots(self):
    """The prior mask; the prototype and the scene are constants of a way.

    How much two scenes differ is a number for each query. A student has no
    support to compare with, and takes its mean for the ensemble.
    """
    return (
      base.Slot('maps', 1, 2, self.backbone.channels[3]),
      base.Slot('vector', core.NECK),
      base.Slot('vector', 1),
    )

  def decode(
    self,
    pyramid: Pyramid,
    coarse: Coarse,
    memory: Memory | None = None,
  ) -> Array:
    return self.answer(pyramid, Coarse(*coarse)).final

  def prior(self, coarse: Coarse) -> Array:
    """The prior mask alone, [b, j, h, w] in [0, 1]: nothing of it is learnt."""
    return coarse.prior[..., 0]

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
      own: int [b], see `core.Ensemble`; BAM gives it in training alone.
      train: whether dropout acts; then `keys` [b] is one JAX key per episode.
      keys: see `train`.
    """
    keys = keys if train else None
    j = coarse.prior.shape[1]
    f2, f3 = (x[:, -1] for x in pyramid[:2])
    query = self.merged(self.query_neck, f3, f2, core.seed_at(keys, 1))
    seed = core.seeds_of(core.seed_at(keys, 2), j)
    meta = self._meta(query, coarse, seed)
    return self.answers(pyramid, meta, coarse.scene, own, core.seed_at(keys, 3))

  def _meta(self, query, coarse, seed):
    """The meta learner's logits [b, j, h, w, 2]."""
    kernel = self.merge.kernel[...].astype(query.dtype)[0, 0]
    width = query.shape[-1]
    # One product over all three side by side, the query's for all j at once.
    x = nnx.relu(
      (query @ kernel[:width])[:, None]
      + coarse.prototype.astype(query.dtype) @ kernel[width : 2 * width]
      + coarse.prior.astype(query.dtype) * kernel[2 * width]
    )
    lead = x.shape[:2]
    x = x.reshape(-1, *x.shape[2:])
    whole = nnx.relu(self.aspp[0](x.mean((1, 2), keepdims=True)))
    parts = [jnp.broadcast_to(whole, x.shape)]
    parts += [nnx.relu(layer(x)) for layer in self.aspp[1:]]
    x = nnx.relu(self.project(jnp.concatenate(parts, -1)))
    x = x + nnx.relu(self.residual[1](nnx.relu(self.residual[0](x))))
    x = nnx.relu(self.score[0](x))
    if seed is not None:
      x = random.drop_channels(x, seed, self.head_dropout)
    x = self.score[1](x)
    return x.reshape(*lead, *x.shape[1:])

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


def build(config, image_size, rngs):
  """The model of a config; see `models.build`."""
  return BAM(
    models.build_backbone(config, image_size, rngs),
    **config.fields,
    dtype=config.dtype,
    rngs=rngs,
  )
