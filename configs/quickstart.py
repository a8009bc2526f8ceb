"""Teacher, student alone, KD and SimKD on handwritten digits, in minutes.

    python launch.py --config configs/quickstart.py

No download: scikit-learn's 1,797 digits, of which 1,437 train and 360 test.
"""

from configs import base


def get_config(arg: str = ""):
  """The four runs; `:smoke` makes each one of seconds."""
  config = base.digits(base.get_config(), epochs=16)
  config.student.name = "resnet8"
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
