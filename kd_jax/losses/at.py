"""AT: attention transfer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial


def _attention(x: jax.Array) -> jax.Array:
  """Normalised energy of each position: [B, H, W, C] -> [B, H * W]."""
  x = spatial.unit_range(x, (1, 2, 3))
  energy = jnp.mean(jnp.square(x), axis=-1)
  return spatial.l2_normalize(energy.reshape(x.shape[0], -1))


def at_loss(
  student_maps: jax.Array | Sequence[jax.Array],
  teacher_maps: jax.Array | Sequence[jax.Array],
) -> jax.Array:
  """Squared distance of normalised spatial attention maps.

  Q = A / ||A||_2 with A = mean over channels of f^2; the loss is the sum over
  layers of the mean over H, W of (Q_s - Q_t)^2. The larger map of a pair is
  first average-pooled to the size of the other.

  Args:
    student_maps: [B, H, W, C], or a sequence of such maps.
    teacher_maps: as many maps; sizes and channels may differ.

  Returns:
    [B] float32, without a unit.

  Raises:
    ValueError: for other ranks, unequal batches or numbers of maps.

  Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR
  2017, equation 2 with p = 2. Departure, as in the authors' code: the mean of
  the squared difference instead of its norm.

  >>> import jax.numpy as jnp
  >>> a = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
  >>> at_loss(a, 5 * a).tolist()
  [0.0]
  """
  students = checks.maps("student_maps", student_maps)
  teachers = checks.maps("teacher_maps", teacher_maps)
  checks.same_number("student_maps", students, "teacher_maps", teachers)
  loss = jnp.zeros(students[0].shape[0], jnp.float32)
  for student, teacher in zip(students, teachers):
    checks.same_batch("student_maps", student, "teacher_maps", teacher)
    student, teacher = spatial.pool_to_smaller(student, teacher)
    loss += spatial.mean_square(_attention(student), _attention(teacher))
  return loss
