"""BKD: binary knowledge distillation (Hao et al., NeurIPS 2023)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class BKD(base.LogitDistiller):
  """Treats each class as a question of its own, after the teacher's softmax."""

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
    return losses.bkd_loss(student_logits, teacher_logits)
