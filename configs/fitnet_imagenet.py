"""FitNet (Romero et al., ICLR 2015): ResNet-50 teaches ResNet-18 on ImageNet.

Published: no figure with this pair and recipe. Here: not run.

    python launch.py --config configs/fitnet_imagenet.py \\
        --config.teacher.checkpoint=resnet50.pth

Loss: CE + KD + 100 FitNet, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "fitnet",
    student="ResNet18",
    teacher="ResNet50",
    weights={"ce": 1.0, "kd": 1.0, "fitnet": 100.0},
    temperature=4.0,
    hint_layer="stage1",
  )
  return base.finish(base.imagenet(config), arg)
