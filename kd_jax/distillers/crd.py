"""CRD: contrastive representation distillation (Tian et al., ICLR 2020)."""

import math
from typing import final

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.distributed import collectives
from kd_jax.models.layers import ModelOutputs

# Temperatures below 0.013 make normalisers that overflow float32.
LARGEST_Z = 1e30


@final
class CRD(base.Distiller):
  """Pulls both networks' embeddings of one image together, others apart.

  The collection "memory" holds:

  - `bank_s`, `bank_t` [N, D]: one vector per training example and network;
  - `z_s`, `z_t`: the normalisers, 0 until the first batch fixes them; one above
    `LARGEST_Z` is stored as -log Z;
  - `order`, `class_start`, `class_count`: the training set sorted by class,
    from which the device draws negatives. `init` reads the classes from
    `batch["train_labels"]` [N].

  Several devices hold copies of the banks or shards of their rows (ImageNet's
  two banks take 1.3 GB); the shape of a bank tells which. With shards, the
  step gathers all devices' embeddings [B, D] and indices [B, 1 + k]. Each
  device scores the indices in its shard and 0 elsewhere, and a sum over the
  devices returns each its own scores. Moving the bank's vectors instead would
  cost D times as much.

  Every device applies the updates of all devices' batches, with or without
  `sync`: otherwise copies of the banks would drift. If two examples of a global
  batch update one row, the first counts.

  A step needs the random stream "distiller" (one key for all devices), unless
  the batch has `negatives` [B, k], as in a replay of another toolbox's run.

  Attributes:
    k: negatives per example.
    nce_temperature: of the contrast, above 0.
    momentum: fraction of a bank's old vector kept at each update, in [0, 1].
    feat_dim: D, width of the embeddings.
    mode: "exact" (the positive is the image itself) or "relax" (a random image
      of its class).
  """

  k: int = 16384
  nce_temperature: float = 0.07
  momentum: float = 0.5
  feat_dim: int = 128
  mode: str = "exact"

  @property
  def memory_rows(self) -> tuple[str, ...]:
    """The banks."""
    return ("bank_s", "bank_t")

  @nn.compact
  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: base.Batch,
    *,
    teacher_head: base.Head,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> base.DistillOutput:
    """See `base.Distiller.__call__`; the method's term is "crd"."""
    if self.mode not in ("exact", "relax"):
      raise ValueError(f"mode: expected 'exact' or 'relax', got {self.mode!r}")
    losses.checks.count("feat_dim", self.feat_dim)
    terms = self.logit_terms(student, teacher, batch)
    feature_s = base.feature(student, "pooled", whose="student")
    feature_t = base.feature(teacher, "pooled", whose="teacher")
    embed_s = connectors.UnitEmbedding(
      self.feat_dim, dtype=self.dtype, name="embed_s"
    )
    embed_t = connectors.UnitEmbedding(
      self.feat_dim, dtype=self.dtype, name="embed_t"
    )
    if self.is_initializing():
      self._make_memory(batch, student.logits.shape[-1])
      embed_s(feature_s), embed_t(feature_t)
    elif train:
      terms["crd"] = self._contrast(
        embed_s(feature_s), embed_t(feature_t), batch
      )
    return base.DistillOutput(student.logits, terms)

  def _make_memory(self, batch: base.Batch, num_classes: int) -> None:
    if "train_labels" not in batch:
      raise ValueError(
        "crd: init expected batch['train_labels'], the class of every "
        f"training example [N] int32, got only {', '.join(sorted(batch))}; "
        "add it to the batch given to init"
      )
    table = losses.class_table(batch["train_labels"], num_classes)
    bound = 1.0 / math.sqrt(self.feat_dim / 3)
    shape = (table.order.shape[0], self.feat_dim)
    for name in ("bank_s", "bank_t"):
      self.variable(
        "memory",
        name,
        lambda: jax.random.uniform(
          self.make_rng("params"), shape, jnp.float32, -bound, bound
        ),
      )
    for name in ("z_s", "z_t"):
      self.variable("memory", name, jnp.zeros, (), jnp.float32)
    self.variable("memory", "order", lambda: table.order)
    self.variable("memory", "class_start", lambda: table.class_start)
    self.variable("memory", "class_count", lambda: table.class_count)

  def _indices(self, batch: base.Batch) -> jax.Array:
    """Positions [B, 1 + k] of the positive and the negatives."""
    index, label = batch["index"], batch["label"]
    table = losses.ClassTable(
      self.get_variable("memory", "order"),
      self.get_variable("memory", "class_start"),
      self.get_variable("memory", "class_count"),
    )
    positives = index
    negatives = batch.get("negatives")
    if negatives is None or self.mode == "relax":
      key_negative, key_positive = jax.random.split(self.make_rng("distiller"))
      if self.mode == "relax":
        positives = losses.draw_positives(key_positive, index, label, table)
      if negatives is None:
        negatives = losses.draw_negatives(
          key_negative, index, label, table, k=self.k
        )
    found = jnp.concatenate([positives[:, None], negatives], axis=1)
    # A shard of the banks cannot tell a position that is in none.
    return jnp.where(found < table.order.shape[0], found, -1)

  def _contrast(
    self, v_s: jax.Array, v_t: jax.Array, batch: base.Batch
  ) -> jax.Array:
    if "index" not in batch:
      raise ValueError(
        "crd: expected batch['index'], the positions of the examples in the "
        f"training set [B], got only {', '.join(sorted(batch))}"
      )
    indices = self._indices(batch)
    bank_s: nn.Variable[jax.Array] = self.variable("memory", "bank_s")
    bank_t: nn.Variable[jax.Array] = self.variable("memory", "bank_t")
    num_examples: int = self.get_variable("memory", "order").shape[0]
    scores_s = self._scores(v_s, bank_t.value, indices, num_examples)
    scores_t = self._scores(v_t, bank_s.value, indices, num_examples)
    log_z_s = self._log_normalizer("z_s", scores_s, num_examples)
    log_z_t = self._log_normalizer("z_t", scores_t, num_examples)
    index = collectives.axis_gather(batch["index"], self.axis_name)
    for bank, v in ((bank_s, v_s), (bank_t, v_t)):
      v = collectives.axis_gather(jax.lax.stop_gradient(v), self.axis_name)
      bank.value = losses.crd_update(
        bank.value,
        v,
        index,
        momentum=self.momentum,
        first_row=self._first_row(bank.value, num_examples),
      )
    return losses.crd_loss(
      scores_s, scores_t, log_z_s, log_z_t, num_examples=num_examples
    )

  def _first_row(self, bank: jax.Array, num_examples: int) -> jax.Array | int:
    """Where this device's rows begin."""
    rows = bank.shape[0]
    if rows >= num_examples:
      return 0
    return rows * collectives.axis_index(self.axis_name)

  def _scores(
    self, v: jax.Array, bank: jax.Array, indices: jax.Array, num_examples: int
  ) -> jax.Array:
    if bank.shape[0] >= num_examples:
      return losses.crd_scores(
        v, bank, indices, temperature=self.nce_temperature
      )
    scores = losses.crd_scores(
      collectives.axis_gather(v, self.axis_name),
      bank,
      collectives.axis_gather(indices, self.axis_name),
      temperature=self.nce_temperature,
      first_row=self._first_row(bank, num_examples),
    )
    return collectives.axis_sum_rows(scores, self.axis_name)

  def _log_normalizer(
    self, name: str, scores: jax.Array, num_examples: int
  ) -> jax.Array:
    """Log of the stored Z; the first batch computes and stores it."""
    z: nn.Variable[jax.Array] = self.variable("memory", name)
    first = losses.crd_log_normalizer(
      jax.lax.stop_gradient(scores), num_examples
    )
    each = collectives.axis_gather(first[None], self.axis_name)
    first = jax.nn.logsumexp(each) - math.log(each.size)
    limit = math.log(LARGEST_Z)
    first = jnp.where(
      first > limit, -first, jnp.exp(jnp.maximum(first, -limit))
    )
    z.value = jnp.where(z.value != 0, z.value, first)
    known = jnp.where(z.value > 0, z.value, 1.0)
    return jnp.where(z.value > 0, jnp.log(known), -z.value)
