"""KD++ (Wang et al., 2023), ND with KD: ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 75.54 % top-1 in the authors' README, whose recipe differs (batch
128, rate 0.1, Nesterov). Here: not run.

    python launch.py --config configs/nd_cifar.py

Loss: CE + 3.5 KD + 2 ND. The weight of KD grows over the first 20 epochs.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "nd",
    weights={"ce": 1.0, "kd": 3.5, "nd": 2.0},
    ramp_epochs={"kd": 20.0},
  )
  return base.finish(config, arg)
