"""CC: correlation congruence."""

import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.losses import checks


def cc_loss(
  student_embeddings: jax.Array,
  teacher_embeddings: jax.Array,
  *,
  axis_name: str | None = None,
) -> jax.Array:
  """Product of the embeddings' differences of neighbours in a batch.

  mean_b sum_d |s_bd - t_bd| |s_b+1,d - t_b+1,d| over the B - 1 pairs of an
  example b and the next; 0 for a batch of one. The order of the examples
  counts, which is random.

  A relational loss. With `axis_name`, the batch is that of all devices, in
  their order, and each device returns the loss of it.

  Args:
    student_embeddings: s, [B, D].
    teacher_embeddings: t, [B, D].
    axis_name: mapped axis over which the batch is gathered, or None.

  Returns:
    Scalar float32, in squared units of the embeddings.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV
  2019. Departure: the form of RepDistiller, whose published figures it has; the
  paper compares kernel matrices of the batch.

  >>> import jax.numpy as jnp
  >>> s = jnp.array([[1.0], [2.0], [3.0]])
  >>> float(cc_loss(s, jnp.zeros((3, 1))))
  4.0
  """
  student = checks.float_array("student_embeddings", student_embeddings, rank=2)
  teacher = checks.float_array("teacher_embeddings", teacher_embeddings, rank=2)
  checks.same_shape(
    "student_embeddings", student, "teacher_embeddings", teacher
  )
  apart = collectives.axis_gather(jnp.abs(student - teacher), axis_name)
  pairs = max(apart.shape[0] - 1, 1)
  return jnp.divide(jnp.sum(apart[:-1] * apart[1:]), pairs)
