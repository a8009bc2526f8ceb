"""NormKD: normalised logits."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax


def normkd_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
) -> jax.Array:
  """KD at temperatures in proportion to each example's spread of logits.

  T_t^2 * KL(softmax(teacher / T_t), softmax(student / T_s)) with T_t = T * std
  of the teacher's logits and T_s = T * std of the student's (unbiased), which
  carries gradient.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    temperature: T, above 0.

  Returns:
    [B] float32, in nats times T_t^2.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Chi et al., "NormKD: Normalized Logits for Knowledge Distillation",
  2023.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0, 3.0]])
  >>> round(float(normkd_loss(3 * z, z, temperature=2.0)[0]), 5)
  0.0
  """
  student, teacher, factor = normkd_logits(
    student_logits, teacher_logits, temperature=temperature
  )
  return factor * softmax.divergence(student, teacher)


def normkd_logits(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Logits over their own temperatures, for any loss at temperature 1.

  Args:
    student_logits: see `normkd_loss`.
    teacher_logits: see `normkd_loss`.
    temperature: see `normkd_loss`.

  Returns:
    student / T_s and teacher / T_t [B, C], and T_t^2 [B], float32.
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  t = checks.number("temperature", temperature, above=0)
  # Equal logits have no spread; any temperature gives an even prediction.
  t_s, t_t = (
    t * jnp.maximum(softmax.row_std(z), 1e-7) for z in (student, teacher)
  )
  return student / t_s, teacher / t_t, jnp.square(t_t[:, 0])
