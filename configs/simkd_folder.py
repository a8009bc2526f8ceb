"""SimKD on images of your own: a folder of class folders.

    python launch.py --config configs/simkd_folder.py --config.data.dir=DIR

DIR holds `train/<class>/*` and `val/<class>/*`, of any size and format. The
teacher is trained first unless config.teacher.checkpoint names one. For images
of Tiny ImageNet's size:

    python launch.py --config configs/simkd_folder.py --config.data.dir=DIR \\
        --config.data.image_size=64 --config.data.resize=64

Rate, schedule and length are ImageNet's; a small set wants more epochs and a
larger weight decay.
"""

from configs import base


def get_config(arg: str = ""):
  """The run; `:smoke` makes it one of seconds."""
  config = base.distillation(
    "simkd",
    student="ResNet18",
    teacher="ResNet50",
    weights={"ce": 0.0, "kd": 0.0, "simkd": 1.0},
    factor=2,
  )
  config = base.imagenet(config)
  config.data.name = "folder"
  config.data.dir = "../data"
  return base.finish(config, arg)
