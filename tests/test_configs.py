"""Every file of configs/ loads, has the schema of base.py, and can begin."""

import importlib
import math
import pathlib

import method_cases
import pytest
from ml_collections import ConfigDict

from configs import base
from kd_jax import distillers, models, storage
from kd_jax.runs import grid, train
from kd_jax.runs import workdir as workdir_lib

REPO = pathlib.Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (REPO / "configs").glob("*.py"))
METHODS = [name for name in distillers.names() if name != "none"]
# Sections whose keys depend on the method or the grid.
FREE_FORM = ("distiller.", "loss_weights.", "loss_ramp_", "grid", "stages")


def load(name: str, arg: str = "") -> ConfigDict:
  return importlib.import_module(f"configs.{name}").get_config(arg)


def fields(config: ConfigDict) -> dict[str, str]:
  """The fixed fields, by dotted name, each with its type."""
  found = {}
  for name in storage.flatten(config.to_dict()):
    if not name.startswith(FREE_FORM):
      section, _, field = name.rpartition(".")
      place = config[section] if section else config
      found[name] = place.get_type(field).__name__
  return found


@pytest.mark.parametrize("arg", ["", ":smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_loads_locked_with_the_fields_of_base(name, arg, parse_launch):
  config = parse_launch("--config", f"{REPO}/configs/{name}.py{arg}")
  with pytest.raises(AttributeError, match='Did you mean "epochs"'):
    config.epoch = 3
  assert fields(config) == fields(base.get_config())
  for cell in grid.cells(config).values():
    assert cell.student.name in models.names()
    assert cell.teacher.name in ["", *models.names()]
    assert cell.distiller.name in distillers.names()


@pytest.mark.parametrize("name", ["teacher", *METHODS])
def test_recipes_are_the_references(name):
  cifar, plain = load(f"{name}_cifar"), base.get_config()
  changed = {}
  if name in METHODS:
    method = method_cases.method(name)
    changed = method.optim
    plain.data.update(method.data)
    plain.optim.update(changed)
  assert (cifar.epochs, cifar.batch_size) == (240, 64)
  assert cifar.optim.milestones == (150, 180, 210)
  assert cifar.optim.weight_decay == 5e-4
  # Else the network's own.
  assert cifar.optim.learning_rate == changed.get("learning_rate")
  assert (cifar.optim, cifar.data) == (plain.optim, plain.data)
  if f"{name}_imagenet" in NAMES:
    imagenet = load(f"{name}_imagenet")
    assert (imagenet.epochs, imagenet.batch_size) == (120, 256)
    assert imagenet.optim.milestones == (30, 60, 90)
    assert imagenet.optim.weight_decay == 1e-4
    assert imagenet.optim.learning_rate == 0.1
    assert imagenet.data.crop_area == (0.08, 1.0)
    assert imagenet.distiller == cifar.distiller
    assert imagenet.loss_weights.keys() == cifar.loss_weights.keys()


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_the_references(method):
  """Published values are compared with the config's, so both could be wrong."""
  weights = load(f"{method}_cifar").loss_weights.to_dict()
  assert weights == dict(method_cases.method(method).weights)


@pytest.mark.parametrize("method", METHODS)
def test_config_repeats_the_modules_defaults(method):
  settings = load(f"{method}_cifar").distiller.to_dict()
  assert settings.pop("name") == method
  # A run that leaves them out is the same run.
  for module in (
    distillers.create(method),
    distillers.create(method, **settings),
  ):
    assert {key: getattr(module, key) for key in settings} == settings


@pytest.mark.parametrize("place", ["epoch", "optim.learning_rat"])
def test_a_misspelt_field_of_a_config_file(place):
  config = load("kd_cifar")
  config.update_from_flattened_dict({place: 1})
  with pytest.raises(ValueError, match=rf"config\.{place}: no such .*you mean"):
    base.finish(config, "")


@pytest.mark.parametrize("arg", ["smok", "sead"])
@pytest.mark.parametrize("name", NAMES)
def test_unknown_argument(name, arg):
  words = rf"expected '' or 'smoke'.* got '{arg}'"
  with pytest.raises(ValueError, match=words):
    load(name, arg)


# One of each kind runs to its end: a method without and with variables of its
# own, with memory banks, with the teacher's classifier, and a grid.
RUN = ["teacher_cifar", "kd_cifar", "crd_cifar", "simkd_cifar", "quickstart"]


@pytest.mark.parametrize(
  "name",
  [
    # The method is tried with its file for CIFAR.
    pytest.param(name, marks=pytest.mark.full)
    if name.endswith("_imagenet") and name.removesuffix("_imagenet") in METHODS
    else name
    for name in sorted({*NAMES} - {*RUN})
  ],
)
def test_smoke_can_begin(name, tmp_path):
  config = load(name, "smoke")
  config.trials = 1
  method = name.removesuffix("_cifar")
  if method in METHODS and method_cases.method(method).tokens:
    with pytest.raises(ValueError, match=r"transformers, .*block1.*got a"):
      train.prepare(config, tmp_path / "run")
    return
  for cell, each in grid.cells(config.lock()).items():
    parts = train.prepare(each, tmp_path / "run").parts
    assert parts.total_steps == 8, cell


@pytest.mark.parametrize("name", RUN)
def test_smoke_runs(name, smoke_run):
  workdir, config = smoke_run(name), load(name, "smoke")
  for cell, delta in (config.grid.to_dict() or {"": {}}).items():
    folder = workdir / cell
    method = {**config.to_dict(), **delta}["distiller"]["name"]
    result = workdir_lib.result(folder)
    assert (result["method"], result["student"]) == (method, "resnet8")
    assert result["steps"] == config.epochs * (64 // config.batch_size)
    assert result["final"]["epoch"] == config.epochs
    for scores in (result["final"], result["best"]):
      assert math.isfinite(scores["ce"])
      assert 0 <= scores["top1"] <= scores["top5"] <= 100
    assert result["best"]["top1"] >= result["final"]["top1"]
    assert bool(result["teacher"]) == (method != "none")
    assert (folder / "export" / "model.json").exists()
    assert (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["quickstart", "simkd_cifar"])
def test_one_teacher_serves_the_runs_beside_each_other(name, smoke_run):
  folder = smoke_run(name)
  teachers = folder if name == "quickstart" else folder.parent
  runs = [path.parent for path in folder.rglob("result.json")]
  about = [workdir_lib.result(run)["teacher"] for run in runs]
  used = {each["checkpoint"] for each in about if each}
  made = {str(path) for path in (teachers / "teachers").iterdir()}
  assert len(used) == 1 and used <= made
