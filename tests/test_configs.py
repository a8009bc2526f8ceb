"""Every file of configs/: what it says, that it loads, that it runs."""

import importlib
import math
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import base
from kd_jax import distillers, models, storage
from kd_jax.reporting import published
from kd_jax.runs import grid, identity, train
from kd_jax.runs import workdir as workdir_lib

REPO = pathlib.Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (REPO / "configs").glob("*.py"))
RUNS = [name for name in NAMES if name != "base"]
GRIDS = ["quickstart", "table_cifar", "table_cpu"]
METHODS = [
  name.removesuffix("_cifar")
  for name in RUNS
  if name.removesuffix("_cifar") in distillers.names()
]
IMAGENET = ["teacher_imagenet", *(f"{method}_imagenet" for method in METHODS)]
# For trying things on other data; no paper has their figures.
OTHERS = ["simkd_digits", "simkd_folder"]
# Sections whose keys depend on the method or the grid.
FREE_FORM = ("distiller.", "loss_weights.", "loss_ramp_epochs", "grid")


def load(name: str, arg: str = "") -> ConfigDict:
  return importlib.import_module(f"configs.{name}").get_config(arg)


def fields(config: ConfigDict) -> dict[str, str]:
  """The fixed fields, by dotted name, each with its type."""
  return {
    name: config.get_type(name).__name__
    if "." not in name
    else config[name.rpartition(".")[0]]
    .get_type(name.rpartition(".")[2])
    .__name__
    for name in storage.flatten(config.to_dict())
    if not name.startswith(FREE_FORM)
  }


def test_there_is_a_config_for_every_method():
  assert {*METHODS, "none"} == set(distillers.names())
  others = {"base", "teacher_cifar", *GRIDS, *IMAGENET, *OTHERS}
  assert set(NAMES) == others | {f"{method}_cifar" for method in METHODS}


@pytest.mark.parametrize("name", RUNS)
def test_header_has_what_a_reader_needs(name):
  header = importlib.import_module(f"configs.{name}").__doc__
  assert f"python launch.py --config configs/{name}.py" in header
  if name not in [*GRIDS, *OTHERS]:
    assert "Published: " in header
    assert "Here: " in header


