"""SP: similarity-preserving distillation (Tung and Mori, ICCV 2019)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class SP(base.FeatureDistiller):
  """Compares the similarities between the examples of a batch.

  Reads the last stage of each network. With `sync`, the batch is the global
  one.
  """

  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    return losses.sp_loss(
      base.stages(student, whose="student")[-1],
      base.stages(teacher, whose="teacher")[-1],
      axis_name=self.relational_axis(train),
    )
