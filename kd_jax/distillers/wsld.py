"""WSLD: weighted soft labels (Zhou et al., ICLR 2021)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class WSLD(base.LogitDistiller):
  """Weighs the soft labels of each example by how hard it is."""

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
    return losses.wsld_loss(
      student_logits, teacher_logits, labels, temperature=self.temperature
    )
