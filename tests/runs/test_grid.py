"""Several runs in one: what a cell is, and what the whole leaves behind."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart
from kd_jax.distributed import claims, signals
from kd_jax.reporting import report, runs, tables
from kd_jax.runs import grid, identity, train
from kd_jax.runs import workdir as workdir_lib


def make(cells):
  config = quickstart.get_config("smoke")
  config.student.name, config.data.image_size = "_tiny", 8
  config.parallel.num_devices = 1
  config.grid = ConfigDict(cells)
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
  assert config.to_dict() == before
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
  assert all(cell.is_locked for cell in made.values())


def test_trials_follow_each_other():
  config = make({"b": {"seed": 7}, "a": {}})
  config.trials = 3
  made = grid.cells(config)
  assert {name: cell.seed for name, cell in made.items()} == {
    **{"a": 0, "b": 7},
    **{"a_seed1": 1, "b_seed8": 8},
    **{"a_seed2": 2, "b_seed9": 9},
  }
  assert list(made) == ["a", "b", "a_seed1", "b_seed8", "a_seed2", "b_seed9"]
  assert {cell.trials for cell in made.values()} == {1}
  # More trials of a grid go on from those that are there.
  assert identity.config_fingerprint(config) == identity.config_fingerprint(
    make(config.grid)
  )


def test_trials_of_a_run_without_a_grid():
  config = make({})
  assert not grid.is_grid(config)
  config.trials = 2
  assert grid.is_grid(config)
  assert list(grid.cells(config)) == ["none", "none_seed1"]
  config.trials = 0
  with pytest.raises(
    ValueError, match=r"config\.trials: expected 1 or more, got 0"
  ):
    grid.cells(config)


def test_a_cell_shares_nothing_with_another():
  made = grid.cells(make({"a": KD, "b": KD}))
  made["a"].distiller.temperature = 9.0
  made["a"].optim.momentum = 0.1
  assert made["b"].distiller.temperature == 2.0
  assert made["b"].optim.momentum == 0.9


@pytest.fixture
def no_training(monkeypatch):
  def refuse(self):
    raise AssertionError("a run was started")

  monkeypatch.setattr(train.Run, "train", refuse)


@pytest.mark.parametrize(
  ("delta", "words"),
  [
    (
      {"optim": {"learning_rat": 1.0}},
      r"config\.grid\.last\.optim\.learning_rat: no such field\. Did you mean"
      r" learning_rate\? The fields are: decay_rate, gradient_clip, learning_",
    ),
    (
      {"epoch": 3},
      r"config\.grid\.last\.epoch: no such field\. Did you mean epochs\?",
    ),
    (
      {"epochs": "many"},
      r"config\.grid\.last\.epochs: expected int, got 'many'",
    ),
    (
      {"optim": 3},
      r"config\.grid\.last\.optim: expected what configs/base\.py has there,"
      " got 3",
    ),
    ({"seed": {"a": 1}}, r"config\.grid\.last\.seed: expected what configs/"),
    (
      {**KD, "distiller": {"name": "kd", "temprature": 2.0}},
      r"config\.grid\.last: kd has no field 'temprature'. Did you mean",
    ),
    (
      {"student": {"name": "resnet88"}},
      r"config\.grid\.last: Unknown model 'resnet88'. Did you mean 'resnet8'",
    ),
    (
      {**KD, "loss_weights": {"kdd": 1.0}},
      r"config\.grid\.last: loss_weights: 'kdd' is not a term",
    ),
    ({"batch_size": 65}, r"config\.grid\.last: config\.batch_size: expected"),
  ],
)
def test_a_mistake_in_the_last_cell_stops_the_first(
  delta, words, no_training, tmp_path
):
  with pytest.raises(ValueError, match=f"(?s){words}"):
    grid.run_grid(make({"first": {}, "last": delta}), str(tmp_path / "grid"))
  assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_grid(no_training, tmp_path):
  other = grid.cells(make({"first": {}, "last": {"seed": 1}}))["last"]
  settled = train.setup.settle(other, None)
  workdir_lib.claim(tmp_path / "last", settled)
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(
    ValueError, match=r"(?s)config\.grid\.last: .*seed: 1 there, 2 here"
  ):
    grid.run_grid(make({"first": {}, "last": {"seed": 2}}), str(tmp_path))
  after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  assert after == before


def test_finished_grid(smoke_run):
  """What quickstart leaves behind; its smoke run is the grid."""
  workdir = smoke_run("quickstart")
  text = (workdir / "table.md").read_text()
  assert text.startswith(tables.table(runs.collect(workdir)))
  names = [line.split()[1] for line in text.split("\n\n")[0].splitlines()[2:]]
  assert names[0].startswith("teachers/resnet8x2_synthetic_")
  assert names[1:] == ["alone", "kd", "simkd"]
  for name in ("alone", "kd", "simkd"):
    top1 = workdir_lib.result(workdir / name)["final"]["top1"]
    teacher = "-" if name == "alone" else "resnet8x2"
    assert f"| {name} | {teacher} | resnet8 | " in text
    assert f"| {top1:.2f} |" in text
  with Image.open(workdir / "curves.png") as image:
    assert image.format == "PNG"
    assert image.convert("L").getextrema()[0] < 128
  for name in ("table.csv", "curves.svg", "report.html"):
    assert (workdir / name).exists()


def test_simkd_cell_has_proved_its_export(smoke_run):
  samples = smoke_run("quickstart") / "simkd" / "samples"
  assert [path.name for path in sorted(samples.iterdir())] == [
    f"{i}_class {i}.png" for i in range(4)
  ]


def test_a_finished_grid_is_not_run_again(smoke_run, no_training, capsys):
  workdir = smoke_run("quickstart")
  results = {
    path: path.read_bytes()
    for path in workdir.rglob("*.json")
    if isinstance(path, pathlib.Path)
  }
  config = quickstart.get_config("smoke").lock()
  rows = grid.run_grid(config, str(workdir))
  assert [row["run"] for row in rows][1:] == ["alone", "kd", "simkd"]
  assert "[2/3] kd" in capsys.readouterr().out
  assert {path: path.read_bytes() for path in results} == results


def test_a_broken_cell_is_reported_and_the_others_are_there(
  tmp_path, fast_compile, capsys
):
  hot = {"optim": {"learning_rate": 1e30}}
  config = make({"a_hot": hot, "b": {}, "c_lost": {}})
  (tmp_path / "c_lost").write_text("a file where a folder should be")
  with pytest.raises(grid.CellsFailedError) as caught:
    grid.run_grid(config, str(tmp_path))
  lines = str(caught.value).splitlines()
  assert lines[0] == (
    "2 of 3 cells have failed, the same command tries them again:"
  )
  assert lines[1].startswith("  a_hot: NonFiniteLossError: step ")
  assert lines[2].startswith("  c_lost: NotADirectoryError: ")
  assert "| b | - | _tiny | none | 1 |" in (tmp_path / "table.md").read_text()
  assert "c_lost has failed: NotADirectoryError" in capsys.readouterr().err
  # Again: what is there is left alone, what failed is tried.
  (tmp_path / "c_lost").unlink()
  before = (tmp_path / "b" / "result.json").stat().st_mtime_ns
  with pytest.raises(grid.CellsFailedError, match=r"1 of 3 cells.*\n  a_hot: "):
    grid.run_grid(config, str(tmp_path))
  assert (tmp_path / "b" / "result.json").stat().st_mtime_ns == before
  assert workdir_lib.result(tmp_path / "c_lost")


def test_what_others_do_is_left_to_them(no_training, tmp_path, capsys):
  other = claims.Claim(tmp_path / "a")
  assert other.take()
  assert grid.run_grid(make({"a": {}}), str(tmp_path)) == []
  other.release()
  assert capsys.readouterr().out == (
    "other processes are at work on a: who ends last writes the table of all\n"
  )


def test_a_machine_that_died_meanwhile_is_followed(tmp_path, monkeypatch):
  """Its last beat came after the first look at its cell."""
  path, trained, now = tmp_path / "a" / "claims" / "1", [], 1000.0
  path.parent.mkdir(parents=True)
  path.write_text("another boot 1 2")

  def later(seconds):
    nonlocal now
    now += seconds

  def run(config, workdir):
    trained.append(pathlib.Path(workdir).name)
    if trained == ["b"]:
      os.utime(path, (1, 1))
      later(3600)

  clock = types.SimpleNamespace(monotonic=lambda: now, sleep=later)
  monkeypatch.setattr(claims, "time", clock)
  monkeypatch.setattr(grid, "time", clock)
  monkeypatch.setattr(train, "prepare", lambda *_: None)
  monkeypatch.setattr(train, "train_and_evaluate", run)
  grid.run_grid(make({"a": {}, "b": {}}), str(tmp_path))
  assert trained == ["b", "a"]


def test_stopped_between_cells_it_leaves_them_to_others(tmp_path, monkeypatch):
  made = []

  def train_and_evaluate(config, workdir):
    if made:
      signal.raise_signal(signal.SIGTERM)
    made.append(pathlib.Path(workdir).name)

  monkeypatch.setattr(train, "train_and_evaluate", train_and_evaluate)
  with pytest.raises(SystemExit) as stopped, signals.ended_by_signals(75):
    grid.run_grid(make({"a": {}, "b": {}, "c": {}}), str(tmp_path))
  assert stopped.value.code == 75
  assert made == ["a"]
  claim = claims.Claim(tmp_path / "b")
  assert claim.take()
  claim.release()


# Two methods x two students x two trials on digits, of networks of a second.
CONFIG = """
from configs import base, table_cifar


