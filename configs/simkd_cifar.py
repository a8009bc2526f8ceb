"""SimKD (Chen et al., CVPR 2022): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 78.08 +- 0.15 % top-1 with factor 2, 77.88 with 4, 76.73 with 8; row
"SimKD" of the table in SimKD's README (teacher 79.42, student alone 73.09; mean
of several runs). Here: not run.

    python launch.py --config configs/simkd_cifar.py

Loss: SimKD: no labels and no soft targets; the prediction goes
through the projector and the teacher's classifier.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "simkd",
    weights={"ce": 0.0, "kd": 0.0, "simkd": 1.0},
    factor=2,
  )
  return base.finish(config, arg)
