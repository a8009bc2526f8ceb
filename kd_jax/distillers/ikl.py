"""IKL: improved Kullback-Leibler divergence (Cui et al., NeurIPS 2024)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class IKL(base.LogitDistiller):
  """Divides KD's divergence into differences of logits and soft labels.

  Attributes:
    alpha: weight of the soft labels.
    beta: weight of the differences of logits.
    weight_temperature: of the teacher's prediction that weighs the classes.
  """

  alpha: float = 1.0
  beta: float = 1.0
  weight_temperature: float = 4.0

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
    return losses.ikl_loss(
      student_logits,
      teacher_logits,
      temperature=self.temperature,
      weight_temperature=self.weight_temperature,
      alpha=self.alpha,
      beta=self.beta,
    )
