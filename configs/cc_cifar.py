"""CC (Peng et al., ICCV 2019): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 72.97 % top-1, row "CC" of the table in RepDistiller's README
(teacher 79.42, student alone 72.50; last epoch), whose recipe this is. Here:
not run.

    python launch.py --config configs/cc_cifar.py

Loss: CE + 0.02 CC, embeddings 128 wide.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "cc", weights={"ce": 1.0, "kd": 0.0, "cc": 0.02}, feat_dim=128
  )
  return base.finish(config, arg)
