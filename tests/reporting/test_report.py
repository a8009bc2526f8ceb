"""Tables, figures and pages from the folders of finished runs."""

import csv
import io
import json
import pathlib
import re
import socket
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from kd_jax.reporting import analysis, report, statistics, tables
from kd_jax.reporting import figures as figures_lib
from kd_jax.reporting import runs as runs_lib

ALONE = (70.0, 70.5, 71.75)
KD = (74.0, 74.25, 74.0)


@pytest.fixture
def runs(tmp_path, write):
  """Three trials alone and with KD, one of another temperature, a teacher."""
  folder = tmp_path / "runs"
  teacher = {"name": "resnet32x4", "checkpoint": "x"}
  kd = {"method": "kd", "teacher": teacher, "distiller_parameters": 1234}
  for seed in range(3):
    name = f"_seed{seed}" if seed else ""
    seconds = 10.0 + seed
    write(
      folder / f"alone{name}", ALONE[seed], seed=seed, seconds=seconds, age=20
    )
    write(folder / f"kd{name}", KD[seed], seed=seed, **kd, age=9)
  hot = {"distiller": {"name": "kd", "temperature": 8.0}}
  write(folder / "hot", 60.0, **kd, age=1, changes=hot)
  wide = {"student": "resnet32x4", "parameters": 7}
  write(folder / "teachers" / "x", 79.0, **wide, age=0, evals=4)
  unfinished = folder / "unfinished"
  unfinished.mkdir()
  (unfinished / "config.json").write_text("{}")
  return folder


def lines_of(markdown):
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in markdown.splitlines()
  ]
  return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_table_is_of_trials(runs):
  lines = lines_of(tables.table(runs_lib.collect(runs)))
  assert [line["run"] for line in lines] == [
    *("teachers/x", "alone", "kd", "hot")
  ]
  kd = lines[2]
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
  assert (lines[0]["method"], lines[0]["n"]) == ("none", "1")
  assert lines[0]["top-1, last epoch"] == "79.00"
  # Two tables have the student alone; one has it after the last epoch.
  alone = np.mean(ALONE)
  assert lines[1]["published"] == (
    "73.09 (SimKD, best); 72.50 (RepDistiller, last)"
  )
  assert lines[1]["difference"] == f"{alone - 71.84:+.2f}; {alone - 72.5:+.2f}"
  assert lines[1]["seconds"] == "11.0"
  assert lines[3]["method"] == "kd (temperature=8.0)"


def test_best_epochs_and_hardware_of_all_trials(tmp_path, write):
  for seed in range(2):
    best = {"top1": 21.0, "top5": 90.0, "ce": 1.5, "epoch": 5 - seed}
    more = {"hardware": f"{seed + 1} x GPU", "best": best}
    write(tmp_path / str(seed), 20.0, seed=seed, **more, age=seed)
  (line,) = lines_of(tables.table(runs_lib.collect(tmp_path)))
  assert line["top-1, best epoch"].endswith("(4-5)")
  assert line["hardware"] == "1 x GPU; 2 x GPU"
  assert line["run"] == "0"  # of the lowest seed, though it is the younger


def test_a_seed_that_was_run_twice_counts_once(tmp_path, write):
  for name in "ab":
    write(tmp_path / name, 20.0, age=ord(name))
  (one,) = runs_lib.group(runs_lib.collect(tmp_path))
  assert [row["run"] for row in one.rows] == ["b"]  # the older


def taught_by(*fingerprints, name="resnet32x4"):
  """A run's teacher of these weights; of several, a list."""
  entries = [{"name": name, "fingerprint": f} for f in fingerprints]
  return {"method": "kd", "teacher": entries if entries[1:] else entries[0]}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
  ("one", "other"), [([10], [11]), ([10, 11], [10, 12]), ([10, 11], [11, 10])]
)
def test_runs_of_other_teachers_are_no_trials(
  tmp_path, write, seed, one, other
):
  """Their configs are the same: a checkpoint is no part of what a run is."""
  write(tmp_path / "a", 20.0, **taught_by(*one))
  write(tmp_path / "b", 30.0, seed=seed, **taught_by(*other))
  write(tmp_path / "c", 31.0, seed=2, **taught_by(*other))
  groups = runs_lib.group(runs_lib.collect(tmp_path))
  found = [[row["run"] for row in g.rows] for g in groups]
  assert found == [["a"], ["b", "c"]]
  names = [" + ".join(f"resnet32x4 {f:08x}" for f in fs) for fs in (one, other)]
  assert [g.label for g in groups] == [f"kd (teacher={n})" for n in names]
  (panel,) = report.panels(groups).values()
  assert [len(trials) for trials in panel.values()] == [1, 2]


