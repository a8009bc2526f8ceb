"""CC: correlation congruence (Peng et al., ICCV 2019)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models import layers
from kd_jax.models.layers import ModelOutputs


@final
class CC(base.Distiller):
  """Compares embeddings of the two networks over neighbours in a batch.

  Reads the pooled feature of each network; both embeddings are learned. With
  `sync`, the batch is the global one.

  Attributes:
    feat_dim: D, width of the embeddings.
  """

  feat_dim: int = 128

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
    """See `base.Distiller.__call__`; the method's term is "cc", a scalar."""
    losses.checks.count("feat_dim", self.feat_dim)
    terms = self.logit_terms(student, teacher, batch)
    embedding_s, embedding_t = (
      layers.dense(
        base.feature(output, "pooled", whose=whose).astype(self.dtype),
        self.feat_dim,
        name=f"embed_{whose[0]}",
        dtype=self.dtype,
      )
      for output, whose in ((student, "student"), (teacher, "teacher"))
    )
    terms["cc"] = losses.cc_loss(
      embedding_s,
      embedding_t,
      # Evaluation may run without a mapped axis.
      axis_name=self.bound(self.batch_axis) if train else None,
    )
    return base.DistillOutput(student.logits, terms)
