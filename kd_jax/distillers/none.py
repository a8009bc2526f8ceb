"""Plain supervised training: no teacher."""

from collections.abc import Sequence
from typing import ClassVar, final

import jax

from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class NoTeacher(base.Distiller):
  """The student alone, with the term "ce"; teachers are ignored."""

  needs_teacher: ClassVar[bool] = False

  def distill(
    self,
    student: ModelOutputs,
    teachers: Sequence[ModelOutputs],
    batch: base.Batch,
    *,
    teacher_heads: Sequence[base.Head],
    student_head: base.Head | None = None,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> base.DistillOutput:
    """See `base.Distiller.distill`."""
    terms = {"ce": self.cross_entropy(student.logits, batch)}
    return base.DistillOutput(student.logits, terms)
