"""RKD: relational knowledge distillation (Park et al., CVPR 2019)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class RKD(base.FeatureDistiller):
  """Compares the distances and angles between the examples of a batch.

  Reads the pooled feature of each network. With `sync`, the batch is the global
  one.

  Attributes:
    distance: weight of the distances.
    angle: weight of the angles.
  """

  distance: float = 25.0
  angle: float = 50.0

  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    return losses.rkd_loss(
      base.feature(student, "pooled", whose="student"),
      base.feature(teacher, "pooled", whose="teacher"),
      distance=self.distance,
      angle=self.angle,
      axis_name=self.relational_axis(train),
    )
