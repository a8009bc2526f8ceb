"""KDSVD (Lee et al., ECCV 2018): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: no figure with this recipe; the weight is mdistiller's. Here: not
run. The two networks must have equal channels, or `over` must be "width".

    python launch.py --config configs/kdsvd_cifar.py

Loss: CE + KDSVD.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "kdsvd",
    weights={"ce": 1.0, "kd": 0.0, "kdsvd": 1.0},
    over="channels",
  )
  config = base.finish(config, arg)
  if arg == "smoke":
    config.student.name = config.teacher.name  # equal channels
  return config
