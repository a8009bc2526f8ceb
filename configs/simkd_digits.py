"""SimKD (Chen et al., CVPR 2022) on handwritten digits, in a minute.

    python launch.py --config configs/simkd_digits.py --workdir runs/first
    python launch.py --config configs/simkd_digits.py --workdir runs/second \\
        --config.teacher.name= --config.teacher.checkpoint=runs/first \\
        --config.student.name=resnet8

A chain: ResNet-14x2, which is trained first, teaches ResNet-14, and that
student (with its projector and the classifier that it reuses) teaches ResNet-8.
Accuracies: docs/models.md.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "simkd",
    student="resnet14",
    teacher="resnet14x2",
    weights={"ce": 0.0, "kd": 0.0, "simkd": 1.0},
    factor=2,
  )
  return base.finish(base.digits(config, epochs=16), arg)
