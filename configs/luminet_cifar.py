"""LumiNet (Hossain et al., 2023): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 77.50 % top-1 in the authors' README, with these weights (their alpha
is 33; mdistiller's recipe). Here: not run.

    python launch.py --config configs/luminet_cifar.py

Loss: 2 CE + 33^2 LumiNet at temperature 4, whose weight grows over 20 epochs.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "luminet",
    weights={"ce": 2.0, "kd": 0.0, "luminet": 1089.0},
    ramp_epochs={"luminet": 20.0},
    temperature=4.0,
  )
  return base.finish(config, arg)
