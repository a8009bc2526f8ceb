"""SimKD (Chen et al., CVPR 2022): ResNet-50 teaches ResNet-18 on ImageNet.

Published: 71.66 % top-1 (the SimKD paper, table 3). Here: not run.

    python launch.py --config configs/simkd_imagenet.py \\
        --config.teacher.checkpoint=resnet50.pth

Loss: SimKD alone; see simkd_cifar.py.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "simkd",
    student="ResNet18",
    teacher="ResNet50",
    weights={"ce": 0.0, "kd": 0.0, "simkd": 1.0},
    factor=2,
  )
  return base.finish(base.imagenet(config), arg)
