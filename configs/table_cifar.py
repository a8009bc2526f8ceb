"""A published table of CIFAR-100: its methods and pairs, 3 trials.

    python launch.py --config configs/table_cifar.py --workdir runs/table
    python launch.py --config configs/table_cifar.py:repdistiller
    python launch.py --config configs/table_cifar.py:mdistiller
    python launch.py --config configs/table_cifar.py --config.trials=1

The table of SimKD's README (ResNet-32x4 teaches three students), RepDistiller's
(13 pairs) or mdistiller's (KD and DKD). There is a cell for each value of the
table in `kd_jax/reporting/published.csv`, with the settings of its line, and
one for each student alone. The command may be given as often as there are
machines: no cell is run twice, finished ones are skipped, failed ones tried
again. Here: not run.
"""

from typing import Any

from configs import base
from kd_jax.reporting import published
from kd_jax.runs import identity

# Argument -> recipe of the values.
TABLES = {
  **{"": "SimKD", "repdistiller": "RepDistiller"},
  "mdistiller": "mdistiller",
}


def cell(recipe: str, *, teacher: str, student: str) -> dict[str, Any]:
  """A cell of `config.grid`: what differs from configs/base.py.

  Args:
    recipe: as `published.Published.config`.
    teacher: network; "" for a student alone.
    student: network.
  """
  plain = identity.as_json(base.get_config())
  config = published.load(recipe, student=student, teacher=teacher)
  delta: dict[str, Any] = {"student": {"name": student}}
  for name, value in config.items():
    # What depends on the method is whole in a cell.
    if name == "distiller" or name.startswith("loss_"):
      delta[name] = value
    elif isinstance(value, dict):
      changed = {k: v for k, v in value.items() if v != plain[name].get(k)}
      delta |= {name: changed} if changed else {}
    elif value != plain[name]:
      delta[name] = value
  return delta


def table(recipe: str) -> dict[str, dict[str, Any]]:
  """The cells STUDENT_alone and TEACHER_STUDENT_METHOD of a published table."""
  values = [v for v in published.values() if v.recipe == recipe]
  cells = {}
  for value in (v for v in values if v.teacher):
    pair = {"teacher": value.teacher, "student": value.student}
    alone = {**pair, "teacher": ""}
    cells[f"{value.student}_alone"] = cell("teacher_cifar", **alone)
    fields = value.config.replace("=", "").split()[1:]
    words = [*pair.values(), value.method, *(f.split(".")[-1] for f in fields)]
    cells["_".join(words)] = cell(value.config, **pair)
  return cells


def get_config(arg: str = ""):
  """The table, see TABLES; `:smoke` two cells of it in seconds."""
  config = base.get_config()
  config.trials = 3
  words = arg.split(",")
  smoke = "smoke" in words
  name = ",".join(word for word in words if word != "smoke")
  if name not in TABLES:
    raise ValueError(
      f"config argument: expected '' or 'smoke', or a table"
      f" ({', '.join(filter(None, TABLES))}), got {arg!r}"
    )
  if smoke:
    config.trials = 1
    preset = f":{name}" if name else ""
    pair = {"teacher": "resnet8x2", "student": "resnet8"}
    config.grid = {
      "alone": cell("teacher_cifar", **{**pair, "teacher": ""}),
      "kd": cell(f"kd_cifar{preset}", **pair),
    }
  else:
    config.grid = table(TABLES[name])
  return base.finish(config, "smoke" if smoke else "")
