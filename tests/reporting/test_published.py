"""Published values stand beside runs of the same recipe, and of no other."""

import copy
import importlib
import json

import pytest

from kd_jax.reporting import published
from kd_jax.runs import grid, identity

# Fields that a run of a recipe may choose.
FREE = {
  "seed",
  "teacher.seed",
  "data.seed",
  "data.pipeline",
  "data.decoder",
} | {*("data.on_bad_image", "steps_per_dispatch", "eval.batch_size")}
PAIR = {"student.name", "teacher.name"}  # free, but of `find`


def load(name: str, arg: str = ""):
  return importlib.import_module(f"configs.{name}").get_config(arg)


def values_of(name="kd_cifar", **changes):
  """The published values of a config with other values of some fields."""
  config = identity.as_json(load(name))
  for field, value in changes.items():
    section, _, last = field.rpartition(".")
    (config[section] if section else config)[last] = value
  return [v.top1 for v in published.find(config)]


def another(value):
  """A value that is not the same."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, str):
    return f"{value}x"
  if isinstance(value, list | dict):
    return [*value, 7] if value else {"kd": 7}
  return (value or 0) + 7


def test_every_line_is_found_by_the_run_that_it_describes():
  for value in published.values():
    name, *changes = value.config.split()
    config = load(name)
    config.student.name, config.teacher.name = value.student, value.teacher
    for field, text in (change.split("=") for change in changes):
      new = text if text.isidentifier() else json.loads(text)
      config.update_from_flattened_dict({field: new})
    found = published.find(identity.as_json(config))
    assert [v for v in found if v.recipe == value.recipe] == [value]


@pytest.mark.parametrize(
  ("arg", "columns", "row"),
  [
    (
      "",
      "kd fitnet at sp vid crd srrl semckd reviewkd",
      [74.42, 74.32, 75.07, 74.29, 74.55, 75.59, 75.39, 76.23, None],
    ),
    (
      "repdistiller",
      "kd fitnet at sp vid crd semckd",
      [73.33, 73.50, 73.44, 72.94, 73.09, 75.51, None],
    ),
  ],
)
def test_cells_of_the_table_have_their_values(arg, columns, row):
  cells = grid.cells(load("table_cifar", arg).lock())
  recipe = "RepDistiller" if arg else "SimKD"
  values = []
  for name in columns.split():
    found = published.find(identity.as_json(cells[f"resnet8x4_{name}"]))
    assert {v.recipe for v in found} <= {recipe}
    values += [v.top1 for v in found] or [None]
  assert values == row


@pytest.mark.parametrize("name", ["kd_cifar", "crd_cifar", "reviewkd_cifar"])
def test_any_other_field_is_another_recipe(name):
  config = identity.as_json(load(name))
  fields = identity.config_fingerprint(config).keys() | {"data.seed"}
  assert published.follows(config, name)
  for field in fields:
    changed = copy.deepcopy(config)
    section, _, last = field.rpartition(".")
    place = changed[section] if section else changed
    place[last] = another(place[last])
    assert published.follows(changed, name) == (field in FREE | PAIR), field
    assert not (published.find(changed) and field in PAIR), field


@pytest.mark.parametrize(
  ("name", "field", "value"),
  [
    ("vid", "distiller.initial_variance", 1.0),
    ("simkd", "distiller.student_map", "stage2"),
    ("kd", "loss_weights.crd", 0.8),
    ("kd", "loss_ramp_epochs.kd", 20.0),
    ("kd", "optim.a_field_of_tomorrow", 1),
    ("kd", "loss_weights", {"kd": 1.0}),
  ],
)
def test_what_the_recipe_does_not_name_has_its_default(name, field, value):
  assert values_of(f"{name}_cifar")
  assert not values_of(f"{name}_cifar", **{field: value})


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("data.name", "tfds:cifar100"),
    ("optim.learning_rate", 0.05),
    ("teacher.epochs", 240),
    ("teacher.learning_rate", 0.05),
    ("teacher.checkpoint", "somewhere"),
    ("distiller", {"name": "kd"}),  # with its default temperature
    ("loss_weights.crd", 0.0),
  ],
)
def test_the_same_recipe_in_other_words(field, value):
  assert values_of(**{field: value}) == [74.42]


def test_a_mobile_student_has_its_own_rate():
  mobile = {"student.name": "ShuffleV2_1_5"}
  assert values_of(**mobile) == [76.82]
  assert values_of(**mobile, **{"optim.learning_rate": 0.01}) == [76.82]
  assert values_of(**mobile, **{"optim.learning_rate": 0.05}) == []


def test_a_recipe_without_its_file(caplog):
  config = identity.as_json(load("kd_cifar"))
  assert not published.follows(config, "no_such_cifar")
  assert "configs/no_such_cifar.py" in caplog.text
