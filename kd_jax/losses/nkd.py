"""NKD: normalised knowledge distillation."""

import jax

from kd_jax.losses import checks, softmax


def nkd_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array,
  gamma: float | jax.Array,
) -> jax.Array:
  """Cross-entropies of the label, and of the other classes among themselves.

  -p_y log q_y - gamma * T^2 * sum over c != y of n_c log m_c: p and q are the
  teacher's and the student's softmax at temperature 1, n and m their softmax
  over the classes other than the label y, of logits / T.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    labels: [B], integers in [0, C); under jit, others give NaN.
    temperature: T of the second part, above 0.
    gamma: weight of the second part, at least 0.

  Returns:
    [B] float32, in nats; without the cross-entropy with the labels.

  Raises:
    ValueError: for other ranks, unequal shapes, or fewer than three classes.

  Source: Yang et al., "From Knowledge Distillation to Self-Knowledge
  Distillation: A Unified Approach with Normalized Loss and Customized Soft
  Labels", ICCV 2023. Early revisions of the authors' code leave the label
  among the other classes.

  >>> import jax.numpy as jnp
  >>> z = jnp.zeros((1, 3))
  >>> loss = nkd_loss(z, z, jnp.array([0]), temperature=1.0, gamma=1.0)
  >>> round(float(loss[0]), 4)  # log(3) / 3 + log(2)
  1.0594
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  labels = checks.labels_of(labels, student)
  softmax.at_least_three(student)
  t = checks.number("temperature", temperature, above=0)
  gamma = checks.number("gamma", gamma, least=0)
  p = softmax.at_label(jax.nn.softmax(teacher), labels)
  log_q = softmax.at_label(jax.nn.log_softmax(student), labels)
  label = softmax.is_label(labels, student.shape[1])
  others = softmax.cross_entropy(
    softmax.soften(softmax.without(student, label), t),
    softmax.without(teacher / t, label),
  )
  return gamma * t**2 * others - p * log_q
