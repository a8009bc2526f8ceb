"""Settling and checking a config, the teacher's folder, signals."""

import copy
import logging
import os
import pathlib
import re
import signal
import threading

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import base
from kd_jax import data, storage
from kd_jax.distributed import collectives, signals
from kd_jax.distributed import devices as devices_lib
from kd_jax.models import base as base_lib
from kd_jax.runs import config as config_lib
from kd_jax.runs import logs, teachers

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
  ("name", "rate"),
  [
    ("resnet8", 0.05),
    ("MobileNetV2", 0.01),
    ("ShuffleV1", 0.01),
    ("ShuffleV2_1_5", 0.01),
  ],
)
def test_settle_fills_the_rate_and_says_so(name, rate, caplog):
  caplog.set_level(logging.INFO, "kd_jax")
  config = make(student__name=name)
  settled = config_lib.resolve_defaults(config, SOURCE)
  assert settled.optim.learning_rate == rate
  assert config.optim.learning_rate is None  # a copy was settled
  assert settled.is_locked
  expected = f"config.optim.learning_rate: {rate:g}, the default for {name}"
  assert expected in caplog.text


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "ShuffleV2"])
def test_settle_never_overrides_an_explicit_rate(name, caplog):
  caplog.set_level(logging.INFO, "kd_jax")
  config = make(student__name=name, optim__learning_rate=0.05)
  assert config_lib.resolve_defaults(config, SOURCE) == config
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
    (
      1,
      {"batch_size": 128},
      r"config\.batch_size: expected at most the 64 images of synthetic, got"
      " 128",
    ),
    (1, {"epochs": 0}, r"config\.epochs: expected 1 or more, got 0"),
    (1, {"accumulate_steps": 0}, r"config\.accumulate_steps: expected 1 or"),
    (1, {"eval__every_epochs": 0}, r"config\.eval\.every_epochs: expected 1"),
    (1, {"eval__batch_size": 0}, r"config\.eval\.batch_size: expected 1 or"),
    (1, {"log__every_steps": 0}, r"config\.log\.every_steps: expected 1 or"),
    (1, {"checkpoint__keep": 0}, r"config\.checkpoint\.keep: expected 1 or"),
    (
      1,
      {"dtype": "float16"},
      "config.dtype: expected 'float32' or 'bfloat16', got 'float16'",
    ),
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
    (4, {}),
    (4, {"accumulate_steps": 4}),
    (1, {"batch_size": 64, "dtype": "bfloat16"}),
    (1, {"loss_ramp_epochs__kd": 2.0}),
  ],
)
def test_check_accepts(devices, fields):
  config_lib.check(make(**fields), SOURCE, num_devices=devices)


def dispatch(wanted, steps=782, *, resident=True):
  return config_lib.steps_per_dispatch(
    wanted, steps_per_epoch=steps, resident=resident
  )


def test_steps_per_dispatch_on_a_cpu():
  assert dispatch(0) == 1
  assert dispatch(34) == 34
  assert dispatch(782) == 782