@pytest.mark.parametrize("arg", ["", ":smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_loads_locked_with_the_fields_of_base(name, arg, parse_launch):
  config = parse_launch("--config", f"{REPO}/configs/{name}.py{arg}")
  assert config.is_locked
  assert bool(config.grid) == (name in GRIDS)
  with pytest.raises(AttributeError, match='Did you mean "epochs"'):
    config.epoch = 3
  assert fields(config) == fields(base.get_config())
  assert config.student.name in models.names()
  assert config.teacher.name in ["", *models.names()]


@pytest.mark.parametrize("name", IMAGENET)
def test_recipe_for_imagenet_is_the_references(name):
  config, cifar = load(name), load(name.replace("imagenet", "cifar"))
  assert config.epochs == 120
  assert config.batch_size == 256
  assert config.optim.milestones == (30, 60, 90)
  assert config.optim.weight_decay == 1e-4
  assert config.optim.learning_rate == 0.1
  assert config.data.name == "imagenet"
  assert config.data.crop_area == (0.08, 1.0)
  assert (config.label_smoothing, config.data.mixup, config.data.cutmix) == (
    (0, 0, 0)
  )
  assert config.distiller == cifar.distiller
  assert config.loss_weights.keys() == cifar.loss_weights.keys()
  pair = (config.teacher.name, config.student.name)
  teaches = ("ResNet50", "ResNet18")
  assert pair == (("", "ResNet50") if name.startswith("teacher") else teaches)


@pytest.mark.parametrize(
  "name", sorted({*NAMES} - {*GRIDS, *IMAGENET, *OTHERS})
)
def test_recipe_is_the_references(name):
  config, plain = load(name), base.get_config()
  assert config.epochs == 240
  assert config.batch_size == 64
  assert config.optim.milestones == (150, 180, 210)
  assert config.optim.weight_decay == 5e-4
  assert config.optim.learning_rate is None  # 0.05, or 0.01 if mobile
  assert config.optim == plain.optim
  assert config.data == plain.data
  assert config.data.name == "cifar100"


# The seed's weights of cross-entropy, KD and the method's own term.
WEIGHTS = {
  "kd": (1, 1, None),
  "fitnet": (1, 1, 100),
  "at": (1, 1, 1000),
  "sp": (1, 1, 3000),
  "vid": (1, 1, 1),
  "crd": (1, 1, 0.8),
  "srrl": (1, 1, 1),
  "semckd": (1, 1, 400),
  "simkd": (0, 0, 1),
  "reviewkd": (1, 0, 5),
}


@pytest.mark.parametrize("method", METHODS)
def test_method_config(method):
  config = load(f"{method}_cifar")
  ce, kd, own = WEIGHTS[method]
  expected = {"ce": ce, "kd": kd, **({} if own is None else {method: own})}
  assert config.loss_weights.to_dict() == expected
  assert set(config.loss_ramp_epochs) <= set(expected)
  assert config.distiller.name == method
  assert (config.teacher.name, config.student.name) == (
    *("resnet32x4", "resnet8x4"),
  )
  settings = config.distiller.to_dict()
  assert settings.pop("name") == method
  # A run that leaves them out is the same run.
  for module in (
    distillers.create(method),
    distillers.create(method, **settings),
  ):
    assert {key: getattr(module, key) for key in settings} == settings


def test_teacher_config_trains_the_teacher_of_the_others():
  config = load("teacher_cifar")
  assert config.student.name == load("kd_cifar").teacher.name
  assert config.distiller.name == "none"
  assert config.loss_weights.to_dict() == {"ce": 1.0}


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


@pytest.mark.parametrize("name", NAMES)
def test_unknown_argument(name):
  with pytest.raises(
    ValueError, match=r"expected '' or 'smoke' .*, got 'smok'; fields are set"
  ):
    load(name, "smok")


# Smoke runs of ImageNet's configs are those of CIFAR's but for the rates, and
# test_grid.py runs grids of trials: that they can begin is enough of most.
BEGUN = sorted(
  {*IMAGENET, "table_cifar", "table_cpu"}
  - {"teacher_imagenet", "simkd_imagenet"}
)


@pytest.mark.parametrize("name", BEGUN)
def test_smoke_can_begin(name, tmp_path):
  for cell, config in grid.cells(load(name, "smoke").lock()).items():
    run = train.prepare(config, tmp_path / "run")
    assert run.total_steps == 8
    assert run.distiller.predicts_with_teacher_head is ("simkd" in cell)


@pytest.mark.parametrize("name", sorted({*NAMES} - {*BEGUN}))
def test_smoke_runs(name, smoke_run):
  workdir = smoke_run(name)
  config = load(name, "smoke")
  if config.grid:
    workdirs = {cell: workdir / cell for cell in config.grid}
    deltas = config.grid.to_dict()
  else:
    workdirs, deltas = {name: workdir}, {name: {}}
  for cell, folder in workdirs.items():
    method = {**config.to_dict(), **deltas[cell]}["distiller"]["name"]
    result = workdir_lib.result(folder)
    assert result["method"] == method
    assert result["student"] == "resnet8"
    assert result["steps"] == config.epochs * (64 // config.batch_size)
    assert result["final"]["epoch"] == config.epochs
    for scores in (result["final"], result["best"]):
      assert math.isfinite(scores["ce"])
      assert 0 <= scores["top1"] <= scores["top5"] <= 100
    assert result["best"]["top1"] >= result["final"]["top1"]
    assert bool(result["teacher"]) == (method != "none")
    assert (folder / "export" / "model.json").exists()
    assert (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
  "names",
  [["kd_cifar", "at_cifar"], *([g] for g in GRIDS if g not in BEGUN)],
)
def test_one_teacher_serves_the_runs_beside_each_other(names, smoke_run):
  folders = [smoke_run(name) for name in names]
  if names[0] in GRIDS:
    parent = folders[0]
    folders = [parent / cell for cell in ("kd", "simkd")]
  else:
    parent = folders[0].parent
  used = {
    workdir_lib.result(folder)["teacher"]["checkpoint"] for folder in folders
  }
  made = {str(folder) for folder in (parent / "teachers").iterdir()}
  assert len(used) == 1 and used <= made
