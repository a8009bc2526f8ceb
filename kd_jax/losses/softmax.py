"""Predictions from logits, and divergences that do not cancel."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks

# Stands for minus infinity, whose differences are NaN.
_NEVER = -1e30
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


def soften(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
  """Logits over a temperature, less a constant: the softmax is the same.

  XLA may round a division in two ways in two places. Of huge logits, what is
  then left of the largest would be above 0, and its exponential infinite.

  Args:
    logits: [..., C] float32.
    temperature: T, a number or an array that broadcasts.

  Returns:
    (logits - their maximum) / T.
  """
  largest = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
  return (logits - largest) / temperature


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


def cross_entropy(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """-sum_c softmax(teacher)_c log softmax(student)_c: [B, C] twice -> [B]."""
  return -jnp.sum(
    jax.nn.softmax(teacher) * jax.nn.log_softmax(student), axis=-1
  )


def at_label(x: jax.Array, labels: jax.Array) -> jax.Array:
  """The entry of each row's label: [B, C] and [B] -> [B]; NaN for label C."""
  return jnp.take_along_axis(x, labels[:, None], axis=1, mode="fill")[:, 0]


def without(logits: jax.Array, classes: jax.Array) -> jax.Array:
  """Logits with probability 0 in `classes`, a mask [B, C]."""
  return jnp.where(classes, _NEVER, logits)


def is_label(labels: jax.Array, num_classes: int) -> jax.Array:
  """Mask [B, C] of each row's label."""
  return labels[:, None] == jnp.arange(num_classes)[None]


def label_or_not(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Two logits [B, 2] of the classes "the label" and "any other"."""
  other = without(logits, is_label(label, logits.shape[1]))
  return jnp.stack(
    [at_label(logits, label), jax.nn.logsumexp(other, axis=-1)], axis=-1
  )


def standardize_logits(logits: jax.Array) -> jax.Array:
  """Logits of each example less their mean, over their standard deviation.

  (z - mean z) / (std z + 1e-7) with the unbiased deviation: only the order and
  the relative distances of a teacher's logits count then.

  Args:
    logits: [B, C], floating-point.

  Returns:
    [B, C] float32.

  Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR
  2024.
  """
  z = checks.float_array("logits", logits, rank=2)
  z -= jnp.mean(z, axis=1, keepdims=True)
  return z / (row_std(z) + 1e-7)


def row_std(logits: jax.Array) -> jax.Array:
  """Unbiased standard deviation of each row [B, 1], with a finite gradient."""
  count = checks.count("number of classes", logits.shape[1], least=2)
  largest = jnp.max(jnp.abs(logits), axis=1, keepdims=True)
  scale = jax.lax.stop_gradient(jnp.maximum(largest, 1.0))
  x = logits / scale
  x -= jnp.mean(x, axis=1, keepdims=True)
  squares = jnp.sum(jnp.square(x), axis=1, keepdims=True) / (count - 1)
  varies = squares > 1e-24
  root = jnp.sqrt(jnp.where(varies, squares, 1.0))
  return scale * jnp.where(varies, root, 0.0)


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
  value = divergence(soften(student, temperature), soften(teacher, temperature))
  if isinstance(temperature, jax.Array) and temperature.ndim:
    temperature = temperature[:, 0]
  return temperature**2 * value


def at_least_three(logits: jax.Array) -> None:
  """Raises ValueError for [B, C] of fewer than three classes.

  With two, only one is other than the label: it has nothing to differ from.
  """
  if logits.shape[1] < 3:
    raise ValueError(
      "student_logits: expected at least 3 classes, got "
      f"{logits.shape[1]}; use kd_loss for two"
    )
