"""Figures from finished runs."""

import io
import textwrap
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


# Most small drawings beside each other.
_ACROSS = 5
# Inches of a character and of a line, at matplotlib's size 10.
_CHARACTER, _LINE = 0.085, 0.17


def _wrap(labels, inches):
  """Labels in lines of that width, and the height that the longest one adds."""
  wide = max(10, int(inches / _CHARACTER))
  wrapped = [textwrap.fill(label, wide) for label in labels]
  return wrapped, _LINE * max(
    (label.count("\n") for label in wrapped), default=0
  )


def curves(
  panels: Mapping[str, Mapping[str, Sequence[Sequence[dict[str, Any]]]]],
) -> tuple[bytes, bytes]:
  """Draws test cross-entropy and top-1 against epochs, a line per method.

  A line is the mean over trials, the band around it one sample standard
  deviation to each side.

  Args:
    panels: title -> label -> for each trial its evaluations, in order, with
      "epoch", "ce" and "top1". A label has one style in all panels.

  Returns:
    A PNG and an SVG file.
  """
  import matplotlib.figure  # only who draws needs it
  from matplotlib import ticker

  class Plain(ticker.LogFormatter):
    """Plain numbers: a run rarely spans a power of ten."""

    def __call__(self, x, pos=None):
      return f"{x:g}" if super().__call__(x, pos) else ""

  labels = list(dict.fromkeys(label for p in panels.values() for label in p))
  wrapped, extra = _wrap(labels, 9.0)
  widest = max(len(line) for label in wrapped for line in label.splitlines())
  columns = min(3, max(1, int(10 / ((widest + 6) * _CHARACTER))))
  legend_height = -(-len(labels) // columns) * (0.22 + extra)
  figure = matplotlib.figure.Figure(
    figsize=(10, 4 * len(panels) + legend_height), layout="constrained"
  )
  rows = figure.subplots(len(panels), 2, squeeze=False)
  handles = {}
  for (title, lines), (left, right) in zip(panels.items(), rows, strict=True):
    for label, trials in lines.items():
      number = labels.index(label)
      for axes, value in ((left, "ce"), (right, "top1")):
        handles[label] = _line(axes, trials, value, number, label)
    if any((line.get_ydata() > 0).any() for line in left.lines):  # not all NaN
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
    wrapped,
    loc="outside lower center",
    ncols=columns,
  )
  return _render(figure)


def _render(figure) -> tuple[bytes, bytes]:
  """A PNG and an SVG file, which depend on nothing but the figure."""
  import matplotlib.text

  for text in figure.findobj(matplotlib.text.Text):
    text.set_parse_math(False)  # a name may have dollars
  svg = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  png_file, svg_file = io.BytesIO(), io.BytesIO()
  with matplotlib.rc_context({"svg.hashsalt": "kd_jax"}):
    figure.savefig(png_file, format="png", dpi=150)
    figure.savefig(svg_file, format="svg", dpi=150, metadata=svg)
  return png_file.getvalue(), svg_file.getvalue()


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


def agreement(pairs: Mapping[str, Pair]) -> tuple[bytes, bytes]:
  """Draws how often students name their teacher's class, a line per method.

  A large dot is the mean over trials, small ones are the trials.

  Args:
    pairs: title -> teacher and students.

  Returns:
    A PNG and an SVG file.
  """
  import matplotlib.figure

  lengths = [len(pair.students) for pair in pairs.values()]
  _, extra = _wrap([name for p in pairs.values() for name in p.students], 3.0)
  figure = matplotlib.figure.Figure(
    figsize=(8, sum((0.3 + extra) * n + 1.1 for n in lengths)),
    layout="constrained",
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
    axes.set_yticks(range(len(pair.students)), _wrap(pair.students, 3.0)[0])
    axes.set_ylim(len(pair.students) - 0.5, -0.5)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.tick_params(labelbottom=True)
  rows[-1, 0].set_xlabel("images for which both name the same class (%)")
  return _render(figure)


def correlations(pairs: Mapping[str, Pair]) -> tuple[bytes, bytes]:
  """Draws by how much students' correlations of logits are not the teacher's.

  Args:
    pairs: title -> teacher and students; one scale for all of a pair.

  Returns:
    A PNG and an SVG file.
  """
  from matplotlib import ticker

  def draw(part, pair, tiles, labels):
    students = pair.students.values()
    largest = np.nanmax([0.0, *(s.difference.max() for s in students)])
    for label, student, axes in zip(labels, students, tiles):
      image = axes.imshow(
        student.difference, cmap="cividis", vmin=0, vmax=largest or 1.0
      )
      axes.set_title(f"{label}\nmean {student.difference.mean():.3f}", size=10)
      axes.set_xlabel("class")
      for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    part.colorbar(image, ax=tiles, label="|difference|", aspect=30)

  return _render(_tiled(pairs, lambda pair: list(pair.students), draw))


def embeddings(pairs: Mapping[str, Pair]) -> tuple[bytes, bytes]:
  """Draws t-SNE's points of a teacher and its students, a colour per class.

  Args:
    pairs: title -> teacher and students.

  Returns:
    A PNG and an SVG file.
  """

  def draw(part, pair, tiles, labels):
    drawn = [pair.points, *(s.points for s in pair.students.values())]
    for label, points, axes in zip(labels, drawn, tiles):
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

  def titles(pair):
    return [f"teacher {pair.teacher}", *pair.students]

  return _render(_tiled(pairs, titles, draw))


def _tiled(pairs, titles, draw):
  """A figure with a part for each pair, of a tile for each of its titles."""
  import matplotlib.figure

  counts = [len(titles(pair)) for pair in pairs.values()]
  deep = [-(-n // _ACROSS) for n in counts]
  across = max(3, *(-(-n // rows) for n, rows in zip(counts, deep)))
  width = 9.5 / across
  _, extra = _wrap([t for p in pairs.values() for t in titles(p)], width)
  figure = matplotlib.figure.Figure(
    figsize=(11, sum((width + 0.7 + extra) * n + 0.4 for n in deep)),
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
    draw(part, pair, tiles[:n], _wrap(titles(pair), width)[0])
  return figure
