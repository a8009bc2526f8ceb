"""CTKD (Li et al., AAAI 2023): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 73.39 % top-1 in the table of logit standardisation (Sun et al., CVPR
2024), with mdistiller's recipe. Here: not run.

    python launch.py --config configs/ctkd_cifar.py

Loss: 0.1 CE + 0.9 CTKD, temperature 1 to 21.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "ctkd",
    weights={"ce": 0.1, "kd": 0.0, "ctkd": 0.9},
    start=1.0,
    span=20.0,
    reversal_epochs=10,
  )
  return base.finish(config, arg)
