"""SRRL: softmax-regression representation learning."""

import jax

from kd_jax.losses import checks, spatial


def srrl_loss(
  student_feature: jax.Array,
  student_logits: jax.Array,
  teacher_feature: jax.Array,
  teacher_logits: jax.Array,
) -> jax.Array:
  """Squared errors of the teacher's pooled feature and of its logits.

  mean over C of (x - f_t)^2 + mean over K of (W x + b - z_t)^2, where x is the
  student's pooled feature after its connector and W, b the teacher's frozen
  classifier.

  Args:
    student_feature: x, [B, C].
    student_logits: W x + b, [B, K]: the teacher's classifier applied to x.
    teacher_feature: f_t, [B, C], the teacher's pooled feature.
    teacher_logits: z_t, [B, K].

  Returns:
    [B] float32, the sum of both squared errors.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Yang et al., "Knowledge Distillation via Softmax Regression
  Representation Learning", ICLR 2021, equations 4 and 6 (L2 form).

  >>> import jax.numpy as jnp
  >>> x, z = jnp.ones((1, 3)), jnp.ones((1, 5))
  >>> srrl_loss(x, z, 2 * x, 3 * z).tolist()
  [5.0]
  """
  x = checks.float_array("student_feature", student_feature, rank=2)
  z_s = checks.float_array("student_logits", student_logits, rank=2)
  target = checks.float_array("teacher_feature", teacher_feature, rank=2)
  z_t = checks.float_array("teacher_logits", teacher_logits, rank=2)
  checks.same_shape("student_feature", x, "teacher_feature", target)
  checks.same_shape("student_logits", z_s, "teacher_logits", z_t)
  return spatial.mean_square(x, target) + spatial.mean_square(z_s, z_t)
