"""BKD (Hao et al., NeurIPS 2023): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: no figure with this pair; the authors use it with strong recipes on
ImageNet. The weights are ours. Here: not run.

    python launch.py --config configs/bkd_cifar.py

Loss: CE + BKD.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "bkd",
    weights={"ce": 1.0, "kd": 0.0, "bkd": 1.0},
  )
  return base.finish(config, arg)
