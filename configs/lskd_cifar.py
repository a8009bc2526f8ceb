"""KD of standardised logits (Sun et al., CVPR 2024): CIFAR-100.

ResNet-32x4 teaches ResNet-8x4. Published: 76.62 % top-1, the best epoch, with
mdistiller's recipe (batch 64, 240 epochs). Here: not run.

    python launch.py --config configs/lskd_cifar.py

Loss: 0.1 CE + 9 KD at temperature 2. Every method that compares logits has the
field `standardize`.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "kd",
    weights={"ce": 0.1, "kd": 9.0},
    temperature=2.0,
    standardize=True,
  )
  return base.finish(config, arg)