def get_config(arg=""):
  config = base.digits(base.get_config(), epochs=2)
  config.grid = table_cifar.product(
    students={"a": "_tiny", "b": "_tiny_wide"},
    teacher="_tiny_wide",
    methods=["kd"],
  )
  config.trials = 2
  config.batch_size = 128
  config.data.image_size = 8
  config.teacher.epochs = 2
  config.checkpoint.every_steps = 4
  config.log.every_steps = 1
  return config
"""
CELLS = [
  f"{student}_{method}{trial}"
  for student in "ab"
  for method in ("alone", "kd")
  for trial in ("", "_seed1")
]


class Drill:
  """Grids of one config, which share compiled programs."""

  def __init__(self, folder, repo):
    self.folder, self.repo = folder, repo
    (folder / "grid_config.py").write_text(CONFIG)

  def start(self, name):
    return subprocess.Popen(
      [
        *(sys.executable, "launch.py"),
        f"--config={self.folder}/grid_config.py",
        f"--workdir={self.folder / name}",
      ],
      cwd=self.repo,
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def finish(self, process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    return out

  def numbers(self, name):
    """The table without what time and place change."""
    rows = runs.collect(self.folder / name)
    lines = [line.rsplit("|", 3)[0] for line in tables.table(rows).splitlines()]
    text = (self.folder / name / "table.md").read_text()
    assert text.startswith(tables.table(rows))
    return sorted(lines), {
      row["run"]: row["evals"] for row in rows if "teachers" not in row["run"]
    }


def test_killed_shared_and_resumed_grids_are_one(tmp_path, repo):
  drill = Drill(tmp_path, repo)
  # Two processes at once: each cell is run by one of them.
  two = [drill.start("shared") for _ in range(2)]
  outs = [drill.finish(process) for process in two]
  said = [
    [line.split()[1] for line in out.splitlines() if line.startswith("[")]
    for out in outs
  ]
  for name in CELLS:
    # Who came later than the end of a cell has found it finished.
    assert any(name in names for names in said)
    claimed = os.listdir(tmp_path / "shared" / name / "claims")
    assert claimed == ["1"], name
  lines, evals = drill.numbers("shared")
  assert sorted(evals) == sorted(CELLS)
  (teacher,) = (tmp_path / "shared" / "teachers").iterdir()
  assert os.listdir(teacher / "claims")

  # As if it had come so far, and there it is killed.
  ahead = ("b_kd", "a_kd_seed1", "b_alone_seed1")
  shutil.copytree(tmp_path / "shared", tmp_path / "killed")
  for name in ahead:
    shutil.rmtree(tmp_path / "killed" / name)
  process = drill.start("killed")
  path = tmp_path / "killed" / "b_kd" / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while not path.exists() or len(path.read_text().splitlines()) < 15:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (path.parent / "result.json").exists()
  out = drill.finish(drill.start("killed"))
  assert out.count("going on from step ") == 1
  assert out.count("teacher _tiny_wide: reusing ") == 2
  assert drill.numbers("killed") == (lines, evals)
  claimed = os.listdir(tmp_path / "killed" / "b_kd" / "claims")
  assert sorted(claimed) == ["1", "2"]

  # The moved runs are analysed where they are now.
  shutil.rmtree(tmp_path / "shared")
  groups = runs.group(runs.collect(tmp_path / "killed"))
  pairs = report.analyse(tmp_path / "killed", groups)
  students = {("digits", "_tiny"), ("digits", "_tiny_wide")}
  assert {key[:2] for key in pairs} == students and len(pairs) == 2
  for pair in pairs.values():
    # "none (...)" where the teacher has been trained alone, too.
    trials = {k.split()[0]: len(s.agreement) for k, s in pair.students.items()}
    assert trials == {"kd": 2, "none": 2}
  for path in report.write(tmp_path / "killed", tmp_path / "out", pairs):
    assert path.exists()
