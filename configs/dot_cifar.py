"""DOT (Zhao et al., ICCV 2023): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 75.12 % top-1, row "DOT" of mdistiller's table, whose recipe this is
(KD with 0.1 and 0.9, batch 64, 240 epochs). Here: not run.

    python launch.py --config configs/dot_cifar.py

Loss: CE + KD, temperature 4. DOT is an optimiser: the momentum of the
cross-entropy is 0.075 lower, that of KD as much higher. It goes with every
method: add `--config.optim.dot_delta=0.075` to its command.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "kd",
    weights={"ce": 0.1, "kd": 0.9},
    temperature=4.0,
  )
  config.optim.dot_delta = 0.075
  return base.finish(config, arg)
