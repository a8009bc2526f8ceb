"""Tables, figures and pages from the folders of finished runs."""

import csv
import io
import json
import math
import re
import shutil
import socket
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from kd_jax.cli import report as command
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
    alone = {"seed": seed, "seconds": 10.0 + seed, "age": 20}
    write(folder / f"alone{name}", ALONE[seed], **alone)
    write(folder / f"kd{name}", KD[seed], seed=seed, **kd, age=9)
  hot = {"distiller": {"name": "kd", "temperature": 8.0}}
  write(folder / "hot", 60.0, **kd, age=1, changes=hot)
  wide = {"student": "resnet32x4", "parameters": 7}
  write(folder / "teachers" / "x", 79.0, **wide, age=0, evals=4)
  unfinished = folder / "unfinished"
  unfinished.mkdir()
  (unfinished / "config.json").write_text("{}")
  return folder


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
  for name, seed, epoch in (("0", 0, 5), ("1", 1, 4), ("again", 0, 3)):
    best = {"top1": 21.0, "top5": 90.0, "ce": 1.5, "epoch": epoch}
    more = {"hardware": f"{seed + 1} x GPU", "best": best}
    age = {"0": 2, "1": 3, "again": 1}[name]
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


def test_csv_has_every_number(runs, tmp_path):
  report.write_report(runs, tmp_path / "out")
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
  text = report.text(grouped(runs))
  compared = lines_of(text.split("\n\n")[2])
  assert {line["best"] for line in compared} == {"kd (temperature=4.0)"}
  against = {line["against"]: line for line in compared}
  assert [*against] == [
    *("none (epochs=240)", "kd (temperature=8.0)", "none (epochs=5)")
  ]
  alone, hot, nan = against.values()
  assert alone["difference"] == f"{np.mean(KD) - np.mean(ALONE):+.2f}"
  assert alone["verdict"] == "better"
  assert hot["verdict"] == "no test: one trial"
  assert (nan["difference"], nan["verdict"]) == ("+nan", "no test: not finite")


def test_mistakes(runs, run_main, capsys):
  for name in ("unfinished", "nothing"):
    assert run_main(command, runs / name) == 2
    error = capsys.readouterr().err
    assert f"{runs / name}: expected finished runs (result.json)" in error
  for name in ("config.json", "metrics.jsonl"):
    kept = (runs / "hot" / name).rename(runs / "kept")
    assert run_main(command, runs) == 2
    error = capsys.readouterr().err
    assert f"{runs / 'hot'}: expected {name} beside result.json" in error
    kept.rename(runs / "hot" / name)
  shutil.copytree(runs / "hot", runs / "hparams")
  assert run_main(command, runs) == 2
  assert str(runs / "hparams") in capsys.readouterr().err
  assert not (runs / "table.md").exists()


FILES = [
  *("table.md", "table.csv", "curves.png", "curves.svg", "report.html"),
  "hparams",
]


def test_command_line(runs, tmp_path, run_main, capsys):
  to = tmp_path / "out"
  assert run_main(command, runs, "--to", to) == 0
  out = capsys.readouterr().out
  text = (to / "table.md").read_text()
  assert out == text + "\n" + "".join(f"{to / name}\n" for name in FILES)
  assert sorted(path.name for path in to.iterdir()) == sorted(FILES)
  with Image.open(to / "curves.png") as image:
    assert image.format == "PNG"
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
  # A line of each group's colour has been drawn.
  for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
    assert (pixels == colour).all(1).sum() > 100


def test_beside_the_runs_the_same_again(runs, run_main, capsys):
  def contents():
    files = [p for p in runs.rglob("*") if p.is_file()]
    return {p: p.read_bytes() for p in files if "hparams" not in p.parts}

  assert run_main(command, runs) == 0
  assert all((runs / name).exists() for name in FILES)
  before = contents()
  assert run_main(command, runs) == 0
  assert contents() == before


def test_containers_of_two_machines_write_at_once(runs, tmp_path, monkeypatch):
  """They may have the same process id."""
  real, to = report.html.write, tmp_path / "out"

  def interrupt(*arguments):
    monkeypatch.setattr(report.html, "write", real)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    report.write_report(runs, to)
    monkeypatch.undo()
    return real(*arguments)

  monkeypatch.setattr(report.html, "write", interrupt)
  assert report.write_report(runs, to)[1] == [to / name for name in FILES]
  assert sorted(path.name for path in to.iterdir()) == sorted(FILES)


@pytest.fixture
def pairs():
  """A teacher with three students of ten classes, one of them in two trials."""
  rng = np.random.default_rng(0)
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
  labels, names = np.repeat(np.arange(7), 5), {k: f"<{k}>" for k in range(7)}
  points = rng.normal(size=(35, 2))
  pair = analysis.Pair("resnet32x4", points, labels, names, students)
  return {("cifar100", "resnet8x4", "resnet32x4"): pair}


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
  assert "better" in cells
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


