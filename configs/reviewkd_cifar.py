"""KR, ReviewKD (Chen et al., CVPR 2021): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 75.63 % top-1 in the ReviewKD paper, whose recipe differs (batch 128,
Nesterov); an open to-do of SimKD's toolbox. Here: not run.

    python launch.py --config configs/reviewkd_cifar.py

Loss: CE + 5 KR, whose weight grows over the first 20 epochs.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "reviewkd",
    weights={"ce": 1.0, "kd": 0.0, "reviewkd": 5.0},
    ramp_epochs={"reviewkd": 20.0},
    max_mid=512,
  )
  return base.finish(config, arg)
