"""FSP: flow of solution procedure (Yim et al., CVPR 2017)."""

from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class FSP(base.FeatureDistiller):
  """Compares how one map of a network leads to the next.

  The maps are the stem and the stages, paired from the first; both networks
  need the same channels in each. If one has more stages, its last ones are
  unused.

  The authors train this term alone in a first stage, then cross-entropy.
  """

  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    maps_s, maps_t = (
      [base.feature(x, "stem", whose=whose), *base.stages(x, whose=whose)]
      for x, whose in ((student, "student"), (teacher, "teacher"))
    )
    pairs = min(len(maps_s), len(maps_t))
    return losses.fsp_loss(maps_s[:pairs], maps_t[:pairs])
