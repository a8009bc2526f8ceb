"""SRD (Miles and Mikolajczyk, AAAI 2024): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: no figure checked for this pair, and the authors' recipe for CIFAR
differs; the weights are those of their ImageNet code (torchdistill has 71.92 %
for ResNet-34 -> ResNet-18 with it). Here: not run.

    python launch.py --config configs/srd_cifar.py

Loss: CE + KD at temperature 1 + 2 SRD.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "srd",
    weights={"ce": 1.0, "kd": 1.0, "srd": 2.0},
    temperature=1.0,
  )
  return base.finish(config, arg)
