"""SP: similarity-preserving distillation (Tung and Mori, ICCV 2019)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class SP(base.Distiller):
  """Compares the similarities between the examples of a batch.

  Reads the last stage of each network. With `sync`, the batch is the global
  one.
  """

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
    """See `base.Distiller.__call__`; the method's term is "sp", a scalar."""
    terms = self.logit_terms(student, teacher, batch)
    terms["sp"] = losses.sp_loss(
      base.stages(student, whose="student")[-1],
      base.stages(teacher, whose="teacher")[-1],
      # Evaluation may run without a mapped axis.
      axis_name=self.bound(self.batch_axis) if train else None,
    )
    return base.DistillOutput(student.logits, terms)
