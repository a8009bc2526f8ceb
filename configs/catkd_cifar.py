"""CAT-KD (Guo et al., CVPR 2023): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: no figure checked for this pair; the weight and the maps (2x2, not
normalised) are the authors' for it. Other pairs of theirs have weights from 0.7
to 600, some with normalised maps. Here: not run.

    python launch.py --config configs/catkd_cifar.py

Loss: CE + 15 CAT-KD.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "catkd",
    weights={"ce": 1.0, "kd": 0.0, "catkd": 15.0},
    resolution=2,
    normalize=False,
  )
  return base.finish(config, arg)
