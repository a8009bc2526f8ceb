"""CRD: contrastive representation distillation, as pure functions.

One step, for embeddings v_s, v_t of unit length and two banks with one vector
per training example:

  indices = concatenate([positives, draw_negatives(...)])      [B, 1 + k]
  scores_s = crd_scores(v_s, bank_t, indices, temperature=...)
  scores_t = crd_scores(v_t, bank_s, indices, temperature=...)
  log_z_s, log_z_t = crd_log_normalizer(scores_s, N), ...       once, on the
    first batch
  loss = crd_loss(scores_s, scores_t, log_z_s, log_z_t, num_examples=N)
  bank_s = crd_update(bank_s, v_s, index, momentum=...)        likewise bank_t
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.losses import checks, spatial

# Keeps denominators above 0, as in the authors' code.
EPSILON = 1e-7


class ClassTable(NamedTuple):
  """The training set sorted by class.

  Attributes:
    order: [N] int32, positions of the examples, class after class.
    class_start: [C] int32, index in `order` of each class's first example.
    class_count: [C] int32, number of examples of each class.
  """

  order: jax.Array
  class_start: jax.Array
  class_count: jax.Array


def class_table(labels: jax.Array, num_classes: int) -> ClassTable:
  """Sorts the training set by class, once.

  Args:
    labels: [N] integers in [0, num_classes).
    num_classes: C.

  Returns:
    The `ClassTable`.

  Raises:
    ValueError: if `labels` are not [N] integers; outside of jit also if one is
      out of range or all are of one class.
  """
  known = checks.known_values(labels)
  num_classes = checks.count("num_classes", num_classes)
  labels = checks.integer_array(
    "train_labels", labels, rank=1, below=num_classes
  )
  if known is not None and known.min() == known.max():
    raise ValueError(
      "train_labels: expected at least two classes to contrast, got only "
      f"class {known.min()}"
    )
  count = jnp.zeros(num_classes, jnp.int32).at[labels].add(1)
  return ClassTable(
    order=jnp.argsort(labels, stable=True).astype(jnp.int32),
    class_start=jnp.cumsum(count) - count,
    class_count=count,
  )


def _keys(key: jax.Array, index: jax.Array) -> jax.Array:
  """One key per example, independent of the number of devices."""
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _class_blocks(
  index: jax.Array, labels: jax.Array, table: ClassTable
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(index, start and count of each row's class)."""
  checks.same_batch("index", index, "labels", labels)
  num_examples, num_classes = table.order.shape[0], table.class_count.shape[0]
  index = checks.integer_array("index", index, rank=1, below=num_examples)
  labels = checks.integer_array("labels", labels, rank=1, below=num_classes)
  start, count = (
    x.at[labels].get(mode="fill", fill_value=-1)
    for x in (table.class_start, table.class_count)
  )
  # A class of -1 examples marks a label or an index that does not exist.
  return index, start, jnp.where(index < num_examples, count, -1)


def draw_negatives(
  key: jax.Array,
  index: jax.Array,
  labels: jax.Array,
  table: ClassTable,
  *,
  k: int,
) -> jax.Array:
  """Draws examples of other classes, uniformly and with replacement.

  For a class of n examples, r is drawn from [0, N - n) and counted in the
  sorted order without the class's block. Nothing is rejected, so shapes are
  static.

  Args:
    key: key of the step.
    index: [B] int32, positions in the training set; each row's draw depends on
      the key and its own position only.
    labels: [B] integers, the classes of those examples.
    table: of the training set.
    k: number of negatives per example.

  Returns:
    [B, k] int32 positions in the training set; -1 in rows whose label or index
    is out of range under jit. `crd_scores` turns them into NaN.
  """
  k = checks.count("k", k)
  index, start, count = _class_blocks(index, labels, table)
  others = table.order.shape[0] - count

  def draw(row_key: jax.Array, row_others: jax.Array) -> jax.Array:
    return jax.random.randint(row_key, (k,), 0, row_others, jnp.int32)

  r = jax.vmap(draw)(_keys(key, index), others)
  r = jnp.where(r >= start[:, None], r + count[:, None], r)
  return jnp.where(count[:, None] < 0, -1, table.order[r])


