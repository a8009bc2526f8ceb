"""FunMatch: function matching (Beyer et al., CVPR 2022)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class FunMatch(base.LogitDistiller):
  """Matches the teacher on the same mixed image, without labels.

  The method is as much in the recipe as in the loss: `config.data.mixup` of 1,
  weight 0 for "ce", and patience. Of several teachers the term is the mean,
  where the authors' code has the sum.

  Attributes:
    distance: see `losses.funmatch_loss`.
    teacher_smoothing: of the distance "hard".
  """

  temperature: float = 1.0
  distance: str = "kl"
  teacher_smoothing: float = 0.0

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
    return losses.funmatch_loss(
      student_logits,
      teacher_logits,
      distance=self.distance,
      temperature=self.temperature,
      teacher_smoothing=self.teacher_smoothing,
    )
