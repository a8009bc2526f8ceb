"""Tables, figures and pages from the folders of finished runs."""

import csv
import io
import math
import re
import resource
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from kd_jax import reporting
from kd_jax.cli import report as command
from kd_jax.reporting import report, statistics, tables
from kd_jax.reporting import runs as runs_lib

ALONE = (70.0, 70.5, 71.75)  # see conftest.py
KD = (74.0, 74.25, 74.0)
FILES = [
  *("table.md", "table.csv", "curves.png", "curves.svg", "report.html"),
  "hparams",
]


def grouped(folder):
  return runs_lib.group(runs_lib.collect(folder))


def lines_of(markdown):
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in markdown.splitlines()
  ]
  return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def accuracy_of(folder):
  return lines_of(tables.markdown(tables.accuracy(grouped(folder))))


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_table_is_of_trials(runs):
  teacher, alone, kd, hot = accuracy_of(runs)
  std = np.std(KD, ddof=1)
  assert kd == {
    "run": "kd",
    "teacher": "resnet32x4",
    "network": "resnet8x4",
    "method": "kd (temperature=4.0)",
    "n": "3",
    "top-1, last epoch": f"{np.mean(KD):.2f} ± {std:.2f}",
    "top-1, best epoch": f"{np.mean(KD) + 1.25:.2f} ± {std:.2f} (2)",
    "published": "74.42 (SimKD, best)",
    "difference": f"{np.mean(KD) + 1.25 - 74.42:+.2f}",
    "cross-entropy, last epoch": "1.5000 ± 0.0000",
    "parameters": "78,042 + 1,234",
    "seconds": "12.3",
    "hardware": "1 x CPU",
  }
  assert (teacher["run"], teacher["n"]) == ("teachers/x", "1")
  assert teacher["top-1, last epoch"] == "79.00"
  # Two recipes have the student alone; one has it after the last epoch.
  mean = np.mean(ALONE)
  assert alone["published"] == "73.09 (SimKD, best); 72.50 (RepDistiller, last)"
  assert alone["difference"] == f"{mean - 71.84:+.2f}; {mean - 72.5:+.2f}"
  assert hot["method"] == "kd (temperature=8.0)"


def test_trials_on_other_machines_and_a_seed_run_twice(tmp_path, write):
  for name, seed, epoch, age in (
    *(("0", 0, 5, 2), ("1", 1, 4, 3), ("again", 0, 3, 1)),
  ):
    best = {"top1": 21.0, "top5": 90.0, "ce": 1.5, "epoch": epoch}
    more = {"hardware": f"{seed + 1} x GPU", "best": best}
    write(tmp_path / name, 20.0, seed=seed, **more, age=age)
  (line,) = accuracy_of(tmp_path)
  assert line["top-1, best epoch"].endswith("(4-5)")
  assert line["hardware"] == "1 x GPU; 2 x GPU"
  # Of the lowest seed, though it is the younger; the older of the same seed.
  assert (line["run"], line["n"]) == ("0", "2")


def taught_by(*fingerprints, name="resnet32x4"):
  """A run's teacher of these weights; of several, a list."""
  entries = [{"name": name, "fingerprint": f} for f in fingerprints]
  return {"method": "kd", "teacher": entries if entries[1:] else entries[0]}


@pytest.mark.parametrize(
  ("one", "other"), [([10], [11]), ([10, 11], [10, 12]), ([10, 11], [11, 10])]
)
def test_runs_of_other_teachers_are_no_trials(tmp_path, write, one, other):
  """Their configs are the same: a checkpoint is no part of what a run is."""
  write(tmp_path / "a", 20.0, **taught_by(*one))
  write(tmp_path / "b", 30.0, seed=0, **taught_by(*other))
  write(tmp_path / "c", 31.0, seed=2, **taught_by(*other))
  groups = grouped(tmp_path)
  found = [[row["run"] for row in g.rows] for g in groups]
  assert found == [["a"], ["b", "c"]]
  names = [" + ".join(f"resnet32x4 {f:08x}" for f in fs) for fs in (one, other)]
  assert [g.label for g in groups] == [f"kd (teacher={n})" for n in names]
  (panel,) = report.panels(groups).values()
  assert [len(trials) for trials in panel.values()] == [1, 2]


