"""ViTKD (Yang et al., 2022) on CIFAR-100.

Published: no figure checked; the paper is about ImageNet. Both networks have to
be transformers: name your own with --config.student.name and
--config.teacher.name. The weights are the authors', the schedule is ours. Here:
not run.

    python launch.py --config configs/vitkd_cifar.py

Loss: CE + ViTKD.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "vitkd",
    weights={"ce": 1.0, "kd": 0.0, "vitkd": 1.0},
    alpha=3e-5,
    beta=3e-6,
    mask_ratio=0.5,
  )
  return base.finish(config, arg)
