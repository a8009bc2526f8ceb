"""Numbers of a config: refused in one line, or fit to train with."""

import contextlib
import math

import hypothesis
import pytest
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import base, kd_cifar
from kd_jax import storage
from kd_jax.runs import errors, limits, train

NUMBERS = {
  name
  for name, value in storage.flatten(base.get_config().to_dict()).items()
  if isinstance(value, int | float) and not isinstance(value, bool)
}
FIELDS = [*limits.LIMITS, "loss_weights.kd", "loss_ramp_epochs.kd"]
VALUES = st.one_of(
  st.sampled_from([0, -1, 1, 0.5, -0.5, 2**31, 2**64, -(10**400), 10**400]),
  st.sampled_from([math.nan, math.inf, -math.inf, 1e-300, 1e300, -0.0]),
  st.sampled_from(["1", "", True, False, (), (1,), None, {}, b"1"]),
  st.integers(),
  st.floats(),
)


def make(changes):
  config = kd_cifar.get_config("smoke")
  for name, value in changes.items():
    section, _, field = name.rpartition(".")
    place = config[section] if section else config
    with place.ignore_type(), place.unlocked():
      place[field] = value
  return config


def test_every_number_has_limits_that_its_default_keeps():
  known = {*limits.LIMITS, "loss_weights.ce"}
  assert known >= NUMBERS
  # The others are None by default.
  flat = storage.flatten(base.get_config().to_dict())
  for name in known - NUMBERS:
    assert flat[name] is None and limits.LIMITS[name].optional
  limits.check(base.get_config())


@hypothesis.settings(max_examples=600)
@hypothesis.given(st.sampled_from(FIELDS), VALUES)
def test_any_value_is_allowed_or_refused_in_one_line(field, value):
  try:
    config = make({field: value})
  except OverflowError:  # ConfigDict makes a float of an integer
    return
  allowed = limits.LIMITS.get(field) or limits.Limits(0, 1e6)
  try:
    limits.check(config)
  except ValueError as error:
    text = str(error)
    assert text.startswith(f"config.{field}: expected a ")
    assert ", got " in text and "\n" not in text
    assert not allowed.allow(value)
    return
  assert (
    (value == {} and field.startswith("loss_"))
    or (value is None and allowed.optional)
    or allowed.low <= float(value) <= allowed.high
  )


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"optim.gradient_clip": -1.0}, r"at least 0 .*0 is off\), got -1\.0"),
    ({"optim.learning_rate": -0.1}, r"above 0 .*, got -0\.1"),
    ({"optim.learning_rate": math.nan}, "learning_rate: .*, got nan"),
    ({"optim.momentum": 1.0}, r"below 1 .*, got 1\.0"),
    ({"optim.weight_decay": -5e-4}, r"weight_decay: .*, got -0\.0005"),
    ({"optim.milestones": (3, -1)}, "milestones: .*, got -1"),
    ({"optim.milestones": (3, 1)}, r"ascending epochs, got \[3, 1\]"),
    ({"loss_weights.kd": -1.0}, r"config\.loss_weights\.kd: .*, got -1\.0"),
    ({"loss_weights": ConfigDict({"ce": 0.0})}, "a weight above 0 for some"),
    ({"loss_ramp_epochs.kd": math.inf}, r"loss_ramp_epochs\.kd: .*, got inf"),
    ({"distiller.temperature": math.nan}, "temperature: .*finite.*, got nan"),
    ({"distiller.temperature": 0.0}, "temperature"),
    ({"distiller.temperature": -4.0}, "temperature"),
    ({"data.crop_padding": 17}, "crop_padding: .* 16 pixels, got 17"),
  ],
)
def test_refused_before_anything_is_written(changes, words, tmp_path):
  with pytest.raises(ValueError, match=words) as caught:
    train.train_and_evaluate(make(changes), str(tmp_path / "a"))
  assert "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "end", ["low", pytest.param("high", marks=pytest.mark.full)]
)
def test_the_ends_of_the_limits_train(end, tmp_path):
  changes = {
    "low": {
      "optim.learning_rate": 1e-30,
      "optim.decay_rate": 1e-30,
      "data.mixup": 1e-3,
      "data.cutmix": 1e-3,
      "loss_weights.kd": 1e-30,
      "distiller.temperature": 0.1,
      "eval.batch_size": 1,
      "checkpoint.every_minutes": 0.0,
    },
    "high": {
      "optim.learning_rate": 1e6,
      "optim.momentum": 0.999,
      "optim.weight_decay": 1.0,
      "optim.gradient_clip": 1e6,
      "label_smoothing": 0.999,
      "data.mixup": 1e3,
      "data.cutmix": 1e3,
      "data.crop_padding": 8,
      "loss_weights.kd": 1e6,
      "distiller.temperature": 1e3,
      "eval.batch_size": 2**31 - 1,
      "log.every_steps": 2**31 - 1,
      "checkpoint.keep": 2**31 - 1,
    },
  }[end]
  tiny = {
    "student.name": "_tiny",
    "teacher.name": "_tiny",
    "teacher.epochs": 1,
    "teacher.learning_rate": 0.1,
    "epochs": 1,
    "data.image_size": 8,
    "data.num_examples": 32,
    "parallel.num_devices": 1,
  }
  # At the high end, evaluation after them may overflow, which it says.
  expected = (
    pytest.raises(errors.NonFiniteLossError, match="no evaluation")
    if end == "high"
    else contextlib.nullcontext()
  )
  with expected:
    train.train_and_evaluate(make(tiny | changes), str(tmp_path / "a"))
  (line,) = [
    r
    for r in storage.read_metrics(tmp_path / "a" / "metrics.jsonl")
    if r["kind"] == "train"
  ]
  assert line["step"] == 2 and math.isfinite(line["loss"])
