"""SDD (Wei et al., CVPR 2024): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: no figure checked for this pair; weights, scales and temperature are
the authors' of SDD-KD. Here: not run.

    python launch.py --config configs/sdd_cifar.py

Loss: 0.1 CE + 0.9 SDD-KD at temperature 4 over 1, 4 and 16 regions.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "sdd",
    weights={"ce": 0.1, "kd": 0.0, "sdd": 0.9},
    temperature=4.0,
    scales=(1, 2, 4),
  )
  return base.finish(config, arg)
