"""OFA (Hao et al., NeurIPS 2023): ResNet-32x4 -> ResNet-8x4, CIFAR-100.

Published: no figure with this pair; the method is for unlike networks, such as
DeiT-T -> ResNet-18 on ImageNet (71.34 %). The weights are the authors', the
schedule is ours. Here: not run.

    python launch.py --config configs/ofa_cifar.py

Loss: CE + OFA of the logits + OFA of the exits after each stage.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "ofa",
    weights={"ce": 1.0, "kd": 0.0, "ofa": 1.0, "ofa_logits": 1.0},
    temperature=1.0,
    eps=1.0,
  )
  return base.finish(config, arg)
