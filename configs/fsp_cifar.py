"""FSP (Yim et al., CVPR 2017): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 72.62 % top-1, row "FSP" of RepDistiller's README (teacher 79.42,
student alone 72.50), by its recipe, which is this one. Here: not run.

    python launch.py --config configs/fsp_cifar.py

Two stages. First FSP alone, for 30 epochs, trains the student up to its last
stage. Then cross-entropy alone trains the student: RepDistiller gives FSP no
weight there, whatever its option says; loss_weights.fsp does. The networks need
maps of the same channels.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation("fsp", weights={"ce": 1.0, "kd": 0.0, "fsp": 0.0})
  config.stages.init = {"epochs": 30, "loss_weights": {"fsp": 1.0}}
  config = base.finish(config, arg)
  if "smoke" in arg.split(","):
    config.teacher.name = config.student.name
  return config
