"""WSLD (Zhou et al., ICLR 2021): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: no figure with this pair and recipe; weight and temperature are the
authors' of ImageNet. Here: not run.

    python launch.py --config configs/wsld_cifar.py

Loss: CE + 2.5 WSLD, temperature 2.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "wsld",
    weights={"ce": 1.0, "kd": 0.0, "wsld": 2.5},
    temperature=2.0,
  )
  return base.finish(config, arg)
