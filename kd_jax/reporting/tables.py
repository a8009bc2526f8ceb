"""Tables of runs: data frames of numbers and of text, Markdown of them."""

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from kd_jax.reporting import analysis, published, runs, statistics

# Columns of words; all others hold numbers and are aligned right.
_WORDS = {
  *("run", "teacher", "network", "method", "hardware", "config"),
  *("data", "best", "against", "verdict", "problem", "student"),
}

ACCURACY_NOTE = (
  "Mean ± sample standard deviation over n trials, which differ only in their"
  " seed. Top-1 in percent of the test set; the best epoch (its number in"
  " brackets) was chosen on the test set. A published value stands beside runs"
  " of its recipe, which is named with it, and is compared with the epoch named"
  " there. Cross-entropy in nats. Parameters of the network, + those that the"
  " method adds during training. Seconds: mean time of a run."
)
COMPARISONS_NOTE = (
  "The method of the highest top-1 after the last epoch against every other of"
  " the same network. Welch's t-test, two-sided: better means p <"
  f" {statistics.LEVEL}, not corrected for the number of comparisons."
)
ANALYSIS_NOTE = (
  "Exported weights (the best epoch's) on the test set. Agreement: percentage"
  " of images for which student and teacher predict the same class. Difference"
  " of correlations: the logits of each two classes have a correlation over the"
  " images; the absolute difference of student and teacher, mean over all"
  " pairs. A student alone (none) is compared with the teacher of the others."
)

DAMAGED_NOTE = "These runs cannot be read, and are in no table or figure."


def numbers(groups: Sequence[runs.Group]) -> pd.DataFrame:
  """Every number of the accuracy table, unrounded: a line for each group.

  Args:
    groups: of `runs.group`.
  """
  lines = []
  for g in groups:
    line = {
      "run": g.first["run"],
      "data": g.task[0],
      "teacher": g.teacher,
      "student": g.first["student"],
      "method": g.label,
      "n": len(g.rows),
      "seeds": _join([row["seed"] for row in g.rows], " "),
    }
    for epoch, word in (("final", "last"), ("best", "best")):
      for name in ("top1", "top5", "ce"):
        values = pd.Series(g.values(epoch, name))
        line[f"{name}_{word}_mean"] = values.mean(skipna=False)
        line[f"{name}_{word}_std"] = values.std(skipna=False)
    found = published.find(g.first["config"])
    line |= {
      "best_epochs": _join([row["best"]["epoch"] for row in g.rows], " "),
      "published": _join(value.top1 for value in found),
      "published_by": _join(value.name for value in found),
      "difference": _join(_difference(g, value) for value in found),
      "parameters": g.first["parameters"],
      "distiller_parameters": g.first["distiller_parameters"],
      "seconds_mean": np.mean([row["seconds"] for row in g.rows]),
      "hardware": _join(dict.fromkeys(row["hardware"] for row in g.rows)),
    }
    lines.append(line)
  return pd.DataFrame(lines)


def csv(groups: Sequence[runs.Group]) -> str:
  """`numbers` as CSV; no word of it is a formula to a spreadsheet."""
  table = numbers(groups)
  for name in _WORDS & {*table.columns}:
    table[name] = table[name].str.replace(r"^(?=[=+\-@\t\r])", "'", regex=True)
  return table.to_csv(index=False)


def accuracy(groups: Sequence[runs.Group]) -> pd.DataFrame:
  """The accuracy table, as text: a line for each group.

  Args:
    groups: of `runs.group`.
  """
  lines = []
  for g in groups:
    epochs = sorted({row["best"]["epoch"] for row in g.rows})
    extra = g.first["distiller_parameters"]
    found = published.find(g.first["config"])
    best = statistics.mean_std(g.values("best", "top1"), 2)
    lines.append(
      {
        "run": g.first["run"],
        "teacher": g.teacher or "-",
        "network": g.first["student"],
        "method": g.label,
        "n": str(len(g.rows)),
        "top-1, last epoch": statistics.mean_std(g.values("final", "top1"), 2),
        "top-1, best epoch": f"{best} ({_join(_ends(epochs), '-')})",
        "published": _join(f"{v.top1:.2f} ({v.name})" for v in found) or "-",
        "difference": _join(f"{_difference(g, v):+.2f}" for v in found) or "-",
        "cross-entropy, last epoch": statistics.mean_std(
          g.values("final", "ce"), 4
        ),
        "parameters": f"{g.first['parameters']:,}"
        + (f" + {extra:,}" if extra else ""),
        "seconds": f"{np.mean([row['seconds'] for row in g.rows]):.1f}",
        "hardware": _join(dict.fromkeys(row["hardware"] for row in g.rows)),
      }
    )
  return pd.DataFrame(lines)


def _join(parts, between="; "):
  return between.join(str(part) for part in parts)


def _ends(values):
  return dict.fromkeys((values[0], values[-1]))


def _difference(g, value):
  return g.values(value.epoch, "top1").mean() - value.top1


def comparisons(groups: Sequence[runs.Group]) -> pd.DataFrame:
  """The best method of each task against every other one, as text.

  Args:
    groups: of `runs.group`; teachers are left out.
  """
  students = [g for g in groups if not g.is_teacher]
  lines = []
  for task in dict.fromkeys(g.task for g in students):
    top1 = {
      g.label: g.values("final", "top1") for g in students if g.task == task
    }
    means = pd.Series({label: x.mean() for label, x in top1.items()})
    best = means.fillna(-np.inf).idxmax()
    for label in means.index.drop(best):
      lines.append(
        {
          "data": task[0],
          "network": task[1],
          "best": best,
          "against": label,
          "difference": f"{means[best] - means[label]:+.2f}",
          **statistics.welch(top1[best], top1[label]),
        }
      )
  return pd.DataFrame(lines)


# (data, network, teacher) -> the students and their teacher.
Pairs = Mapping[tuple[str, str, str], analysis.Pair]


def analysed(pairs: Pairs) -> pd.DataFrame:
  """Students beside their teachers, as text.

  Args:
    pairs: of `report.analyse`.
  """
  return pd.DataFrame(
    {
      **dict(zip(("data", "network", "teacher"), task)),
      "method": label,
      "n": str(len(student.agreement)),
      "agreement": statistics.mean_std(student.agreement, 2),
      "difference of correlations": statistics.mean_std(student.distances, 4),
    }
    for task, pair in pairs.items()
    for label, student in pair.students.items()
  )


def damaged(problems: Mapping[str, str]) -> pd.DataFrame:
  """The runs that were left out, as text.

  Args:
    problems: of `runs.collect_whole`.
  """
  return pd.DataFrame([*problems.items()], columns=["run", "problem"])


def alignments(table: pd.DataFrame) -> list[str]:
  """ "left" or "right" for each column."""
  return ["left" if name in _WORDS else "right" for name in table.columns]


def markdown(table: pd.DataFrame) -> str:
  """A table of text in Markdown, in which no text is markup."""
  escaped = table.map(
    lambda cell: " ".join(
      html.escape(cell, quote=False).replace("|", "\\|").splitlines()
    )
  )
  return (
    escaped.to_markdown(
      index=False, colalign=alignments(table), disable_numparse=True
    )
    + "\n"
  )
