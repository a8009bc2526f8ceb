"""Several runs in one: what a cell is, and what the whole leaves behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from configs import quickstart
from kd_jax.distributed import signals
from kd_jax.reporting import runs, tables
from kd_jax.runs import errors, grid, identity, train
from kd_jax.runs import workdir as workdir_lib


def make(cells, trials=1):
  config = quickstart.get_config("smoke")
  config.student.name, config.data.image_size = "_tiny", 8
  config.parallel.num_devices = 1
  config.grid, config.trials = ConfigDict(cells), trials
  return config.lock()


KD = {
  "teacher": {"name": "_tiny_wide"},
  "distiller": {"name": "kd", "temperature": 2.0},
  "loss_weights": {"kd": 1.0},
}


def test_cells_are_deltas():
  config = make({"z": {}, "kd": KD, "a": {"seed": 3, "optim": {"momentum": 0}}})
  before = config.to_dict()
  made = grid.cells(config)
  assert list(made) == ["a", "kd", "z"]
  plain = {**before, "grid": {}}
  assert made["z"].to_dict() == plain
  # A cell's own distiller and weights replace the grid's: no leftover "ce".
  assert made["kd"].to_dict() == {
    **plain,
    "teacher": {**plain["teacher"], "name": "_tiny_wide"},
    "distiller": {"name": "kd", "temperature": 2.0},
    "loss_weights": {"kd": 1.0},
  }
  assert made["a"].to_dict() == {
    **plain,
    "seed": 3,
    "optim": {**plain["optim"], "momentum": 0.0},
  }
  # Nothing is shared with another cell, or with the grid's config.
  made["kd"].distiller.temperature, made["kd"].optim.momentum = 9.0, 0.1
  assert made["z"].optim.momentum == 0.9
  assert config.to_dict() == before


def test_trials_follow_each_other():
  config = make({"b": {"seed": 7}, "a": {}}, trials=3)
  made = grid.cells(config)
  assert [(name, cell.seed) for name, cell in made.items()] == [
    *[("a", 0), ("b", 7), ("a_seed1", 1)],
    *[("b_seed8", 8), ("a_seed2", 2), ("b_seed9", 9)],
  ]
  # More trials of a grid continue the same runs.
  once = grid.cells(make(config.grid))
  assert identity.config_fingerprint(made["a"]) == (
    identity.config_fingerprint(once["a"])
  )


def test_trials_of_a_run_without_a_grid():
  assert not grid.is_grid(make({}))
  config = make({}, trials=2)
  assert grid.is_grid(config)
  assert list(grid.cells(config)) == ["none", "none_seed1"]
  with pytest.raises(
    ValueError, match=r"config\.trials: .*at least 1 .*, got 0"
  ):
    grid.cells(make({}, trials=0))


@pytest.fixture
def trained(monkeypatch):
  """Names of the cells that would have been trained."""
  names = []
  monkeypatch.setattr(
    train,
    "train_and_evaluate",
    lambda config, workdir: names.append(pathlib.Path(workdir).name),
  )
  return names


@pytest.mark.parametrize(
  ("delta", "words"),
  [
    (
      {"optim": {"learning_rat": 1.0}},
      r"\.optim\.learning_rat: no such field\. Did you mean learning_rate\?",
    ),
    ({"epochs": "many"}, r"\.epochs: expected int, got 'many'"),
    ({"optim": 3}, r"\.optim: .* configs/base\.py has there, got 3"),
    ({"seed": {"a": 1}}, r"\.seed: expected what configs/"),
    (
      {**KD, "distiller": {"name": "kd", "temprature": 2.0}},
      r": kd has no field 'temprature'. Did you mean",
    ),
    ({"student": {"name": "resnet88"}}, r": unknown model 'resnet88'"),
    ({**KD, "loss_weights": {"kdd": 1.0}}, r": loss_weights: 'kdd' is not"),
    ({"batch_size": 65}, r": config\.batch_size: expected"),
  ],
)
def test_a_mistake_in_the_last_cell_stops_the_first(
  delta, words, trained, tmp_path
):
  with pytest.raises(ValueError, match=rf"(?s)config\.grid\.last{words}"):
    grid.run_grid(make({"first": {}, "last": delta}), str(tmp_path / "grid"))
  assert not trained and list(tmp_path.iterdir()) == []


def test_shards_divide_the_cells(trained, tmp_path, monkeypatch):
  monkeypatch.setattr(train, "prepare", lambda *_: None)
  config = make({"a": {}, "b": {}, "c": {}}, trials=2)
  folders = [
    grid.run_grid(config, str(tmp_path), shard=(i, 4)) for i in range(4)
  ]
  assert [[f.name for f in found] for found in folders] == [
    *[["a", "b_seed1"], ["b", "c_seed1"], ["c"], ["a_seed1"]]
  ]
  assert sorted(trained) == sorted(grid.cells(config))
  assert len(trained) == 6


def test_finished_grid(smoke_run, monkeypatch):
  """quickstart's smoke run is a grid; it is not run again."""
  workdir = smoke_run("quickstart")
  names = [row["run"] for row in runs.collect(workdir)]
  assert names[0].startswith("teachers/resnet8x2_synthetic_")
  assert names[1:] == ["alone", "kd", "simkd"]
  # Its SimKD cell predicts with its export in a fresh process.
  samples = workdir / "simkd" / "samples"
  assert [path.name for path in sorted(samples.iterdir())] == [
    f"{i}_class {i}.png" for i in range(4)
  ]
  before = {p: p.read_bytes() for p in workdir.rglob("*.json")}
  config = quickstart.get_config("smoke").lock()
  folders = grid.run_grid(config, str(workdir))
  assert folders == [workdir / name for name in ("alone", "kd", "simkd")]
  assert {p: p.read_bytes() for p in before} == before


