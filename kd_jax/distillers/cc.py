"""CC: correlation congruence (Peng et al., ICCV 2019)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models import layers
from kd_jax.models.layers import ModelOutputs


@final
class CC(base.FeatureDistiller):
  """Compares embeddings of the two networks over neighbours in a batch.

  Reads the pooled feature of each network; both embeddings are learned. With
  `sync`, the batch is the global one.

  Attributes:
    feat_dim: D, width of the embeddings.
  """

  feat_dim: int = 128

  @nn.compact
  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    losses.checks.count("feat_dim", self.feat_dim)
    embedding_s, embedding_t = (
      layers.dense(
        base.feature(output, "pooled", whose=whose).astype(self.dtype),
        self.feat_dim,
        name=f"embed_{whose[0]}",
        dtype=self.dtype,
      )
      for output, whose in ((student, "student"), (teacher, "teacher"))
    )
    return losses.cc_loss(
      embedding_s,
      embedding_t,
      axis_name=self.relational_axis(train),
    )
