"""LumiNet: logits as the batch sees them."""

import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.losses import checks, softmax


def _perceived(logits: jax.Array, axis_name: str | None) -> jax.Array:
  """Own rows [B, C], standardised per class over all devices' rows."""
  every = collectives.axis_gather(logits, axis_name)
  # Squares of huge logits would overflow.
  scale = jnp.maximum(jnp.max(jnp.abs(every)), 1.0)
  scale = jax.lax.stop_gradient(scale)
  own, every = logits / scale, every / scale
  mean = jnp.mean(every, axis=0, keepdims=True)
  variance = jnp.mean(jnp.square(every - mean), axis=0, keepdims=True)
  return (own - mean) * jax.lax.rsqrt(variance + 1e-5 / jnp.square(scale))


def luminet_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
  axis_name: str | None = None,
) -> jax.Array:
  """Divergence of predictions from logits standardised over the batch.

  KL(softmax(h_t / T), softmax(h_s / T)) with h = (z - mean z) / sqrt(var z +
  1e-5), mean and variance of each class over the batch; without T^2.

  A relational loss. With `axis_name`, mean and variance are those of all
  devices' examples, and the mean over the devices is the loss.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    temperature: T, above 0.
    axis_name: mapped axis over which the batch is gathered, or None.

  Returns:
    Scalar float32, in nats.

  Raises:
    ValueError: for other ranks or unequal shapes.

  Source: Hossain et al., "LumiNet: The Bright Side of Perceptual Knowledge
  Distillation", 2023. The square of the authors' alpha weighs the term.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0], [4.0, 3.0]])
  >>> float(luminet_loss(z, z, temperature=4.0))
  0.0
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  t = checks.number("temperature", temperature, above=0)
  s, t_s = (_perceived(z, axis_name) / t for z in (student, teacher))
  return jnp.mean(softmax.divergence(s, t_s))
