"""DKD: decoupled knowledge distillation (Zhao et al., CVPR 2022)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class DKD(base.LogitDistiller):
  """KD in two parts, of which each has its own weight.

  Attributes:
    alpha: weight of the part about the label against all other classes.
    beta: weight of the part about the other classes among themselves.
  """

  alpha: float = 1.0
  beta: float = 8.0

  def compare(
    self,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    epoch: jax.Array | int,
    axis_name: str | None,
  ) -> jax.Array:
    """See `base.LogitDistiller.compare`."""
    return losses.dkd_loss(
      student_logits,
      teacher_logits,
      labels,
      temperature=self.temperature,
      alpha=self.alpha,
      beta=self.beta,
    )