def test_labels_have_what_varies_in_one_order(tmp_path, write):
  teachers = [("resnet32x4", 10)] * 3 + [("vgg13", 10), ("vgg13", None)]
  for number, (name, fingerprint) in enumerate(teachers):
    fields = taught_by(fingerprint, name=name)
    if fingerprint is None:
      del fields["teacher"]["fingerprint"]
    distiller = {"name": "kd", "temperature": float(number)}
    config = {"distiller": distiller, "epochs": 9 if number == 2 else 240}
    fields |= {"changes": {**config, "teacher": {"name": name}}}
    write(tmp_path / str(number), 20.0, age=-number, **fields)
  write(tmp_path / "alone", 10.0, age=-8)
  write(tmp_path / "other", 20.0, student="vgg8", age=-9, **taught_by(10))
  groups = grouped(tmp_path)
  assert [g.label for g in groups] == [
    "kd (teacher=resnet32x4, temperature=0.0, epochs=240)",
    "kd (teacher=resnet32x4, temperature=1.0, epochs=240)",
    "kd (teacher=resnet32x4, temperature=2.0, epochs=9)",
    "kd (teacher=vgg13 0000000a, temperature=3.0)",
    "kd (teacher=vgg13, temperature=4.0)",
    "none",
    "kd",
  ]
  assert len(report.panels(groups)["resnet8x4, cifar100"]) == 6


def test_csv_has_every_number(runs):
  lines = list(csv.DictReader(io.StringIO(tables.csv(grouped(runs)))))
  runs_in_order = [line["run"] for line in lines]
  assert runs_in_order == ["teachers/x", "alone", "kd", "hot"]
  alone, mean = lines[1], np.mean(ALONE)
  for name, expected in (
    ("top1_last_mean", mean),
    ("top1_last_std", np.std(ALONE, ddof=1)),
    ("top1_best_mean", mean + 1.25),
    ("seconds_mean", 11.0),
  ):
    assert float(alone[name]) == pytest.approx(expected), name
  assert (alone["n"], alone["seeds"]) == ("3", "0 1 2")
  assert alone["best_epochs"] == "2 2 2"
  assert alone["published"] == "73.09; 72.5"
  first = float(alone["difference"].split(";")[0])
  assert first == pytest.approx(mean + 1.25 - 73.09)
  assert lines[3]["top1_last_std"] == ""


@pytest.mark.parametrize(
  ("a", "b", "verdict"),
  [
    ((75.0, 75.5, 75.2), (70.0, 71.0, 70.5, 70.2), "better"),
    ((20.0, 22.0), (18.5, 22.5), "not told apart"),
    ((1.0,), (1.0, 2.0), "no test: one trial"),
    ((1.0, 1.0), (0.0, 0.0), "no test: no spread"),
    ((1.0, 2.0), (0.0, math.nan), "no test: not finite"),
  ],
)
def test_verdict_of_welch(a, b, verdict):
  found = statistics.welch(np.array(a), np.array(b))
  numbers = ["-"] * 3
  if not verdict.startswith("no test"):
    test = stats.ttest_ind(a, b, equal_var=False)
    numbers = [f"{test.statistic:.2f}", f"{test.df:.1f}", f"{test.pvalue:.2g}"]
  assert [*found.values()] == [*numbers, verdict]


def test_comparison_is_with_the_best(runs, write):
  write(runs / "nan", math.nan, changes={"epochs": 5}, age=-1)
  compared = lines_of(report.text(grouped(runs)).split("\n\n")[2])
  assert {line["best"] for line in compared} == {"kd (temperature=4.0)"}
  found = {x["against"]: (x["difference"], x["verdict"]) for x in compared}
  assert found == {
    "none (epochs=240)": (f"{np.mean(KD) - np.mean(ALONE):+.2f}", "better"),
    "kd (temperature=8.0)": ("+14.08", "no test: one trial"),
    "none (epochs=5)": ("+nan", "no test: not finite"),
  }


@pytest.mark.parametrize(
  ("name", "content", "problem"),
  [
    ("result.json", '{"final": {', "result.json: expected JSON, got a file"),
    ("result.json", "[]", "result.json: expected `object`, got `array`"),
    ("config.json", None, "expected config.json beside result.json"),
    ("metrics.jsonl", None, "expected metrics.jsonl beside result.json"),
    ("metrics.jsonl", '{"step"\n{}\n', "metrics.jsonl, line 1: expected JSON"),
    ("metrics.jsonl", '{"step": 1, "kind": "eval"}', "missing required field"),
  ],
)
def test_a_damaged_run_is_left_out_and_named(
  runs, monkeypatch, caplog, name, content, problem
):
  path = runs / "hot" / name
  path.unlink() if content is None else path.write_text(content)
  monkeypatch.setattr(report, "write", lambda *arguments: [])
  text, _ = report.write_report(runs)
  assert str(runs / "hot") in caplog.text and problem in caplog.text
  accuracy, *_, damaged = [p for p in text.split("\n\n") if p[:1] == "|"]
  assert [x["run"] for x in lines_of(accuracy)] == ["teachers/x", "alone", "kd"]
  assert [x["run"] for x in lines_of(damaged)] == ["hot"]
  assert problem in damaged
  with pytest.raises(ValueError, match=re.escape(problem)):
    report.write_report(runs / "hot")  # nothing else to report


