"""RKD: relational knowledge distillation."""

import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.losses import checks, spatial

# Squared distance of examples that rounding cannot tell apart; the largest
# offset of a batch is 1.
_COINCIDING = 1e-12


def rkd_loss(
  student_features: jax.Array,
  teacher_features: jax.Array,
  *,
  distance: float | jax.Array,
  angle: float | jax.Array,
  axis_name: str | None = None,
) -> jax.Array:
  """Difference of the distances and angles between the examples of a batch.

  distance * mean_ij h(d_ij^s - d_ij^t) + angle * mean_ijk h(a_ijk^s - a_ijk^t)
  with h(x) = x^2 / 2 for |x| < 1, else |x| - 1/2. d_ij is the Euclidean
  distance of examples i and j over its mean over i != j; a_ijk is the cosine of
  the angle at i between the directions to j and to k, 0 where one of them
  coincides with i.

  A relational loss. With `axis_name`, the batch is that of all devices. Each
  device then returns the part of its own examples i, scaled so that the mean
  over the devices is the loss.

  Args:
    student_features: [B, C].
    teacher_features: [B, C'].
    distance: weight of the distances, at least 0.
    angle: weight of the angles, at least 0.
    axis_name: mapped axis over which the batch is gathered, or None.

  Returns:
    Scalar float32, without a unit.

  Raises:
    ValueError: for other ranks, unequal batch sizes or integer features.

  Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, RKD-DA.
  Departure, as in the authors' code: means instead of sums.

  >>> import jax.numpy as jnp
  >>> x = jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 0.0]])
  >>> round(float(rkd_loss(x, 2 * x + 1, distance=25.0, angle=50.0)), 4)
  0.0
  """
  student = checks.float_array("student_features", student_features, rank=2)
  teacher = checks.float_array("teacher_features", teacher_features, rank=2)
  checks.same_batch("student_features", student, "teacher_features", teacher)
  distance = checks.number("distance", distance, least=0)
  angle = checks.number("angle", angle, least=0)
  (d_s, a_s), (d_t, a_t) = (
    _relations(x, axis_name) for x in (student, teacher)
  )
  return distance * _mean_huber(d_s - d_t) + angle * _mean_huber(a_s - a_t)


def _relations(
  x: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
  """Distances [B, N] and cosines [B, N, N] of N = B * devices examples."""
  size = x.shape[0]
  every = collectives.axis_gather(x, axis_name)
  # The origin does not count: near points far from it keep their digits.
  every = spatial.unit_range(every - every[:1], (0, 1))
  rows = size * collectives.axis_index(axis_name) + jnp.arange(size)
  own = every[rows]
  towards = every[None] - own[:, None]
  squares = jnp.sum(jnp.square(towards), axis=-1)
  # A compiler may leave rounding where an example meets itself.
  others = rows[:, None] != jnp.arange(len(every))[None]
  apart = others & (squares > _COINCIDING)
  lengths = jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
  sums = collectives.axis_gather(jnp.sum(lengths)[None], axis_name)
  mean = jnp.mean(sums) / (size * max(len(every) - 1, 1))
  directions = towards / jnp.where(apart, lengths, jnp.inf)[:, :, None]
  cosines = jnp.einsum(
    "ijc,ikc->ijk", directions, directions, precision=spatial.HIGHEST
  )
  return lengths / jnp.where(mean > 0, mean, 1.0), cosines


def _mean_huber(x: jax.Array) -> jax.Array:
  size = jnp.abs(x)
  return jnp.mean(jnp.where(size < 1, 0.5 * jnp.square(x), size - 0.5))
