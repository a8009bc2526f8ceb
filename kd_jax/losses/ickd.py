"""ICKD: inter-channel correlation."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial


def ickd_loss(student_map: jax.Array, teacher_map: jax.Array) -> jax.Array:
  """Distance between the correlations of two maps' channels.

  ||G_s - G_t||_F^2 / C, where row i of G holds channel i's inner products with
  all channels over the positions of one image, divided by the row's L2 norm.

  Args:
    student_map: [B, H, W, C], embedded into the teacher's channels.
    teacher_map: [B, H', W', C].

  Returns:
    [B] float32, without a unit.

  Raises:
    ValueError: for other ranks, unequal batches or numbers of channels.

  Source: Liu et al., "Exploring Inter-Channel Correlation for
  Diversity-preserved Knowledge Distillation", ICCV 2021, with the norms and the
  1 / C of the authors' code for CIFAR. The code for ImageNet divides by the
  batch size once more: a matter of the weight.

  >>> import jax.numpy as jnp
  >>> a = jnp.array([[1.0, 0.0], [0.0, 2.0]]).reshape(1, 2, 1, 2)
  >>> ickd_loss(a, 3 * a).tolist()
  [0.0]
  """
  student = checks.float_array("student_map", student_map, rank=4)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  checks.same_batch("student_map", student, "teacher_map", teacher)
  checks.same_width("student_map", student, "teacher_map", teacher)
  difference = _correlation(student) - _correlation(teacher)
  return jnp.mean(jnp.sum(jnp.square(difference), axis=2), axis=1)


def _correlation(x: jax.Array) -> jax.Array:
  """Unit rows of inner products between channels: [B, C, C]."""
  x = spatial.unit_range(x, (1, 2, 3))
  products = jnp.einsum("bhwi,bhwj->bij", x, x, precision=spatial.HIGHEST)
  return spatial.l2_normalize(products)
