"""CRD (Tian et al., ICLR 2020): ResNet-50 teaches ResNet-18 on ImageNet.

Published: no figure with this pair and recipe. Here: not run.

    python launch.py --config configs/crd_imagenet.py \\
        --config.teacher.checkpoint=resnet50.pth

Loss: CE + KD + 0.8 CRD, temperature 4.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "crd",
    student="ResNet18",
    teacher="ResNet50",
    weights={"ce": 1.0, "kd": 1.0, "crd": 0.8},
    temperature=4.0,
    k=16384,
    nce_temperature=0.07,
    momentum=0.5,
    feat_dim=128,
    mode="exact",
  )
  return base.finish(base.imagenet(config), arg)
