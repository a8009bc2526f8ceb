"""Teacher, student alone, KD and SimKD on handwritten digits, in minutes.

    python launch.py --config configs/quickstart.py

No download: scikit-learn's 1,797 digits, of which 1,437 train and 360 test.
"""

from configs import base


def get_config(arg: str = ""):
  """The four runs; `:smoke` makes each one of seconds."""
  config = base.get_config()
  config.data.name = "digits"
  config.data.image_size = 16
  config.data.crop_padding = 2
  config.data.flip = False
  config.student.name = "resnet8"
  config.epochs = 16
  config.batch_size = 64
  config.optim.schedule = "cosine"
  config.optim.milestones = ()
  config.eval.batch_size = 360
  config.log.every_steps = 22
  config.teacher.epochs = 12
  teacher = {"name": "resnet14x2"}
  config.grid = {
    "alone": {},
    "kd": {
      "teacher": teacher,
      "distiller": {"name": "kd", "temperature": 4.0},
      "loss_weights": {"ce": 1.0, "kd": 1.0},
    },
    "simkd": {
      "teacher": teacher,
      "distiller": {"name": "simkd", "factor": 2},
      "loss_weights": {"ce": 0.0, "kd": 0.0, "simkd": 1.0},
      "verify_export": True,
    },
  }
  return base.finish(config, arg)