def draw_positives(
  key: jax.Array, index: jax.Array, labels: jax.Array, table: ClassTable
) -> jax.Array:
  """Draws one example of the same class per row, uniformly (mode "relax").

  Args:
    key: key of the step.
    index: [B] int32, positions in the training set.
    labels: [B] integers, the classes of those examples.
    table: of the training set.

  Returns:
    [B] int32 positions in the training set; -1 as in `draw_negatives`.
  """
  index, start, count = _class_blocks(index, labels, table)

  def draw(row_key: jax.Array, row_count: jax.Array) -> jax.Array:
    return jax.random.randint(row_key, (), 0, row_count, jnp.int32)

  r = jax.vmap(draw)(_keys(key, index), count)
  return jnp.where(count < 0, -1, table.order[start + r])


def crd_scores(
  embedding: jax.Array,
  bank: jax.Array,
  indices: jax.Array,
  *,
  temperature: float | jax.Array,
  first_row: jax.Array | int | None = None,
) -> jax.Array:
  """Log of the unnormalised critic: <bank[indices_bk], embedding_b> / t.

  Args:
    embedding: [B, D], unit rows of one network.
    bank: [N, D], unit rows of the other network.
    indices: [B, 1 + k] integers in [0, N); column 0 is the positive.
    temperature: t, above 0.
    first_row: if `bank` is a shard of a larger one, the position of its first
      row there. Scores of positions outside the shard are 0, so the sum over
      all shards gives the scores of the whole bank.

  Returns:
    [B, 1 + k] float32. Under jit, a position outside of [0, N) gives NaN; of a
    shard, only a negative one does.

  Raises:
    ValueError: for other ranks, unequal B or D, t of 0 or less, or, where its
      value is known, a position out of range.
  """
  temperature = checks.number("temperature", temperature, above=0)
  embedding = checks.float_array("embedding", embedding, rank=2)
  bank = checks.float_array("bank", bank, rank=2)
  size = bank.shape[0] if first_row is None else np.iinfo(np.int32).max
  indices = checks.integer_array("indices", indices, rank=2, below=size)
  checks.same_batch("embedding", embedding, "indices", indices)
  checks.same_width("embedding", embedding, "bank", bank)
  invalid, owned = indices == size, None
  if first_row is not None:
    first_row = checks.integer_array("first_row", first_row, rank=0)
    indices, owned = _within(bank, indices - first_row)
    indices = jnp.where(owned, indices, 0)
  else:
    indices = jnp.where(invalid, 0, indices)
  if bank.shape[0] <= indices.shape[1] * bank.shape[1]:
    # Products with the whole bank take less memory than the gathered vectors:
    # 13 MB instead of 537 MB for 64 examples of CIFAR at k = 16384.
    products = jnp.matmul(embedding, bank.T, precision=spatial.HIGHEST)
    products = jnp.take_along_axis(products, indices, axis=1)
  else:
    products = jnp.einsum(
      "bd,bkd->bk", embedding, bank[indices], precision=spatial.HIGHEST
    )
  if owned is not None:
    products = jnp.where(owned, products, 0.0)
  return jnp.where(invalid, jnp.nan, products / temperature)


