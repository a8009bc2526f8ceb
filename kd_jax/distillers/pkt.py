"""PKT: probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class PKT(base.Distiller):
  """Compares how probably the examples of a batch are neighbours.

  Reads the pooled feature of each network. With `sync`, the batch is the global
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
    """See `base.Distiller.__call__`; the method's term is "pkt", a scalar."""
    terms = self.logit_terms(student, teacher, batch)
    terms["pkt"] = losses.pkt_loss(
      base.feature(student, "pooled", whose="student"),
      base.feature(teacher, "pooled", whose="teacher"),
      # Evaluation may run without a mapped axis.
      axis_name=self.bound(self.batch_axis) if train else None,
    )
    return base.DistillOutput(student.logits, terms)
