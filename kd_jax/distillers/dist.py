"""DIST: distillation from a stronger teacher (Huang et al., NeurIPS 2022)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base


@final
class DIST(base.LogitDistiller):
  """Correlates the two predictions over classes and over examples.

  With `sync`, the examples are those of the global batch.

  Attributes:
    beta: weight of the correlation over an example's classes.
    gamma: weight of the correlation over a class's examples.
  """

  beta: float = 1.0
  gamma: float = 1.0

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
    return losses.dist_loss(
      student_logits,
      teacher_logits,
      temperature=self.temperature,
      beta=self.beta,
      gamma=self.gamma,
      axis_name=axis_name,
    )