def _within(bank: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(rows, with those outside of the bank set to its size; whether inside)."""
  size = bank.shape[0]
  owned = (rows >= 0) & (rows < size)
  return jnp.where(owned, rows, size), owned


def crd_log_normalizer(scores: jax.Array, num_examples: int) -> jax.Array:
  """Log of the normaliser Z = N * mean(exp(scores)), fixed by the first batch.

  A logarithm because Z overflows float32 at temperatures below 0.013.

  Args:
    scores: [B, 1 + k], see `crd_scores`.
    num_examples: N, the size of the training set.

  Returns:
    Scalar float32. Under a mapped axis, Z is the mean over the devices.
  """
  scores = checks.float_array("scores", scores, rank=2)
  num_examples = checks.count("num_examples", num_examples)
  return jax.nn.logsumexp(scores) + math.log(num_examples / scores.size)


def _contrast(
  scores: jax.Array, log_z: jax.Array | float, num_examples: int
) -> jax.Array:
  """-log h(positive) - sum over negatives of log(1 - h), per example."""
  log_x = scores - log_z
  noise = (scores.shape[1] - 1) / num_examples
  # In log space: exp(1 / temperature) overflows below a temperature of 0.012.
  log_offset = math.log(noise + EPSILON)
  positive = jax.nn.softplus(log_offset - log_x[:, 0])
  negatives = jax.nn.softplus(log_x[:, 1:] - log_offset)
  negatives += log_offset - math.log(noise)
  return positive + jnp.sum(negatives, axis=1)


def crd_loss(
  student_scores: jax.Array,
  teacher_scores: jax.Array,
  student_log_z: jax.Array | float,
  teacher_log_z: jax.Array | float,
  *,
  num_examples: int,
) -> jax.Array:
  """Noise-contrastive loss between the two networks' embeddings.

  The sum over both networks of
  -log(x_0 / (x_0 + c + eps)) - sum_j log(c / (x_j + c + eps)),
  where x = exp(scores) / Z, c = k / N and eps = 1e-7.

  Args:
    student_scores: [B, 1 + k], the student's embedding against the teacher's
      bank; column 0 is the positive.
    teacher_scores: [B, 1 + k], the teacher's against the student's bank.
    student_log_z: scalar log Z of the student's scores, see
      `crd_log_normalizer`.
    teacher_log_z: scalar log Z of the teacher's scores.
    num_examples: N, the size of the training set.

  Returns:
    [B] float32, in nats.

  Raises:
    ValueError: for other ranks, unequal shapes, or no negatives.

  Source: Tian, Krishnan and Isola, "Contrastive Representation Distillation",
  ICLR 2020, equations 17 and 18.

  >>> import jax.numpy as jnp
  >>> zeros = jnp.zeros((1, 3))
  >>> round(float(crd_loss(zeros, zeros, 0.0, 0.0, num_examples=2)[0]), 4)
  4.1589
  """
  student = checks.float_array("student_scores", student_scores, rank=2)
  teacher = checks.float_array("teacher_scores", teacher_scores, rank=2)
  checks.same_shape("student_scores", student, "teacher_scores", teacher)
  if student.shape[1] < 2:
    raise ValueError(
      "student_scores: expected a positive and at least one negative per "
      f"row, got shape {student.shape}"
    )
  student_log_z = checks.number("student_log_z", student_log_z)
  teacher_log_z = checks.number("teacher_log_z", teacher_log_z)
  num_examples = checks.count("num_examples", num_examples)
  return _contrast(student, student_log_z, num_examples) + _contrast(
    teacher, teacher_log_z, num_examples
  )


def crd_update(
  bank: jax.Array,
  embedding: jax.Array,
  index: jax.Array,
  *,
  momentum: float | jax.Array,
  first_row: jax.Array | int = 0,
) -> jax.Array:
  """Moves a batch's rows of the bank towards the batch's embeddings.

  bank[i] <- normalise(m * bank[i] + (1 - m) * v_i).

  Args:
    bank: [N, D].
    embedding: v, [B, D].
    index: [B] integers in [0, N); a known negative one is an error. If one
      occurs twice (an image may replace one that cannot be read), its first
      embedding counts.
    momentum: m, in [0, 1].
    first_row: if `bank` is a shard of a larger one, the position of its first
      row there. Positions outside the shard change nothing.

  Returns:
    The new bank, [N, D].

  Raises:
    ValueError: for other ranks or unequal batches.
  """
  embedding = checks.float_array("embedding", embedding, rank=2)
  index = checks.integer_array(
    "index", index, rank=1, below=np.iinfo(np.int32).max
  )
  checks.same_batch("embedding", embedding, "index", index)
  bank = checks.float_array("bank", bank, rank=2)
  checks.same_width("embedding", embedding, "bank", bank)
  momentum = checks.number("momentum", momentum, least=0, most=1)
  first_row = checks.integer_array("first_row", first_row, rank=0)
  # The result of several writes to one row is undefined.
  repeated = jnp.tril(index[:, None] == index[None], -1).any(axis=1)
  index, _ = _within(bank, index - first_row)
  index = jnp.where(repeated, bank.shape[0], index)
  rows = bank.at[index].get(mode="clip")
  rows = momentum * rows + (1 - momentum) * embedding
  return bank.at[index].set(spatial.l2_normalize(rows), mode="drop")
