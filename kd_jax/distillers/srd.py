"""SRD: a simple recipe for distillation (Miles and Mikolajczyk, AAAI 2024)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models import layers

# Of both BatchNorms, as the authors have it.
EPSILON = 1e-4


@final
class SRD(base.FeatureDistiller):
  """Compares the means of the last maps, normalised over the batch.

  A linear layer projects the student's. With `sync`, the batch is the global
  one. The recipe's KD is at temperature 1.
  """

  temperature: float = 1.0

  @nn.compact
  def compare(
    self,
    student: layers.ModelOutputs,
    teacher: layers.ModelOutputs,
    *,
    train: bool,
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    pooled_s, pooled_t = (
      layers.global_average_pool(base.feature(output, "last", whose=whose))
      for output, whose in ((student, "student"), (teacher, "teacher"))
    )

    def normalize(x: jax.Array, name: str) -> jax.Array:
      return layers.BatchNorm(
        epsilon=EPSILON, affine=False, axis_name=self.batch_axis, name=name
      )(x, train=train)

    embedded = layers.dense(
      pooled_s.astype(self.dtype),
      pooled_t.shape[-1],
      name="embed",
      dtype=self.dtype,
    )
    return losses.srd_loss(
      normalize(embedded, "bn_s"),
      normalize(pooled_t, "bn_t"),
      axis_name=self.relational_axis(train),
    )
