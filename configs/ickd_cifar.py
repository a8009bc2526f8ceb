"""ICKD (Liu et al., ICCV 2021): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: no figure checked for this pair; weight and embedding are the
authors' for CIFAR. On ImageNet their embedding is 3x3 (kernel_size=3). Here:
not run.

    python launch.py --config configs/ickd_cifar.py

Loss: CE + 2.5 ICKD.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "ickd",
    weights={"ce": 1.0, "kd": 0.0, "ickd": 2.5},
    kernel_size=1,
  )
  return base.finish(config, arg)
