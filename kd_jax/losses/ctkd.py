"""CTKD: curriculum temperature."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax


def ctkd_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  theta: jax.Array | float,
  *,
  start: float | jax.Array,
  span: float | jax.Array,
) -> jax.Array:
  """KD at a learned temperature T = start + span * sigmoid(theta).

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    theta: scalar, learned to make the loss larger (see `reversed_gradient`).
    start: the lowest temperature, above 0.
    span: the highest less the lowest, at least 0.

  Returns:
    [B] float32, in nats times T^2.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI
  2023, the global temperature.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0]])
  >>> ctkd_loss(z, z, 1.0, start=1.0, span=20.0).tolist()
  [0.0]
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  t = ctkd_temperature(theta, start=start, span=span)
  return softmax.scaled_divergence(student, teacher, t)


def ctkd_temperature(
  theta: jax.Array | float,
  *,
  start: float | jax.Array,
  span: float | jax.Array,
) -> jax.Array:
  """The temperature start + span * sigmoid(theta); see `ctkd_loss`."""
  theta = checks.number("theta", theta)
  start = checks.number("start", start, above=0)
  span = checks.number("span", span, least=0)
  return start + span * jax.nn.sigmoid(theta)


def reversed_gradient(
  x: jax.Array, epoch: jax.Array | int, *, epochs: int
) -> jax.Array:
  """`x` with a gradient that turns round as training goes on.

  It is multiplied by (1 + cos(pi * epoch / epochs)) / 2 - 1, from 0 to -1: from
  no training of `x` to training against the loss.

  Args:
    x: an array.
    epoch: number of the epoch, from 1.
    epochs: after how many of them the factor stays -1.

  Returns:
    `x`.
  """
  epochs = checks.count("epochs", epochs)
  progress = jnp.minimum(epoch / epochs, 1.0)
  factor = 0.5 * (1 + jnp.cos(jnp.pi * progress)) - 1
  constant = jax.lax.stop_gradient(x)
  return constant + factor * (x - constant)
