"""Plain supervised training: no teacher."""

from typing import final

import jax

from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class NoTeacher(base.Distiller):
  """The student alone; its only term is "ce", and `teacher` may be None."""

  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs | None,
    batch: base.Batch,
    *,
    teacher_head: base.Classifier | None,
    step: jax.Array | int,
    train: bool,
  ) -> base.DistillOutput:
    """See `base.Distiller.__call__`."""
    return base.DistillOutput(
      student.logits, self.logit_losses(student, None, batch)
    )
