"""RLD: refined logit distillation."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax


def rld_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array,
  confidence_temperature: float | jax.Array,
  alpha: float | jax.Array,
  beta: float | jax.Array,
) -> jax.Array:
  """Divergences that never teach a teacher's mistake.

  alpha * A^2 * KL((p_top, 1 - p_top), (q_y, 1 - q_y))
  + beta * T^2 * KL(n_t, n_s): p_top is the teacher's largest probability and
  q_y the student's of the label, both of logits / A; n is the softmax of
  logits / T over the classes that the teacher puts below the label.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    labels: [B], integers in [0, C); under jit, others give NaN.
    temperature: T of the second divergence, above 0.
    confidence_temperature: A of the first, above 0.
    alpha: weight of the first divergence, at least 0.
    beta: weight of the second, at least 0.

  Returns:
    [B] float32, in nats. The second part is 0 where no class is below the
    label.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025.

  >>> import jax.numpy as jnp
  >>> z, label = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([2])
  >>> settings = {"temperature": 4.0, "confidence_temperature": 1.0}
  >>> rld_loss(z, z, label, alpha=1.0, beta=8.0, **settings).tolist()
  [0.0]
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  labels = checks.labels_of(labels, student)
  t = checks.number("temperature", temperature, above=0)
  a = checks.number("confidence_temperature", confidence_temperature, above=0)
  alpha = checks.number("alpha", alpha, least=0)
  beta = checks.number("beta", beta, least=0)
  top = jnp.argmax(teacher, axis=1)
  confidence = softmax.divergence(
    softmax.label_or_not(student / a, labels),
    softmax.label_or_not(teacher / a, top),
  )
  not_below = teacher >= softmax.at_label(teacher, labels)[:, None]
  below = softmax.divergence(
    softmax.soften(softmax.without(student, not_below), t),
    softmax.soften(softmax.without(teacher, not_below), t),
  )
  return alpha * a**2 * confidence + beta * t**2 * below
