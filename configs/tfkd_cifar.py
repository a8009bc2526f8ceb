"""Tf-KD (Yuan et al., CVPR 2020): ResNet-8x4 teaches ResNet-8x4 on CIFAR-100.

Published: no figure with this network and recipe. Here: not run. Without a
teacher (--config.teacher.name=), the labels make one; the authors weigh it 0.1
and CE 0.9.

    python launch.py --config configs/tfkd_cifar.py

Loss: 0.1 CE + 0.9 Tf-KD, temperature 20.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "tfkd",
    weights={"ce": 0.1, "kd": 0.0, "tfkd": 0.9},
    student="resnet8x4",
    teacher="resnet8x4",
    temperature=20.0,
    correct_prob=0.99,
  )
  return base.finish(config, arg)
