"""Several methods at once: one distiller with the terms of all."""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import flax.linen as nn
import jax

from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs

# Every method has them; one member's count.
SHARED = ("ce", "kd")


@final
class Combination(base.Distiller):
  """Methods side by side, each with variables under its own name.

  "ce" and "kd" are the first member's, unless the method "kd" is a member:
  members may differ in their temperature and their views. See
  `distillers.create` for the fields.

  Attributes:
    members: named modules; at most one predicts with its teacher's classifier.
  """

  members: tuple[base.Distiller, ...] = ()

  # Flax reads it: a member's variables are under the member's own name.
  preserve_adopted_names: ClassVar[bool] = True

  @property
  def needs_logits_only(self) -> bool:
    """Whether all members do."""
    return all(member.needs_logits_only for member in self.members)

  @property
  def views(self) -> int:
    """The most of any member."""
    return max(member.views for member in self.members)

  @property
  def needs_class_means(self) -> bool:
    """Whether a member does."""
    return any(member.needs_class_means for member in self.members)

  @property
  def memory_rows(self) -> tuple[str, ...]:
    """The members', below their names."""
    return tuple(
      f"{member.name}/{row}"
      for member in self.members
      for row in member.memory_rows
    )

  @property
  def predictor(self) -> base.Distiller:
    """The member that predicts with its teacher's classifier, if any."""
    able = [m for m in self.members if m.predicts_with_teacher_head]
    if len(able) > 1:
      raise ValueError(
        "expected one method that predicts with its teacher's classifier, got"
        f" {' and '.join(str(member.name) for member in able)}"
      )
    return able[0] if able else self

  @property
  def predicts_with_teacher_head(self) -> bool:
    """Whether a member does."""
    return self.predictor is not self

  @nn.nowrap
  def teacher_constants(
    self, teachers: Sequence[Any], variables: Sequence[Any]
  ) -> dict[str, Any]:
    """See `base.Distiller.teacher_constants`: the members', by name."""
    found = {
      str(member.name): member.teacher_constants(teachers, variables)
      for member in self.members
    }
    return {name: constants for name, constants in found.items() if constants}

  def last_map(
    self,
    student: ModelOutputs,
    teachers: Sequence[ModelOutputs],
    *,
    train: bool = False,
  ) -> jax.Array:
    """See `base.Distiller.last_map`: the predictor's."""
    if self.predicts_with_teacher_head:
      return self.predictor.last_map(student, teachers, train=train)
    return super().last_map(student, teachers, train=train)

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
    """See `base.Distiller.distill`.

    Raises:
      ValueError: if two members have a term of one name.
    """
    logits, terms = student.logits, {}
    owner: dict[str, str] = {}
    for member in self.members:
      name = str(member.name)
      output = member.distill(
        student,
        teachers,
        batch,
        teacher_heads=teacher_heads,
        student_head=student_head,
        step=step,
        epoch=epoch,
        train=train,
      )
      if member is self.predictor:
        logits = output.logits
      for term, value in output.terms.items():
        if term in terms and term not in SHARED:
          raise ValueError(
            f"{owner[term]} and {name} both have the term {term!r}; expected"
            " methods with terms of different names"
          )
        if term not in terms or term == name:
          terms[term], owner[term] = value, name
    return base.DistillOutput(logits, terms)
