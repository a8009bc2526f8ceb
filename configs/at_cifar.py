"""AT (Zagoruyko, Komodakis, ICLR 2017): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 75.07 % top-1, row "AT" of the table in SimKD's README
(teacher 79.42, student alone 73.09; mean of several runs). Here: not run.

    python launch.py --config configs/at_cifar.py

Loss: CE + KD + 1000 AT, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "at",
    weights={"ce": 1.0, "kd": 1.0, "at": 1000.0},
    temperature=4.0,
  )
  return base.finish(config, arg)
