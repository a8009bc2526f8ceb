"""WKD-L (Lv et al., NeurIPS 2024): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 76.53 % top-1 in the authors' README, by this recipe but for the
costs: theirs come from CKA between classes, these from the teacher's
classifier, which their code also offers. Here: not run.

    python launch.py --config configs/wkd_l_cifar.py

Loss: CE + WKD-L at temperature 8, whose cost weighs 600 and fades out after
epoch 150. Set decay_start and decay_end with another number of epochs.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "wkd_l",
    weights={"ce": 1.0, "kd": 0.0, "wkd_l": 1.0},
    temperature=8.0,
    gamma=600.0,
    regularization=0.05,
    iterations=10,
    sharpen=1.0,
    decay_start=150,
    decay_end=240,
  )
  return base.finish(config, arg)
