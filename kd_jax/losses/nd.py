"""ND: regularisation of a feature's norm and direction."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial


def nd_loss(
  student_features: jax.Array,
  teacher_features: jax.Array,
  labels: jax.Array,
  class_means: jax.Array,
) -> jax.Array:
  """One minus the student's projection onto its class's direction.

  1 - <s, e_y> / max(||s||, ||t||), with e_y = c_y / ||c_y|| and c_y the mean of
  the teacher's features of class y over the training set. A student shorter
  than the teacher grows, a longer one only turns.

  Args:
    student_features: s [B, D], projected to the teacher's width.
    teacher_features: t [B, D].
    labels: y [B] int.
    class_means: c [num_classes, D], constants.

  Returns:
    [B] float32, from 0 to 2; 1 where all is zero.

  Raises:
    ValueError: for other ranks, unequal shapes, or labels that are no classes.

  Source: Wang et al., "Improving Knowledge Distillation via Regularizing
  Feature Norm and Direction", 2023, the ND loss.
  """
  student = checks.float_array("student_features", student_features, rank=2)
  teacher = checks.float_array("teacher_features", teacher_features, rank=2)
  means = checks.float_array("class_means", class_means, rank=2)
  checks.same_shape("student_features", student, "teacher_features", teacher)
  checks.same_width("teacher_features", teacher, "class_means", means)
  if labels.shape != student.shape[:1]:
    raise ValueError(
      f"labels: expected shape {student.shape[:1]}, one class for each feature,"
      f" got {labels.shape}"
    )
  labels = checks.integer_array("labels", labels, rank=1, below=means.shape[0])
  directions = spatial.l2_normalize(means)
  direction = jnp.take(directions, labels, 0, mode="fill")
  # A common factor changes nothing; the largest value keeps squares finite.
  largest = jnp.max(jnp.abs(jnp.concatenate([student, teacher], 1)), 1)
  largest = jax.lax.stop_gradient(largest)[:, None]
  largest = jnp.where(largest > 1e-30, largest, 1.0)
  student, teacher = student / largest, teacher / largest
  squares = jnp.maximum(
    jnp.sum(jnp.square(student), 1), jnp.sum(jnp.square(teacher), 1)
  )
  inverse = jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))
  return 1 - jnp.sum(student * direction, 1) * inverse
