"""FitNet: regression onto a hint layer."""

import jax

from kd_jax.losses import checks, spatial


def fitnet_loss(student_map: jax.Array, teacher_map: jax.Array) -> jax.Array:
  """Mean squared error between a regressed student map and the teacher's.

  mean over H, W, C of (r(f_s) - f_t)^2; the regressor r is the caller's.

  Args:
    student_map: [B, H, W, C], after the regressor.
    teacher_map: [B, H, W, C].

  Returns:
    [B] float32, in squared units of the map.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015,
  equation 3. Departure: the mean over the map instead of half the sum.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 2, 2, 3))
  >>> fitnet_loss(a, 3 * a).tolist()
  [4.0]
  """
  student = checks.float_array("student_map", student_map, rank=4)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_shape("student_map", student, "teacher_map", teacher)
  return spatial.mean_square(student, teacher)
