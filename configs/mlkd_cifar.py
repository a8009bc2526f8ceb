"""MLKD (Jin et al., CVPR 2023): ResNet-32x4 teaches ResNet-8x4 on CIFAR-100.

Published: 77.08 % top-1, row "MLKD" of the tables of logit standardisation (Sun
et al., CVPR 2024), whose runs take 480 epochs; this is the authors' recipe of
240 at a rate of 0.025. Here: not run.

    python launch.py --config configs/mlkd_cifar.py

Loss: 0.1 CE + 0.9 MLKD at temperatures 4, 3, 5, 2 and 6, as in the paper's
formula, without its masks of confident examples and classes. The strong view:
RandAugment (2 operations of magnitude 10) and Cutout.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "mlkd",
    weights={"ce": 0.1, "kd": 0.0, "mlkd": 0.9},
    temperature=4.0,
    other_temperatures=(3.0, 5.0, 2.0, 6.0),
  )
  config.optim.learning_rate = 0.025
  return base.finish(config, arg)
