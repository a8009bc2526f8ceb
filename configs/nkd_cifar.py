"""NKD (Yang et al., ICCV 2023): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: no figure with this pair; gamma and temperature are those of the
authors' ResNet-34 -> ResNet-18 on CIFAR-100. Here: not run.

    python launch.py --config configs/nkd_cifar.py

Loss: CE + NKD, gamma 3.5, temperature 3.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "nkd",
    weights={"ce": 1.0, "kd": 0.0, "nkd": 1.0},
    temperature=3.0,
    gamma=3.5,
  )
  return base.finish(config, arg)
