"""Tables, figures and a page from finished runs.

    python -m kd_jax report RUNS
    python -m kd_jax report RUNS --analysis

Runs that differ in their seed alone are trials of one line. Accuracies are of
the test set, in percent: after the last epoch, and at the best one, which was
chosen on the test set.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from kd_jax import data, storage
from kd_jax.interop import card
from kd_jax.reporting import analysis, figures, hparams, html, runs, tables


def panels(
  groups: Sequence[runs.Group],
) -> dict[str, dict[str, list[list[dict]]]]:
  """What `figures.curves` draws: a panel for each student and data set.

  A teacher is a line of its students' panels; one without any has its own.
  """
  students = [g for g in groups if not g.is_teacher] or list(groups)
  made: dict[str, dict[str, list[list[dict]]]] = {}
  for task in dict.fromkeys(g.task for g in students):
    members = [g for g in students if g.task == task]
    names = {g.teacher for g in members}
    teachers = [
      g
      for g in groups
      if g.is_teacher and g not in members and g.task[0] == task[0]
    ]
    networks = [g.first["student"] for g in teachers]
    lines = {}
    for g, network in zip(teachers, networks, strict=True):
      if network in names:
        more = f", {g.label}" if networks.count(network) > 1 else ""
        lines[f"teacher {network}{more}"] = [row["evals"] for row in g.rows]
    lines.update({g.label: [row["evals"] for row in g.rows] for g in members})
    made[f"{task[1]}, {task[0]}"] = lines
  return made


def analyse(
  folder: pathlib.Path,
  groups: Sequence[runs.Group],
  data_dir: str | None = None,
) -> dict[tuple[str, str, str], analysis.Pair]:
  """Compares students with the teacher that they, or others like them, had.

  Args:
    folder: that the groups were collected from.
    groups: of `group`.
    data_dir: folder of the data set; None: the one that the runs had.

  Returns:
    (data, network, teacher) -> the comparison. Students of several teachers at
    once are left out.

  Raises:
    ValueError: if no student has a teacher, or if a model or the data cannot be
      read.
    ImportError: if a teacher takes PyTorch and there is none.
  """
  students = [g for g in groups if not g.is_teacher]
  made = {}
  for task in dict.fromkeys(g.task for g in students):
    members = [g for g in students if g.task == task]
    teachers: dict[str, dict[str, Any]] = {}
    for g in members:
      if g.teacher and isinstance(g.first["teacher"], dict):
        teachers.setdefault(runs._names(g.first, precise=True), g.first)
    networks = [runs._names(row) for row in teachers.values()]
    for row in teachers.values():
      name = runs._names(row, precise=networks.count(runs._names(row)) > 1)
      source = _test_set(row["config"]["data"], data_dir)
      made[*task, name] = analysis.compare(
        analysis.open_teacher(folder / row["run"], row["teacher"], source),
        _trials(folder, members, row),
        source,
      )
  if not made:
    raise ValueError(
      f"{folder}: expected a run with a teacher, to compare students with it,"
      " found none"
    )
  return made


def _trials(folder, groups, taught):
  """label -> the runs that had the teacher of a row, or none at all."""
  ours = ("", runs._names(taught, precise=True))
  return {
    g.label: [folder / row["run"] for row in g.rows]
    for g in groups
    if runs._names(g.first, precise=True) in ours
  }


def _test_set(config, data_dir):
  options = {
    name: config[name] for name in (*card.DATA_OPTIONS, "on_bad_image")
  }
  folder = data_dir or config["dir"]
  return data.load(config["name"], split="test", dir=folder, **options)


def _tables(groups, pairs) -> list[tuple[str, html.Table, str]]:
  """Title, table and note of each part of the report."""
  made = [("Accuracy", tables._table(groups), tables._NOTE)]
  if compared := tables._comparisons(groups):
    table = html.Table(tables._COMPARED, compared, tables._COMPARED_RIGHT)
    made.append(("Comparison", table, tables._COMPARED_NOTE))
  if pairs:
    table = html.Table(
      tables._ANALYSED, tables._analysed(pairs), tables._ANALYSED_RIGHT
    )
    made.append(("Student and teacher", table, tables._ANALYSED_NOTE))
  return made


def text(
  groups: Sequence[runs.Group], pairs: tables.Pairs | None = None
) -> str:
  """The whole report in Markdown: tables, and what they mean.

  Args:
    groups: of `group`.
    pairs: of `analyse`, if they are to be in it.
  """
  return "\n".join(
    f"{table.markdown()}\n{note}\n"
    for _, table, note in _tables(groups, pairs or {})
  )


# File, title and note of each figure, and what draws it.
_CURVES: tuple[str, str, str, Callable] = (
  "curves",
  "Curves",
  "Mean over trials; the band is one sample standard deviation to each side.",
  figures.curves,
)


_ANALYSES: tuple[tuple[str, str, str, Callable], ...] = (
  (
    "agreement",
    "Agreement with the teacher",
    "Large dots are means over trials, small ones the trials.",
    figures.agreement,
  ),
  (
    "correlations",
    "Correlation of logits: difference from the teacher",
    "Of the first trial, for each two classes; dark is like the teacher.",
    figures.correlations,
  ),
  (
    "features",
    "Features before the classifier (t-SNE)",
    f"Of the first trial: the first {analysis.SHOWN_EACH} test images of each"
    f" of the first {analysis.SHOWN_CLASSES} classes. Neighbours have similar"
    " features; sizes of groups and distances between them mean little.",
    figures.embeddings,
  ),
)


def write(
  folder: pathlib.Path, to: pathlib.Path, pairs: tables.Pairs | None = None
) -> list[pathlib.Path]:
  """Writes the whole report of the finished runs at or below a folder.

  Args:
    folder: of a run or of many.
    to: folder to write into; it is made.
    pairs: of `analyse`, if they are to be in it.

  Returns:
    `table.md`, `table.csv`, `curves.png` and `curves.svg`, of pairs the same of
    `agreement`, `correlations` and `features`, `report.html` and `hparams`
    there.

  Raises:
    ValueError: as `collect`.
  """
  rows, pairs = runs.collect(folder), pairs or {}
  groups = runs.group(rows)
  to.mkdir(parents=True, exist_ok=True)
  drafts: dict[pathlib.Path, pathlib.Path] = {}

  def draft(name):
    # Several processes of a grid may write at once: each file is one's whole.
    drafts[to / name] = storage.draft(to / name)
    return drafts[to / name]

  draft("table.md").write_text(text(groups, pairs), encoding="utf-8")
  draft("table.csv").write_text(tables._csv(groups), encoding="utf-8")
  sections = [html.Section(*part) for part in _tables(groups, pairs)]
  titled = {f"{n}, {d}, teacher {t}": p for (d, n, t), p in pairs.items()}
  for (name, title, note, draw), content in [
    (_CURVES, panels(groups)),
    *((figure, titled) for figure in _ANALYSES if pairs),
  ]:
    paths = [draft(f"{name}.png"), draft(f"{name}.svg")]
    draw(content, paths)
    svg = paths[1].read_text(encoding="utf-8")
    sections.append(html.Section(title, svg, note))
  draft("report.html").write_text(html.write(sections), encoding="utf-8")
  hparams.write(rows, to / "hparams")
  for path, written in drafts.items():
    written.replace(path)
  return [*drafts, to / "hparams"]
