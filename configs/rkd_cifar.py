"""RKD (Park et al., CVPR 2019): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 71.90 % top-1, row "RKD" of the table in RepDistiller's README
(teacher 79.42, student alone 72.50; last epoch), whose recipe this is. Here:
not run.

    python launch.py --config configs/rkd_cifar.py

Loss: CE + RKD, distances 25 and angles 50.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "rkd",
    weights={"ce": 1.0, "kd": 0.0, "rkd": 1.0},
    distance=25.0,
    angle=50.0,
  )
  return base.finish(config, arg)
