"""Student alone, KD and SimKD on all of CIFAR-100, at the scale of a CPU.

    python launch.py --config configs/cpu_cifar.py

ResNet-14 teaches ResNet-8 for two epochs: enough to see real images learnt on
two cores, far from the accuracy of a full schedule. Top-1 in percent, seed 0,
2026-11-23, this command on 2 cores of an AMD EPYC: teacher 19.80, student alone
19.53, KD 21.28, SimKD 17.84 (KD and SimKD took 252 and 261 s). SimKD, which has
no labels, cannot pass so young a teacher.
"""

from configs import base


def get_config(arg: str = ""):
  """The four runs; `:smoke` makes each one of seconds."""
  config = base.get_config()
  config.student.name = "resnet8"
  config.epochs = 2
  config.batch_size = 128
  config.optim.learning_rate = 0.1
  config.optim.schedule = "cosine"
  config.optim.milestones = ()
  teacher = {"name": "resnet14"}
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
    },
  }
  return base.finish(config, arg)
