"""The workdir: whose it is, and what is written there."""

import dataclasses
import json
import subprocess
import threading

import jax
import pytest
from PIL import Image

from configs import base
from kd_jax import data, storage
from kd_jax.runs import identity
from kd_jax.runs import workdir as workdir_lib
from scripts import fuzz


def make(**fields):
  weights = {"ce": 1.0, "kd": 1.0}
  config = base.distillation("kd", weights=weights, temperature=4.0)
  with config.unlocked():
    config.update_from_flattened_dict(
      {name.replace("__", "."): value for name, value in fields.items()}
    )
  return config.lock()


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_identity_is_all_that_a_result_depends_on():
  made = identity.as_json(make())
  assert made["optim"]["milestones"] == [150, 180, 210]
  assert json.loads(json.dumps(made)) == made
  names = identity.config_fingerprint(made).keys()
  assert identity.config_fingerprint(make()).keys() == names
  assert {
    *("seed", "student.name", "teacher.name", "optim.milestones"),
    *("distiller.temperature", "loss_weights.kd", "data.pipeline"),
  } <= names
  free = ("parallel.", "checkpoint.", "log.", "data.dir", "teacher.checkpoint")
  assert not [name for name in names if name.startswith(free)]
  # Runs of before there were these fields are the same runs.
  assert not {"data.seed", "trials", "trials_together"} & names
  assert identity.config_fingerprint(make(data__seed=3))["data.seed"] == 3


def test_a_fresh_workdir_is_made_and_then_recognised(tmp_path):
  workdir, config = tmp_path / "runs" / "a", make()
  assert workdir_lib.finished(workdir, config) is None
  assert not workdir.exists()  # looking writes nothing
  workdir_lib.create(workdir, config)
  assert storage.read_json(workdir / "config.json") == identity.as_json(config)
  before = contents(workdir)
  assert workdir_lib.finished(workdir, config) is None
  workdir_lib.create(workdir, make(log__every_steps=7))
  assert contents(workdir) == before
  assert workdir_lib.result(workdir) is None
  result = fuzz.TARGETS["result"].make()
  (workdir / "result.json").write_bytes(result)
  assert workdir_lib.finished(workdir, config) == json.loads(result)


def move(train):
  for i in range(6):
    (train / "cat" / f"{i}.png").rename(train / "dog" / f"{10 + i}.png")


def swap_labels(train):
  for name in ("3.png", "4.png"):
    (train / "cat" / name).rename(train / "x")
    (train / "dog" / name).rename(train / "cat" / f"d{name}")
    (train / "x").rename(train / "dog" / f"c{name}")


def replace_pixels(train):
  Image.new("RGB", (4, 4), "red").save(train / "dog" / "7.png")


def rename_class(train):
  for folder in (train, train.parent / "val"):
    (folder / "cat").rename(folder / "cow")


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (move, "train: class 'cat' has 8 images before, 2 now; .*'dog' .* 14 now"),
    (swap_labels, "train: class 'cat' has 8 other images; .*class 'dog' has 8"),
    (replace_pixels, "train: the content of .*dog/7.png has changed"),
    (rename_class, "train: class 0 is 'cat' before, 'cow' now; test: class 0"),
  ],
)
def test_a_run_does_not_go_on_with_other_data(tmp_path, change, words):
  for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
    (tmp_path / "set" / name).mkdir(parents=True)
    for i in range(8):
      Image.new("L", (4, 4), i).save(tmp_path / "set" / name / f"{i}.png")

  def require_same():
    sources = {
      split: data.load("folder", split=split, dir=tmp_path / "set")
      for split in ("train", "test")
    }
    workdir_lib.require_same_data(tmp_path, sources)

  require_same()
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  require_same()
  before = contents(tmp_path)
  change(tmp_path / "set" / "train")
  with pytest.raises(ValueError, match=words):
    require_same()
  path = tmp_path / "data.json"
  assert path.read_bytes() == before[path]
  (tmp_path / "checkpoints" / "3").rmdir()
  require_same()  # nothing to lose yet


