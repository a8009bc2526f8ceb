"""Several runs in one: what a cell is, and what the whole leaves behind."""

import pathlib

import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart
from kd_jax import grid, record, report, train


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
  record.claim(tmp_path / "last", settled)
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
  assert text == report.table(report.collect(workdir))
  names = [line.split()[1] for line in text.splitlines()[2:]]
  assert names[0].startswith("teachers/resnet8x2_synthetic_")
  assert names[1:] == ["alone", "kd", "simkd"]
  for name in ("alone", "kd", "simkd"):
    top1 = record.result(workdir / name)["final"]["top1"]
    assert f"| {name} | resnet8 | " in text
    assert f"| {top1:.2f} |" in text
  with Image.open(workdir / "curves.png") as image:
    assert image.format == "PNG"
    assert image.convert("L").getextrema()[0] < 128


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
