"""SRD: a simple recipe for distillation."""

import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.losses import checks, spatial

# Of the distances: large ones count more, as in the authors' code.
EXPONENT = 4
# A larger distance than this decides; the logarithm of 0 is infinite.
_LEAST = 1e-30


def srd_loss(
  student_feature: jax.Array,
  teacher_feature: jax.Array,
  *,
  axis_name: str | None = None,
) -> jax.Array:
  """Logarithm of the distances between two networks' normalised features.

  log sum over the batch and C of |f_s - f_t|^4.

  A relational loss: a function of the whole batch. With `axis_name`, the batch
  is that of all devices, and each returns the same.

  Args:
    student_feature: [B, C], projected and normalised over the batch.
    teacher_feature: [B, C], normalised over the batch.
    axis_name: mapped axis over which the batch is gathered, or None.

  Returns:
    Scalar float32; of equal features the logarithm of a tiny number.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Miles and Mikolajczyk, "Understanding the Role of the Projector in
  Knowledge Distillation", AAAI 2024, as the authors' code has it.

  >>> import jax.numpy as jnp
  >>> a = jnp.zeros((2, 3)).at[0, 0].set(1.0)
  >>> float(srd_loss(a, -a)) == float(jnp.log(16.0))
  True
  """
  student = checks.float_array("student_feature", student_feature, rank=2)
  teacher = checks.float_array("teacher_feature", teacher_feature, rank=2)
  checks.same_shape("student_feature", student, "teacher_feature", teacher)
  distance = collectives.axis_gather(student - teacher, axis_name)
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(distance)))
  total = jnp.sum(spatial.unit_range(distance, (0, 1)) ** EXPONENT)
  visible = largest > _LEAST
  log_total = jnp.log(jnp.where(visible, total, 1.0))
  return log_total + EXPONENT * jnp.log(jnp.maximum(largest, _LEAST))
