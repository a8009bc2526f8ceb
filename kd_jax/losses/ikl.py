"""IKL: improved Kullback-Leibler divergence."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax


def ikl_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
  weight_temperature: float | jax.Array,
  alpha: float | jax.Array,
  beta: float | jax.Array,
) -> jax.Array:
  """Weighted squared differences of logits, and soft labels.

  alpha * H(softmax(teacher / T), softmax(student / T))
  + beta / 4 * sum_ij w_i w_j ((t_i - t_j) - (s_i - s_j))^2, with
  w = softmax(teacher / T'). The sum is twice the variance of t - s under w, so
  that C values do instead of C^2. There is no T^2.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    temperature: T, above 0.
    weight_temperature: T', above 0.
    alpha: weight of the soft labels, at least 0.
    beta: weight of the differences, at least 0.

  Returns:
    [B] float32, in nats and squared logits.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Cui et al., "Decoupled Kullback-Leibler Divergence Loss", NeurIPS
  2024, with the teacher's own prediction as weights; also called GKL.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0, 3.0]])
  >>> settings = {"temperature": 4.0, "weight_temperature": 4.0}
  >>> ikl_loss(z + 5.0, z, alpha=0.0, beta=1.0, **settings).tolist()
  [0.0]
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  t = checks.number("temperature", temperature, above=0)
  t_w = checks.number("weight_temperature", weight_temperature, above=0)
  alpha = checks.number("alpha", alpha, least=0)
  beta = checks.number("beta", beta, least=0)
  soft = softmax.cross_entropy(
    softmax.soften(student, t), softmax.soften(teacher, t)
  )
  weight = jax.nn.softmax(teacher / t_w)
  difference = teacher - student
  difference -= jnp.sum(weight * difference, axis=1, keepdims=True)
  variance = jnp.sum(weight * jnp.square(difference), axis=1)
  return alpha * soft + 0.5 * beta * variance