def test_teachers_of_a_task_are_in_its_labels(tmp_path, write):
  for number, (name, fingerprint) in enumerate(
    [("resnet32x4", 10), ("resnet32x4", 10), ("vgg13", 10), ("vgg13", None)]
  ):
    teacher = {"name": name}
    if fingerprint is not None:
      teacher["fingerprint"] = fingerprint
    heat = {"distiller": {"name": "kd", "temperature": float(number)}}
    fields = {"method": "kd", "teacher": teacher, "changes": heat}
    write(tmp_path / str(number), 20.0, age=-number, **fields)
  write(tmp_path / "alone", 10.0, age=-8)
  write(tmp_path / "other", 20.0, student="vgg8", age=-9, **taught_by(10))
  groups = runs_lib.group(runs_lib.collect(tmp_path))
  assert [g.label for g in groups] == [
    "kd (teacher=resnet32x4, temperature=0.0)",
    "kd (teacher=resnet32x4, temperature=1.0)",
    "kd (teacher=vgg13 0000000a, temperature=2.0)",
    "kd (teacher=vgg13, temperature=3.0)",
    "none",
    "kd",
  ]
  panels = report.panels(groups)
  assert len(panels["resnet8x4, cifar100"]) == 5


def test_every_teacher_of_a_network_is_drawn(runs, write):
  more = {"student": "resnet32x4", "age": -1}
  write(runs / "teachers" / "y", 60.0, changes={"epochs": 9}, **more)
  data = {"data": {"name": "cifar10"}}
  write(runs / "teachers" / "z", 90.0, changes=data, **more)
  panels = report.panels(runs_lib.group(runs_lib.collect(runs)))
  assert [*panels["resnet8x4, cifar100"]][:2] == [
    "teacher resnet32x4, none (epochs=240)",
    "teacher resnet32x4, none (epochs=9)",
  ]


def test_csv_has_every_number(runs, tmp_path):
  report.write(runs, tmp_path / "out")
  text = (tmp_path / "out" / "table.csv").read_text()
  lines = list(csv.DictReader(io.StringIO(text)))
  assert [line["run"] for line in lines] == [
    *("teachers/x", "alone", "kd", "hot")
  ]
  alone = lines[1]
  assert float(alone["top1_last_mean"]) == pytest.approx(np.mean(ALONE))
  std = np.std(ALONE, ddof=1)
  assert float(alone["top1_last_std"]) == pytest.approx(std)
  assert float(alone["top1_best_mean"]) == pytest.approx(np.mean(ALONE) + 1.25)
  assert (alone["n"], alone["seeds"]) == ("3", "0 1 2")
  assert alone["best_epochs"] == "2 2 2"
  assert float(alone["seconds_mean"]) == 11.0
  assert alone["published"] == "73.09; 72.5"
  first = float(alone["difference"].split(";")[0])
  assert first == pytest.approx(np.mean(ALONE) + 1.25 - 73.09)
  assert lines[3]["top1_last_std"] == ""


def test_welch_is_scipys():
  a, b = np.array([1.0, 2.0, 4.5]), np.array([3.0, 3.5, 3.25, 9.0])
  ours, theirs = statistics.welch(a, b), stats.ttest_ind(a, b, equal_var=False)
  assert ours.t == pytest.approx(theirs.statistic)
  assert ours.degrees == pytest.approx(theirs.df)
  assert ours.p == pytest.approx(theirs.pvalue)


def test_no_welch_without_spread_or_of_one():
  assert statistics.welch(np.array([1.0]), np.array([1.0, 2.0])) is None
  assert statistics.welch(np.ones(3), np.zeros(3)) is None


