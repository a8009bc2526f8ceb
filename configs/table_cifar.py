"""The table of SimKD's README: its methods and pairs on CIFAR-100, 3 trials.

    python launch.py --config configs/table_cifar.py --workdir runs/table
    python launch.py --config configs/table_cifar.py:repdistiller
    python launch.py --config configs/table_cifar.py --config.trials=1

ResNet-32x4 teaches ResNet-8x4, VGG-8 and ShuffleNetV2 x1.5, with the weights of
SimKD's toolbox (cross-entropy, KD and the method's own term) or, after
`:repdistiller`, of RepDistiller's (KD with 0.1 and 0.9, all others without it);
methods that RepDistiller has not are treated alike. Each cell is a run of
`configs/METHOD_cifar.py`. The command may be given as often as there are
machines: no cell is run twice, finished ones are skipped, failed ones tried
again. The published values stand in `kd_jax/reporting/published.csv`.
Here: not run.
"""

import importlib
from typing import Any

from configs import base

STUDENTS = {
  "resnet8x4": "resnet8x4",
  "vgg8": "vgg8",
  "shufflev2": "ShuffleV2_1_5",
}
TEACHER = "resnet32x4"
# Row -> the method's config and what differs from it.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  **{
    name: (name, {})
    for name in (
      *("kd", "fitnet", "at", "sp", "vid", "crd", "srrl", "semckd"),
      "reviewkd",
    )
  },
  **{f"simkd_f{factor}": ("simkd", {"factor": factor}) for factor in (8, 4, 2)},
}


def product(
  *,
  students: dict[str, str],
  teacher: str,
  methods: list[str],
  repdistiller: bool = False,
) -> dict[str, dict[str, Any]]:
  """The cells STUDENT_METHOD of a grid.

  Args:
    students: word for the cells' names -> network.
    teacher: network.
    methods: of METHODS.
    repdistiller: whether the weights are RepDistiller's.

  Returns:
    What `config.grid` takes: name -> what differs from a student alone.
  """
  cells: dict[str, dict[str, Any]] = {}
  for word, student in students.items():
    cells[f"{word}_alone"] = {"student": {"name": student}}
    for row in methods:
      cells[f"{word}_{row}"] = {
        "student": {"name": student},
        "teacher": {"name": teacher},
        **_method(row, repdistiller),
      }
  return cells


def _method(row, repdistiller):
  name, changes = METHODS[row]
  config = importlib.import_module(f"configs.{name}_cifar").get_config()
  weights = config.loss_weights.to_dict()
  fields = {**config.distiller.to_dict(), **changes}
  if repdistiller:
    if name == "kd":
      weights = {"ce": 0.1, "kd": 0.9}
    else:
      weights["kd"] = 0.0
    if name == "fitnet":
      fields["hint_layer"] = "stage2"
  return {
    "distiller": fields,
    "loss_weights": weights,
    "loss_ramp_epochs": config.loss_ramp_epochs.to_dict(),
  }


def get_config(arg: str = ""):
  """The table; `:repdistiller` with its weights, `:smoke` in seconds."""
  config = base.get_config()
  config.trials = 3
  students, methods = STUDENTS, list(METHODS)
  if arg == "smoke":
    students, methods = {"resnet8": "resnet8"}, ["kd", "simkd_f2"]
    config.trials = 1
  config.grid = product(
    students=students,
    teacher=TEACHER,
    methods=methods,
    repdistiller=arg == "repdistiller",
  )
  return base.finish(config, "" if arg == "repdistiller" else arg)
