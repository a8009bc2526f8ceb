"""NKD: normalised knowledge distillation (Yang et al., ICCV 2023)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class NKD(base.LogitDistiller):
  """Imitates the teacher's confidence in the label and its other classes.

  `temperature` is that of the other classes.

  Attributes:
    gamma: weight of the other classes.
  """

  temperature: float = 3.0
  gamma: float = 3.5

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
    return losses.nkd_loss(
      student_logits,
      teacher_logits,
      labels,
      temperature=self.temperature,
      gamma=self.gamma,
    )
