"""SP: similarity-preserving distillation."""

import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.losses import checks, spatial


def similarity_matrix(
  x: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
  """Inner products between the examples of a batch.

  Rows are the device's own examples, columns those of all devices.

  Args:
    x: [B, ...], floating-point; flattened to one vector per example, so any
      rank of at least 2.
    axis_name: mapped axis of the devices, or None for the local batch.

  Returns:
    [B, B * devices] float32.
  """
  rows = checks.float_array("x", x)
  rows = rows.reshape(rows.shape[0], -1)
  columns = collectives.axis_gather(rows, axis_name)
  # Methods that normalise or attend to these products amplify the rounding of
  # TF32 and bfloat16.
  return jnp.matmul(rows, columns.T, precision=spatial.HIGHEST)


def sp_loss(
  student_map: jax.Array,
  teacher_map: jax.Array,
  *,
  axis_name: str | None = None,
) -> jax.Array:
  """Distance between the two networks' similarity matrices of a batch.

  ||G_s - G_t||_F^2 / B^2, G = F F^T with every row divided by its L2 norm,
  where row b of F is the flattened map of example b.

  A relational loss: a function of the whole batch. With `axis_name`, the batch
  is that of all devices. Each device then returns the part of its own rows,
  scaled so that the mean over the devices is the loss.

  Args:
    student_map: [B, H, W, C].
    teacher_map: [B, H', W', C'].
    axis_name: mapped axis over which the batch is gathered, or None.

  Returns:
    Scalar float32, without a unit.

  Raises:
    ValueError: for other ranks, unequal batch sizes or integer maps.

  Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV
  2019, equations 1 to 4, one layer.

  >>> import jax.numpy as jnp
  >>> a = jnp.array([[1.0, 0.0], [0.0, 2.0]]).reshape(2, 1, 1, 2)
  >>> float(sp_loss(a, 3 * a))
  0.0
  """
  student = checks.float_array("student_map", student_map, rank=4)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_batch("student_map", student, "teacher_map", teacher)
  difference = _unit_rows(student, axis_name) - _unit_rows(teacher, axis_name)
  return jnp.mean(jnp.square(difference))


def _unit_rows(x: jax.Array, axis_name: str | None) -> jax.Array:
  """Rows of the similarity matrix over their norms: [B, B * devices]."""
  rows = x.reshape(x.shape[0], -1)
  columns = collectives.axis_gather(rows, axis_name)
  # Each row may have its own scale, but the columns share one.
  rows, columns = (
    spatial.unit_range(rows, (1,)),
    spatial.unit_range(columns, (0, 1)),
  )
  return spatial.l2_normalize(
    jnp.matmul(rows, columns.T, precision=spatial.HIGHEST)
  )
