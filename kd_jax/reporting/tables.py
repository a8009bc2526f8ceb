"""Tables of runs as Markdown and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kd_jax.reporting import analysis, html, published, runs, statistics

# The p below which one mean is called better than another.
_LEVEL = 0.05


_HEADER = (
  *("run", "teacher", "network", "method", "n"),
  *("top-1, last epoch", "top-1, best epoch", "published", "difference"),
  *("cross-entropy, last epoch", "parameters", "seconds", "hardware"),
)


# Those that hold numbers.
_RIGHT = {4, 5, 6, 7, 8, 9, 10, 11}


_NOTE = (
  "Mean ± sample standard deviation over n trials, which differ in their seed"
  " alone. Top-1 in percent of the test set; the best epoch (its number in"
  " brackets) was chosen on the test set. A published value is compared with"
  " the epoch that is named with it. Cross-entropy in nats. Parameters of the"
  " network, + those that the method adds while it trains. Seconds are the mean"
  " of a run's."
)


def _cells(groups: Sequence[runs.Group]) -> list[list[str]]:
  cells = []
  for g in groups:
    epochs = sorted({row["best"]["epoch"] for row in g.rows})
    span = f"{epochs[0]}-{epochs[-1]}" if len(epochs) > 1 else f"{epochs[0]}"
    extra = g.first["distiller_parameters"]
    values = published.find(g.first["config"])
    cells.append(
      [
        g.first["run"],
        g.teacher or "-",
        g.first["student"],
        g.label,
        str(len(g.rows)),
        runs.mean_std(g.values("final", "top1"), 2),
        f"{runs.mean_std(g.values('best', 'top1'), 2)} ({span})",
        "; ".join(f"{v.top1:.2f} ({_words(v)})" for v in values) or "-",
        "; ".join(f"{_difference(g, v):+.2f}" for v in values) or "-",
        runs.mean_std(g.values("final", "ce"), 4),
        f"{g.first['parameters']:,}" + (f" + {extra:,}" if extra else ""),
        f"{np.mean([row['seconds'] for row in g.rows]):.1f}",
        _hardware(g),
      ]
    )
  return cells


def _words(value):
  return f"{value.source}, {'last' if value.epoch == 'final' else value.epoch}"


def _difference(g, value):
  return g.values(value.epoch, "top1").mean() - value.top1


def _hardware(g):
  return "; ".join(dict.fromkeys(row["hardware"] for row in g.rows))


def table(rows: Iterable[dict[str, Any]]) -> str:
  """The Markdown table of rows that `collect` made, a line for each group."""
  return _table(runs.group(rows)).markdown()


def _table(groups):
  return html.Table(_HEADER, _cells(groups), _RIGHT)


def table_of(groups: Sequence[runs.Group], columns: Sequence[str]) -> str:
  """A Markdown table of some columns, without those that nothing is in.

  Args:
    groups: a line for each.
    columns: of the full table's header, in the order to write them.
  """
  cells = _cells(groups)
  places = [
    place
    for place in map(_HEADER.index, columns)
    if any(line[place] != "-" for line in cells)
  ]
  return html.Table(
    [_HEADER[place] for place in places],
    [[line[place] for place in places] for line in cells],
    {i for i, place in enumerate(places) if place in _RIGHT},
  ).markdown()


_COMPARED = (
  *("data", "network", "best", "against", "difference", "t"),
  *("degrees of freedom", "p", "verdict"),
)


_COMPARED_RIGHT = {4, 5, 6, 7}


_COMPARED_NOTE = (
  "The method of the highest top-1 after the last epoch against every other of"
  f" the same network: Welch's t-test, two-sided; better means p < {_LEVEL},"
  " which is not corrected for the number of comparisons."
)


def _comparisons(groups: Sequence[runs.Group]) -> list[list[str]]:
  students = [g for g in groups if not g.is_teacher]
  lines = []
  for task in dict.fromkeys(g.task for g in students):
    rivals = [g for g in students if g.task == task]
    best = max(rivals, key=lambda g: g.values("final", "top1").mean())
    ours = best.values("final", "top1")
    for other in rivals:
      if other is best:
        continue
      theirs = other.values("final", "top1")
      test, numbers = statistics.welch(ours, theirs), ["-"] * 3
      if test is not None:
        numbers = [f"{test.t:.2f}", f"{test.degrees:.1f}", f"{test.p:.2g}"]
        verdict = "better" if test.p < _LEVEL else "not told apart"
      elif min(len(ours), len(theirs)) < 2:
        verdict = "no test: one trial"
      else:
        verdict = "no test: no spread"
      lines.append(
        [
          *task,
          best.label,
          other.label,
          f"{ours.mean() - theirs.mean():+.2f}",
          *numbers,
          verdict,
        ]
      )
  return lines


def _csv(groups: Sequence[runs.Group]) -> str:
  lines = []
  for g in groups:
    line: dict[str, Any] = {
      "run": g.first["run"],
      "data": g.task[0],
      "teacher": g.teacher,
      "student": g.first["student"],
      "method": g.label,
      "n": len(g.rows),
      "seeds": " ".join(str(row["seed"]) for row in g.rows),
    }
    for epoch, word in (("final", "last"), ("best", "best")):
      for name in ("top1", "top5", "ce"):
        values = g.values(epoch, name)
        line[f"{name}_{word}_mean"] = values.mean()
        std = values.std(ddof=1) if len(values) > 1 else ""
        line[f"{name}_{word}_std"] = std
    line["best_epochs"] = " ".join(str(row["best"]["epoch"]) for row in g.rows)
    found = published.find(g.first["config"])
    line["published"] = "; ".join(f"{v.top1}" for v in found)
    line["published_by"] = "; ".join(_words(v) for v in found)
    line["difference"] = "; ".join(f"{_difference(g, v)}" for v in found)
    line["parameters"] = g.first["parameters"]
    line["distiller_parameters"] = g.first["distiller_parameters"]
    line["seconds_mean"] = float(np.mean([row["seconds"] for row in g.rows]))
    line["hardware"] = _hardware(g)
    lines.append(line)
  file = io.StringIO()
  writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(lines)
  return file.getvalue()


Pairs = Mapping[tuple[str, str, str], analysis.Pair]


_ANALYSED = (
  *("data", "network", "teacher", "method", "n", "agreement"),
  "difference of correlations",
)


_ANALYSED_RIGHT = {4, 5, 6}


_ANALYSED_NOTE = (
  "Of the weights that a run exports, those of its best epoch, on the test set."
  " Agreement: the share of images, in percent, for which student and teacher"
  " name the same class. Difference of correlations: each two classes' logits"
  " have a correlation over the images; the student's less the teacher's, its"
  " absolute value, mean over all pairs. A student alone (none) is compared"
  " with the teacher of the others."
)


def _analysed(pairs: Pairs) -> list[list[str]]:
  return [
    [
      *task,
      label,
      str(len(student.agreement)),
      runs.mean_std(student.agreement, 2),
      runs.mean_std(student.distances, 4),
    ]
    for task, pair in pairs.items()
    for label, student in pair.students.items()
  ]
