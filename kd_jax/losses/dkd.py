"""DKD: decoupled knowledge distillation."""

import jax

from kd_jax.losses import checks, softmax


def dkd_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array,
  alpha: float | jax.Array,
  beta: float | jax.Array,
) -> jax.Array:
  """Divergence about the label, and that among the other classes.

  T^2 * (alpha * KL(b_t, b_s) + beta * KL(n_t, n_s)): b is the pair of the
  label's probability and that of all other classes together, n the softmax over
  the other classes alone, both of logits / T. KD is the same with alpha = 1 and
  with 1 - b_t, different for each example, instead of beta.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    labels: [B], integers in [0, C); under jit, others give NaN.
    temperature: T, above 0.
    alpha: weight of the first divergence, at least 0.
    beta: weight of the second, at least 0.

  Returns:
    [B] float32, in nats times T^2.

  Raises:
    ValueError: for other ranks, unequal shapes, or fewer than three classes, of
      which the others would be one without alternative.

  Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, equation
  7; T^2 as in the authors' code.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0, 3.0]])
  >>> label = jnp.array([0])
  >>> dkd_loss(z, z, label, temperature=4.0, alpha=1.0, beta=8.0).tolist()
  [0.0]
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  labels = checks.labels_of(labels, student)
  softmax.at_least_three(student)
  t = checks.number("temperature", temperature, above=0)
  alpha = checks.number("alpha", alpha, least=0)
  beta = checks.number("beta", beta, least=0)
  about_label = softmax.divergence(
    softmax.label_or_not(softmax.soften(student, t), labels),
    softmax.label_or_not(softmax.soften(teacher, t), labels),
  )
  label = softmax.is_label(labels, student.shape[1])
  among_others = softmax.divergence(
    softmax.soften(softmax.without(student, label), t),
    softmax.soften(softmax.without(teacher, label), t),
  )
  return t**2 * (alpha * about_label + beta * among_others)
