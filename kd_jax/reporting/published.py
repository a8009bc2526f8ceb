"""Published accuracies of CIFAR-100, to stand beside one's own.

A value stands only beside a run of its own recipe: data and augmentation, pair,
method and its settings, weights of the loss, optimiser, schedule, batch and
arithmetic, which is float32 in all tables: a run in bfloat16 has none. Seeds,
the pipeline and what a device does at once are free. A teacher that is named by
its checkpoint is taken to be the table's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kd_jax import models
from kd_jax.runs import identity


@dataclasses.dataclass(frozen=True)
class Published:
  """A value of a published table.

  Attributes:
    top1: in percent.
    source: short name of the table.
    epoch: which of a run it is to be compared with: "final", the last, or
      "best", chosen on the test set.
  """

  top1: float
  source: str
  epoch: str


# Each table's sources are the READMEs of the toolboxes: SimKD's
# (github.com/DefangChen/SimKD, whose code keeps the best epoch) and
# RepDistiller's (github.com/HobbitLong/RepDistiller, which reports the last).
_EPOCH = {"SimKD": "best", "RepDistiller": "final"}


# What the runs of all tables have alike, by the names of `record.identity`; the
# learning rate is the network's default.
_RECIPE: dict[str, Any] = {
  "epochs": 240,
  "batch_size": 64,
  "accumulate_steps": 1,
  "dtype": "float32",
  "sync_batch_stats": True,  # as on one device
  "label_smoothing": 0.0,
  "optim.reference_batch_size": 0,
  "optim.schedule": "step",
  "optim.milestones": [150, 180, 210],
  "optim.decay_rate": 0.1,
  "optim.warmup_epochs": 0.0,
  "optim.momentum": 0.9,
  "optim.nesterov": False,
  "optim.weight_decay": 5e-4,
  "optim.gradient_clip": 0.0,
  "data.crop_padding": 4,
  "data.flip": True,
  "data.mixup": 0.0,
  "data.cutmix": 0.0,
  "eval.every_epochs": 1,  # among which the best was chosen
}


# Settings of the methods where a row has no others.
_TEMPERATURE = 4.0


_SETTINGS: dict[str, dict[str, Any]] = {
  "vid": {"initial_variance": 5.0},
  "crd": {
    "k": 16384,
    "nce_temperature": 0.07,
    "momentum": 0.5,
    "feat_dim": 128,
    "mode": "exact",
  },
  "semckd": {"soft": 1.0},
  "reviewkd": {"max_mid": 512},
}


_RAMPS = {"reviewkd": {"reviewkd": 20.0}}


# Weights of the terms of each method's loss.
WEIGHTS: dict[str, dict[str, dict[str, float]]] = {
  "SimKD": {
    "none": {"ce": 1.0},
    "kd": {"ce": 1.0, "kd": 1.0},
    "fitnet": {"ce": 1.0, "kd": 1.0, "fitnet": 100.0},
    "at": {"ce": 1.0, "kd": 1.0, "at": 1000.0},
    "sp": {"ce": 1.0, "kd": 1.0, "sp": 3000.0},
    "vid": {"ce": 1.0, "kd": 1.0, "vid": 1.0},
    "crd": {"ce": 1.0, "kd": 1.0, "crd": 0.8},
    "srrl": {"ce": 1.0, "kd": 1.0, "srrl": 1.0},
    "semckd": {"ce": 1.0, "kd": 1.0, "semckd": 400.0},
    "simkd": {"simkd": 1.0},
    # Without values: that of its paper (75.63 for resnet8x4) is of batch 128,
    # rate 0.1 and Nesterov's momentum.
    "reviewkd": {"ce": 1.0, "reviewkd": 5.0},
  },
  "RepDistiller": {
    "none": {"ce": 1.0},
    "kd": {"ce": 0.1, "kd": 0.9},
    "fitnet": {"ce": 1.0, "fitnet": 100.0},
    "at": {"ce": 1.0, "at": 1000.0},
    "sp": {"ce": 1.0, "sp": 3000.0},
    "vid": {"ce": 1.0, "vid": 1.0},
    "crd": {"ce": 1.0, "crd": 0.8},
  },
}


# (source, teacher) -> students, and rows of method, settings and values.
_TABLES: dict[tuple[str, str], tuple[tuple[str, ...], list[tuple]]] = {
  ("SimKD", ""): (
    ("resnet32x4", "resnet8x4", "vgg8", "ShuffleV2_1_5"),
    [("none", {}, 79.42, 73.09, 70.46, 74.15)],
  ),
  ("SimKD", "resnet32x4"): (
    ("resnet8x4", "vgg8", "ShuffleV2_1_5"),
    [
      ("kd", {}, 74.42, 72.73, 76.82),
      ("fitnet", {"hint_layer": "stage1"}, 74.32, 72.91, 77.12),
      ("at", {}, 75.07, 71.90, 77.51),
      ("sp", {}, 74.29, 73.12, 77.18),
      ("vid", {}, 74.55, 73.19, 77.11),
      ("crd", {}, 75.59, 73.54, 77.66),
      ("srrl", {}, 75.39, 73.23, 77.55),
      ("semckd", {}, 76.23, 75.27, 79.13),
      ("simkd", {"factor": 8}, 76.73, 74.74, 78.96),
      ("simkd", {"factor": 4}, 77.88, 75.62, 79.48),
      ("simkd", {"factor": 2}, 78.08, 75.76, 79.54),
    ],
  ),
  ("RepDistiller", ""): (
    ("resnet32x4", "resnet8x4", "vgg8", "ShuffleV1", "ShuffleV2"),
    [("none", {}, 79.42, 72.50, 70.36, 70.50, 71.82)],
  ),
  ("RepDistiller", "resnet32x4"): (
    ("resnet8x4", "ShuffleV1", "ShuffleV2"),
    [
      ("kd", {}, 73.33, 74.07, 74.45),
      ("fitnet", {"hint_layer": "stage2"}, 73.50, 73.59, 73.54),
      ("at", {}, 73.44, 71.73, 72.73),
      ("sp", {}, 72.94, 73.48, 74.56),
      ("vid", {}, 73.09, 73.38, 73.40),
      ("crd", {}, 75.51, 75.11, 75.65),
    ],
  ),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A method, as a table has it.

  Attributes:
    source: short name of the table.
    teacher: network; "" for networks alone.
    method: its word.
    settings: fields of the method that other rows of it have otherwise.
    top1: student -> percent.
  """

  source: str
  teacher: str
  method: str
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  top1: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def has(self, config: Mapping[str, Any]) -> bool:
    """Whether a run is of this row, whichever its student is.

    Args:
      config: the content of its `config.json`.
    """
    student = models.MODELS.get(config["student"]["name"])
    if student is None:  # a user's own
      return False
    recipe = {**_RECIPE, "optim.learning_rate": student.learning_rate}
    if self.teacher:  # it may have to be trained
      recipe |= {
        "teacher.epochs": _RECIPE["epochs"],
        "teacher.milestones": _RECIPE["optim.milestones"],
        "teacher.learning_rate": models.MODELS[self.teacher].learning_rate,
      }
    given = identity.config_fingerprint(config)
    return (
      config["data"]["name"].rpartition(":")[2] == "cifar100"
      and config["teacher"]["name"] == self.teacher
      # What is open will be settled so.
      and all(given.get(k) in (None, value) for k, value in recipe.items())
      and self._has_method(config)
    )

  def _has_method(self, config):
    settings = dict(config["distiller"])
    if settings.pop("name") != self.method:
      return False
    weights = WEIGHTS[self.source]
    if self.method not in weights:  # a method that no table has: any is as good
      return True
    # What a run leaves out has its default, which is the tables' value.
    expected = {
      "temperature": _TEMPERATURE,
      **_SETTINGS.get(self.method, {}),
      **self.settings,
    }
    return (
      {**expected, **settings} == expected
      and _present(config["loss_weights"]) == weights[self.method]
      and _present(config["loss_ramp_epochs"]) == _RAMPS.get(self.method, {})
    )


def _present(terms):
  return {name: value for name, value in terms.items() if value}


def rows(source: str, teacher: str) -> list[Row]:
  """The rows of a table for one teacher, or for networks alone ("")."""
  students, lines = _TABLES[source, teacher]
  return [
    Row(source, teacher, method, settings, dict(zip(students, values)))
    for method, settings, *values in lines
  ]


def find(config: Mapping[str, Any]) -> list[Published]:
  """The published values of a run.

  Args:
    config: the content of its `config.json`.

  Returns:
    One for each table that has it; none if its recipe is no table's.
  """
  student = config["student"]["name"]
  return [
    Published(row.top1[student], row.source, _EPOCH[row.source])
    for table in _TABLES
    for row in rows(*table)
    if student in row.top1 and row.has(config)
  ]
