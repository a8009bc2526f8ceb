"""LumiNet: logits as the batch sees them (Hossain et al., 2023)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class LumiNet(base.LogitDistiller):
  """Compares logits that are standardised per class over the batch.

  With `sync`, the batch is the global one.
  """

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
    return losses.luminet_loss(
      student_logits,
      teacher_logits,
      temperature=self.temperature,
      axis_name=axis_name,
    )
