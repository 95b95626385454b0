"""What is minimised, a number per episode; or sums, where a batch is one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from distillfss_jax.ops import resize
from distillfss_jax.types import VOID


def focal(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
  """Focal loss (1708.02002), mean over pixels.

  Args:
    logits: [b, H, W, 1+n].
    labels: [b, H, W] int; `VOID` pixels add nothing.
    gamma: how much sure pixels are discounted; 0 is cross-entropy.

  Returns:
    [b]. The gradient flows through the discount too.
  """
  void = labels == VOID
  index = jnp.where(void, 0, labels)[..., None]
  log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), index, -1)[..., 0]
  # Parity: void pixels count in the mean's denominator, as in the original.
  loss = -log_p
  if gamma:
    # Above 0, so that a sure pixel's gradient is finite for gamma below 1 too.
    loss = jnp.maximum(1 - jnp.exp(log_p), 1e-12) ** gamma * loss
  loss = jnp.where(void, 0, loss)
  return loss.mean((1, 2))


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
  """Cross-entropy, as a sum and the count of what it sums over.

  PyTorch's mean is over all pixels of a batch: the ratio of the sums of both.

  Args:
    logits: [b, H, W, 1+n].
    labels: [b, H, W] int; `VOID` pixels add and count nothing. Or shares of
      the labels, [b, H, W, 1+n], whose sum is 1; 0 where it is void.

  Returns:
    The sums [b] over pixels, and the counts [b].
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  if labels.ndim == logits.ndim:
    total = -(labels * log_p).sum((1, 2, 3))
    return total, labels.any(-1).sum((1, 2)).astype(jnp.float32)
  void = labels == VOID
  index = jnp.where(void, 0, labels)[..., None]
  log_p = jnp.take_along_axis(log_p, index, -1)[..., 0]
  total = -jnp.where(void, 0, log_p).sum((1, 2))
  return total, (~void).sum((1, 2)).astype(jnp.float32)


def dice(logits: Array, labels: Array) -> Array:
  """Soft Dice loss (1606.04797), mean over the foreground classes of an image.

  Args:
    logits: [b, H, W, 1+n].
    labels: as `cross_entropy` takes them; void counts nowhere.

  Returns:
    [b], 0..1: of the classes that the labels show, of shares those that have a
    half somewhere. Of one class alone it counts where it is not shown, too:
    what is found there is too much.
  """
  if labels.ndim == logits.ndim:
    known, y = labels.any(-1, keepdims=True), labels
  else:
    known = (labels != VOID)[..., None]
    y = (labels[..., None] == jnp.arange(logits.shape[-1])) * known
  p = jax.nn.softmax(logits.astype(jnp.float32)) * known
  p, y = p[..., 1:], y[..., 1:]
  both, all_ = (p * y).sum((1, 2)), (p + y).sum((1, 2))
  lost = 1 - (2 * both + 1) / (all_ + 1)
  shown = (y >= 0.5).any((1, 2)) | (logits.shape[-1] == 2)
  return (lost * shown).sum(-1) / jnp.maximum(shown.sum(-1), 1)


def structure(logits: Array, masks: Array, *, weighted: bool = False) -> Array:
  """Structure loss of a binary map (F3Net, 1911.11445; Polyp-PVT, KDAS).

  Cross-entropy, and one minus an intersection over union in which pixels near
  a border weigh up to six times as much.

  Args:
    logits: [b, H, W].
    masks: [b, H, W] in 0..1, soft borders allowed.
    weighted: whether the weights act in the cross-entropy, too.

  Returns:
    [b].
  """
  logits = logits.astype(jnp.float32)
  window = (1, 31, 31)
  near = jax.lax.reduce_window(
    masks, 0.0, jax.lax.add, window, (1, 1, 1), 'SAME'
  )
  weights = 1 + 5 * jnp.abs(near / 31**2 - masks)
  entropy = jax.nn.softplus(logits) - logits * masks
  if weighted:
    total = (weights * entropy).sum((1, 2)) / weights.sum((1, 2))
  else:
    # Parity: an old option, given as text, makes the original's cross-entropy
    # a mean over pixels, and its weights cancel.
    total = entropy.mean((1, 2))
  p = jax.nn.sigmoid(logits)
  both = (p * masks * weights).sum((1, 2))
  all_ = ((p + masks) * weights).sum((1, 2))
  return total + 1 - (both + 1) / (all_ - both + 1)


