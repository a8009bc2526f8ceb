"""RKD: relational knowledge distillation (Park et al., CVPR 2019)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class RKD(base.Distiller):
  """Compares the distances and angles between the examples of a batch.

  Reads the pooled feature of each network. With `sync`, the batch is the global
  one.

  Attributes:
    distance: weight of the distances.
    angle: weight of the angles.
  """

  distance: float = 25.0
  angle: float = 50.0

  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: base.Batch,
    *,
    teacher_head: base.Head,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> base.DistillOutput:
    """See `base.Distiller.__call__`; the method's term is "rkd", a scalar."""
    terms = self.logit_terms(student, teacher, batch)
    terms["rkd"] = losses.rkd_loss(
      base.feature(student, "pooled", whose="student"),
      base.feature(teacher, "pooled", whose="teacher"),
      distance=self.distance,
      angle=self.angle,
      # Evaluation may run without a mapped axis.
      axis_name=self.bound(self.batch_axis) if train else None,
    )
    return base.DistillOutput(student.logits, terms)
