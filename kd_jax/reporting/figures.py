"""Figures from finished runs."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_jax.reporting.analysis import Pair

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


_MARKERS = ("o", "s", "^", "v", "D", "P", "X")


# The most of small drawings beside each other.
_ACROSS = 5


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
  import matplotlib.figure  # only who draws needs it
  from matplotlib import ticker

  class Plain(ticker.LogFormatter):
    """Plain numbers: a run rarely spans a power of ten."""

    def __call__(self, x, pos=None):
      return f"{x:g}" if super().__call__(x, pos) else ""

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
    left.yaxis.set_major_formatter(Plain())
    left.yaxis.set_minor_formatter(Plain())
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
  _save(figure, paths)


def _save(figure, paths):
  """The same figure gives the same file, without a word of where it is made."""
  import matplotlib

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


def agreement(pairs: Mapping[str, Pair], paths: Sequence[pathlib.Path]) -> None:
  """Draws how often students name their teacher's class, a line per method.

  A large dot is the mean over trials, small ones are the trials.

  Args:
    pairs: title -> teacher and students.
    paths: .png or .svg files to write.
  """
  import matplotlib.figure

  lengths = [len(pair.students) for pair in pairs.values()]
  figure = matplotlib.figure.Figure(
    figsize=(8, sum(0.3 * n + 1.1 for n in lengths)), layout="constrained"
  )
  rows = figure.subplots(
    len(pairs), 1, squeeze=False, sharex=True, height_ratios=lengths
  )
  for (title, pair), (axes,) in zip(pairs.items(), rows, strict=True):
    for place, student in enumerate(pair.students.values()):
      trials = student.agreement
      if len(trials) > 1:
        axes.plot(
          trials, [place] * len(trials), "o", ms=4, mfc="none", color="#555555"
        )
      axes.plot(trials.mean(), place, "o", ms=8, color=_COLOURS[0])
    axes.set_yticks(range(len(pair.students)), list(pair.students))
    axes.set_ylim(len(pair.students) - 0.5, -0.5)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.tick_params(labelbottom=True)
  rows[-1, 0].set_xlabel("images for which both name the same class (%)")
  _save(figure, paths)


def correlations(
  pairs: Mapping[str, Pair], paths: Sequence[pathlib.Path]
) -> None:
  """Draws by how much students' correlations of logits are not the teacher's.

  Args:
    pairs: title -> teacher and students; one scale for all of a pair.
    paths: .png or .svg files to write.
  """
  from matplotlib import ticker

  def draw(part, pair, tiles):
    largest = max(s.difference.max() for s in pair.students.values())
    for (label, student), axes in zip(pair.students.items(), tiles):
      image = axes.imshow(
        student.difference, cmap="cividis", vmin=0, vmax=largest or 1.0
      )
      axes.set_title(f"{label}\nmean {student.difference.mean():.3f}", size=10)
      axes.set_xlabel("class")
      for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    part.colorbar(image, ax=tiles, label="|difference|", aspect=30)

  _save(_tiled(pairs, lambda pair: len(pair.students), draw), paths)


def embeddings(
  pairs: Mapping[str, Pair], paths: Sequence[pathlib.Path]
) -> None:
  """Draws t-SNE's points of a teacher and its students, a colour per class.

  Args:
    pairs: title -> teacher and students.
    paths: .png or .svg files to write.
  """

  def draw(part, pair, tiles):
    drawn = {f"teacher {pair.teacher}": pair.points}
    drawn.update({label: s.points for label, s in pair.students.items()})
    for (label, points), axes in zip(drawn.items(), tiles):
      for number, k in enumerate(pair.class_names):
        axes.scatter(
          *points[pair.labels == k].T,
          s=10,
          color=_COLOURS[number],
          marker=_MARKERS[number],
          linewidths=0,
          label=pair.class_names[k],
          rasterized=True,
        )
      axes.set_title(label, size=10)
      axes.set_xticks([])
      axes.set_yticks([])
    part.legend(
      *tiles[0].get_legend_handles_labels(),
      loc="outside right center",
      markerscale=2,
    )

  _save(_tiled(pairs, lambda pair: len(pair.students) + 1, draw), paths)


def _tiled(pairs, count, draw):
  """A figure with a part for each pair, of so many tiles beside each other."""
  import matplotlib.figure

  counts = [count(pair) for pair in pairs.values()]
  deep = [-(-n // _ACROSS) for n in counts]
  across = max(3, *(-(-n // rows) for n, rows in zip(counts, deep)))
  figure = matplotlib.figure.Figure(
    figsize=(11, sum((9.5 / across + 0.7) * n + 0.4 for n in deep)),
    layout="constrained",
  )
  parts = figure.subfigures(len(pairs), 1, squeeze=False, height_ratios=deep)
  for (title, pair), (part,), n, rows in zip(
    pairs.items(), parts, counts, deep
  ):
    tiles = part.subplots(rows, across, squeeze=False).ravel()
    for axes in tiles[n:]:
      axes.remove()
    part.suptitle(title)
    draw(part, pair, tiles[:n])
  return figure
