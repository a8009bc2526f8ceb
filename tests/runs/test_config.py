"""Resolving and checking a config, and what a run logs at its start."""

import logging

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import base
from kd_jax import data
from kd_jax.distributed import collectives, processes
from kd_jax.distributed import devices as devices_lib
from kd_jax.runs import config as config_lib
from kd_jax.runs import logs

SOURCE = data.load(
  "synthetic", split="train", image_size=8, num_examples=64, num_classes=5
)


def make(**fields):
  """The base config, small, with dotted fields (`__` for a dot) replaced."""
  config = base.distillation("kd", weights={"ce": 1.0, "kd": 1.0})
  config = base.finish(config, "smoke")
  with config.unlocked():
    config.update_from_flattened_dict(
      {name.replace("__", "."): value for name, value in fields.items()}
    )
  return config.lock()


@pytest.mark.parametrize(
  ("name", "rate"), [("resnet8", 0.05), ("MobileNetV2", 0.01)]
)
def test_the_default_rate_is_filled_in_and_told(name, rate, caplog):
  caplog.set_level(logging.INFO, "kd_jax")
  config = make(student__name=name)
  resolved = config_lib.resolve_defaults(config)
  assert resolved.optim.learning_rate == rate
  assert config.optim.learning_rate is None  # it is a copy
  assert resolved.is_locked
  expected = f"config.optim.learning_rate: {rate:g}, the default for {name}"
  assert expected in caplog.text
  caplog.clear()
  explicit = make(student__name=name, optim__learning_rate=0.05)
  assert config_lib.resolve_defaults(explicit) == explicit
  assert caplog.text == ""


@pytest.mark.parametrize(
  ("devices", "fields", "words"),
  [
    (
      4,
      {"batch_size": 18},
      r"config\.batch_size: expected a multiple of 4 \(4 devices x 1"
      r" accumulate_steps\), got 18\. Take 16, or fewer devices with"
      r" config\.parallel\.num_devices",
    ),
    (2, {"accumulate_steps": 3, "batch_size": 16}, "multiple of 6 .* Take 18,"),
    (4, {"batch_size": 1}, "got 1. Take 4, or fewer devices"),
    (1, {"batch_size": 0}, "multiple of 1 .* got 0. Take 1,"),
    (1, {"batch_size": 128}, r"batch_size: .* at most the 64 images .* 128"),
    (4, {"batch_size": 4, "data__cutmix": 1.0}, r"cutmix mixes pairs: .*of 8"),
    (
      1,
      {"epochs": 10**9},
      r"config\.epochs: expected fewer than 2\^31 updates",
    ),
    (1, {"data__crop_padding": 9}, r"crop_padding: expected at most .* 8 pix"),
    (
      1,
      {"optim__dot_delta": 0.075, "loss_weights__kd": 0.0},
      r"dot_delta: expected a weight of 'ce' and of another .*'kd': 0\.0}",
    ),
    (1, {"dtype": "float16"}, "config.dtype: .*'bfloat16', got 'float16'"),
    (
      1,
      {"loss_ramp_epochs__kdd": 2.0},
      r"config\.loss_ramp_epochs: expected terms of config\.loss_weights \(ce,"
      r" kd\), got 'kdd'",
    ),
  ],
)
def test_check_refuses(devices, fields, words):
  with pytest.raises(ValueError, match=words):
    config_lib.check(make(**fields), SOURCE, num_devices=devices)


@pytest.mark.parametrize(
  ("devices", "fields"),
  [
    (4, {"accumulate_steps": 4}),
    (1, {"batch_size": 64, "dtype": "bfloat16", "data__mixup": 0.2}),
    (1, {"loss_ramp_epochs__kd": 2.0}),
  ],
)
def test_check_accepts(devices, fields):
  config_lib.check(make(**fields), SOURCE, num_devices=devices)


