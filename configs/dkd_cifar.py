"""DKD (Zhao et al., CVPR 2022): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 76.32 % top-1 in mdistiller, mean of 5 runs, whose recipe this is
(batch 64, 240 epochs). Here: not run.

    python launch.py --config configs/dkd_cifar.py

Loss: CE + DKD at temperature 4, whose weight grows over the first 20 epochs.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "dkd",
    weights={"ce": 1.0, "kd": 0.0, "dkd": 1.0},
    ramp_epochs={"dkd": 20.0},
    temperature=4.0,
    alpha=1.0,
    beta=8.0,
  )
  return base.finish(config, arg)