def spatial_kl(teacher: Array, student: Array) -> Array:
  """KL divergence of distributions over places, in float32.

  Args:
    teacher: [b, h, w] logits, resized (by half pixels) to the student's size.
    student: [b, H, W] logits.

  Returns:
    [b]: sum over places of P log(P / S), P and S their softmax over places.
  """
  teacher, student = (
    resize.bilinear(
      x.astype(jnp.float32)[..., None],
      student.shape[1:],
      align_corners=False,
    ).reshape(x.shape[0], -1)
    for x in (teacher, student)
  )
  p, s = jax.nn.softmax(teacher), jax.nn.softmax(student)
  # Parity: the original's logarithms are of probabilities, kept from 0.
  return (p * (jnp.log(p + 1e-12) - jnp.log(s + 1e-12))).sum(-1)


def hierarchical_kl(maps: Sequence[Array], labels: Array) -> Array:
  """Correlation distillation from level to level (HDMNet, eq. 9).

  The labels teach the coarsest map, and every map the next finer one; no
  gradient reaches a teacher.

  Args:
    maps: per level, coarse to fine, [b, h, w] logits over query places.
    labels: [b, H, W] int; 1 is foreground.

  Returns:
    [b], the mean over levels.
  """
  # Parity: outside the foreground (void counts as outside) the original's
  # teacher is -1e9, before it is resized: only a coarse cell whose four pixels
  # are all foreground stays above that, and takes part.
  outside = (labels != 1).astype(jnp.float32)[..., None]
  size = maps[0].shape[1:]
  outside = resize.bilinear(outside, size, align_corners=False)[..., 0]
  teachers = [1 - (1 + 1e9) * outside, *map(jax.lax.stop_gradient, maps[:-1])]
  each = [spatial_kl(t, s) for t, s in zip(teachers, maps, strict=True)]
  return sum(each) / len(each)


def coarse_mse(
  teacher: tuple[Array, ...], student: tuple[Array, ...], some: Array
) -> Array:
  """Distance of the student's coarse maps from the teacher's (DistillFSS).

  Args:
    teacher: per level [b, n, h, w, m].
    student: the same shapes.
    some: [b, n] bool, ways with a shot; the others are left out.

  Returns:
    [b]: mean over ways of the mean over levels of the mean squared error; 0
    where no way has a shot.
  """
  per_way = jnp.stack(
    [
      ((x - y) ** 2).mean((2, 3, 4))
      for x, y in zip(teacher, student, strict=True)
    ]
  ).mean(0)
  return (per_way * some).sum(1) / jnp.maximum(some.sum(1), 1)


def map_bce(coarse: tuple[Array, ...], masks: Array) -> Array:
  """Binary cross-entropy of the mean coarse map (DCAMA's source training).

  Args:
    coarse: per level [b, 1, h, w, m].
    masks: [b, H, W] in {0, 1}.

  Returns:
    [b]: all maps of all levels are brought to the masks' size, averaged, and
    compared, mean over pixels.
  """
  size = masks.shape[1:]
  # Bringing to size is linear: a level's maps are summed first.
  total = sum(
    resize.bilinear(x[:, 0].sum(-1, keepdims=True).astype(jnp.float32), size)
    for x in coarse
  )
  mean = total[..., 0] / sum(x.shape[-1] for x in coarse)
  # Parity: the original clamps to 0..1 and its library the logarithm to -100;
  # a mean of exactly 0 or 1 then has a gradient of 1e12. Here it has none.
  mean = jnp.clip(mean, 1e-7, 1 - 1e-7)
  loss = masks * jnp.log(mean) + (1 - masks) * jnp.log1p(-mean)
  return -loss.mean((1, 2))