@pytest.fixture
def drawn(monkeypatch):
  """drawn(draw, content) -> the figure that a function would save."""
  figures = []
  monkeypatch.setattr(
    matplotlib.figure.Figure, "savefig", lambda f, *a, **k: figures.append(f)
  )

  def draw(function, content):
    function(content)
    return figures[-1]

  return draw


def curves(folder):
  return figures_lib.curves, report.panels(grouped(folder))


def test_figures_of_an_analysis(pairs, drawn):
  titled = dict.fromkeys(("one", "two"), next(iter(pairs.values())))
  agreement = drawn(figures_lib.agreement, titled)
  assert [axes.get_title() for axes in agreement.axes] == ["one", "two"]
  for axes in agreement.axes:
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert shown == ["none", "kd", "simkd (factor=2)"]
    lines = [np.ravel(line.get_xdata()).tolist() for line in axes.lines]
    assert lines == [[70.0], [80.0, 90.0], [85.0], [95.0]]
  correlations = drawn(figures_lib.correlations, titled)
  maps = [axes for axes in correlations.axes if axes.images]
  assert [axes.get_title() for axes in maps] == 2 * [
    *("none\nmean 0.000", "kd\nmean 0.250", "simkd (factor=2)\nmean 0.500")
  ]
  assert {axes.images[0].get_clim() for axes in maps} == {(0.0, 0.5)}
  features = drawn(figures_lib.embeddings, titled)
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
  figure = drawn(*curves(runs))
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
    assert axes.get_title() == "resnet8x4, cifar100"
    # Of the two groups of three trials; their standard deviation is 1.
    assert len(axes.collections) == 2
    for band in axes.collections:
      at_1 = [y for x, y in band.get_paths()[0].vertices if x == 1]
      assert max(at_1) - min(at_1) == pytest.approx(2.0)
  assert left.get_yscale() == "log"
  ticks = left.yaxis.get_major_formatter().format_ticks([0.01, 0.1, 1, 10])
  assert ticks == ["0.01", "0.1", "1", "10"]
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == names


def test_panels(runs, drawn, write):
  write(runs / "v_kd", 70.0, student="vgg8", method="kd", age=2)
  write(runs / "v", 70.0, student="vgg8", age=1, evals=1)
  more = {"student": "resnet32x4", "age": -1}
  write(runs / "teachers" / "y", 60.0, changes={"epochs": 9}, **more)
  data = {"data": {"name": "cifar10"}}
  write(runs / "teachers" / "z", 90.0, changes=data, **more)
  figure = drawn(*curves(runs))
  panels = [
    {x.get_label(): (x.get_color(), x.get_linestyle()) for x in axes.lines}
    for axes in figure.axes[::2]
  ]
  titles = [axes.get_title() for axes in figure.axes[::2]]
  assert titles == ["resnet8x4, cifar100", "vgg8, cifar100"]
  # Every teacher of its own network and data.
  assert [*panels[0]][:2] == [
    "teacher resnet32x4, none (epochs=240)",
    "teacher resnet32x4, none (epochs=9)",
  ]
  # A method looks the same in every panel; one evaluation is a dot.
  assert set(panels[1]) == {"none", "kd"}
  assert panels[0]["none"] == panels[1]["none"]
  dots = {x.get_label(): x.get_marker() for x in figure.axes[2].lines}
  assert dots == {"none": "o", "kd": ""}
  figure = drawn(*curves(runs / "teachers" / "x"))
  assert figure.axes[0].get_title() == "resnet32x4, cifar100"


def test_many_long_labels_stay_apart_and_inside(tmp_path, write, monkeypatch):
  for i in range(14):
    milestones = list(range(i, i + 40))
    write(
      tmp_path / str(i), 20.0, changes={"optim": {"milestones": milestones}}
    )
  inside = []

  def look(figure, *arguments, **options):
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    inside.append(box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0)
    styles = {(x.get_color(), x.get_linestyle()) for x in figure.axes[0].lines}
    assert len(styles) == 14

  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", look)
  draw, panels = curves(tmp_path)
  draw(panels)
  assert inside == [True, True]


@pytest.mark.parametrize("worst", [5.0, math.nan])
def test_odd_cross_entropies_are_drawn(tmp_path, write, worst):
  """A band below zero on a log axis, and a run that has diverged."""
  for seed, ce in enumerate((0.001, worst)):
    write(tmp_path / str(seed), 20.0, seed=seed)
    line = {"step": 1, "kind": "eval", "epoch": 1, "ce": ce, "top1": 1.0}
    (tmp_path / str(seed) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    report.write_report(tmp_path)