@pytest.mark.parametrize("field", ["images", "labels", "class_names"])
def test_a_set_in_memory_is_compared(field):
  source = data.load("digits", split="test", image_size=8)
  before = {"test": data.summarize(source)}
  assert not data.differences(before, {"test": source})
  value = getattr(source, field)
  changed = dataclasses.replace(source, **{field: value[::-1]})
  assert data.differences(before, {"test": changed})


def test_a_run_of_an_older_version_is_recognised(tmp_path):
  """With fields that are gone, and without those that came later."""
  workdir_lib.create(tmp_path, make())
  config = storage.read_json(tmp_path / "config.json")
  config["trials_together"] = False
  del config["trials"], config["data"]["seed"]
  storage.write_json(tmp_path / "config.json", config)
  assert workdir_lib.finished(tmp_path, make()) is None


def test_another_config_is_refused_with_both_values(tmp_path):
  workdir_lib.create(tmp_path, make())
  (tmp_path / "result.json").write_text("{}")
  before = contents(tmp_path)
  other = make(seed=1, optim__milestones=(1, 2), distiller__temperature=2.0)
  with pytest.raises(ValueError, match="holds a run of another config") as info:
    workdir_lib.finished(tmp_path, other)
  assert str(info.value).splitlines()[1:4] == [
    "  distiller.temperature: 4.0 there, 2.0 here",
    "  optim.milestones: [150, 180, 210] there, [1, 2] here",
    "  seed: 0 there, 1 here",
  ]
  method = base.distillation("simkd", weights={"simkd": 1.0}, factor=2)
  with pytest.raises(
    ValueError, match=r"distiller\.factor: None there, 2 here"
  ):
    workdir_lib.finished(tmp_path, method.lock())
  assert contents(tmp_path) == before


@pytest.mark.parametrize(
  "fields",
  [
    {"data__dir": "/elsewhere"},
    {"teacher__checkpoint": "/elsewhere"},
    {"parallel__num_devices": 2},
    {"checkpoint__every_steps": 5},
    {"log__every_steps": 1},
    {"steps_per_dispatch": 2},
    {"eval__batch_size": 7},
    {"data__num_workers": 3},
  ],
)
def test_a_run_resumes_with_other_settings(tmp_path, fields):
  workdir_lib.create(tmp_path, make())
  assert workdir_lib.finished(tmp_path, make(**fields)) is None


def test_a_broken_config_is_an_error_not_a_fresh_start(tmp_path):
  workdir_lib.create(tmp_path, make())
  path = tmp_path / "config.json"
  path.write_text(path.read_text()[:100])
  with pytest.raises(
    ValueError, match=r"config\.json: expected JSON, got a file that ends or"
  ):
    workdir_lib.finished(tmp_path, make())


def test_environment(monkeypatch):
  found = workdir_lib.environment()
  assert found["versions"]["jax"] == jax.__version__
  assert "not installed" not in found["versions"].values()
  assert found["hardware"].startswith("4 x CPU ")
  assert found["processes"] == 1 and found["command"]
  json.dumps(found)

  def refuse(*args, **kwargs):
    raise subprocess.CalledProcessError(128, "git")

  monkeypatch.setattr(subprocess, "run", refuse)
  assert workdir_lib.git_commit() == "unknown"


def test_a_lock_is_held_by_one(tmp_path):
  order, entered = [], threading.Event()

  def second():
    entered.set()
    with workdir_lib.locked(tmp_path / "run", wait=True):
      order.append("second")

  with workdir_lib.locked(tmp_path / "run"):
    thread = threading.Thread(target=second)
    thread.start()
    entered.wait()
    with workdir_lib.locked(tmp_path / "another run"):  # is not in the way
      order.append("first")
    thread.join(timeout=0.3)
    assert thread.is_alive()
  thread.join(timeout=10)
  assert order == ["first", "second"]
