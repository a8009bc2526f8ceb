"""OFD: overhaul of feature distillation (Heo et al., ICCV 2019)."""

from collections.abc import Sequence
from typing import Any, final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class OFD(base.FeatureDistiller):
  """Compares stages before their activation, from the teacher's margins up.

  Maps are `stageN_preact` if the network has them, else `stageN`. Stages are
  paired from the last; if one network has more, its first ones are unused. A
  1x1 convolution and BatchNorm take the student's map to the teacher's
  channels.

  The margins come from the teacher's BatchNorms (`Classifier.stage_norms`).
  Departure: the teacher is in evaluation mode, as in all methods here. The
  authors leave it in training mode, so that its statistics move.
  """

  @nn.nowrap
  def teacher_constants(
    self, teachers: Sequence[Any], variables: Sequence[Any]
  ) -> dict[str, jax.Array]:
    """See `base.Distiller.teacher_constants`: the margins of each stage."""
    norms = self.only(teachers).stage_norms(self.only(variables)["params"])
    return {
      f"margin{i}": losses.ofd_margin(scale, bias)
      for i, (scale, bias) in enumerate(norms, start=1)
    }

  @nn.compact
  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    maps_s = base.preactivations(student, whose="student")
    maps_t = base.preactivations(teacher, whose="teacher")
    margins = [
      self.constant(f"margin{i}", x.shape[-1:])
      for i, x in enumerate(maps_t, start=1)
    ]
    pairs = min(len(maps_s), len(maps_t))
    connected = [
      connectors.LinearConnector(
        axis_name=self.batch_axis, dtype=self.dtype, name=f"connector{i}"
      )(x, target.shape[-1], train=train)
      for i, (x, target) in enumerate(
        zip(maps_s[-pairs:], maps_t[-pairs:]), start=1
      )
    ]
    return losses.ofd_loss(connected, maps_t[-pairs:], margins[-pairs:])
