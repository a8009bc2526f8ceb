"""The teacher: ResNet-32x4 on CIFAR-100, cross-entropy alone.

Published: 79.42 % top-1 (SimKD's README). Here: not run.

    python launch.py --config configs/teacher_cifar.py

A student alone is the same run with another network (73.09 for ResNet-8x4):

    python launch.py --config configs/teacher_cifar.py \\
        --config.student.name=resnet8x4
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.get_config()
  config.student.name = "resnet32x4"
  return base.finish(config, arg)
