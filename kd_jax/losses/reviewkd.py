"""ReviewKD: knowledge review with a hierarchical context loss."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial

# Side lengths of the coarser views of a map, finest first.
CONTEXT_SIZES = (4, 2, 1)


def reviewkd_loss(
  student_maps: Sequence[jax.Array], teacher_maps: Sequence[jax.Array]
) -> jax.Array:
  """Hierarchical context loss: maps compared at several resolutions.

  Sum over levels of [E(f) + sum_k 2^-k E(pool_k f)] / (1 + sum_k 2^-k). E is
  the mean squared error. pool_k, k = 1, 2, .., average-pools to the side
  lengths 4, 2, 1, without those that are not below the map's height.

  Args:
    student_maps: per level [B, H, W, C], after the fusion modules; a pooled
      vector as [B, 1, 1, C].
    teacher_maps: of the teacher, of the same shapes.

  Returns:
    [B] float32, in squared units of the maps.

  Raises:
    ValueError: for other ranks, unequal shapes or numbers of levels.

  Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021,
  section 3.4 and the authors' weights.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 8, 8, 3))
  >>> reviewkd_loss([a], [3 * a]).tolist()
  [4.0]
  """
  students = checks.maps("student_maps", student_maps)
  teachers = checks.maps("teacher_maps", teacher_maps)
  checks.same_number("student_maps", students, "teacher_maps", teachers)
  loss = jnp.zeros(students[0].shape[0], jnp.float32)
  for student, teacher in zip(students, teachers):
    checks.same_shape("student_maps", student, "teacher_maps", teacher)
    # Pooling is linear: one pool of the difference serves both sides.
    difference = student - teacher
    level = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    weight, total = 1.0, 1.0
    for size in CONTEXT_SIZES:
      if size < student.shape[1]:
        weight /= 2.0
        total += weight
        coarse = spatial.adaptive_average_pool(difference, (size, size))
        level += weight * jnp.mean(jnp.square(coarse), axis=(1, 2, 3))
    loss += level / total
  return loss
