"""MLKD: multi-level logit distillation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.distributed import collectives
from kd_jax.losses import checks, softmax, spatial


def mlkd_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  *,
  temperature: float | jax.Array,
  other_temperatures: Sequence[float] = (),
  instance: float = 1.0,
  batch: float = 1.0,
  classes: float = 1.0,
  axis_name: str | None = None,
) -> jax.Array:
  """Alignment of predictions by example, by pairs of examples and of classes.

  The sum over the temperatures T of

    instance * mean_b T^2 * KL(p_b, q_b)
    + batch * ||Q Q^T - P P^T||_F^2 / B
    + classes * ||Q^T Q - P^T P||_F^2 / C

  with the rows p_b of P = softmax(teacher / T), and q_b of Q = softmax(student
  / T).

  A relational loss. With `axis_name`, the batch is that of all devices, and the
  mean over the devices is the loss of it.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    temperature: T, above 0.
    other_temperatures: further T.
    instance: weight, at least 0; a part of weight 0 is not computed.
    batch: likewise.
    classes: likewise.
    axis_name: mapped axis over which the batch is gathered, or None.

  Returns:
    Scalar float32; 0 where the two agree.

  Raises:
    ValueError: for other ranks, unequal shapes, or a number out of its range.

  Source: Jin, Wang and Lin, "Multi-level Logit Distillation", CVPR 2023. The
  authors' code also scales three terms by the shares of examples and classes
  whose confidence is at most the median, about a half; the paper does not.

  >>> import jax.numpy as jnp
  >>> z = jnp.array([[1.0, 2.0]])
  >>> float(mlkd_loss(z, z, temperature=4.0))
  0.0
  """
  # Division rounds: without it, the largest of huge logits may stick out.
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  weights = {"instance": instance, "batch": batch, "classes": classes}
  for name, weight in weights.items():
    checks.number(name, weight, least=0)
  total = jnp.zeros(())
  temperatures = [checks.number("temperature", temperature, above=0)]
  for other in other_temperatures:
    temperatures.append(checks.number("other_temperatures", other, above=0))
  for t in temperatures:
    if instance:
      own = softmax.scaled_divergence(student, teacher, t)
      total += instance * jnp.mean(own)
    if not batch and not classes:
      continue
    q, p = (
      collectives.axis_gather(jax.nn.softmax(softmax.soften(z, t)), axis_name)
      for z in (student, teacher)
    )
    if batch:
      total += batch * _distance(q.T, p.T) / len(q)
    if classes:
      total += classes * _distance(q, p) / q.shape[1]
  return total


def _distance(x: jax.Array, y: jax.Array) -> jax.Array:
  """||x^T x - y^T y||_F^2."""
  # Entries are differences of numbers that are much alike.
  gram_x, gram_y = (
    jnp.matmul(z.T, z, precision=spatial.HIGHEST) for z in (x, y)
  )
  return jnp.sum(jnp.square(gram_x - gram_y))
