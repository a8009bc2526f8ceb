"""What figures show of runs and of analyses."""

import json
import math
import warnings

import matplotlib.figure
import numpy as np
import pytest

from kd_jax.reporting import figures as figures_lib
from kd_jax.reporting import report
from kd_jax.reporting import runs as runs_lib


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
  groups = runs_lib.group(runs_lib.collect(folder))
  return figures_lib.curves, report.panels(groups)


def test_figures_of_an_analysis(pairs, drawn):
  titled = dict.fromkeys(("one", "two"), next(iter(pairs.values())))
  students = ["none", "kd", "simkd (factor=2)"]
  for axes in drawn(figures_lib.agreement, titled).axes:
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert shown == students and axes.get_title() in titled
    lines = [np.ravel(line.get_xdata()).tolist() for line in axes.lines]
    assert lines == [[70.0], [80.0, 90.0], [85.0], [95.0]]
  figure = drawn(figures_lib.correlations, titled)
  maps = [axes for axes in figure.axes if axes.images]
  assert [axes.get_title() for axes in maps] == 2 * [
    f"{name}\nmean {0.25 * i:.3f}" for i, name in enumerate(students)
  ]
  assert {axes.images[0].get_clim() for axes in maps} == {(0.0, 0.5)}
  figure = drawn(figures_lib.embeddings, titled)
  titles = [axes.get_title() for axes in figure.axes]
  assert titles == 2 * ["teacher resnet32x4", *students]
  for axes in figure.axes:
    looks = {
      (tuple(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes())
      for dots in axes.collections
    }
    assert len({colour for colour, _ in looks}) == len(looks) == 7
  for part in figure.subfigs:
    names = [text.get_text() for text in part.legends[0].get_texts()]
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
    # Of the two groups of three trials; their standard deviation is 1.
    assert len(axes.collections) == 2
    for band in axes.collections:
      at_1 = [y for x, y in band.get_paths()[0].vertices if x == 1]
      assert max(at_1) - min(at_1) == pytest.approx(2.0)
  assert left.get_yscale() == "log"
  ticks = left.yaxis.get_major_formatter().format_ticks([0.01, 0.1, 1, 10])
  assert ticks == ["0.01", "0.1", "1", "10"]
  assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_panels(runs, drawn, write):
  write(runs / "v_kd", 70.0, student="vgg8", method="kd", age=2)
  write(runs / "v", 70.0, student="vgg8", age=1, evals=1)
  more = {"student": "resnet32x4", "age": -1}
  write(runs / "teachers" / "y", 60.0, changes={"epochs": 9}, **more)
  data = {"data": {"name": "cifar10"}}
  write(runs / "teachers" / "z", 90.0, changes=data, **more)
  figure = drawn(*curves(runs))
  first, second = [
    {x.get_label(): (x.get_color(), x.get_linestyle()) for x in axes.lines}
    for axes in figure.axes[::2]
  ]
  titles = [axes.get_title() for axes in figure.axes[::2]]
  assert titles == ["resnet8x4, cifar100", "vgg8, cifar100"]
  # Every teacher of its own network and data.
  assert [*first][:2] == [
    "teacher resnet32x4, none (epochs=240)",
    "teacher resnet32x4, none (epochs=9)",
  ]
  # A method looks the same in every panel; one evaluation is a dot.
  assert set(second) == {"none", "kd"} and first["none"] == second["none"]
  dots = {x.get_label(): x.get_marker() for x in figure.axes[2].lines}
  assert dots == {"none": "o", "kd": ""}
  figure = drawn(*curves(runs / "teachers" / "x"))
  assert figure.axes[0].get_title() == "resnet32x4, cifar100"


def test_many_long_labels_stay_apart_and_inside(tmp_path, write, drawn):
  for i in range(14):
    milestones = list(range(i, i + 40))
    write(
      tmp_path / str(i), 20.0, changes={"optim": {"milestones": milestones}}
    )
  figure = drawn(*curves(tmp_path))
  figure.draw_without_rendering()
  box, whole = figure.legends[0].get_window_extent(), figure.bbox
  assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0
  styles = {(x.get_color(), x.get_linestyle()) for x in figure.axes[0].lines}
  assert len(styles) == 14


@pytest.mark.parametrize("worst", [5.0, math.nan, None])
def test_odd_cross_entropies_are_drawn(tmp_path, write, worst):
  """A band below zero on a log axis, and a run that has diverged."""
  for seed, ce in enumerate((0.001, worst)):
    write(tmp_path / str(seed), 20.0, seed=seed)
    line = {"step": 1, "kind": "eval", "epoch": 1, "ce": ce, "top1": 1.0}
    (tmp_path / str(seed) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    report.write_report(tmp_path)
