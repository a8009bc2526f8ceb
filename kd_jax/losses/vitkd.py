"""ViTKD: feature distillation of vision transformers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses import checks


def vitkd_loss(
  student_low: Sequence[jax.Array],
  teacher_low: Sequence[jax.Array],
  generated: jax.Array,
  teacher_high: jax.Array,
  mask: jax.Array,
  *,
  alpha: float | jax.Array,
  beta: float | jax.Array,
  mask_ratio: float | jax.Array,
) -> jax.Array:
  """Mimics the first blocks, and generates the last from a part of it.

  alpha * E(low) + beta / mask_ratio * E(high), where E is a sum of squared
  errors: over all tokens of the first blocks, and over the masked tokens of the
  last.

  Args:
    student_low: grids of tokens [B, H, W, D] of the first blocks, projected.
    teacher_low: the teacher's, of the same shapes.
    generated: [B, H, W, D], from the student's tokens that are not masked.
    teacher_high: [B, H, W, D], the teacher's last block.
    mask: [B, H, W], 1 for a masked token, else 0.
    alpha: weight of the first blocks, at least 0.
    beta: weight of the last, at least 0.
    mask_ratio: share of masked tokens, above 0 and at most 1.

  Returns:
    [B] float32, in squared units of the tokens.

  Raises:
    ValueError: for other ranks, unequal shapes or numbers of blocks.

  Source: Yang et al., "ViTKD: Practical Guidelines for ViT Feature Knowledge
  Distillation", 2022, equations 1 to 5; weights as in the authors' code.

  >>> import jax.numpy as jnp
  >>> x, half = jnp.ones((1, 2, 2, 3)), jnp.array([[[1.0, 0.0], [1.0, 0.0]]])
  >>> weights = {"alpha": 1.0, "beta": 1.0, "mask_ratio": 0.5}
  >>> vitkd_loss([x], [2 * x], x, 3 * x, half, **weights).tolist()
  [60.0]
  """
  students = checks.maps("student_low", student_low)
  teachers = checks.maps("teacher_low", teacher_low)
  checks.same_number("student_low", students, "teacher_low", teachers)
  made = checks.float_array("generated", generated, rank=4)
  target = checks.float_array("teacher_high", teacher_high, rank=4)
  checks.same_shape("generated", made, "teacher_high", target)
  masked = checks.float_array("mask", mask, rank=3)
  checks.same_shape("mask", masked, "teacher_high", target[..., 0])
  alpha = checks.number("alpha", alpha, least=0)
  beta = checks.number("beta", beta, least=0)
  ratio = checks.number("mask_ratio", mask_ratio, above=0, most=1)
  high = jnp.sum(jnp.square(masked[..., None] * (made - target)), (1, 2, 3))
  low = jnp.zeros_like(high)
  for student, teacher in zip(students, teachers):
    checks.same_shape("student_low", student, "teacher_low", teacher)
    checks.same_batch("student_low", student, "generated", made)
    low += jnp.sum(jnp.square(student - teacher), axis=(1, 2, 3))
  return alpha * low + beta / ratio * high
