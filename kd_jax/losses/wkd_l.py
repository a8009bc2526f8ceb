"""WKD-L: Wasserstein distance between two predictions."""

import jax
import jax.numpy as jnp

from kd_jax.losses import checks, softmax, spatial

# Added to each sum of the iteration: bounds the factors of classes that no
# probability reaches.
_LEAST = 1e-8


def wkd_l_loss(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  cost: jax.Array,
  *,
  temperature: float | jax.Array,
  gamma: float | jax.Array,
  regularization: float | jax.Array,
  iterations: int,
) -> jax.Array:
  """Cost of moving the student's prediction onto the teacher's.

  -q_y log p_y + gamma * sum_ij F_ij cost_ij, p and q the student's and the
  teacher's softmax, y the label. F is the flow between the softmaxes of
  logits / T over the other classes that is cheapest for an entropic
  regularisation, by Sinkhorn's iteration from equal factors. The sum has no
  factor T^2.

  Factors are logarithms, and the sums over classes are matrix products with
  their largest factor divided out: memory is B * C, and nothing overflows.

  Args:
    student_logits: [B, C], floating-point.
    teacher_logits: [B, C], floating-point.
    labels: [B], integers in [0, C); under jit, others give NaN.
    cost: [C, C], at least 0, of moving probability from the student's class
      (row) to the teacher's (column); see `wkd_l_cost`.
    temperature: T, above 0.
    gamma: weight of the cost, at least 0.
    regularization: above 0; the smaller, the closer to the cheapest flow of
      all, the slower the iteration.
    iterations: how often both factors are computed.

  Returns:
    [B] float32, in nats.

  Raises:
    ValueError: for other ranks, unequal shapes, or fewer than three classes.

  Source: Lv, Yang and Li, "Wasserstein Distance Rivals Kullback-Leibler
  Divergence for Knowledge Distillation", NeurIPS 2024; iteration as in the
  authors' code.

  >>> import jax.numpy as jnp
  >>> z, cost = jnp.array([[0.0, 50.0, 0.0]]), 1.0 - jnp.eye(3)
  >>> loss = wkd_l_loss(
  ...   z, -z, jnp.array([0]), cost, temperature=1.0, gamma=2.0,
  ...   regularization=0.2, iterations=10,
  ... )
  >>> f"{float(loss[0]):.2f}"  # -0.5 log(exp(-50)), and all moves: 2 * 1
  '27.00'
  """
  student, teacher = checks.logits_of(student_logits, teacher_logits)
  labels = checks.labels_of(labels, student)
  softmax.at_least_three(student)
  cost = checks.float_array("cost", cost, rank=2)
  if cost.shape != (student.shape[1],) * 2:
    raise ValueError(
      f"cost: expected shape {(student.shape[1],) * 2}, the classes of the "
      f"logits twice, got {cost.shape}"
    )
  t = checks.number("temperature", temperature, above=0)
  gamma = checks.number("gamma", gamma, least=0)
  reg = checks.number("regularization", regularization, above=0)
  iterations = checks.count("iterations", iterations)
  of_label = -softmax.at_label(
    jax.nn.softmax(teacher), labels
  ) * softmax.at_label(jax.nn.log_softmax(student), labels)
  label = softmax.is_label(labels, student.shape[1])
  log_p, log_q = (
    jax.nn.log_softmax(softmax.soften(softmax.without(x, label), t))
    for x in (student, teacher)
  )
  kernel = jnp.exp(-cost / reg)
  # The label's factor is as its probability: none.
  log_u = jnp.where(label, log_p, -jnp.log(float(student.shape[1] - 1)))
  log_v = log_q
  for _ in range(iterations):
    log_v = log_q - _log_product(log_u, kernel)
    log_u = log_p - _log_product(log_v, kernel.T)
  largest = _largest(log_v)
  received = _product(jnp.exp(log_v - largest), (kernel * cost).T)
  return of_label + gamma * jnp.sum(jnp.exp(log_u + largest) * received, axis=1)


def wkd_l_cost(
  weights: jax.Array, *, sharpen: float | jax.Array = 1.0
) -> jax.Array:
  """Costs between classes from a classifier: 1 - exp(-sharpen (1 - cosine)).

  Args:
    weights: [C, D], each class's row of the teacher's classifier.
    sharpen: above 0; the larger, the more alike are the costs of unlike
      classes.

  Returns:
    [C, C] float32, in [0, 1); 0 on the diagonal.

  Raises:
    ValueError: for another rank or dtype.

  Source: see `wkd_l_loss`. The authors offer these costs besides those that
  they tabulate per teacher from linear CKA between classes.

  >>> import jax.numpy as jnp
  >>> wkd_l_cost(jnp.array([[1.0, 0.0], [3.0, 0.0]])).tolist()
  [[0.0, 0.0], [0.0, 0.0]]
  """
  rows = spatial.l2_normalize(checks.float_array("weights", weights, rank=2))
  sharpen = checks.number("sharpen", sharpen, above=0)
  cosine = jnp.matmul(rows, rows.T, precision=spatial.HIGHEST)
  return -jnp.expm1(-sharpen * jnp.maximum(1.0 - cosine, 0.0))


def wkd_decay(epoch: jax.Array | int, *, start: int, end: int) -> jax.Array:
  """WKD's factor of its losses: 1 up to `start`, then half a cosine down to 0.

  Args:
    epoch: number of the epoch, from 1.
    start: the last epoch with the full weight.
    end: the epoch that has none, and all after it; above `start`.

  Returns:
    Scalar float32 in [0, 1].

  Raises:
    ValueError: if the epochs are not in this order.
  """
  start = checks.count("start", start, least=0)
  end = checks.count("end", end, least=start + 1)
  progress = jnp.clip((epoch - start) / (end - start), 0.0, 1.0)
  return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def _largest(x: jax.Array) -> jax.Array:
  """[B, C] -> [B, 1], held constant."""
  return jax.lax.stop_gradient(jnp.max(x, axis=1, keepdims=True))


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
  return jnp.matmul(x, matrix, precision=spatial.HIGHEST)


def _log_product(log_x: jax.Array, kernel: jax.Array) -> jax.Array:
  """log(exp(log_x) @ kernel + `_LEAST`): [B, C] and [C, C] -> [B, C]."""
  largest = _largest(log_x)
  total = _product(jnp.exp(log_x - largest), kernel)
  return largest + jnp.log(total + _LEAST * jnp.exp(-largest))
