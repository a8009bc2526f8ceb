"""SemCKD (Chen et al., AAAI 2021): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 76.23 % top-1, row "SemCKD" of the table in SimKD's README
(teacher 79.42, student alone 73.09; mean of several runs). Here: not run.

    python launch.py --config configs/semckd_cifar.py

Loss: CE + KD + 400 SemCKD, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "semckd",
    weights={"ce": 1.0, "kd": 1.0, "semckd": 400.0},
    temperature=4.0,
    soft=1.0,
  )
  return base.finish(config, arg)
