"""KD (Hinton et al., 2015): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 74.42 +- 0.05 % top-1, row "KD" of the table in SimKD's README
(teacher 79.42, student alone 73.09; mean of several runs). Here: not run.

    python launch.py --config configs/kd_cifar.py

Loss: CE + KD, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "kd",
    weights={"ce": 1.0, "kd": 1.0},
    temperature=4.0,
  )
  return base.finish(config, arg)
