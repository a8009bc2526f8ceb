"""RLD: refined logit distillation (Sun et al., ICCV 2025)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class RLD(base.LogitDistiller):
  """Imitates a teacher's confidence, and its classes below the label.

  Attributes:
    alpha: weight of the confidence.
    beta: weight of the classes below the label.
    confidence_temperature: of the confidence.
  """

  alpha: float = 1.0
  beta: float = 8.0
  confidence_temperature: float = 1.0

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
    return losses.rld_loss(
      student_logits,
      teacher_logits,
      labels,
      temperature=self.temperature,
      confidence_temperature=self.confidence_temperature,
      alpha=self.alpha,
      beta=self.beta,
    )
