"""AT: attention transfer (Zagoruyko and Komodakis, ICLR 2017)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class AT(base.FeatureDistiller):
  """Compares the spatial attention of each stage.

  Stages are paired from the first. If one network has more stages, its last
  ones are unused, as in the reference toolboxes.
  """

  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    return losses.at_loss(*base.paired_stages(student, teacher))
