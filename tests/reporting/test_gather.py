"""What is kept of finished runs."""

import errno
import gzip
import os
import pathlib

import pytest

from configs import table_cifar
from kd_jax import storage
from kd_jax.cli import results as command
from kd_jax.reporting import documents, gather, report, tables
from kd_jax.reporting import runs as runs_lib
from kd_jax.runs import identity

REPO = pathlib.Path(__file__).resolve().parents[2]
NOT_RUN = "not run"


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
  document.write_text(f"{documents.BEGIN}\n{documents.END}\n")
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


def test_command_line(runs, tmp_path, run_main, capsys):
  kept, document = tmp_path / "kept", tmp_path / "README.md"
  assert run_main(command, runs, "--to", kept / "table") == 0
  assert capsys.readouterr().out.splitlines() == [
    str(kept / "table" / run) for run in ("teachers/t", "a", "b")
  ]
  empty = f"{documents.BEGIN}\n{documents.END}\n"
  document.write_text(empty)
  for word in ("written", "unchanged"):
    assert run_main(command, kept, "--readme", document) == 0
    assert capsys.readouterr().out == f"{document}: {word}\n"
  text = document.read_text()
  assert text == documents.rewrite(empty, documents.tables(kept))
  assert run_main(command, kept, "--page", document) == 0
  text = document.read_text()
  assert text == documents.rewrite(empty, documents.page(kept))


def test_mistakes_on_the_command_line(runs, tmp_path, run_main, capsys):
  document = tmp_path / "README.md"
  assert run_main(command, runs, "--readme", document) == 2
  assert "No such file or directory" in capsys.readouterr().err
  document.write_text("nothing to see")
  assert run_main(command, runs, "--readme", document) == 2
  assert capsys.readouterr().err.startswith(f"{document}: expected one line")
  assert run_main(command, tmp_path / "none", "--to", tmp_path / "kept") == 2
  assert "expected finished runs (result.json)" in capsys.readouterr().err