def test_steps_per_dispatch_on_an_accelerator(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert dispatch(0) == 782
  assert dispatch(0, resident=False) == 46  # the most up to 64
  assert dispatch(0, 781, resident=False) == 11
  assert dispatch(17) == 17


@pytest.mark.parametrize(
  ("wanted", "near"),
  [(30, "17, 23, 34"), (783, "46, 391, 782"), (-1, "1, 2, 17")],
)
def test_steps_per_dispatch_has_to_divide_an_epoch(wanted, near):
  with pytest.raises(
    ValueError,
    match=r"config\.steps_per_dispatch: expected a divisor of the 782 steps of"
    rf" an epoch, got {wanted}\. Near it: {near}; 0 settles it",
  ):
    dispatch(wanted)


def teacher_of(config):
  settled = config_lib.resolve_defaults(config, SOURCE)
  return teachers.teacher_config(settled, config.teacher.name)


def test_teacher_config_is_plain_training_of_the_teacher():
  config = make(
    seed=3,
    teacher__seed=5,
    teacher__epochs=7,
    teacher__milestones=(4, 6),
    verify_export=True,
    teacher__checkpoint="elsewhere",
  )
  before = copy.deepcopy(config)
  teacher = teacher_of(config)
  assert config == before
  assert teacher.student.name == "resnet8x2"
  assert teacher.teacher.name == teacher.teacher.checkpoint == ""
  assert teacher.distiller.to_dict() == {"name": "none"}
  assert teacher.loss_weights.to_dict() == {"ce": 1.0}
  assert (teacher.seed, teacher.epochs) == (5, 7)
  assert teacher.optim.milestones == (4, 6)
  assert teacher.data == config.data
  assert not teacher.verify_export
  # It is a config like any other: same fields, nothing left open.
  assert config_lib.resolve_defaults(teacher, SOURCE) == teacher
  fixed = ("distiller.", "loss_weights.")
  assert {
    k for k in storage.flatten(teacher.to_dict()) if not k.startswith(fixed)
  } == {k for k in storage.flatten(config.to_dict()) if not k.startswith(fixed)}


def test_teacher_takes_the_runs_own_length_where_it_has_none():
  config = make(teacher__epochs=None, epochs=9, optim__milestones=(2, 3))
  teacher = teacher_of(config)
  assert teacher.epochs == 9
  assert teacher.optim.milestones == (2, 3)


def test_teachers_rate_is_its_own_networks():
  rate = teacher_of(make(student__name="MobileNetV2")).optim.learning_rate
  assert rate == 0.05
  rate = teacher_of(make(teacher__name="MobileNetV2")).optim.learning_rate
  assert rate == 0.01
  rate = teacher_of(make(teacher__learning_rate=0.2)).optim.learning_rate
  assert rate == 0.2


def folder_of(config, workdir="/runs/a", source=SOURCE):
  return teachers.teacher_workdir(
    pathlib.Path(workdir), teacher_of(config), source
  )


def test_teacher_workdir_lies_beside_the_run_and_is_stable():
  folder = folder_of(make())
  assert folder.parent == pathlib.Path("/runs/teachers")
  assert re.fullmatch("resnet8x2_synthetic_[0-9a-f]{8}", folder.name)
  assert folder_of(make(), "/runs/b") == folder
  tfds = data.load("synthetic", split="train", num_examples=4)
  object.__setattr__(tfds, "name", "tfds:cifar10")
  assert ":" not in folder_of(make(), source=tfds).name


@pytest.mark.parametrize(
  "fields",
  [
    # Of the student and its method.
    {"seed": 1},
    {"data__seed": 1},
    {"student__name": "resnet14"},
    {"student__name": "MobileNetV2"},
    {"optim__learning_rate": 0.3},
    {"distiller__temperature": 9.0},
    {"loss_weights__kd": 0.5},
    {"loss_ramp_epochs__kd": 1.0},
    {"verify_export": True},
    # Where things are and how often they are written.
    {"data__dir": "/elsewhere"},
    {"parallel__num_devices": 2},
    {"checkpoint__keep": 3},
    {"log__every_steps": 1},
  ],
)
def test_teacher_is_shared_by_runs_that_differ_elsewhere(fields):
  assert folder_of(make(**fields)) == folder_of(make())


@pytest.mark.parametrize(
  "fields",
  [
    {"teacher__name": "resnet14x2"},
    {"teacher__seed": 1},
    {"teacher__epochs": 3},
    {"teacher__learning_rate": 0.1},
    {"teacher__milestones": (1, 2)},
    {"batch_size": 32},
    {"dtype": "bfloat16"},
    {"optim__weight_decay": 0.0},
    {"optim__schedule": "cosine"},
    {"data__flip": False},
    {"data__crop_padding": 2},
    {"data__image_size": 8},
    {"data__num_examples": 32},
    {"data__pipeline": "grain"},
  ],
)
def test_teacher_is_another_where_its_training_differs(fields):
  assert folder_of(make(**fields)) != folder_of(make())


def test_count_and_overview():
  params = {
    "student": {
      "conv1": {"kernel": np.zeros((3, 3, 3, 16))},
      "fc": {"kernel": np.zeros((64, 100)), "bias": np.zeros(100)},
    },
    "distiller": {},
  }
  assert base_lib.count_parameters(params) == 432 + 6500
  lines = logs.parameter_overview(params, "resnet8").splitlines()
  assert lines[0] == "parameters"
  assert [line.split() for line in lines[1:]] == [
    ["resnet8/conv1", "432"],
    ["resnet8/fc", "6,500"],
    ["resnet8,", "all", "6,932"],
    ["distiller,", "all", "0"],
  ]


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


def test_compilation_cache(cache_settings, monkeypatch, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  config_lib.compilation_cache("auto", tmp_path / "runs" / "a")
  assert jax.config.jax_compilation_cache_dir is None  # a CPU
  config_lib.compilation_cache("", tmp_path / "runs" / "a")
  assert jax.config.jax_compilation_cache_dir is None
  config_lib.compilation_cache("/named", tmp_path / "runs" / "a")
  assert jax.config.jax_compilation_cache_dir == "/named"
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  config_lib.compilation_cache("auto", tmp_path / "runs" / "a")
  folder = str(tmp_path / "runs" / ".compilation_cache")
  assert jax.config.jax_compilation_cache_dir == folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signals(number):
  seen = []
  outside = signal.signal(number, lambda *_: seen.append("outside"))
  try:
    with signals.StopSignals() as stop:
      assert stop.received is None
      os.kill(os.getpid(), number)
      assert stop.received == signal.Signals(number).name
      assert seen == []
      os.kill(os.getpid(), number)  # the second acts as without the context
      assert seen == ["outside"]
    os.kill(os.getpid(), number)
    assert seen == ["outside", "outside"]
  finally:
    signal.signal(number, outside)


def test_stop_signals_restore_the_handlers_after_an_error():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(RuntimeError), signals.StopSignals():
    assert signal.getsignal(signal.SIGTERM) != before
    raise RuntimeError
  assert signal.getsignal(signal.SIGTERM) == before


def test_stop_signals_do_nothing_in_another_thread():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def work():
    with signals.StopSignals() as stop:
      seen.append((stop.received, signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [(None, before)]


def test_the_memory_of_a_method_is_told():
  devices = devices_lib.make_devices(num_devices=4)
  memory = devices.place(
    {"bank": np.zeros((1000, 250), np.float32), "z": np.float32(0)},
    {"bank": P(collectives.AXIS), "z": P()},
  )
  assert logs.memory_overview(memory) == (
    "memory of the method: 0.25 MB per device, 1 MB in all"
  )


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
  in_memory = config_lib.decoders(wanted, SOURCE)
  assert in_memory["num_threads"] == 0


@pytest.mark.parametrize("first", [True, False])
def test_every_process_tells_of_its_bad_images(first, monkeypatch):
  loggers = [logging.getLogger(n) for n in ("kd_jax", "kd_jax.data.batch")]
  names = ["kd_jax", "kd_jax.data", "absl", "asyncio"]
  before = {name: logging.getLogger(name).level for name in names}
  monkeypatch.setattr(threading, "excepthook", threading.excepthook)
  monkeypatch.setattr(config_lib.processes, "is_first", lambda: first)
  try:
    logs.configure_logging()
    for logger, warns in zip(loggers, (first, True), strict=True):
      assert logger.isEnabledFor(logging.WARNING) == warns
      assert logger.isEnabledFor(logging.INFO) == first
  finally:
    for name, level in before.items():
      logging.getLogger(name).setLevel(level)
