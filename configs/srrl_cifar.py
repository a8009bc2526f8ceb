"""SRRL (Yang et al., ICLR 2021): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 75.39 % top-1, row "SRRL" of the table in SimKD's README
(teacher 79.42, student alone 73.09; mean of several runs). Here: not run.

    python launch.py --config configs/srrl_cifar.py

Loss: CE + KD + SRRL, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "srrl",
    weights={"ce": 1.0, "kd": 1.0, "srrl": 1.0},
    temperature=4.0,
  )
  return base.finish(config, arg)
