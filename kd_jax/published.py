"""Published accuracies of CIFAR-100, to stand beside one's own.

A value stands only beside a run of its own recipe: data, pair, method and its
settings, weights of the loss, epochs and batch size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


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
_RECIPE = {"epochs": 240, "batch_size": 64}
_EPOCH = {"SimKD": "best", "RepDistiller": "final"}
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
    settings: fields of the method that the row is of.
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
    weights = {k: v for k, v in config["loss_weights"].items() if v}
    return (
      config["data"]["name"].rpartition(":")[2] == "cifar100"
      and all(config[name] == value for name, value in _RECIPE.items())
      and config["teacher"]["name"] == self.teacher
      and config["distiller"]["name"] == self.method
      and self.settings.items() <= config["distiller"].items()
      # Of a method that the table has not, any weights are as good.
      and weights == WEIGHTS[self.source].get(self.method, weights)
    )


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
