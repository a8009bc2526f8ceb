"""CRD (Tian et al., ICLR 2020): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 75.59 % top-1, row "CRD" of the table in SimKD's README
(teacher 79.42, student alone 73.09; mean of several runs). Here: not run.

    python launch.py --config configs/crd_cifar.py

Loss: CE + KD + 0.8 CRD, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "crd",
    weights={"ce": 1.0, "kd": 1.0, "crd": 0.8},
    temperature=4.0,
    k=16384,
    nce_temperature=0.07,
    momentum=0.5,
    feat_dim=128,
    mode="exact",
  )
  return base.finish(config, arg)
