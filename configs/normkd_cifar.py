"""NormKD (Chi et al., 2023): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: no figure checked for this pair; the weights and the temperature are
the authors' of CIFAR-100. Here: not run.

    python launch.py --config configs/normkd_cifar.py

Loss: 0.1 CE + 0.9 NormKD, temperature 2.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "normkd",
    weights={"ce": 0.1, "kd": 0.0, "normkd": 0.9},
    temperature=2.0,
  )
  return base.finish(config, arg)
