"""OFD: partial distance between maps before their activation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial

# A channel that is negative less often than this has no mean worth estimating:
# the margin is then this many deviations below 0.
RARE, RARE_DEVIATIONS = 1e-3, 3.0


def ofd_margin(scale: jax.Array, bias: jax.Array) -> jax.Array:
  """Expected value of a teacher's channel where it is negative.

  m = E[x | x < 0] = mu - s pdf(mu / s) / cdf(-mu / s) of the normal
  distribution with s = |scale| and mu = bias, which BatchNorm gives its
  channels. m = -3 s where cdf(-mu / s) <= 0.001.

  Args:
    scale: [C], of the BatchNorm before the activation.
    bias: [C], likewise.

  Returns:
    [C] float32, at most 0, in units of the map.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV
  2019, section 3; the case of rare negatives is from the authors' code.
  """
  deviation = jnp.abs(checks.float_array("scale", scale, rank=1))
  mean = checks.float_array("bias", bias, rank=1)
  checks.same_shape("scale", deviation, "bias", mean)
  spread = deviation > 0
  z = jnp.where(spread, mean / jnp.where(spread, deviation, 1.0), 0.0)
  negative = jax.scipy.stats.norm.cdf(-z)
  expected = mean - deviation * jax.scipy.stats.norm.pdf(z) / jnp.maximum(
    negative, RARE
  )
  # Without a spread the channel is its mean.
  rare = jnp.where(spread, negative <= RARE, mean > 0)
  return jnp.where(rare, -RARE_DEVIATIONS * deviation, expected)


def ofd_loss(
  student_maps: jax.Array | Sequence[jax.Array],
  teacher_maps: jax.Array | Sequence[jax.Array],
  margins: jax.Array | Sequence[jax.Array],
) -> jax.Array:
  """Partial squared distance to a teacher's margin ReLU, over stages.

  Sum over L stages i = 1..L of 2^(i - L) times the sum over H, W, C of

    0 if s <= t' <= 0, else (s - t')^2,   with t' = max(t, m).

  Where the teacher is negative, the student only has to be below it, or below
  the margin m. A teacher's map is average-pooled to the student's size first.

  Args:
    student_maps: [B, H, W, C] or a sequence, before the activation, after the
      connector.
    teacher_maps: as many, [B, H', W', C], before the activation.
    margins: as many, [C], at most 0; see `ofd_margin`.

  Returns:
    [B] float32, in squared units of the maps.

  Raises:
    ValueError: for other ranks, unequal numbers, batches or channels.

  Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV
  2019, section 3; the stages' weights are from the authors' code.

  >>> import jax.numpy as jnp
  >>> teacher = jnp.array([2.0, -1.0, -9.0]).reshape(1, 1, 1, 3)
  >>> ofd_loss(0 * teacher, teacher, jnp.full(3, -3.0)).tolist()
  [14.0]
  """
  students = checks.maps("student_maps", student_maps)
  teachers = checks.maps("teacher_maps", teacher_maps)
  several = isinstance(margins, list | tuple)
  limits = list(margins) if several else [jnp.asarray(margins)]
  checks.same_number("student_maps", students, "teacher_maps", teachers)
  checks.same_number("student_maps", students, "margins", limits)
  loss = jnp.zeros(students[0].shape[0], jnp.float32)
  for student, teacher, margin in zip(students, teachers, limits):
    margin = checks.float_array("margins", margin, rank=1)
    checks.same_batch("student_maps", student, "teacher_maps", teacher)
    checks.same_width("student_maps", student, "teacher_maps", teacher)
    checks.same_width("teacher_maps", teacher, "margins", margin)
    size = (student.shape[1], student.shape[2])
    teacher = spatial.adaptive_average_pool(teacher, size)
    floor = jnp.expand_dims(margin, range(student.ndim - 1))
    above = student - jnp.maximum(teacher, floor)
    partial = jnp.where(teacher > 0, above, jnp.maximum(above, 0))
    loss = loss / 2 + jnp.sum(jnp.square(partial), axis=(1, 2, 3))
  return loss
