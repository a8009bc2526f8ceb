"""DIST (Huang et al., NeurIPS 2022): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 76.31 +- 0.19 % top-1 in the authors' code (RepDistiller's recipe:
batch 64, 240 epochs). Here: not run.

    python launch.py --config configs/dist_cifar.py

Loss: CE + 2 DIST, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "dist",
    weights={"ce": 1.0, "kd": 0.0, "dist": 2.0},
    temperature=4.0,
    beta=1.0,
    gamma=1.0,
  )
  return base.finish(config, arg)
