"""FSP: flow of solution procedure."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial


def fsp_matrix(first: jax.Array, second: jax.Array) -> jax.Array:
  """Inner products of the channels of two maps of one network.

  G[i, j] = mean over H, W of first_i * second_j. The larger map is first
  average-pooled to the size of the other.

  Args:
    first: [B, H, W, C].
    second: [B, H', W', C'].

  Returns:
    [B, C, C'] float32.

  Raises:
    ValueError: for other ranks, unequal batches or aspect ratios.

  Source: Yim et al., "A Gift from Knowledge Distillation", CVPR 2017,
  equation 1.
  """
  first = checks.float_array("first", first, rank=4)
  second = checks.float_array("second", second, rank=4)
  first, second = spatial.pool_to_smaller(first, second)
  positions = first.shape[1] * first.shape[2]
  return (
    jnp.einsum("bhwc,bhwd->bcd", first, second, precision=spatial.HIGHEST)
    / positions
  )


def fsp_loss(
  student_maps: Sequence[jax.Array], teacher_maps: Sequence[jax.Array]
) -> jax.Array:
  """Squared distance of the FSP matrices of consecutive maps.

  Sum over the pairs (l, l + 1) of the mean over G of (G_s - G_t)^2, see
  `fsp_matrix`.

  Args:
    student_maps: two or more [B, H, W, C], from the shallowest.
    teacher_maps: as many, with the same channels; sizes may differ.

  Returns:
    [B] float32, in fourth powers of the maps' unit.

  Raises:
    ValueError: for other ranks, fewer than two maps, or unequal batches,
      channels or numbers of maps.

  Source: Yim et al., as `fsp_matrix`, equation 2. Departure, as in
  RepDistiller: the mean over the matrix instead of its sum.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 2, 2, 3))
  >>> fsp_loss([a, a], [2 * a, 2 * a]).tolist()
  [9.0]
  """
  students = checks.maps("student_maps", student_maps)
  teachers = checks.maps("teacher_maps", teacher_maps)
  checks.same_number("student_maps", students, "teacher_maps", teachers)
  if len(students) < 2:
    raise ValueError(
      "student_maps and teacher_maps: expected at least 2 maps, whose flow is"
      f" compared, got {len(students)}"
    )
  for student, teacher in zip(students, teachers):
    checks.same_batch("student_maps", student, "teacher_maps", teacher)
    checks.same_width("student_maps", student, "teacher_maps", teacher)
  loss = jnp.zeros(students[0].shape[0], jnp.float32)
  for i in range(1, len(students)):
    loss += spatial.mean_square(
      fsp_matrix(*students[i - 1 : i + 1]), fsp_matrix(*teachers[i - 1 : i + 1])
    )
  return loss