def test_nothing_to_report(runs, run_main, capsys, monkeypatch):
  for name in ("unfinished", "nothing"):
    assert run_main(command, runs / name) == 2
    error = capsys.readouterr().err
    assert f"{runs / name}: expected finished runs (result.json)" in error
  shutil.copytree(runs / "hot", runs / "hparams")
  assert run_main(command, runs) == 2
  assert str(runs / "hparams") in capsys.readouterr().err
  monkeypatch.setattr(reporting, "_PACKAGES", ("no_such_package",))
  assert run_main(command, runs) == 2
  error = capsys.readouterr().err
  assert error == (
    "a report needs no_such_package: pip install 'kd_jax[report]'\n"
  )
  assert not (runs / "table.md").exists()


def test_the_command_writes_the_same_again(runs, run_main, capsys):
  assert run_main(command, runs) == 0
  out = capsys.readouterr().out
  text = (runs / "table.md").read_text()
  assert out == text + "\n" + "".join(f"{runs / name}\n" for name in FILES)
  with Image.open(runs / "curves.png") as image:
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
  # A line of each group's colour has been drawn.
  for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
    assert (pixels == colour).all(1).sum() > 100
  before = contents(runs)
  assert run_main(command, runs, "--to", runs) == 0
  assert contents(runs) == before


@pytest.mark.parametrize("size", [100, 20_000])  # bytes of the largest file
def test_a_full_disk_leaves_no_draft(runs, tmp_path, run_main, capsys, size):
  to, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    assert run_main(command, runs, "--to", to) == 1
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and f"File too large: '{to}/" in error
  assert not [*to.rglob("*.draft")]
  assert run_main(command, runs, "--to", to) == 0
  assert sorted(path.name for path in to.iterdir()) == sorted(FILES)


def test_names_are_neither_formulas_nor_markup(tmp_path, write):
  names = ("=1+1", "<script>alert(1)</script>", "a|b", "$x$", "@a", "-1")
  for name in names:
    student = name.replace("/", "")
    write(tmp_path / "runs" / student, 70.0, student=student, hardware=name)
  text, _ = report.write_report(tmp_path / "runs", tmp_path)
  assert "<script" not in text and r"a\|b" in text
  assert "<script" not in (tmp_path / "report.html").read_text()
  lines = csv.reader(io.StringIO((tmp_path / "table.csv").read_text()))
  cells = [cell for line in lines for cell in line]
  assert "'=1+1" in cells and "'@a" in cells
  assert not [cell for cell in cells if cell[:1] in ("=", "@", "+")]


def test_page_is_well_formed_and_needs_no_other_file(runs, pairs, tmp_path):
  report.write(runs_lib.collect(runs), tmp_path, pairs)
  page = (tmp_path / "report.html").read_text()
  assert page.count("<?xml") == 0 and page.count("<!DOCTYPE") == 1
  root = ElementTree.fromstring(page)
  xhtml, svg = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
  assert not list(root.iter(f"{xhtml}script"))
  # Links are to the page's own parts, each of its own name.
  ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
  assert ids and len(ids) == len(set(ids))
  for element in root.iter():
    for name, value in element.attrib.items():
      parts = re.findall(r"url\((.*?)\)", value)
      if name.rpartition("}")[2] in ("href", "src", "srcset", "data"):
        parts.append(value)
      for part in parts:
        if not part.startswith("data:image/png;base64,"):
          assert part[:1] == "#" and part[1:] in ids, (element.tag, name)
  styles = [e.text for e in root.iter() if e.tag.endswith("}style")]
  assert not any("@import" in text or "url(" in text for text in styles)
  cells = [cell.text for cell in root.iter(f"{xhtml}td")]
  table = accuracy_of(runs)
  assert cells[: 13 * 4] == [cell for line in table for cell in line.values()]
  number = cells.index("85.00 ± 7.07")
  assert cells[number - 2 : number + 2] == [
    *("kd", "2", "85.00 ± 7.07", "0.2500 ± 0.0000")
  ]
  titles = [title.text for title in root.iter(f"{xhtml}h2")]
  drawings = list(root.iter(f"{svg}svg"))
  assert all(drawing.attrib["role"] == "img" for drawing in drawings)
  assert titles == [
    *("Accuracy", "Comparison", "Student and teacher"),
    *(drawing.attrib["aria-label"] for drawing in drawings),
  ]
  for name in ("agreement", "correlations", "features"):
    with Image.open(tmp_path / f"{name}.png") as image:
      assert image.format == "PNG"
