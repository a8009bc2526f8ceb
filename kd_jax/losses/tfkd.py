"""Tf-KD: teacher-free knowledge distillation."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax


def tfkd_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
) -> jax.Array:
  """KD over the number of classes, from a teacher of the student's own network.

  T^2 / C * KL(softmax(teacher / T), softmax(student / T)).

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    temperature: T, above 0.

  Returns:
    [B] float32, in nats times T^2 / C.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing
  Regularization", CVPR 2020, the self-training form. Departure, as in the
  authors' code: divided by C, on which their weights depend.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0]])
  >>> tfkd_loss(z, z, temperature=20.0).tolist()
  [0.0]
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  t = checks.number("temperature", temperature, above=0)
  value = softmax.scaled_divergence(student, teacher, t)
  return value / student.shape[1]


def tfkd_regularization(
  student_logits: jax.Array,
  labels: jax.Array,
  *,
  temperature: float | jax.Array,
  correct_prob: float | jax.Array,
) -> jax.Array:
  """Divergence from a hand-made teacher that is right but not certain.

  KL(softmax(u / T), softmax(student)) / C with u = a for the label and
  (1 - a) / (C - 1) for every other class. The student has no temperature.

  Args:
    student_logits: [B, C], floating-point.
    labels: [B], integers in [0, C); under jit, others give NaN.
    temperature: T, above 0.
    correct_prob: a, in (0, 1].

  Returns:
    [B] float32, in nats over C.

  Raises:
    ValueError: for other ranks or shapes, or values out of range.

  Source: as `tfkd_loss`, the manually designed form.

  >>> import jax.numpy as jnp
  >>> z, label = jnp.array([[0.9, 0.1]]) / 20.0, jnp.array([0])
  >>> tfkd_regularization(z, label, temperature=20.0, correct_prob=0.9).tolist()
  [0.0]
  """
  student = checks.float_array("student_logits", student_logits, rank=2)
  labels = checks.labels_of(labels, student)
  t = checks.number("temperature", temperature, above=0)
  a = checks.number("correct_prob", correct_prob, above=0, most=1)
  classes = checks.count("number of classes", student.shape[1], least=2)
  label = softmax.is_label(labels, classes)
  virtual = jnp.where(label, a, (1 - a) / (classes - 1)) / t
  exists = jnp.where(labels < classes, 1.0, jnp.nan)
  return exists * softmax.divergence(student, virtual) / classes
