"""SimKD: feature alignment for the reused teacher classifier."""

import jax

from kd_jax.losses import checks, spatial


def simkd_loss(student_map: jax.Array, teacher_map: jax.Array) -> jax.Array:
  """Mean squared error between the projected last map and the teacher's.

  mean over H, W, C of (P(f_s) - f_t)^2: the method's only term, without labels
  or logits. Pool the larger map to the other's size before the projector
  (`spatial.pool_to_smaller`).

  Args:
    student_map: P(f_s), [B, H, W, C], after the projector.
    teacher_map: f_t, [B, H, W, C], the map that the classifier's pool reads.

  Returns:
    [B] float32, in squared units of the map.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Chen et al., "Knowledge Distillation with the Reused Teacher
  Classifier", CVPR 2022, equation 2.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 2, 2, 3))
  >>> simkd_loss(a, 3 * a).tolist()
  [4.0]
  """
  student = checks.float_array("student_map", student_map, rank=4)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_shape("student_map", student, "teacher_map", teacher)
  return spatial.mean_square(student, teacher)
