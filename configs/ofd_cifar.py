"""OFD (Heo et al., ICCV 2019): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

mdistiller's recipe, whose README has no figure for it; the paper's CIFAR-100
pairs are other ones. Here: not run.

    python launch.py --config configs/ofd_cifar.py

Loss: CE + 0.001 OFD. The teacher is in evaluation mode; the authors leave it in
training mode.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "ofd", weights={"ce": 1.0, "kd": 0.0, "ofd": 0.001}
  )
  return base.finish(config, arg)
