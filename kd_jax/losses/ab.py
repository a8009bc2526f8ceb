"""AB: activation boundaries."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks

# Of the authors' code, which divides by 1,000 and sums three maps.
_SCALE = 3 / 1000


def ab_loss(
  student_maps: jax.Array | Sequence[jax.Array],
  teacher_maps: jax.Array | Sequence[jax.Array],
  *,
  margin: float | jax.Array = 1.0,
) -> jax.Array:
  """Hinge on the side of the teacher's activation boundary.

  A student's neuron s should lie beyond the margin m on the side of its
  teacher's t: (s - m)^2 if t > 0 and s <= m; (s + m)^2 if t <= 0 and s > -m;
  else 0. Summed over positions and channels, and over the L layers with the
  weights 2^(l - L) from 2^(1 - L) to 1; times 0.003, a constant of the
  authors' code.

  Args:
    student_maps: [B, H, W, C] before the activation, or a sequence of them from
      the shallowest to the deepest, after the connectors.
    teacher_maps: as many of the same shapes, before the activation.
    margin: m, above 0.

  Returns:
    [B] float32, in squared units of the maps.

  Raises:
    ValueError: for other ranks, unequal shapes or numbers of maps, and margins.

  Source: Heo et al., "Knowledge Transfer via Distillation of Activation
  Boundaries Formed by Hidden Neurons", AAAI 2019.

  >>> import jax.numpy as jnp
  >>> a = jnp.array([2.0, -3.0]).reshape(1, 1, 1, 2)
  >>> ab_loss(a, a).tolist()
  [0.0]
  """
  margin = checks.number("margin", margin, above=0)
  students = checks.maps("student_maps", student_maps)
  teachers = checks.maps("teacher_maps", teacher_maps)
  checks.same_number("student_maps", students, "teacher_maps", teachers)
  loss = jnp.zeros(students[0].shape[0], jnp.float32)
  for i, (student, teacher) in enumerate(zip(students, teachers)):
    checks.same_shape("student_maps", student, "teacher_maps", teacher)
    side = jnp.where(teacher > 0, 1.0, -1.0)
    missing = jax.nn.relu(margin - side * student)
    weight = 2.0 ** (i + 1 - len(students))
    loss += weight * jnp.sum(jnp.square(missing), axis=(1, 2, 3))
  return _SCALE * loss
