"""DIST: distillation from a stronger teacher."""

import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.losses import checks, softmax


def _correlation(p: jax.Array, q: jax.Array, axis: int) -> jax.Array:
  """Pearson's correlation of two matrices along an axis."""
  p, q = (x - jnp.mean(x, axis=axis, keepdims=True) for x in (p, q))
  norms = _norm(p, axis) * _norm(q, axis)
  return jnp.sum(p * q, axis=axis) / (norms + 1e-8)


def _norm(x: jax.Array, axis: int) -> jax.Array:
  """Length along an axis; 0 has a gradient of 0."""
  squares = jnp.sum(jnp.square(x), axis=axis)
  visible = squares > 1e-24
  return jnp.where(visible, jnp.sqrt(jnp.where(visible, squares, 1.0)), 0.0)


def dist_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
  beta: float | jax.Array,
  gamma: float | jax.Array,
  axis_name: str | None = None,
) -> jax.Array:
  """One minus the correlation of the predictions, over rows and over columns.

  T^2 * (beta * (1 - mean_b rho(p_b, q_b)) + gamma * (1 - mean_c rho(p_c, q_c)))
  with Pearson's rho of rows (an example's classes) and of columns (a class's
  examples) of p = softmax(student / T) and q = softmax(teacher / T).

  A relational loss. With `axis_name`, the batch is that of all devices, and
  each device returns the loss of it.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    temperature: T, above 0.
    beta: weight of the rows, at least 0.
    gamma: weight of the columns, at least 0.
    axis_name: mapped axis over which the batch is gathered, or None.

  Returns:
    Scalar float32, times T^2. A column of one example has the correlation 0.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Huang et al., "Knowledge Distillation from A Stronger Teacher",
  NeurIPS 2022; T^2 and 1e-8 in the denominator as in the authors' code.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0], [4.0, 3.0]])
  >>> loss = dist_loss(z, z, temperature=1.0, beta=1.0, gamma=1.0)
  >>> abs(round(float(loss), 5))
  0.0
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  t = checks.number("temperature", temperature, above=0)
  beta = checks.number("beta", beta, least=0)
  gamma = checks.number("gamma", gamma, least=0)
  p, q = (
    collectives.axis_gather(jax.nn.softmax(softmax.soften(z, t)), axis_name)
    for z in (student, teacher)
  )
  rows, columns = (1 - jnp.mean(_correlation(p, q, axis)) for axis in (1, 0))
  return t**2 * (beta * rows + gamma * columns)
