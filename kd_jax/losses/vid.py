"""VID: variational information distillation."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, spatial

# Keeps the variance above 0, where the likelihood has no bound.
MIN_VARIANCE = 1e-5


def vid_variance(log_scale: jax.Array) -> jax.Array:
  """Variance per channel, always above 0: softplus(log_scale) + 1e-5."""
  return jax.nn.softplus(log_scale.astype(jnp.float32)) + MIN_VARIANCE


def vid_loss(
  student_mean: jax.Array, variance: jax.Array, teacher_map: jax.Array
) -> jax.Array:
  """Negative log-likelihood of the teacher's map, without its constant.

  mean over H, W, C of 0.5 * ((mu - t)^2 / v_c + log v_c): the student predicts
  a Gaussian with mean mu and one variance v_c per channel.

  Args:
    student_mean: mu, [B, H, W, C], the regressed student map.
    variance: v, [C], above 0; see `vid_variance`.
    teacher_map: t, [B, H', W', C]. The larger map is pooled to the other.

  Returns:
    [B] float32, in nats per element.

  Raises:
    ValueError: for other ranks, unequal batches or channels.

  Source: Ahn et al., "Variational Information Distillation for Knowledge
  Transfer", CVPR 2019, equation 5.

  >>> import jax.numpy as jnp
  >>> a = jnp.ones((1, 2, 2, 3))
  >>> vid_loss(3 * a, jnp.ones(3), a).tolist()
  [2.0]
  """
  mean = checks.float_array("student_mean", student_mean, rank=4)
  variance = checks.positive_array("variance", variance, rank=1)
  teacher = checks.float_array("teacher_map", teacher_map, rank=4)
  mean, teacher = spatial.pool_to_smaller(mean, teacher)
  checks.same_shape("student_mean", mean, "teacher_map", teacher)
  checks.same_width("student_mean", mean, "variance", variance)
  variance = variance.reshape(1, 1, 1, -1)
  terms = jnp.square(mean - teacher) / variance + jnp.log(variance)
  return 0.5 * jnp.mean(terms, axis=(1, 2, 3))
