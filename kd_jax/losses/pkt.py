"""PKT: probabilistic knowledge transfer."""

import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.losses import checks, spatial

# Keeps the student's probabilities above 0, as in the authors' code.
_EPSILON = 1e-7


def pkt_loss(
  student_features: jax.Array,
  teacher_features: jax.Array,
  *,
  axis_name: str | None = None,
) -> jax.Array:
  """Divergence of the probabilities that examples of a batch are neighbours.

  mean_ij p_ij^t log((p_ij^t + 1e-7) / (p_ij^s + 1e-7)), where p_ij is
  (1 + cos(f_i, f_j)) / 2 over its sum over j; j = i counts.

  A relational loss. With `axis_name`, the batch is that of all devices. Each
  device then returns the part of its own examples i, scaled so that the mean
  over the devices is the loss.

  Args:
    student_features: [B, C].
    teacher_features: [B, C'].
    axis_name: mapped axis over which the batch is gathered, or None.

  Returns:
    Scalar float32, in nats over B.

  Raises:
    ValueError: for other ranks, unequal batch sizes or integer features.

  Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic
  Knowledge Transfer", ECCV 2018, cosine kernel. Departure, as in the authors'
  code: a mean instead of a sum.

  >>> import jax.numpy as jnp
  >>> x = jnp.array([[1.0, 2.0], [3.0, -4.0]])
  >>> float(pkt_loss(x, 2 * x))
  0.0
  """
  student = checks.float_array("student_features", student_features, rank=2)
  teacher = checks.float_array("teacher_features", teacher_features, rank=2)
  checks.same_batch("student_features", student, "teacher_features", teacher)
  p = _neighbours(teacher, axis_name)
  # With r = (p_s - p_t) / (p_t + e), a row is -sum p_t log(1 + r). What cancels
  # in it is left out: sum p_t r = -e sum r, as both p sum to 1.
  r = (_neighbours(student, axis_name) - p) / (p + _EPSILON)
  return jnp.mean(p * (r - jnp.log1p(r)) + _EPSILON * r)


def _neighbours(x: jax.Array, axis_name: str | None) -> jax.Array:
  """Rows of probabilities: [B, B * devices]."""
  rows = spatial.l2_normalize(spatial.unit_range(x, (1,)))
  columns = collectives.axis_gather(rows, axis_name)
  cosines = jnp.matmul(rows, columns.T, precision=spatial.HIGHEST)
  # Rounding may pass -1.
  likely = jnp.maximum(1 + cosines, 0.0)
  total = jnp.sum(likely, axis=1, keepdims=True)
  return likely / total
