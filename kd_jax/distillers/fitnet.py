"""FitNet: regression onto a hint layer (Romero et al., ICLR 2015)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class FitNet(base.FeatureDistiller):
  """Regresses a map of the student onto the teacher's map of the same name.

  Attributes:
    hint_layer: name of a map of both networks, such as "stem" or "stage2".
  """

  hint_layer: str = "stage1"

  @nn.compact
  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    regressor = connectors.HintRegressor(
      axis_name=self.batch_axis, dtype=self.dtype, name="regressor"
    )
    regressed, target = regressor(
      base.feature(student, self.hint_layer, whose="student"),
      base.feature(teacher, self.hint_layer, whose="teacher"),
      train=train,
    )
    return losses.fitnet_loss(regressed, target)
