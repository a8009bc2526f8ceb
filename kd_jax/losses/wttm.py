"""WTTM: weighted transformed teacher matching."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax


def wttm_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  exponent: float | jax.Array,
) -> jax.Array:
  """Divergence from a power of the teacher's prediction, weighted by its sum.

  U * KL(p^g / U, softmax(student)) with p = softmax(teacher), g the exponent
  and U = sum_c p_c^g, which is large for an even prediction.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    exponent: g, above 0; 1 / T of a teacher's temperature T.

  Returns:
    [B] float32, in nats.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher
  Matching", ICLR 2024.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0]])
  >>> wttm_loss(0.5 * z, z, exponent=0.5).tolist()
  [0.0]
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  exponent = checks.number("exponent", exponent, above=0)
  log_p = jax.nn.log_softmax(teacher)
  weight = jnp.sum(jnp.exp(exponent * log_p), axis=1)
  return weight * softmax.divergence(student, exponent * teacher)
