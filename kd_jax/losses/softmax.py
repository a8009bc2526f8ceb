"""Divergences of softened predictions that do not cancel."""

import jax
import jax.numpy as jnp

# exp of it is well inside float32.
_LARGE = 80.0


def _weighted_remainder(log_p: jax.Array, x: jax.Array) -> jax.Array:
  """p * (exp(x) - 1 - x), to full relative precision; log_p + x < `_LARGE`."""
  p = jnp.exp(log_p)
  small = jnp.abs(x) < 0.5
  y = jnp.where(small, x, 0.0)
  # Horner form of x^2 (1/2! + x/3! + .. + x^8/10!).
  series = jnp.zeros_like(y)
  for n in range(10, 2, -1):
    series = (series + 1.0) * y / n
  series = (series + 1.0) * jnp.square(y) / 2
  return jnp.where(small, p * series, jnp.exp(log_p + x) - p * (1.0 + x))


def divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """KL of the student's softmax from the teacher's, over the last axis.

  sum_c p_c (log p_c - log q_c) loses all digits where the two predictions are
  alike, as they are at a high temperature. With p = softmax(t), d = s - t and
  e = d - sum_c p_c d_c, it equals log(1 + sum_c p_c (exp(e_c) - 1 - e_c)), a
  sum of positive numbers. Where one of them overflows, nothing cancels, and the
  plain form serves.

  Args:
    student: s, [..., C] float32 logits over the temperature.
    teacher: t, of the same shape.

  Returns:
    [...] float32, in nats; 0 where the predictions agree.
  """
  s, t = (
    x - jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    for x in (student, teacher)
  )
  log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
  p = jnp.exp(log_p)
  plain = jnp.sum(p * (log_p - log_q), axis=-1)
  e = s - t
  e -= jnp.sum(p * e, axis=-1, keepdims=True)
  alike = jnp.max(log_p + e, axis=-1) < _LARGE
  e = jnp.where(alike[..., None], e, 0.0)
  close = jnp.log1p(jnp.sum(_weighted_remainder(log_p, e), axis=-1))
  return jnp.where(alike, close, plain)


def scaled_divergence(
  student: jax.Array, teacher: jax.Array, temperature: float | jax.Array
) -> jax.Array:
  """T^2 * KL(softmax(teacher / T), softmax(student / T)) of each example.

  Args:
    student: [B, C] float32 logits.
    teacher: [B, C].
    temperature: T, a number or [B, 1].

  Returns:
    [B] float32.
  """
  value = divergence(student / temperature, teacher / temperature)
  if isinstance(temperature, jax.Array) and temperature.ndim:
    temperature = temperature[:, 0]
  return temperature**2 * value
