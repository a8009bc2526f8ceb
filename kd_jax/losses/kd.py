"""Knowledge distillation by softened logits."""

import jax

from kd_jax.losses import checks, softmax


def kd_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
) -> jax.Array:
  """Divergence of the student's softened prediction from the teacher's.

  T^2 * sum_c p_c * (log p_c - log q_c), p = softmax(teacher / T), q =
  softmax(student / T). The factor T^2 keeps the gradient's size independent of
  T.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    temperature: T, above 0; a number, or one per example, [B] or [B, 1].

  Returns:
    [B] float32, in nats times T^2; 0 where the two agree.

  Raises:
    ValueError: for other ranks, unequal shapes, or a temperature of 0 or less.

  Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural
  Network", 2015, section 2.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0]])
  >>> kd_loss(z, z, temperature=4.0).tolist()
  [0.0]
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  t = checks.number(
    "temperature", temperature, above=0, examples=student.shape[0]
  )
  return softmax.scaled_divergence(student, teacher, t)
