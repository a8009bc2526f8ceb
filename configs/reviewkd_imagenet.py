"""KR, ReviewKD (Chen et al., CVPR 2021): ResNet-50 -> ResNet-18 on ImageNet.

Published: no figure with this pair and recipe. Here: not run.

    python launch.py --config configs/reviewkd_imagenet.py \\
        --config.teacher.checkpoint=resnet50.pth

Loss: CE + KR, whose weight grows over the first epoch.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "reviewkd",
    student="ResNet18",
    teacher="ResNet50",
    weights={"ce": 1.0, "kd": 0.0, "reviewkd": 1.0},
    ramp_epochs={"reviewkd": 1.0},
    max_mid=512,
  )
  return base.finish(base.imagenet(config), arg)
