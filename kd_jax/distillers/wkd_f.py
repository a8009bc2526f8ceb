"""WKD-F: Wasserstein distance of features (Lv et al., NeurIPS 2024)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class WKDF(base.Distiller):
  """Compares the last maps as Gaussians, channel by channel.

  A convolution, BatchNorm and ReLU project the student's map.

  Attributes:
    mean_weight: of the means' distance beside the deviations'.
    grid: regions along a side, each with a Gaussian of its own.
    decay_start: the last epoch with the full term.
    decay_end: the epoch in which it is 0.
  """

  mean_weight: float = 4.0
  grid: int = 1
  decay_start: int = 150
  decay_end: int = 240

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
    """See `base.Distiller.__call__`; the method's term is "wkd_f"."""
    terms = self.logit_terms(student, teacher, batch)
    regressor = connectors.HintRegressor(
      axis_name=self.batch_axis, dtype=self.dtype, name="regressor"
    )
    projected, target = regressor(
      base.feature(student, "last", whose="student"),
      base.feature(teacher, "last", whose="teacher"),
      train=train,
    )
    decay = losses.wkd_decay(epoch, start=self.decay_start, end=self.decay_end)
    terms["wkd_f"] = decay * losses.wkd_f_loss(
      projected, target, mean_weight=self.mean_weight, grid=self.grid
    )
    return base.DistillOutput(student.logits, terms)
