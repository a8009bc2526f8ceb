"""RLD (Sun et al., ICCV 2025): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: no figure checked for this pair; the weights are DKD's. Here: not
run.

    python launch.py --config configs/rld_cifar.py

Loss: CE + RLD, whose weight grows over the first 20 epochs.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "rld",
    weights={"ce": 1.0, "kd": 0.0, "rld": 1.0},
    ramp_epochs={"rld": 20.0},
    temperature=4.0,
    confidence_temperature=1.0,
    alpha=1.0,
    beta=8.0,
  )
  return base.finish(config, arg)
