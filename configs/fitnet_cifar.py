"""FitNet (Romero et al., ICLR 2015): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 74.32 % top-1, row "FitNet" of the table in SimKD's README
(teacher 79.42, student alone 73.09; mean of several runs). Here: not run.

    python launch.py --config configs/fitnet_cifar.py

Loss: CE + KD + 100 FitNet, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "fitnet",
    weights={"ce": 1.0, "kd": 1.0, "fitnet": 100.0},
    temperature=4.0,
    hint_layer="stage1",
  )
  return base.finish(config, arg)
