"""NST (Huang and Wang, 2017): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 73.30 % top-1, row "NST" of the table in RepDistiller's README
(teacher 79.42, student alone 72.50; last epoch), whose recipe this is. Here:
not run.

    python launch.py --config configs/nst_cifar.py

Loss: CE + 50 NST.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation("nst", weights={"ce": 1.0, "kd": 0.0, "nst": 50.0})
  return base.finish(config, arg)
