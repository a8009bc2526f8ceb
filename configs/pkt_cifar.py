"""PKT (Passalis, Tefas, ECCV 2018): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: 73.64 % top-1, row "PKT" of the table in RepDistiller's README
(teacher 79.42, student alone 72.50; last epoch), whose recipe this is. Here:
not run.

    python launch.py --config configs/pkt_cifar.py

Loss: CE + 30000 PKT.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "pkt", weights={"ce": 1.0, "kd": 0.0, "pkt": 30000.0}
  )
  return base.finish(config, arg)
