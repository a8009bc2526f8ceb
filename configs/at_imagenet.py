"""AT (Zagoruyko, Komodakis, ICLR 2017): ResNet-50 -> ResNet-18 on ImageNet.

Published: no figure with this pair and recipe. Here: not run.

    python launch.py --config configs/at_imagenet.py \\
        --config.teacher.checkpoint=resnet50.pth

Loss: CE + KD + 1000 AT, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "at",
    student="ResNet18",
    teacher="ResNet50",
    weights={"ce": 1.0, "kd": 1.0, "at": 1000.0},
    temperature=4.0,
  )
  return base.finish(base.imagenet(config), arg)
