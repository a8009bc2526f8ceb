"""WKD-F (Lv et al., NeurIPS 2024): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 76.77 % top-1 in the authors' README, whose recipe this is. Here: not
run.

    python launch.py --config configs/wkd_f_cifar.py

Loss: CE + 0.08 WKD-F, which fades out after epoch 150. Set decay_start and
decay_end with another number of epochs.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "wkd_f",
    weights={"ce": 1.0, "kd": 0.0, "wkd_f": 0.08},
    mean_weight=4.0,
    grid=1,
    decay_start=150,
    decay_end=240,
  )
  return base.finish(config, arg)
