"""NST: neuron selectivity transfer (Huang and Wang, 2017)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class NST(base.Distiller):
  """Compares the distributions of the channels of each stage.

  Stages are paired from the first. If one network has more stages, its last
  ones are unused, as in the reference toolboxes.
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
    """See `base.Distiller.__call__`; the method's term is "nst"."""
    terms = self.logit_terms(student, teacher, batch)
    maps_s = base.stages(student, whose="student")
    maps_t = base.stages(teacher, whose="teacher")
    pairs = min(len(maps_s), len(maps_t))
    terms["nst"] = losses.nst_loss(maps_s[:pairs], maps_t[:pairs])
    return base.DistillOutput(student.logits, terms)
