"""Figures from finished runs."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
  "#000000",
)
_LINES = ("-", "--", "-.", ":")


def curves(
  panels: Mapping[str, Mapping[str, Sequence[Sequence[dict[str, Any]]]]],
  paths: Sequence[pathlib.Path],
) -> None:
  """Draws test cross-entropy and top-1 against epochs, a line per method.

  A line is the mean over trials, the band around it one sample standard
  deviation to each side.

  Args:
    panels: title -> label -> for each trial its evaluations, in order, with
      "epoch", "ce" and "top1". A label has one style in all panels.
    paths: .png or .svg files to write.
  """
  import matplotlib  # only who draws needs it
  import matplotlib.figure
  from matplotlib import ticker

  labels = list(dict.fromkeys(label for p in panels.values() for label in p))
  legend_rows = -(-len(labels) // 3)
  figure = matplotlib.figure.Figure(
    figsize=(10, 4 * len(panels) + 0.22 * legend_rows), layout="constrained"
  )
  rows = figure.subplots(len(panels), 2, squeeze=False)
  handles = {}
  for (title, lines), (left, right) in zip(panels.items(), rows, strict=True):
    for label, trials in lines.items():
      number = labels.index(label)
      for axes, value in ((left, "ce"), (right, "top1")):
        handles[label] = _line(axes, trials, value, number, label)
    left.set_yscale("log")
    # Plain numbers: a run rarely spans a power of ten.
    left.yaxis.set_major_formatter(ticker.LogFormatter())
    left.yaxis.set_minor_formatter(ticker.LogFormatter())
    left.set_ylabel("test cross-entropy (nats)")
    right.set_ylabel("test top-1 (%)")
    for axes in (left, right):
      axes.set_title(title)
      axes.set_xlabel("epoch")
      axes.xaxis.get_major_locator().set_params(integer=True)
      axes.grid(alpha=0.3)
  figure.legend(
    [handles[label] for label in labels],
    labels,
    loc="outside lower center",
    ncols=3,
  )
  # The same runs give the same file, without a word of where it was made.
  with matplotlib.rc_context({"svg.hashsalt": "kd_jax"}):
    for path in paths:
      names = ("Creator", "Date", "Format", "Type")
      svg = dict.fromkeys(names) if path.suffix == ".svg" else None
      figure.savefig(path, dpi=150, metadata=svg)


def _line(axes, trials, value, number, label):
  """Draws one method; epochs that not all trials have are left out."""
  by_epoch = [{e["epoch"]: e[value] for e in evals} for evals in trials]
  epochs = sorted(set.intersection(*map(set, by_epoch)))
  values = np.array([[trial[e] for e in epochs] for trial in by_epoch])
  mean = values.mean(axis=0)
  colour = _COLOURS[number % len(_COLOURS)]
  (line,) = axes.plot(
    epochs,
    mean,
    color=colour,
    linestyle=_LINES[number % len(_LINES)],
    label=label,
    marker="o" if len(epochs) == 1 else "",
  )
  if len(trials) > 1:
    spread = values.std(axis=0, ddof=1)
    axes.fill_between(
      epochs, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0
    )
  return line
