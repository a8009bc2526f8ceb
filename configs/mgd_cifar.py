"""MGD (Yang et al., ECCV 2022): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: nothing for CIFAR-100; weight and ratio are the authors' for
ImageNet. Here: not run.

    python launch.py --config configs/mgd_cifar.py

Loss: CE + 7e-5 MGD, a sum over the map.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "mgd",
    weights={"ce": 1.0, "kd": 0.0, "mgd": 7e-5},
    mask_ratio=0.15,
  )
  return base.finish(config, arg)
