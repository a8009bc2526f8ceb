"""FunMatch (Beyer et al., CVPR 2022): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: no figure with this pair; the paper trains for up to 9,600 epochs on
other data sets (ImageNet, BiT-R152x2 to R50: 82.8 %). Raise config.epochs to be
as patient. Here: not run.

    python launch.py --config configs/funmatch_cifar.py

Loss: KL at temperature 1, no labels. Mixup: both networks see the same mixed
images.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "funmatch",
    weights={"ce": 0.0, "kd": 0.0, "funmatch": 1.0},
    temperature=1.0,
    distance="kl",
    teacher_smoothing=0.0,
  )
  config.data.mixup = 1.0
  return base.finish(config, arg)
