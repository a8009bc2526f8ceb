"""docs/speed.md's table is what the kept measurements say."""

import dataclasses
import json
import pathlib

import pytest

from benchmarks import speed_table, step
from benchmarks import work as work_lib

REPO = pathlib.Path(__file__).resolve().parents[2]
CPU = ("--dtype", "float32", "--devices", "2")


def file_of(path, platform, *arguments, ms=1000.0, change=()):
  """A file of `benchmarks.step`, with made-up results."""
  cells = step.make_cells(step.parse(arguments))
  result = {
    "platform": platform,
    "ms_per_step": ms,
    "ms_per_step_least": ms / 2,
    "ms_per_step_most": ms * 2,
  }
  rows = [
    {"cell": dataclasses.replace(c, **dict(change)).key, "result": result}
    for c in cells
  ]
  path.write_text(json.dumps({"rows": rows}))


def line_of(table, pair, batch, method):
  pair = pair.replace(":", " -> ")
  begin = f"| {pair} | {batch} | {speed_table.NAMES[method]} |"
  (line,) = [line for line in table.splitlines() if line.startswith(begin)]
  return [cell.strip() for cell in line.split("|")[4:-1]]


def test_the_document_has_the_table_of_the_results():
  found = speed_table.read(REPO / "results" / "benchmarks")
  text = (REPO / "docs" / "speed.md").read_text(encoding="utf-8")
  assert speed_table.put(text, speed_table.make(found)) == text, (
    "run python -m benchmarks.speed_table"
  )


def test_names_every_method_and_pair_once():
  assert set(speed_table.NAMES) == set(work_lib.METHODS)
  lines = speed_table.lines_of_table()
  assert len(set(lines)) == len(lines) == 5 * 7 + 6
  assert {method for _, _, method in lines} == set(work_lib.METHODS)


def test_figures_are_in_their_places(tmp_path):
  pair = work_lib.PAIRS[1]
  arguments = ("--pairs", pair, "--batch", "64", "--methods", "kd")
  file_of(tmp_path / "a.json", "cpu", *arguments, *CPU, ms=640.0)
  file_of(tmp_path / "b.json", "gpu", *arguments, ms=0.5)
  large = ("--pairs", speed_table.LARGE, "--batch", "256", "--methods", "none")
  file_of(tmp_path / "c.json", "gpu", *large, "--sides", "jax", ms=100.0)
  methods = ("--batch", "64", "--methods", "fitnet", "--sides", "jax")
  first = ("--pairs", work_lib.PAIRS[0])
  file_of(tmp_path / "d.json", "cpu", *first, *methods, *CPU, ms=6400.0)
  # Neither the step without augmentation, nor other dispatches, nor the
  # teacher alone has a place.
  bare = (*arguments, *CPU, "--no_augment")
  file_of(tmp_path / "e.json", "cpu", *bare)
  counted = (*arguments, *CPU, "--steps_per_dispatch", "11", "--sides", "jax")
  file_of(tmp_path / "f.json", "cpu", *counted)
  file_of(tmp_path / "g.json", "cpu", *arguments, *CPU, "--sides", "teacher")
  (tmp_path / "h.json").write_text(json.dumps({"rows": [{"pipeline": "x"}]}))
  (tmp_path / "below").mkdir()
  file_of(tmp_path / "below/a.json", "cpu", *arguments, *CPU)
  table = speed_table.make(speed_table.read(tmp_path))
  assert line_of(table, pair, 64, "kd") == [
    *["100 (50-200)"] * 3,
    *["128,000 (64,000-256,000)"] * 3,
  ]
  assert line_of(table, pair, 256, "kd") == ["not run"] * 6
  assert line_of(table, speed_table.LARGE, 256, "none") == [
    *["not run"] * 3,
    *["2,560 (1,280-5,120)", "not run", "not run"],
  ]
  assert line_of(table, work_lib.PAIRS[0], 64, "fitnet") == [
    *["10 (5-20)", "-", "-"],
    *["not run", "-", "-"],
  ]


def test_what_was_tried_with_flags_is_left_out(tmp_path):
  path = tmp_path / "a.json"
  file_of(path, "cpu", "--batch", "64", "--methods", "kd", *CPU)
  assert speed_table.read(tmp_path)
  path.write_text(
    json.dumps({**json.loads(path.read_text()), "xla_flags": "-"})
  )
  assert not speed_table.read(tmp_path)


def test_two_figures_for_a_place_are_refused(tmp_path):
  arguments = ("--batch", "64", "--methods", "kd", *CPU)
  file_of(tmp_path / "a.json", "cpu", *arguments)
  file_of(tmp_path / "b.json", "cpu", *arguments)
  with pytest.raises(SystemExit, match=r"b\.json: .* kd jax, which a\.json"):
    speed_table.read(tmp_path)


def test_writes_between_the_marks_of_a_document(tmp_path, capsys):
  docs = tmp_path / "speed.md"
  docs.write_text("before\n")
  arguments = [str(tmp_path), "--docs", str(docs)]
  with pytest.raises(SystemExit, match="expected the marks"):
    speed_table.main(arguments)
  around = f"before\n{speed_table.BEGIN}old\n{speed_table.END}after\n"
  docs.write_text(around)
  speed_table.main(arguments)
  text = docs.read_text()
  table = speed_table.make({})
  assert text == around.replace("old\n", f"\n{table}\n")
  assert capsys.readouterr().out == f"written: {docs}\n"
