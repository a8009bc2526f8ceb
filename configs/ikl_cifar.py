"""IKL-KD (Cui et al., NeurIPS 2024): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: no figure checked for this pair; weights and temperatures of 1 and 4
are ours. Here: not run.

    python launch.py --config configs/ikl_cifar.py

Loss: CE + IKL.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "ikl",
    weights={"ce": 1.0, "kd": 0.0, "ikl": 1.0},
    temperature=4.0,
    weight_temperature=4.0,
    alpha=1.0,
    beta=1.0,
  )
  return base.finish(config, arg)
