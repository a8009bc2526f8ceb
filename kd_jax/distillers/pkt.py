"""PKT: probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class PKT(base.FeatureDistiller):
  """Compares how probably the examples of a batch are neighbours.

  Reads the pooled feature of each network. With `sync`, the batch is the global
  one.
  """

  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    return losses.pkt_loss(
      base.feature(student, "pooled", whose="student"),
      base.feature(teacher, "pooled", whose="teacher"),
      axis_name=self.relational_axis(train),
    )
