"""What is kept of finished runs, and the tables that are made of it."""

import errno
import gzip
import json
import os
import pathlib
import re

import pytest

from configs import nkd_cifar, table_cifar
from kd_jax import distillers, storage
from kd_jax.cli import results as command
from kd_jax.reporting import gather, published, report, tables
from kd_jax.reporting import runs as runs_lib
from kd_jax.runs import grid, identity

REPO = pathlib.Path(__file__).resolve().parents[2]
NOT_RUN = "not run"


@pytest.fixture
def keep(write):
  """keep(folder, top1, **more): a finished run with its environment."""

  def make(folder, *arguments, command=("launch.py",), **more):
    write(folder, *arguments, **more)
    environment = {"command": command, "versions": {"jax": "1.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))

  return make


@pytest.fixture
def runs(tmp_path, keep):
  folder = tmp_path / "private" / "runs"
  keep(
    folder / "a",
    70.0,
    seed=1,
    age=9,
    command=[
      f"{REPO}/launch.py",
      f"--config={REPO}/configs/table_cifar.py:seed",
      f"--workdir={folder}",
      "--config.data.dir=/private/data",
      f"--config.teachers=('{folder}/teachers/t', '/private/w.pth')",
      "--config.teacher.name=a/b",
    ],
  )
  teacher = {"name": "resnet32x4", "checkpoint": f"{folder}/teachers/t"}
  data = identity.as_json(table_cifar.get_config())["data"]
  changes = {"data": {**data, "dir": "/private/my data"}}
  keep(folder / "b", 71.0, method="kd", teacher=teacher, changes=changes, age=3)
  keep(folder / "teachers" / "t", 79.0, student="resnet32x4", age=5)
  unfinished = folder / "unfinished"
  unfinished.mkdir()
  (unfinished / "config.json").write_text("{}")
  return folder


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def table_of(folder):
  groups = runs_lib.group(runs_lib.collect(folder))
  return tables.markdown(tables.accuracy(groups))


def test_gathered_are_the_finished_runs_without_private_paths(runs, tmp_path):
  to = tmp_path / "kept"
  assert gather.gather(runs, to) == [to / "teachers/t", to / "a", to / "b"]
  names = ("config.json", "environment.json", "metrics.jsonl.gz", "result.json")
  kept = contents(to)
  assert kept.keys() == {
    f"{run}/{name}" for run in ("a", "b", "teachers/t") for name in names
  }
  lines = gzip.decompress(kept["b/metrics.jsonl.gz"])
  assert lines == (runs / "b" / "metrics.jsonl").read_bytes()
  assert storage.read_json(to / "a" / "environment.json") == {
    "command": [
      "launch.py",
      "--config=configs/table_cifar.py:seed",
      "--workdir=runs",
      "--config.data.dir=.../data",
      "--config.teachers=('runs/teachers/t', '.../w.pth')",
      "--config.teacher.name=a/b",
    ],
    "versions": {"jax": "1.0"},
  }
  result = storage.read_json(to / "b" / "result.json")
  assert result["teacher"]["checkpoint"] == "runs/teachers/t"
  data = storage.read_json(to / "b" / "config.json")["data"]
  assert data["dir"] == ".../my data"
  every = b"".join(kept.values())
  for private in (b"private", str(tmp_path).encode(), str(REPO).encode()):
    assert private not in every


def test_gathered_again_is_the_same(runs, tmp_path):
  gather.gather(runs, tmp_path / "one")
  for path in runs.rglob("*.json*"):
    os.utime(path, (1e9, 1e9))
  gather.gather(runs, tmp_path / "two")
  gather.gather(tmp_path / "one", tmp_path / "three")
  one = contents(tmp_path / "one")
  assert one == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_report_reads_what_was_gathered(runs, tmp_path):
  to = tmp_path / "kept"
  gather.gather(runs, to)
  # As a checkout leaves them.
  for age, name in enumerate(("a", "b", "teachers/t")):
    os.utime(to / name / "result.json", (1e9 - age, 1e9 - age))
  ours, theirs = runs_lib.collect(to), runs_lib.collect(runs)
  assert [row["run"] for row in ours] == ["teachers/t", "a", "b"]
  assert table_of(to) == table_of(runs)
  assert [r["evals"] for r in ours] == [r["evals"] for r in theirs]
  report.write_report(to, tmp_path / "out")


def test_finished_grid_is_gathered(smoke_run, tmp_path):
  workdir = smoke_run("quickstart")
  gather.gather(workdir, tmp_path)
  assert table_of(tmp_path) == table_of(workdir)
  assert str(workdir.parent).encode() not in b"".join(
    contents(tmp_path).values()
  )


def test_a_damaged_run_is_left_out_and_named(runs, tmp_path, caplog):
  to = tmp_path / "kept"
  (runs / "b" / "environment.json").unlink()
  (runs / "a" / "result.json").write_text("{")
  assert gather.gather(runs, to) == [to / "teachers" / "t"]
  assert not (to / "b").exists()
  warned = sorted(record.getMessage() for record in caplog.records)
  assert len(warned) == 2
  assert f"{runs / 'a' / 'result.json'}: expected JSON, got a file" in warned[0]
  assert "b: expected environment.json beside result.json" in warned[1]
  (runs / "teachers" / "t" / "metrics.jsonl").unlink()
  with pytest.raises(ValueError, match=r"t: expected metrics\.jsonl beside"):
    gather.gather(runs, tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_a_full_disk(runs, tmp_path, monkeypatch, run_main, capsys):
  def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  to, document = tmp_path / "kept", tmp_path / "README.md"
  document.write_text(f"{gather.BEGIN}\n{gather.END}\n")
  before = contents(tmp_path)
  for folder, *given in ((runs, "--to", to), (runs, "--readme", document)):
    with monkeypatch.context() as patch:
      patch.setattr(os, "fsync", fail)
      assert run_main(command, folder, *given) == 1
    error = capsys.readouterr().err
    assert "No space left on device: '" in error and "Make room" in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before
  assert run_main(command, runs, "--to", tmp_path / "README.md" / "x") == 2
  assert "Not a directory" in capsys.readouterr().err
  assert run_main(command, runs, "--to", to) == 0


def cells_of(markdown):
  """(row, column) -> the text of the first table's cells, and the header."""
  lines = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in markdown.split("\n\n")[0].splitlines()
  ]
  header, _, *rows = lines
  return {
    (row[0], i): cell for row in rows for i, cell in enumerate(row)
  }, header


@pytest.mark.parametrize(
  ("name", "make", "option"),
  [
    ("README.md", gather.tables, "readme"),
    ("docs/results.md", gather.page, "page"),
  ],
)
def test_document_has_the_tables_of_the_results(name, make, option):
  text = (REPO / name).read_text(encoding="utf-8")
  made = gather.rewrite(text, make(REPO / "results" / "cifar100"))
  assert text == made, (
    f"{name} does not show what results/ holds: python -m kd_jax results"
    f" results/cifar100 --{option} {name}"
  )


def title_of(method):
  text = gather.tables(REPO / "nothing")
  (title,) = re.findall(rf"\[(\S+)\]\(kd_jax/distillers/{method}\.py\)", text)
  return title


@pytest.mark.parametrize("method", sorted({*distillers.names()} - {"none"}))
def test_every_method_is_listed_by_its_name_and_paper(method):
  line = rf"\]\(kd_jax/distillers/{method}\.py\) \(([A-Za-z]+ )?20\d\d\)"
  assert re.search(line, gather.tables(REPO / "nothing"))
  title = title_of(method).lower().replace("-", "")
  assert title == method.replace("_", "")


def test_nothing_has_been_run(tmp_path):
  text = gather.tables(tmp_path / "nothing")
  cells, header = cells_of(text.partition("`resnet8x4`:\n\n")[2])
  assert header == ["method", "config", "published", "kd_jax"]
  rows = list(dict.fromkeys(row for row, _ in cells))
  pairs = {"", "resnet32x4"}
  assert rows[0] == "student alone" and len(rows) == len(
    {
      v.method
      for v in published.values()
      if v.student == "resnet8x4" and v.teacher in pairs
    }
  )
  assert {cells[row, 3] for row in rows} == {NOT_RUN}
  assert cells["SemCKD", 1] == "`semckd_cifar.py`"
  assert cells["SemCKD", 2] == "76.23 (SimKD, best)"
  assert cells["AT", 2] == "75.07 (SimKD, best); 73.44 (RepDistiller, last)"
  assert "78.08 (SimKD, best, factor 2)" in cells["SimKD", 2]
  teacher = (
    "\nThe teacher, `resnet32x4`: published 79.42 (SimKD, best); 79.42"
    " (RepDistiller, last); kd_jax not run.\n"
  )
  assert teacher in text


def test_page_has_every_published_value(tmp_path):
  text = gather.page(tmp_path / "nothing")
  for value in published.values():
    part = text.partition(f"## {value.recipe}\n")[2].partition("\n## ")[0]
    head, _, table = part.partition("\n\n|")
    assert value.source in head
    if value.teacher:
      _, header = cells_of(f"|{table}")
      lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if f"| `{value.teacher}` " in line and f"| `{value.student}` " in line
      ]
      word = "last" if value.epoch == "final" else "best"
      name = title_of(value.method)
      assert f"{value.top1:.2f}" in [
        cell
        for [line] in [lines]
        for title, cell in zip(header, line, strict=True)
        if title.startswith(f"{name} (") and f"{word} epoch" in title
      ]
  assert "kd_jax" not in text


def keep_cells(folder, keep, config):
  """Keeps a run of each cell; the scores of the n-th are n, n + 1, n + 2."""
  scores = {}
  for name, cell in grid.cells(config).items():
    first = name.partition("_seed")[0]
    number = scores.setdefault(first, len(scores))
    keep(
      folder / name,
      number + cell.seed - 1.25,  # the best epoch's is 1.25 more
      changes=identity.as_json(cell),
      student=cell.student.name,
      method=cell.distiller.name,
      seed=cell.seed,
      teacher={"name": cell.teacher.name} if cell.teacher.name else {},
    )
  return scores


@pytest.mark.parametrize(
  ("arg", "recipe", "row", "name"),
  [
    ("", "SimKD", "KD", "kd"),
    ("", "SimKD factor 2", "SimKD", "simkd_factor2"),
    ("repdistiller", "RepDistiller, mdistiller", "KD", "kd"),
    ("repdistiller", "RepDistiller", "CRD", "crd"),
  ],
)
def test_cells_of_the_grid_have_their_places(
  arg, recipe, row, name, tmp_path, keep
):
  config = table_cifar.get_config(arg).lock()
  pair = "resnet32x4_resnet8x4_"
  names = [n for n in config.grid if n.startswith(pair) or "alone" in n]
  with config.unlocked():
    config.grid = {name: config.grid[name] for name in names}
  scores = keep_cells(tmp_path / "table", keep, config)
  text = gather.tables(tmp_path)
  cells, _ = cells_of(text.partition("`resnet8x4`:\n\n")[2])
  best = scores[pair + name] + 1
  assert f"{best:.2f} ± 1.00 ({recipe}, best, n = 3)" in cells[row, 3]
  assert text.count("\n|:--") == 1  # no other table
  # Beside the published value, at the epoch of its source.
  shown = best - 1.25 if arg else best
  assert f"; kd_jax {shown:.2f} ± 1.00 (n = 3) |" in gather.page(tmp_path)


def test_the_teacher_and_what_is_not_of_the_table(tmp_path, keep):
  keep(tmp_path / "table" / "teachers" / "t", 78.0, student="resnet32x4")
  command = ["launch.py", "--config", "configs/cpu.py"]
  cpu = tmp_path / "cpu"
  kd = {"method": "kd", "student": "resnet8", "teacher": {"name": "resnet20"}}
  for seed in range(2):
    more = {"changes": {"epochs": 30}, "seed": seed, "command": command}
    keep(cpu / f"kd_seed{seed}", 50.0 + seed, **kd, **more)
  more = {"changes": {"epochs": 40}, "student": "resnet20", "command": command}
  keep(cpu / "teachers" / "t", 60.0, **more)
  text = gather.tables(tmp_path)
  assert "kd_jax 79.25 (SimKD, RepDistiller, best, n = 1).\n" in text
  *_, about, table = text.rstrip("\n").split("\n\n")
  assert about == (
    "`cpu`: 30 epochs of batches of 64, on 1 x CPU, by `python launch.py"
    " --config configs/cpu.py`."
  )
  header, _, *lines = [" ".join(line.split()) for line in table.splitlines()]
  # Without the columns of which nothing is known.
  assert header == (
    "| network | teacher | method | n | top-1, last epoch | top-1, best epoch |"
  )
  assert lines == [
    "| resnet20 | - | none | 1 | 60.00 | 61.25 (2) |",
    "| resnet8 | resnet20 | kd | 2 | 50.50 ± 0.71 | 51.75 ± 0.71 (2) |",
  ]


def test_a_method_without_published_values_has_its_place(tmp_path, keep):
  config = identity.as_json(nkd_cifar.get_config())
  run = {"method": "nkd", "teacher": {"name": "resnet32x4"}}
  keep(tmp_path / "nkd" / "run", 75.0, changes=config, **run)
  text = gather.tables(tmp_path)
  cells, _ = cells_of(text.partition("`resnet8x4`:\n\n")[2])
  assert cells["NKD", 3] == "76.25 (best, n = 1)"
  assert text.count("\n|:--") == 1


DOCUMENT = f"before\n{gather.BEGIN}\nold\n{gather.END}\nafter\n"


def test_rewrite_leaves_the_rest():
  once = gather.rewrite(DOCUMENT, "| new |\n")
  assert once == (f"before\n{gather.BEGIN}\n\n| new |\n\n{gather.END}\nafter\n")
  assert gather.rewrite(once, "| new |\n") == once


@pytest.mark.parametrize(
  "text",
  [
    *("no markers\n", f"{gather.BEGIN}\n", DOCUMENT + DOCUMENT),
    f"{gather.END}\n{gather.BEGIN}\n",
  ],
)
def test_rewrite_wants_its_markers(text):
  with pytest.raises(ValueError, match="expected one line '<!-- results: writ"):
    gather.rewrite(text, "")


def test_command_line(runs, tmp_path, run_main, capsys):
  kept, document = tmp_path / "kept", tmp_path / "README.md"
  assert run_main(command, runs, "--to", kept / "table") == 0
  assert capsys.readouterr().out.splitlines() == [
    str(kept / "table" / run) for run in ("teachers/t", "a", "b")
  ]
  document.write_text(DOCUMENT)
  for word in ("written", "unchanged"):
    assert run_main(command, kept, "--readme", document) == 0
    assert capsys.readouterr().out == f"{document}: {word}\n"
  text = document.read_text()
  assert text == gather.rewrite(DOCUMENT, gather.tables(kept))
  assert run_main(command, kept, "--page", document) == 0
  text = document.read_text()
  assert text == gather.rewrite(DOCUMENT, gather.page(kept))


def test_mistakes_on_the_command_line(runs, tmp_path, run_main, capsys):
  document = tmp_path / "README.md"
  assert run_main(command, runs, "--readme", document) == 2
  assert "No such file or directory" in capsys.readouterr().err
  document.write_text("nothing to see")
  assert run_main(command, runs, "--readme", document) == 2
  assert capsys.readouterr().err.startswith(f"{document}: expected one line")
  assert run_main(command, tmp_path / "none", "--to", tmp_path / "kept") == 2
  assert "expected finished runs (result.json)" in capsys.readouterr().err
