"""NormKD: normalised logits (Chi et al., 2023)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class NormKD(base.LogitDistiller):
  """KD with a temperature for each example and network.

  `temperature` multiplies the standard deviation of an example's logits.
  """

  temperature: float = 2.0

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
    return losses.normkd_loss(
      student_logits, teacher_logits, temperature=self.temperature
    )