def test_a_broken_cell_is_reported_and_the_others_are_there(tmp_path):
  # Each step multiplies the weights by a thousand.
  hot = {"optim": {"learning_rate": 1e3, "weight_decay": 1.0}, "epochs": 20}
  config = make({"a_hot": hot, "b": {}, "c_lost": {}})
  (tmp_path / "c_lost").write_text("a file where a folder should be")
  with pytest.raises(errors.CellsFailedError) as caught:
    grid.run_grid(config, str(tmp_path))
  lines = str(caught.value).splitlines()
  assert lines[0].startswith("2 of 3 cells failed")
  assert lines[1].startswith("  a_hot: NonFiniteLossError: step ")
  assert lines[2].startswith("  c_lost: FileExistsError: ")
  # Again: what is there is left alone, what failed is tried.
  (tmp_path / "c_lost").unlink()
  before = (tmp_path / "b" / "result.json").stat().st_mtime_ns
  with pytest.raises(
    errors.CellsFailedError, match=r"1 of 3 cells.*\n  a_hot: "
  ):
    grid.run_grid(config, str(tmp_path))
  assert (tmp_path / "b" / "result.json").stat().st_mtime_ns == before
  assert workdir_lib.result(tmp_path / "c_lost")


def test_a_signal_stops_the_grid_even_if_the_disk_is_full(
  tmp_path, monkeypatch
):
  made = []

  def train_and_evaluate(config, workdir):
    made.append(pathlib.Path(workdir).name)
    raise errors.StoppedUnsavedError("SIGTERM, but the disk is full")

  monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)
  with pytest.raises(errors.UnsavedError, match="SIGTERM, but"):
    grid.run_grid(make({"a": {}, "b": {}}), str(tmp_path))
  assert made == ["a"]


def test_a_signal_between_cells_stops_the_grid(tmp_path, monkeypatch):
  made = []

  def train_and_evaluate(config, workdir):
    made.append(pathlib.Path(workdir).name)
    signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)
  monkeypatch.setattr(os, "_exit", sys.exit)
  with pytest.raises(SystemExit) as stopped, signals.ended_by_signals(75):
    grid.run_grid(make({"a": {}, "b": {}}), str(tmp_path))
  assert stopped.value.code == 75 and made == ["a"]


# A method and a student alone, two trials each, on digits.
CONFIG = """
from configs import base


def get_config(arg=""):
  config = base.digits(base.get_config(), epochs=2)
  config.student.name = "_tiny"
  config.grid.alone = {}
  config.grid.kd = {
    "teacher": {"name": "_tiny_wide"},
    "distiller": {"name": "kd", "temperature": 4.0},
    "loss_weights": {"kd": 1.0},
  }
  config.trials = 2
  config.batch_size = 128
  config.data.image_size = 8
  config.teacher.epochs = 1
  config.checkpoint.every_steps = 4
  config.log.every_steps = 1
  return config
"""


def start(folder, repo, name):
  return subprocess.Popen(
    [
      *(sys.executable, "launch.py", f"--config={folder}/grid_config.py"),
      f"--workdir={folder / name}",
    ],
    cwd=repo,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "1",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  out, err = process.communicate(timeout=240)
  assert process.returncode == 0, out + err
  return out


@pytest.mark.full
def test_a_killed_grid_ends_as_one_that_was_not(tmp_path, repo):
  (tmp_path / "grid_config.py").write_text(CONFIG)
  finish(start(tmp_path, repo, "whole"))
  process = start(tmp_path, repo, "killed")
  path = tmp_path / "killed" / "kd" / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while not path.exists() or len(path.read_text().splitlines()) < 15:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.communicate()
  out = finish(start(tmp_path, repo, "killed"))
  assert out.count("resuming from step ") == 1
  assert out.count("teacher _tiny_wide: reusing ") == 2
  found = []
  for name in ("whole", "killed"):
    rows = runs.collect(tmp_path / name)
    text = (tmp_path / name / "table.md").read_text()
    assert text.startswith(tables.markdown(tables.accuracy(runs.group(rows))))
    found.append({row["run"]: row["evals"] for row in rows})
  assert found[0] == found[1] and len(found[0]) == 5
