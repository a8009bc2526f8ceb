"""KDSVD: distillation by singular value decomposition (Lee et al., 2018)."""

from typing import final

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class KDSVD(base.FeatureDistiller):
  """Compares how singular vectors change from stage to stage.

  Stages are paired from the first. If one network has more stages, its last
  ones are unused, as in the reference toolboxes.

  Attributes:
    over: "channels": singular vectors over channels, which must be equally many
      in both networks. "width": over image columns, as in mdistiller; the
      larger map of a pair is first average-pooled to the size of the other.
  """

  over: str = "channels"

  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    if self.over not in ("channels", "width"):
      raise ValueError(
        f"over: expected 'channels' or 'width', got {self.over!r}"
      )
    students, teachers = [], []
    for s, t in zip(*base.paired_stages(student, teacher), strict=True):
      if self.over == "width":
        s, t = (jnp.swapaxes(x, 2, 3) for x in losses.pool_to_smaller(s, t))
      students.append(s)
      teachers.append(t)
    return losses.kdsvd_loss(students, teachers)
