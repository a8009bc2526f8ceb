"""Published values stand beside runs of the same recipe, and of no other."""

import copy
import importlib
import json

import pytest

from kd_jax import models
from kd_jax.reporting import published
from kd_jax.runs import grid, identity, presets

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
    assert {value.student, value.teacher} <= {"", *models.names()}
    assert value.epoch in ("final", "best") and 50 < value.top1 < 80
    file, *changes = value.config.split()
    name, _, preset = file.partition(":")
    config = load(name, preset)
    config.student.name, config.teacher.name = value.student, value.teacher
    for field, text in (change.split("=") for change in changes):
      new = text if text.isidentifier() else json.loads(text)
      config.update_from_flattened_dict({field: new})
    presets.fill(config)
    found = published.find(identity.as_json(config))
    assert [v for v in found if v.recipe == value.recipe] == [value]


TABLES = {
  "": {
    "resnet32x4_resnet8x4": {
      **{"kd": 74.42, "fitnet": 74.32, "at": 75.07, "sp": 74.29},
      **{"vid": 74.55, "crd": 75.59, "srrl": 75.39, "semckd": 76.23},
      **{"simkd_factor8": 76.73, "simkd_factor2": 78.08},
    }
  },
  "repdistiller": {
    "resnet32x4_resnet8x4": {
      **{"kd": 73.33, "fitnet": 73.50, "at": 73.44, "sp": 72.94},
      **{"vid": 73.09, "crd": 75.51},
    },
    "ResNet50_cifar_vgg8": {"kd": 73.81, "crd": 74.30},
  },
  "mdistiller": {
    "resnet110_resnet32": {"kd": 73.08, "dkd": 74.11},
    "vgg13_MobileNetV2": {"kd": 67.37, "dkd": 69.71},
  },
}
# (teacher, student) and students alone.
COUNTS = {"": (3, 3), "repdistiller": (13, 9), "mdistiller": (15, 10)}


@pytest.mark.parametrize(
  "arg",
  [
    *["", "mdistiller"],
    pytest.param("repdistiller", marks=pytest.mark.full),
  ],
)
def test_cells_of_a_table_have_their_values(arg):
  cells = grid.cells(load("table_cifar", arg).lock())
  recipe = {"": "SimKD", "repdistiller": "RepDistiller"}.get(arg, arg)
  for pair, row in TABLES[arg].items():
    for name, expected in row.items():
      found = published.find(identity.as_json(cells[f"{pair}_{name}"]))
      assert {v.recipe: v.top1 for v in found}[recipe] == expected
  first = [cell for name, cell in cells.items() if "_seed" not in name]
  assert len(cells) == 3 * len(first)
  pairs = {(cell.teacher.name, cell.student.name) for cell in first}
  alone = {pair for pair in pairs if not pair[0]}
  assert (len(pairs - alone), len(alone)) == COUNTS[arg]


def test_the_pair_of_a_table_chooses_what_depends_on_it():
  cells = load("table_cifar", "mdistiller").grid
  betas = {
    pair: cells[f"{pair}_dkd"].distiller.beta
    for pair in ("resnet32x4_resnet8x4", "resnet56_resnet20", "vgg13_vgg8")
  }
  assert [*betas.values()] == [8, 2, 6]
  assert cells.vgg13_vgg8_dkd.preset == "mdistiller"


def test_unknown_table():
  with pytest.raises(ValueError, match=r"a table \(repdistiller, mdistiller\)"):
    load("table_cifar", "lskd")


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
