"""OFA: one for all, distillation between unlike architectures."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax


def ofa_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array = 1.0,
  eps: float | jax.Array = 1.0,
) -> jax.Array:
  """Cross-entropy with a teacher that is raised at the label.

  -sum over c of ((p_c + y_c)^eps - y_c) log q_c: p and q are the teacher's and
  the student's softmax of logits / T, y is 1 at the label. An `eps` above 1
  weighs the label more and the other classes less; 1 is the plain teacher.

  Args:
    student_logits: [B, C], floating-point; of the network or of an exit.
    teacher_logits: [B, C], floating-point.
    labels: [B], integers in [0, C); under jit, others give NaN.
    temperature: T, above 0.
    eps: at least 1.

  Returns:
    [B] float32, in nats.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous
  Architectures in Knowledge Distillation", NeurIPS 2023, equation 8.

  >>> import jax.numpy as jnp
  >>> z = jnp.zeros((1, 2))
  >>> round(float(ofa_loss(z, z, jnp.array([0]))[0]), 4)  # log(2)
  0.6931
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  labels = checks.labels_of(labels, student)
  t = checks.number("temperature", temperature, above=0)
  eps = checks.number("eps", eps, least=1)
  one = softmax.is_label(labels, student.shape[1]).astype(jnp.float32)
  p = jax.nn.softmax(softmax.soften(teacher, t))
  log_q = jax.nn.log_softmax(softmax.soften(student, t))
  value = -jnp.sum(((p + one) ** eps - one) * log_q, axis=1)
  return jnp.where(labels < student.shape[1], value, jnp.nan)
