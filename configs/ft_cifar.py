"""FT (Kim et al., NeurIPS 2018): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 72.86 % top-1, row "FT" of RepDistiller's README (teacher 79.42,
student alone 72.50), by its recipe, which is this one. Here: not run.

    python launch.py --config configs/ft_cifar.py

Two stages. First the paraphraser learns alone, for 30 epochs at rate 0.01, to
reconstruct the teacher's last map. Then the student: CE + 200 FT.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "ft",
    weights={"ce": 1.0, "kd": 0.0, "ft": 200.0, "ft_init": 0.0},
    rate=0.5,
  )
  config.stages.init = {
    "epochs": 30,
    # RepDistiller's for ResNet and WRN students; else the student's own.
    "optim": {"learning_rate": 0.01},
    "loss_weights": {"ft_init": 1.0},
  }
  return base.finish(config, arg)
