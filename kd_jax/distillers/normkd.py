"""NormKD: normalised logits (Chi et al., 2023)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class NormKD(base.LogitDistiller):
  """KD or DKD with a temperature for each example and network.

  `temperature` multiplies the standard deviation of an example's logits.

  Attributes:
    alpha: with `beta`, weights of DKD's parts; both None: KD.
    beta: see `alpha`.
  """

  temperature: float = 2.0
  alpha: float | None = None
  beta: float | None = None

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
    if self.alpha is None or self.beta is None:
      return losses.normkd_loss(
        student_logits, teacher_logits, temperature=self.temperature
      )
    student, teacher, factor = losses.normkd_logits(
      student_logits, teacher_logits, temperature=self.temperature
    )
    return factor * losses.dkd_loss(
      student,
      teacher,
      labels,
      temperature=1.0,
      alpha=self.alpha,
      beta=self.beta,
    )
