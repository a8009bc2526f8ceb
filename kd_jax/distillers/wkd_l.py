"""WKD-L: Wasserstein distance of predictions (Lv et al., NeurIPS 2024)."""

from typing import ClassVar, final

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class WKDL(base.Distiller):
  """Moves the student's prediction where the teacher's classes are close.

  The teacher's classifier must be linear; its rows tell which classes are
  alike. With features too, it is the combination "wkd_l+wkd_f".

  Attributes:
    gamma: weight of the cost beside the part of the label.
    regularization: of the flow's entropy.
    iterations: of Sinkhorn's algorithm.
    sharpen: contrast of the costs, see `losses.wkd_l_cost`.
    decay_start: the last epoch with the full `gamma`.
    decay_end: the epoch in which it is 0.
  """

  takes_many_teachers: ClassVar[bool] = True

  temperature: float = 8.0
  gamma: float = 600.0
  regularization: float = 0.05
  iterations: int = 10
  sharpen: float = 1.0
  decay_start: int = 150
  decay_end: int = 240

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
    """See `base.Distiller.__call__`; the method's term is "wkd_l"."""
    terms = self.logit_terms(student, teacher, batch)
    z_s, z_t = self.compared_logits(student, teacher)
    width = base.feature(teacher, "pooled", whose="teacher").shape[-1]
    cost = losses.wkd_l_cost(
      base.without_bias(teacher_head, jnp.eye(width)).T, sharpen=self.sharpen
    )
    decay = losses.wkd_decay(epoch, start=self.decay_start, end=self.decay_end)
    terms["wkd_l"] = base.over_labels(
      lambda labels: losses.wkd_l_loss(
        z_s,
        z_t,
        labels,
        cost,
        temperature=self.temperature,
        gamma=self.gamma * decay,
        regularization=self.regularization,
        iterations=self.iterations,
      ),
      batch,
    )
    return base.DistillOutput(student.logits, terms)
