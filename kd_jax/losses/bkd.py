"""BKD: binary knowledge distillation."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks


def bkd_loss(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
  """Binary cross-entropy of every class with the teacher's probability.

  mean over classes of -p log sigmoid(s) - (1 - p) log sigmoid(-s), with
  p = softmax(teacher).

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.

  Returns:
    [B] float32, in nats.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Hao et al., "Revisit the Power of Vanilla Knowledge Distillation: from
  Small Scale to Large Scale", NeurIPS 2023.

  >>> import jax.numpy as jnp
  >>> round(float(bkd_loss(jnp.zeros((1, 2)), jnp.ones((1, 2)))[0]), 4)
  0.6931
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  p = jax.nn.softmax(teacher)
  return jnp.mean(jax.nn.softplus(student) - p * student, axis=1)
