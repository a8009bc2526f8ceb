"""WSLD: weighted soft labels."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax


def wsld_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array,
) -> jax.Array:
  """Cross-entropy of soft labels, less for what the student knows better.

  T^2 * w * H(softmax(teacher / T), softmax(student / T)) with
  w = 1 - exp(-CE_s / CE_t), which has no gradient; CE is a network's
  cross-entropy with the label.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    labels: [B], integers in [0, C); under jit, others give NaN.
    temperature: T, above 0.

  Returns:
    [B] float32, in nats times T^2.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A
  Bias-Variance Tradeoff Perspective", ICLR 2021. Departure, as in the
  authors' code: the cross-entropies are at temperature 1.

  >>> import jax.numpy as jnp
  >>> z = jnp.zeros((1, 2))
  >>> loss = wsld_loss(z, z, jnp.array([0]), temperature=1.0)
  >>> round(float(loss[0]), 4)  # (1 - 1 / e) log(2)
  0.4382
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  labels = checks.labels_of(labels, student)
  t = checks.number("temperature", temperature, above=0)
  ce_s, ce_t = (
    -softmax.at_label(jax.nn.log_softmax(z), labels) for z in (student, teacher)
  )
  # A teacher that is certain leaves the weight at 1.
  weight = -jnp.expm1(-ce_s / jnp.maximum(ce_t, 1e-12))
  soft = softmax.cross_entropy(
    softmax.soften(student, t), softmax.soften(teacher, t)
  )
  return t**2 * jax.lax.stop_gradient(weight) * soft