def dispatch(wanted, steps=782, *, resident=True):
  return config_lib.steps_per_dispatch(
    wanted, steps_per_epoch=steps, resident=resident
  )


def test_steps_per_dispatch(monkeypatch):
  assert [dispatch(n) for n in (0, 34, 782)] == [1, 34, 782]  # on a CPU
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert dispatch(0) == 782
  assert dispatch(0, resident=False) == 46  # the most up to 64
  assert dispatch(0, 781, resident=False) == 11
  assert dispatch(17) == 17


@pytest.mark.parametrize(
  ("wanted", "near"),
  [(30, "17, 23, 34"), (783, "46, 391, 782"), (-1, "1, 2, 17")],
)
def test_steps_per_dispatch_must_divide_an_epoch(wanted, near):
  with pytest.raises(
    ValueError,
    match=r"config\.steps_per_dispatch: expected a divisor of the 782 steps of"
    rf" an epoch, got {wanted}\. Near it: {near};",
  ):
    dispatch(wanted)


@pytest.mark.parametrize(
  ("wanted", "cores", "expected"),
  [
    (None, 2, (2, 0)),
    (None, 16, (0, 16)),
    (0, 16, (16, 0)),
    (3, 2, (0, 3)),
  ],
)
def test_who_decodes(wanted, cores, expected, monkeypatch):
  monkeypatch.setattr(
    config_lib.os, "sched_getaffinity", lambda _: set(range(cores))
  )
  got = config_lib.decoders(wanted, object())
  assert (got["num_threads"], got["num_workers"]) == expected
  assert config_lib.decoders(wanted, SOURCE)["num_threads"] == 0  # in memory


@pytest.fixture
def cache_settings():
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.usefixtures("cache_settings")
@pytest.mark.parametrize(
  ("setting", "backend", "expected"),
  [
    ("auto", "cpu", None),
    ("", "cpu", None),
    ("/named", "cpu", "/named"),
    ("auto", "gpu", "/runs/.compilation_cache"),
  ],
)
def test_compilation_cache(setting, backend, expected, monkeypatch, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  config_lib.compilation_cache(setting, tmp_path / "runs" / "a")
  found = jax.config.jax_compilation_cache_dir
  assert (found and found.removeprefix(str(tmp_path))) == expected


def test_overviews():
  params = {
    "distiller": {},
    "student": {
      "conv1": {"kernel": np.zeros((3, 3, 3, 16))},
      "fc": {"kernel": np.zeros((64, 100)), "bias": np.zeros(100)},
    },
  }
  lines = logs.parameter_overview(params, "resnet8").splitlines()
  assert [line.split() for line in lines[1:]] == [
    ["resnet8/conv1", "432"],
    ["resnet8/fc", "6,500"],
    ["resnet8,", "all", "6,932"],
    ["distiller,", "all", "0"],
  ]
  devices = devices_lib.make_devices(num_devices=4)
  memory = devices.place(
    {"bank": np.zeros((1000, 250), np.float32), "z": np.float32(0)},
    {"bank": P(collectives.AXIS), "z": P()},
  )
  found = logs.memory_overview(memory)
  assert "0.25 MB per device, 1 MB in all" in found


@pytest.mark.parametrize("first", [True, False])
def test_every_process_tells_of_its_bad_images(first, monkeypatch):
  loggers = [logging.getLogger(n) for n in ("kd_jax", "kd_jax.data.batch")]
  names = ["kd_jax", "kd_jax.data", "absl"]
  before = {name: logging.getLogger(name).level for name in names}
  monkeypatch.setattr(processes, "is_first", lambda: first)
  try:
    logs.configure_logging()
    for logger, warns in zip(loggers, (first, True), strict=True):
      assert logger.isEnabledFor(logging.WARNING) == warns
      assert logger.isEnabledFor(logging.INFO) == first
  finally:
    for name, level in before.items():
      logging.getLogger(name).setLevel(level)
