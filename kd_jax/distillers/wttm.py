"""WTTM: weighted transformed teacher matching (Zheng and Yang, ICLR 2024)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class WTTM(base.LogitDistiller):
  """Imitates a power of the teacher's prediction, weighted by its spread.

  Attributes:
    exponent: of the teacher's probabilities, above 0; 1 over a temperature.
  """

  exponent: float = 0.1

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
    return losses.wttm_loss(
      student_logits, teacher_logits, exponent=self.exponent
    )
