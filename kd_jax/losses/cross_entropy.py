"""Cross-entropy with the true labels."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks


def cross_entropy_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float | jax.Array = 0.0,
) -> jax.Array:
  """Negative log-likelihood of the label of each example, in nats.

  -sum_c q_c log softmax(z)_c with q = 1 - s on the label plus s / C on every
  class, where s is `label_smoothing`.

  Args:
    logits: [B, C], floating-point.
    labels: [B], integers in [0, C).
    label_smoothing: s, in [0, 1).

  Returns:
    [B] float32. Under jit, a label outside of [0, C) gives NaN.

  Raises:
    ValueError: for other ranks, shapes or dtypes, s outside [0, 1), or, where
      its value is known, a label outside of [0, C).

  >>> import jax.numpy as jnp
  >>> cross_entropy_loss(jnp.zeros((1, 2)), jnp.array([1])).tolist()
  [0.6931471824645996]
  """
  smoothing = checks.number(
    "label_smoothing", label_smoothing, least=0.0, below=1.0
  )
  logits = checks.float_array("logits", logits, rank=2)
  labels = checks.labels_of(labels, logits)
  log_p = jax.nn.log_softmax(logits)
  loss = -jnp.take_along_axis(log_p, labels[:, None], axis=1, mode="fill")
  loss = loss[:, 0]
  if isinstance(smoothing, int | float) and smoothing == 0:
    return loss
  return (1 - smoothing) * loss - smoothing * jnp.mean(log_p, 1)
