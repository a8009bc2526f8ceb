"""WTTM (Zheng and Yang, ICLR 2024): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 76.06 % top-1 in the authors' code (RepDistiller's recipe), which has
its settings for other pairs only; exponent and weight here are those of
VGG-13 -> VGG-8 with CRD, to be searched for this one. Here: not run.

    python launch.py --config configs/wttm_cifar.py

Loss: CE + 4 WTTM, exponent 0.1.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "wttm",
    weights={"ce": 1.0, "kd": 0.0, "wttm": 4.0},
    exponent=0.1,
  )
  return base.finish(config, arg)
