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


def lines_of(table, pair, batch):
  """The figures of each line of a work, without the head."""
  begin = f"| {pair.replace(':', ' -> ')} | {batch} |"
  lines = [line for line in table.splitlines() if line.startswith(begin)]
  return [[cell.strip() for cell in line.split("|")[3:-1]] for line in lines]


def test_the_document_has_the_table_of_the_results():
  found = speed_table.read(REPO / "results" / "benchmarks")
  text = (REPO / "docs" / "speed.md").read_text(encoding="utf-8")
  assert speed_table.put(text, speed_table.make(found)) == text, (
    "run python -m benchmarks.speed_table"
  )


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
  none = ["not run"]
  kd = work_lib.COMMON.index("kd")
  measured = [
    [title, *none * kd, figure, *none * (4 - kd)]
    for figure in ("100 (50-200)", "128,000 (64,000-256,000)")
    for title in speed_table.SIDES.values()
  ]
  assert lines_of(table, pair, 64) == measured
  assert lines_of(table, pair, 256) == []
  assert lines_of(table, speed_table.LARGE, 256) == [
    ["kd_jax", "2,560 (1,280-5,120)", *none * 4]
  ]
  assert "Not run: the other 18 of 21 lines." in table  # of the CPU
  assert "Not run: the other 17 of 21 lines." in table
  assert "| FitNet | 10 (5-20) | not run |" in table
  assert "| AT |" not in table


def test_what_was_tried_with_flags_is_left_out(tmp_path):
  path = tmp_path / "a.json"
  file_of(path, "cpu", "--batch", "64", "--methods", "kd", *CPU)
  content = json.loads(path.read_text())
  for flags in ("", speed_table.FLAGS, "--another"):
    path.write_text(json.dumps({**content, "xla_flags": flags}))
    assert bool(speed_table.read(tmp_path)) == (flags != "--another")
  assert speed_table.FLAGS in (REPO / "benchmarks/cpu.sh").read_text()


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
