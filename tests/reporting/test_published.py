"""Published values stand beside runs of the same recipe, and of no other."""

import importlib

import pytest

from kd_jax.reporting import published
from kd_jax.runs import grid, identity


def load(name: str, arg: str = ""):
  return importlib.import_module(f"configs.{name}").get_config(arg)


def test_table_is_the_published_one():
  """Every cell but ReviewKD's stands beside a value, each beside its own."""
  config = load("table_cifar")
  assert config.trials == 3
  made = grid.cells(config.lock())
  assert len(made) == 3 * 3 * 13
  values = {}
  for name, cell in list(made.items())[: 3 * 13]:
    found = published.find(identity.as_json(cell))
    values[name] = [v.top1 for v in found if v.source == "SimKD"]
  assert [name for name, v in values.items() if not v] == [
    f"{student}_reviewkd" for student in ("resnet8x4", "shufflev2", "vgg8")
  ]
  assert values["resnet8x4_alone"] == [73.09]
  assert values["resnet8x4_simkd_f2"] == [78.08]
  assert values["vgg8_simkd_f8"] == [74.74]
  assert values["shufflev2_crd"] == [77.66]


def test_table_with_the_weights_of_repdistiller():
  made = grid.cells(load("table_cifar", "repdistiller").lock())
  values = {
    name: [v.top1 for v in found if v.source == "RepDistiller"]
    for name, cell in made.items()
    if (found := published.find(identity.as_json(cell)))
  }
  columns = ("kd", "fitnet", "at", "sp", "vid", "crd", "alone")
  row = [values[f"resnet8x4_{name}"] for name in columns]
  assert row == [[73.33], [73.50], [73.44], [72.94], [73.09], [75.51], [72.50]]
  weights = made["vgg8_semckd_seed2"].loss_weights.to_dict()
  assert weights == {"ce": 1.0, "kd": 0.0, "semckd": 400.0}
  assert made["vgg8_semckd_seed2"].seed == 2


# For each field on which a published value depends, another value.
OTHER_RECIPES = {
  "epochs": 200,
  "batch_size": 128,
  "accumulate_steps": 2,
  "dtype": "bfloat16",
  "sync_batch_stats": False,
  "label_smoothing": 0.1,
  "student.name": "resnet20",
  "teacher.name": "resnet38x4",
  "teacher.epochs": 30,
  "teacher.learning_rate": 0.1,
  "teacher.milestones": (10, 20),
  "distiller.name": "sp",
  "distiller.temperature": 8.0,
  "loss_weights.ce": 0.5,
  "loss_weights.kd": 0.5,
  "loss_ramp_epochs": {"kd": 20.0},
  "optim.learning_rate": 0.1,
  "optim.reference_batch_size": 128,
  "optim.schedule": "cosine",
  "optim.milestones": (100, 150),
  "optim.decay_rate": 0.2,
  "optim.warmup_epochs": 1.0,
  "optim.momentum": 0.5,
  "optim.nesterov": True,
  "optim.weight_decay": 1e-4,
  "optim.gradient_clip": 1.0,
  "data.name": "cifar10",
  "data.crop_padding": 2,
  "data.flip": False,
  "data.mixup": 0.2,
  "data.cutmix": 1.0,
  "eval.every_epochs": 10,
}
# The other fields, with values that are of the same recipe.
SAME_RECIPE = {
  "seed": 7,
  "steps_per_dispatch": 5,
  "teacher.seed": 7,
  "data.name": "tfds:cifar100",
  "data.pipeline": "grain",
  "data.seed": 7,
  "data.decoder": "gpu",
  "data.on_bad_image": "error",
  "eval.batch_size": 100,
  "optim.learning_rate": 0.05,  # what None is settled to
  "teacher.epochs": 240,
}
# Those that CIFAR-100 has not, and that say how several runs are made of one.
NO_RECIPE = {
  *("data.image_size", "data.resize", "data.crop_area", "data.crop_aspect"),
  *("data.num_examples", "data.num_classes", "grid", "teachers"),
}


def values_of(name="kd_cifar", **changes):
  """The published values of a config with other values of some fields."""
  config = load(name)
  with config.unlocked():
    for field, value in changes.items():
      config.update_from_flattened_dict({field: value})
  return [v.top1 for v in published.find(identity.as_json(config))]


def test_what_a_published_value_depends_on_is_known_of_every_field():
  every = identity.config_fingerprint(load("kd_cifar")).keys() | {"data.seed"}
  assert every == OTHER_RECIPES.keys() | SAME_RECIPE.keys() | NO_RECIPE


@pytest.mark.parametrize("field", OTHER_RECIPES)
def test_a_published_value_is_of_its_own_recipe(field):
  assert values_of() == [74.42]
  assert values_of(**{field: OTHER_RECIPES[field]}) == []


@pytest.mark.parametrize("field", SAME_RECIPE)
def test_a_published_value_does_not_depend_on(field):
  assert values_of(**{field: SAME_RECIPE[field]}) == [74.42]


@pytest.mark.parametrize(
  ("name", "value", "setting", "other"),
  [
    ("fitnet", 74.32, "hint_layer", "stage3"),
    ("vid", 74.55, "initial_variance", 1.0),
    ("crd", 75.59, "k", 4096),
    ("crd", 75.59, "mode", "relax"),
    ("semckd", 76.23, "soft", 4.0),
    ("simkd", 78.08, "student_map", "stage2"),
    ("simkd", 78.08, "factor", 1),
  ],
)
def test_a_published_value_is_of_its_own_settings(name, value, setting, other):
  assert values_of(f"{name}_cifar") == [value]
  change = {f"distiller.{setting}": other}
  assert values_of(f"{name}_cifar", **change) == []


def test_a_mobile_student_has_its_own_rate():
  mobile = {"student.name": "ShuffleV2_1_5"}
  assert values_of(**mobile) == [76.82]
  assert values_of(**mobile, **{"optim.learning_rate": 0.01}) == [76.82]
  assert values_of(**mobile, **{"optim.learning_rate": 0.05}) == []


@pytest.mark.parametrize(
  "change",
  [
    {"distiller.max_mid": 64},
    {"loss_weights.reviewkd": 1.0},
    {"loss_ramp_epochs.reviewkd": 1.0},
    {"optim.nesterov": True},
  ],
)
def test_a_row_without_values_is_of_one_recipe(change):
  row = published.Row("SimKD", "resnet32x4", "reviewkd")
  config = load("reviewkd_cifar")
  assert row.has(identity.as_json(config))
  config.unlock()
  config.update_from_flattened_dict(change)
  assert not row.has(identity.as_json(config))
