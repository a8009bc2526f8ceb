"""Presets: their table, what they set, and when."""

import importlib
import logging
import pathlib

import pytest

from configs import base
from kd_jax import distillers, models
from kd_jax.runs import config as config_lib
from kd_jax.runs import identity, presets, train

CONFIGS = pathlib.Path(base.__file__).parent
ROWS = [
  (name, method)
  for name, methods in presets.table().items()
  for method in methods
]


def load(method, arg=""):
  return importlib.import_module(f"configs.{method}_cifar").get_config(arg)


def resolved(method, arg, teacher="resnet32x4", student="resnet8x4"):
  config = load(method, arg).lock()
  config.teacher.name, config.student.name = teacher, student
  return config_lib.resolve_defaults(config)


@pytest.mark.parametrize(("name", "method"), ROWS)
def test_row_is_whole(name, method):
  row = presets.table()[name][method]
  size = len(row.get("by_pair", ()))
  assert len(row.get("default", ())) == size
  for pair, values in row.get("pairs", {}).items():
    assert len(pair.split()) == 2 and {*pair.split()} <= {*models.names()}
    assert [type(v) for v in values] == [type(v) for v in row["default"]], pair
  config = resolved(method, name)
  assert config.preset == name and config.is_locked
  settings = config.distiller.to_dict()
  distillers.create(settings.pop("name"), **settings)
  for section in (settings, config.loss_weights, config.loss_ramp_epochs):
    assert None not in [*section.values()]
  # The same terms and fields as in the method's config.
  plain = load(method)
  assert {*config.loss_weights} == {*plain.loss_weights}
  assert {*config.distiller} - {*plain.distiller} <= {"standardize"}


@pytest.mark.parametrize(
  ("method", "name", "teacher", "student", "field", "value"),
  [
    ("dkd", "mdistiller", "resnet32x4", "resnet8x4", "beta", 8),
    ("dkd", "mdistiller", "resnet110", "resnet32", "beta", 2),
    ("dkd", "mdistiller", "vgg13", "MobileNetV2", "beta", 6),
    ("dkd", "lskd", "resnet56", "resnet20", "alpha", 18),
    ("kd", "lskd", "vgg13", "vgg8", "temperature", 3),
    ("kd", "lskd", "resnet110", "resnet20", "kd", 12),
    ("reviewkd", "mdistiller", "resnet32x4", "resnet8x4", "reviewkd", 5),
    ("reviewkd", "authors", "resnet56", "resnet20", "reviewkd", 0.6),
    ("catkd", "authors", "resnet32x4", "ShuffleV1", "resolution", 4),
  ],
)
def test_the_pair_chooses(method, name, teacher, student, field, value, caplog):
  caplog.set_level(logging.INFO, "kd_jax")
  config = resolved(method, name, teacher, student)
  assert {**config.loss_weights, **config.distiller}[field] == value
  assert f"preset {name} for {teacher} -> {student}: " in caplog.text
  assert f"{field} {value:g}" in caplog.text
  assert "by default" not in caplog.text


def test_a_pair_that_is_not_listed_has_the_default(caplog):
  caplog.set_level(logging.INFO, "kd_jax")
  config = resolved("dkd", "mdistiller", "vgg16", "resnet14")
  assert config.distiller.beta == 8
  assert (
    "preset mdistiller for vgg16 -> resnet14: beta 8, by default, as it does"
    " not list this pair" in caplog.text
  )


def test_flags_win_and_choose_the_pair(parse_launch, caplog):
  caplog.set_level(logging.INFO, "kd_jax")
  file = f"{CONFIGS}/dkd_cifar.py:mdistiller"
  pair = ("--config.student.name=resnet32", "--config.teacher.name=resnet110")
  config = parse_launch("--config", file, *pair)
  assert config.distiller.beta is None
  assert config_lib.resolve_defaults(config).distiller.beta == 2
  caplog.clear()
  flags = ("--config.distiller.beta=7", "--config.distiller.alpha=3", *pair)
  config = parse_launch("--config", file, *flags)
  settings = config_lib.resolve_defaults(config).distiller
  assert (settings.alpha, settings.beta) == (3, 7)
  expected = "distiller.alpha is 3, not 1; distiller.beta is 7, not 2"
  assert f"resnet110 -> resnet32: {expected}" in caplog.text


def test_what_a_preset_leaves_out_is_the_files():
  config = resolved("at", "repdistiller")
  assert config.loss_weights.to_dict() == {"ce": 1, "kd": 0, "at": 1000}
  assert config.distiller.to_dict() == load("at").distiller.to_dict()
  config = resolved("reviewkd", "authors", "resnet32x4", "ShuffleV2")
  assert (config.batch_size, config.optim.nesterov) == (128, True)
  assert config.optim.learning_rate == 0.02
  assert config.loss_ramp_epochs.to_dict() == {"reviewkd": 20}


@pytest.mark.parametrize("method", presets.table()["seed"])
def test_the_seeds_settings_are_those_of_the_files(method):
  of_preset, of_file = resolved(method, "seed"), resolved(method, "")
  prints = [identity.config_fingerprint(c) for c in (of_preset, of_file)]
  assert prints[0] == prints[1]


@pytest.mark.parametrize("arg", ["mdistiler", "seed", "lskd,mdistiller", ","])
def test_unknown_preset(arg):
  words = (
    r"expected '' or 'smoke' \(CONFIG\.py:smoke\), or a preset \(mdistiller,"
    rf" lskd\), got '{arg}'"
  )
  with pytest.raises(ValueError, match=words):
    load("dkd", arg)


def test_a_preset_that_the_method_does_not_have():
  config = load("simkd").lock()
  config.preset = "mdistiller"
  with pytest.raises(ValueError, match=r"of simkd \(seed\), got 'mdistiller'"):
    config_lib.resolve_defaults(config)


@pytest.mark.parametrize("arg", ["mdistiller,smoke", "smoke,mdistiller"])
def test_smoke_with_a_preset_can_begin(arg, tmp_path):
  prepared = train.prepare(load("dkd", arg).lock(), tmp_path / "run")
  assert prepared.parts.total_steps == 8
  assert prepared.config.distiller.beta == 8


def test_a_teacher_that_its_checkpoint_names(smoke_run, tmp_path, caplog):
  caplog.set_level(logging.INFO, "kd_jax")
  [teacher] = (smoke_run("kd_cifar").parent / "teachers").iterdir()
  config = load("dkd", "mdistiller,smoke").lock()
  config.teacher.name, config.teacher.checkpoint = "", str(teacher)
  train.prepare(config, tmp_path / "run")
  assert "preset mdistiller for resnet8x2 -> resnet8: beta 8" in caplog.text
