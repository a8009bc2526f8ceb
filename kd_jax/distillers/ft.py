"""FT: factor transfer (Kim et al., NeurIPS 2018)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class FT(base.Distiller):
  """Translates the student's last map into the teacher's factor.

  The factor is what a paraphraser, an autoencoder, makes of the teacher's last
  map. It learns by the term "ft_init" alone, in a first stage; "ft" trains the
  student and its translator, and leaves the paraphraser as it is.

  Attributes:
    rate: channels of the factor over those of the teacher's map, above 0.
    over_channels: see `losses.ft_loss`.
  """

  rate: float = 0.5
  over_channels: bool = True

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
    """See `base.Distiller.__call__`; the terms are "ft" and "ft_init"."""
    terms = self.logit_terms(student, teacher, batch)
    map_t = base.feature(teacher, "last", whose="teacher")
    losses.checks.number("rate", self.rate, above=0)
    channels = max(int(map_t.shape[-1] * self.rate), 1)
    translator = connectors.FactorEncoder(
      normalize=True,
      axis_name=self.batch_axis,
      dtype=self.dtype,
      name="translator",
    )
    factor_s = translator(
      base.feature(student, "last", whose="student"), channels, train=train
    )
    paraphraser = connectors.Paraphraser(dtype=self.dtype, name="paraphraser")
    factor_t, reconstructed = paraphraser(map_t, channels)
    terms["ft"] = losses.ft_loss(
      factor_s,
      jax.lax.stop_gradient(factor_t),
      over_channels=self.over_channels,
    )
    terms["ft_init"] = losses.paraphraser_loss(reconstructed, map_t)
    return base.DistillOutput(student.logits, terms)
