"""TTM (Zheng and Yang, ICLR 2024): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 76.17 % top-1 in the authors' code (RepDistiller's recipe), which has
its settings for other pairs only; exponent and weight here are those of
VGG-13 -> VGG-8, to be searched for this one. Here: not run.

    python launch.py --config configs/ttm_cifar.py

Loss: CE + 45 TTM, exponent 0.1.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "ttm",
    weights={"ce": 1.0, "kd": 0.0, "ttm": 45.0},
    exponent=0.1,
  )
  return base.finish(config, arg)
