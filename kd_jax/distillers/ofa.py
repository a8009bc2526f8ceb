"""OFA: one for all (Hao et al., NeurIPS 2023)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, exits
from kd_jax.models.layers import ModelOutputs

# Of the attention in an exit from tokens.
HEADS = 4


@final
class OFA(base.Distiller):
  """Compares networks of any two kinds by logits, of every stage's exit too.

  A transformer (a network with the feature `block1`) exits through attention,
  another network through convolutions. A class token after stage i is read from
  the feature `class_tokeni`, such as `class_token1`, if there is one.

  The term "ofa" is the sum over the exits, "ofa_logits" that of the network's
  own logits.

  Attributes:
    eps: see `losses.ofa_loss`.
    exits: numbers of the stages with an exit, from 1; None: all.
  """

  temperature: float = 1.0
  eps: float = 1.0
  exits: tuple[int, ...] | None = None

  @nn.compact
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
    """See `base.Distiller.__call__`; terms "ofa" and "ofa_logits"."""
    terms = self.logit_terms(student, teacher, batch)
    stages = base.stages(student, whose="student")
    exits = self.exits or tuple(range(1, len(stages) + 1))
    if not set(exits) <= set(range(1, len(stages) + 1)):
      raise ValueError(
        f"exits: expected numbers of the student's {len(stages)} stages, from"
        f" 1, got {exits}"
      )

    def compare(logits: jax.Array) -> jax.Array:
      z_s, z_t = self.compared_logits(student._replace(logits=logits), teacher)
      return base.over_labels(
        lambda labels: losses.ofa_loss(
          z_s, z_t, labels, temperature=self.temperature, eps=self.eps
        ),
        batch,
      )

    terms["ofa_logits"] = compare(student.logits)
    each = [
      compare(self._exit(i, stages, student, teacher, train)) for i in exits
    ]
    terms["ofa"] = sum(each[1:], each[0])
    return base.DistillOutput(student.logits, terms)

  def _exit(
    self,
    number: int,
    stages: list[jax.Array],
    student: ModelOutputs,
    teacher: ModelOutputs,
    train: bool,
  ) -> jax.Array:
    """The logits [B, C] of one stage."""
    x, following = stages[number - 1], len(stages) - number
    classes, name = student.logits.shape[-1], f"exit{number}"
    if "block1" in student.features:
      token = student.features.get(f"class_token{number}")
      head = exits.TokenHead(
        blocks=max(following, 1), heads=HEADS, dtype=self.dtype, name=name
      )
      return head(x, token, classes)
    pooled = base.feature(teacher, "pooled", whose="teacher")
    return exits.ExitHead(
      downs=following,
      width=max(stages[-1].shape[-1], pooled.shape[-1]),
      axis_name=self.batch_axis,
      dtype=self.dtype,
      name=name,
    )(x, classes, train=train)
