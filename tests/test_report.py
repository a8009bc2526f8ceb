"""Tables and figures from the folders of finished runs."""

import json
import os
import sys

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from kd_jax import report


def result(top1, **fields):
  final = {"top1": top1, "top5": 90.0, "ce": 1.5, "epoch": 3}
  return {
    "final": final,
    "best": {**final, "top1": top1 + 1.25, "epoch": 2},
    "student": "resnet8",
    "method": "none",
    "parameters": 78042,
    "distiller_parameters": 0,
    "seconds": 12.34,
    **fields,
  }


def write(folder, content, *, evals, age):
  """A finished run of that many evaluations, `age` seconds old."""
  folder.mkdir(parents=True)
  lines = [
    {"step": 8 * e, "kind": "eval", "epoch": e, "ce": 2.0 / e, "top1": 10.0 * e}
    for e in range(1, evals + 1)
  ]
  lines.insert(1, {"step": 4, "kind": "train", "loss": 5.0, "epoch": 0.5})
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  path = folder / "result.json"
  path.write_text(json.dumps(content))
  os.utime(path, (1e9 - age, 1e9 - age))


@pytest.fixture
def runs(tmp_path):
  folder = tmp_path / "runs"
  simkd = result(30.0, method="simkd", distiller_parameters=1234)
  write(folder / "simkd", simkd, evals=3, age=1)
  write(folder / "alone", result(20.0), evals=2, age=3)
  write(folder / "teachers" / "x", result(40.0, student="big"), evals=4, age=0)
  unfinished = folder / "unfinished"
  unfinished.mkdir()
  (unfinished / "config.json").write_text("{}")
  return folder


def main(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
  try:
    report.main()
  except SystemExit as stop:
    return stop.code
  return 0


TABLE = """\
| run | network | method | top-1 last | top-1 best (epoch) | cross-entropy |\
 parameters | seconds |
|---|---|---|---:|---:|---:|---:|---:|
| teachers/x | big | none | 40.00 | 41.25 (2) | 1.5000 | 78,042 | 12.3 |
| alone | resnet8 | none | 20.00 | 21.25 (2) | 1.5000 | 78,042 | 12.3 |
| simkd | resnet8 | simkd | 30.00 | 31.25 (2) | 1.5000 | 78,042 + 1,234 |\
 12.3 |
"""


def test_teachers_come_first_and_then_the_oldest(runs):
  assert report.table(report.collect(runs)) == TABLE


def test_a_run_is_its_own_table(runs):
  (row,) = report.collect(runs / "simkd")
  assert row["run"] == "."
  assert row["method"] == "simkd"


@pytest.mark.parametrize("name", ["unfinished", "nothing"])
def test_no_finished_run(runs, name, monkeypatch, capsys):
  assert main(monkeypatch, runs / name) == 2
  assert capsys.readouterr().err == (
    f"{runs / name}: expected finished runs (result.json) at or below it, found"
    " none. Give the --workdir of launch.py, or the folder above it\n"
  )


def test_command_line(runs, tmp_path, monkeypatch, capsys):
  path = tmp_path / "curves.png"
  assert main(monkeypatch, runs, "--curves", path) == 0
  assert capsys.readouterr().out == TABLE + "\n"
  with Image.open(path) as image:
    assert (image.format, image.size) == ("PNG", (1500, 600))
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
  # A line of each run's colour has been drawn.
  for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
    assert (pixels == colour).all(1).sum() > 100


def test_command_line_refuses_another_format(runs, monkeypatch, capsys):
  assert main(monkeypatch, runs, "--curves", runs / "curves.doc") == 2
  assert "Format 'doc' is not supported" in capsys.readouterr().err


def test_curves_are_the_evaluations(runs, tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(
    matplotlib.figure.Figure, "savefig", lambda f, *a, **k: figures.append(f)
  )
  report.curves(runs, tmp_path / "x.png")
  (figure,) = figures
  left, right = figure.axes
  names = ["teachers/x (big)", "alone (resnet8)", "simkd (resnet8)"]
  for axes, value in ((left, lambda e: 2.0 / e), (right, lambda e: 10.0 * e)):
    assert [line.get_label() for line in axes.lines] == names
    for line, evals in zip(axes.lines, (4, 2, 3), strict=True):
      epochs = list(range(1, evals + 1))
      assert line.get_xdata().tolist() == epochs
      assert line.get_ydata().tolist() == [value(e) for e in epochs]
    assert axes.get_xlabel() == "epoch"
  assert left.get_ylabel() == "test cross-entropy (nats)"
  assert left.get_yscale() == "log"
  assert right.get_ylabel() == "test top-1 (%)"
  (legend,) = figure.legends
  texts = [text.get_text() for text in legend.get_texts()]
  assert texts == names


def test_one_evaluation_is_visible(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(
    matplotlib.figure.Figure, "savefig", lambda f, *a, **k: figures.append(f)
  )
  write(tmp_path / "runs", result(20.0), evals=1, age=0)
  report.curves(tmp_path / "runs", tmp_path / "x.png")
  for axes in figures[0].axes:
    assert axes.lines[0].get_marker() not in ("None", "", None)


def test_many_runs_stay_apart(tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(
    matplotlib.figure.Figure, "savefig", lambda f, *a, **k: figures.append(f)
  )
  for i in range(12):
    write(tmp_path / "runs" / str(i), result(20.0), evals=2, age=i)
  report.curves(tmp_path / "runs", tmp_path / "x.png")
  lines = figures[0].axes[0].lines
  styles = {(line.get_color(), line.get_linestyle()) for line in lines}
  assert len(styles) == 12
