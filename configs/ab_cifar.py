"""AB (Heo et al., AAAI 2019): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 73.17 % top-1, row "AB" of RepDistiller's README (teacher 79.42,
student alone 72.50), by its recipe, which is this one. Here: not run.

    python launch.py --config configs/ab_cifar.py

Two stages. First AB alone, for 30 epochs, trains the student up to its last
stage, and the connectors. Then cross-entropy alone trains the student:
RepDistiller gives AB no weight there, whatever its option says;
loss_weights.ab does.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "ab", weights={"ce": 1.0, "kd": 0.0, "ab": 0.0}, margin=1.0
  )
  config.stages.init = {"epochs": 30, "loss_weights": {"ab": 1.0}}
  return base.finish(config, arg)