def test_better_only_with_a_test(runs):
  text = report.text(runs_lib.group(runs_lib.collect(runs)))
  compared = lines_of(text.split("\n\n")[2])
  assert [line["against"] for line in compared] == [
    "none",
    "kd (temperature=8.0)",
  ]
  assert {line["best"] for line in compared} == {"kd (temperature=4.0)"}
  test = stats.ttest_ind(KD, ALONE, equal_var=False)
  assert compared[0]["difference"] == f"{np.mean(KD) - np.mean(ALONE):+.2f}"
  assert compared[0]["t"] == f"{test.statistic:.2f}"
  assert compared[0]["p"] == f"{test.pvalue:.2g}"
  assert compared[0]["verdict"] == "better"
  assert compared[1]["p"] == "-"
  assert compared[1]["verdict"] == "no test: one trial"


def test_no_test_without_spread(tmp_path, write):
  for seed in range(2):
    write(tmp_path / f"a{seed}", 20.0, seed=seed)
    write(tmp_path / f"b{seed}", 19.0, seed=seed, changes={"epochs": 5})
  text = report.text(runs_lib.group(runs_lib.collect(tmp_path)))
  (line,) = lines_of(text.split("\n\n")[2])
  assert line["verdict"] == "no test: no spread"


def test_not_told_apart(tmp_path, write):
  for seed, (one, other) in enumerate([(20.0, 19.0), (22.0, 23.0)]):
    write(tmp_path / f"a{seed}", one, seed=seed)
    less = other - 0.5
    write(tmp_path / f"b{seed}", less, seed=seed, changes={"epochs": 5})
  text = report.text(runs_lib.group(runs_lib.collect(tmp_path)))
  (line,) = lines_of(text.split("\n\n")[2])
  assert line["best"] == "none (epochs=240)"
  assert line["verdict"] == "not told apart"


def test_a_run_is_its_own_table(runs):
  (row,) = runs_lib.collect(runs / "hot")
  assert row["run"] == "."
  assert row["method"] == "kd"


@pytest.mark.parametrize("name", ["unfinished", "nothing"])
def test_no_finished_run(runs, name, run_main, capsys):
  assert run_main(report, runs / name) == 2
  assert capsys.readouterr().err == (
    f"{runs / name}: expected finished runs (result.json) at or below it, found"
    " none. Give the --workdir of launch.py, or the folder above it\n"
  )


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_run_without_its_parts(name, runs, run_main, capsys):
  (runs / "hot" / name).unlink()
  assert run_main(report, runs) == 2
  assert capsys.readouterr().err == (
    f"{runs / 'hot'}: expected {name} beside result.json, found none. Copy"
    " it from the run, or remove this folder\n"
  )


FILES = [
  *("table.md", "table.csv", "curves.png", "curves.svg", "report.html"),
  "hparams",
]


def test_command_line(runs, tmp_path, run_main, capsys):
  to = tmp_path / "out"
  assert run_main(report, runs, "--to", to) == 0
  out = capsys.readouterr().out
  text = (to / "table.md").read_text()
  assert out == text + "\n" + "".join(f"{to / name}\n" for name in FILES)
  assert text.startswith(tables.table(runs_lib.collect(runs)))
  assert sorted(path.name for path in to.iterdir()) == sorted(FILES)
  with Image.open(to / "curves.png") as image:
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
  # A line of each group's colour has been drawn.
  for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
    assert (pixels == colour).all(1).sum() > 100


def test_command_line_writes_beside_the_runs(runs, run_main, capsys):
  assert run_main(report, runs) == 0
  assert all((runs / name).exists() for name in FILES)
  before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
  assert run_main(report, runs) == 0
  after = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
  assert after == before


def test_containers_of_two_machines_write_at_once(runs, tmp_path, monkeypatch):
  """They may have the same process id."""
  real, to = report.hparams.write, tmp_path / "out"

  def interrupt(*arguments):
    monkeypatch.setattr(report.hparams, "write", real)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    report.write(runs, to)
    real(*arguments)

  monkeypatch.setattr(report.hparams, "write", interrupt)
  assert report.write(runs, to) == [to / name for name in FILES]
  assert sorted(path.name for path in to.iterdir()) == sorted(FILES)


def needs_no_other_file(root):
  """Whether a page names nothing but its own parts, each by a name of its own.

  Returns those names.
  """
  named = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
  assert len(named) == len(set(named))
  for element in root.iter():
    for name, value in element.attrib.items():
      parts = re.findall(r"url\((.*?)\)", value)
      if name.rpartition("}")[2] in ("href", "src", "srcset", "data"):
        parts.append(value)
      for part in parts:
        if not part.startswith("data:image/png;base64,"):
          assert part[:1] == "#" and part[1:] in named, (element.tag, name)
  return named


