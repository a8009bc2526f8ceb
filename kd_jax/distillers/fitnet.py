"""FitNet: regression onto a hint layer (Romero et al., ICLR 2015)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class FitNet(base.Distiller):
  """Regresses a map of the student onto the teacher's map of the same name.

  Attributes:
    hint_layer: name of a map of both networks, such as "stem" or "stage2".
  """

  hint_layer: str = "stage1"

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
    """See `base.Distiller.__call__`; the method's term is "fitnet"."""
    terms = self.logit_terms(student, teacher, batch)
    regressor = connectors.HintRegressor(
      axis_name=self.batch_axis, dtype=self.dtype, name="regressor"
    )
    regressed, target = regressor(
      base.feature(student, self.hint_layer, whose="student"),
      base.feature(teacher, self.hint_layer, whose="teacher"),
      train=train,
    )
    terms["fitnet"] = losses.fitnet_loss(regressed, target)
    return base.DistillOutput(student.logits, terms)
