"""The teacher: ResNet-50 on ImageNet, cross-entropy alone.

Published: 76.13 % top-1 (torchvision's first weights, by a recipe of its own).
Here: not run.

    python launch.py --config configs/teacher_imagenet.py

A larger batch, with its rate in proportion and a warm-up:

    python launch.py --config configs/teacher_imagenet.py \\
        --config.batch_size=1024 --config.optim.reference_batch_size=256 \\
        --config.optim.warmup_epochs=5
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.get_config()
  config.student.name = "ResNet50"
  return base.finish(base.imagenet(config), arg)