def test_page_is_well_formed_and_needs_no_other_file(runs, tmp_path):
  report.write(runs, tmp_path)
  page = (tmp_path / "report.html").read_text()
  root = ElementTree.fromstring(page)
  xhtml, svg = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
  body = [cell.text for cell in root.iter(f"{xhtml}td")]
  table = lines_of(tables.table(runs_lib.collect(runs)))
  assert body[: 13 * 4] == [cell for line in table for cell in line.values()]
  assert "better" in body
  assert len(list(root.iter(f"{svg}svg"))) == 1
  assert not list(root.iter(f"{xhtml}script"))
  needs_no_other_file(root)
  styles = [e.text for e in root.iter() if e.tag.endswith("}style")]
  assert not any("@import" in text or "url(" in text for text in styles)
  assert page.count("<?xml") == 0 and page.count("<!DOCTYPE") == 1


@pytest.fixture
def drawn(monkeypatch):
  figures = []
  monkeypatch.setattr(
    matplotlib.figure.Figure, "savefig", lambda f, *a, **k: figures.append(f)
  )

  def draw(folder):
    panels = report.panels(runs_lib.group(runs_lib.collect(folder)))
    report.figures.curves(panels, [folder / "x.png"])
    return figures[-1]

  return draw


@pytest.fixture
def pairs():
  """A teacher with three students of ten classes, one of them in two trials."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(7), 5)
  students = {
    name: analysis.Student(
      agreement=np.array(agreement),
      distances=np.full(len(agreement), 0.25),
      difference=np.full((10, 10), 0.25 * i),
      points=rng.normal(size=(35, 2)),
    )
    for i, (name, agreement) in enumerate(
      {"none": [70.0], "kd": [80.0, 90.0], "simkd (factor=2)": [95.0]}.items()
    )
  }
  names = {k: f"<{k}>" for k in range(7)}
  points = rng.normal(size=(35, 2))
  pair = analysis.Pair("resnet32x4", points, labels, names, students)
  return {("cifar100", "resnet8x4", "resnet32x4"): pair}


def test_page_of_an_analysis(runs, pairs, tmp_path):
  report.write(runs, tmp_path, pairs)
  root = ElementTree.fromstring((tmp_path / "report.html").read_text())
  assert needs_no_other_file(root)
  drawings = list(root.iter("{http://www.w3.org/2000/svg}svg"))
  assert [drawing.attrib["aria-label"] for drawing in drawings] == [
    *("Curves", "Agreement with the teacher"),
    "Correlation of logits: difference from the teacher",
    "Features before the classifier (t-SNE)",
  ]
  assert all(drawing.attrib["role"] == "img" for drawing in drawings)
  cells = [cell.text for cell in root.iter("{http://www.w3.org/1999/xhtml}td")]
  assert (cells[cells.index("85.00 ± 7.07") - 2 :][:4]) == [
    "kd",
    "2",
    "85.00 ± 7.07",
    "0.2500 ± 0.0000",
  ]
  for name in ("agreement", "correlations", "features"):
    with Image.open(tmp_path / f"{name}.png") as image:
      assert image.format == "PNG"


def test_figures_of_an_analysis(pairs, monkeypatch):
  made = []
  monkeypatch.setattr(
    matplotlib.figure.Figure, "savefig", lambda f, *a, **k: made.append(f)
  )
  titled = {"one": next(iter(pairs.values())), "two": pairs.popitem()[1]}
  path = [pathlib.Path("x.png")]
  for draw in (
    figures_lib.agreement,
    figures_lib.correlations,
    figures_lib.embeddings,
  ):
    draw(titled, path)
  agreement, correlations, features = made
  assert [axes.get_title() for axes in agreement.axes] == ["one", "two"]
  for axes in agreement.axes:
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert shown == ["none", "kd", "simkd (factor=2)"]
    drawn = [np.ravel(line.get_xdata()).tolist() for line in axes.lines]
    assert drawn == [[70.0], [80.0, 90.0], [85.0], [95.0]]
  maps = [axes for axes in correlations.axes if axes.images]
  assert [axes.get_title() for axes in maps] == 2 * [
    *("none\nmean 0.000", "kd\nmean 0.250", "simkd (factor=2)\nmean 0.500")
  ]
  assert {axes.images[0].get_clim() for axes in maps} == {(0.0, 0.5)}
  titles = [axes.get_title() for axes in features.axes]
  assert titles == 2 * ["teacher resnet32x4", "none", "kd", "simkd (factor=2)"]
  for axes in features.axes:
    looks = {
      (tuple(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes())
      for dots in axes.collections
    }
    assert len({colour for colour, _ in looks}) == len(looks) == 7
  for part in features.subfigs:
    (legend,) = part.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [f"<{k}>" for k in range(7)]


def test_curves_are_means_of_the_evaluations(runs, drawn):
  figure = drawn(runs)
  left, right = figure.axes
  names = [
    *("teacher resnet32x4", "none"),
    *("kd (temperature=4.0)", "kd (temperature=8.0)"),
  ]
  for axes, value in ((left, lambda e: 2.0 / e), (right, lambda e: 10.0 * e)):
    assert [line.get_label() for line in axes.lines] == names
    seeds = (0, 1, 1, 0)  # the mean of 0, 1 and 2 is 1
    for line, evals, seed in zip(axes.lines, (4, 2, 2, 2), seeds, strict=True):
      epochs = list(range(1, evals + 1))
      assert line.get_xdata().tolist() == epochs
      expected = [value(e) + seed for e in epochs]
      np.testing.assert_allclose(line.get_ydata(), expected)
    assert axes.get_xlabel() == "epoch"
    assert axes.get_title() == "resnet8x4, cifar100"
    # Of the two groups of three trials; their standard deviation is 1.
    for band in axes.collections:
      ys = band.get_paths()[0].vertices[:, 1]
      at_1 = [y for x, y in band.get_paths()[0].vertices if x == 1]
      assert max(at_1) - min(at_1) == pytest.approx(2.0)
      assert np.isfinite(ys).all()
    assert len(axes.collections) == 2
  assert left.get_ylabel() == "test cross-entropy (nats)"
  assert left.get_yscale() == "log"
  assert right.get_ylabel() == "test top-1 (%)"
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == names


def test_a_method_looks_the_same_in_every_panel(runs, drawn, write):
  write(runs / "v_kd", 70.0, student="vgg8", method="kd", age=2)
  write(runs / "v", 70.0, student="vgg8", age=1)
  figure = drawn(runs)
  assert len(figure.axes) == 4
  assert figure.axes[2].get_title() == "vgg8, cifar100"
  styles = [
    {
      line.get_label(): (line.get_color(), line.get_linestyle())
      for line in figure.axes[row].lines
    }
    for row in (0, 2)
  ]
  assert set(styles[1]) == {"none", "kd"}
  assert styles[0]["none"] == styles[1]["none"]


def test_teachers_alone_are_drawn(runs, drawn):
  figure = drawn(runs / "teachers")
  assert figure.axes[0].get_title() == "resnet32x4, cifar100"


def test_one_evaluation_is_visible(tmp_path, drawn, write):
  write(tmp_path / "runs", 20.0, evals=1)
  for axes in drawn(tmp_path / "runs").axes:
    assert axes.lines[0].get_marker() not in ("None", "", None)


def test_many_methods_stay_apart(tmp_path, drawn, write):
  for i in range(14):
    changes = {"epochs": 100 + i}
    write(tmp_path / str(i), 20.0, age=i, changes=changes)
  lines = drawn(tmp_path).axes[0].lines
  styles = {(line.get_color(), line.get_linestyle()) for line in lines}
  assert len(styles) == 14


def test_no_power_of_ten_on_the_axis(runs, drawn, write):
  write(runs / "small", 70.0, changes={"epochs": 5}, evals=300)
  axes = drawn(runs).axes[0]
  labels = axes.yaxis.get_major_formatter().format_ticks([0.01, 0.1, 1, 10])
  assert labels == ["0.01", "0.1", "1", "10"]


def test_a_band_below_zero_is_drawn(tmp_path, write):
  """Of a cross-entropy that spreads more than its mean, on a log axis."""
  for seed, ce in enumerate((0.001, 5.0)):
    write(tmp_path / str(seed), 20.0, seed=seed)
    line = {"step": 1, "kind": "eval", "epoch": 1, "ce": ce, "top1": 1.0}
    (tmp_path / str(seed) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    report.write(tmp_path, tmp_path)
