"""Tables, figures and a page of finished runs.

Runs that differ only in their seed are trials of one line. Accuracies are of
the test set, in percent: after the last epoch, and at the best one, which was
chosen on the test set.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from kd_jax import data, storage
from kd_jax.interop import card
from kd_jax.reporting import analysis, figures, hparams, html, runs, tables


def panels(
  groups: Sequence[runs.Group],
) -> dict[str, dict[str, list[list[dict]]]]:
  """The lines of `figures.curves`: a panel for each student and data set.

  A teacher is a line of its students' panels; without students it has its own.

  Args:
    groups: of `runs.group`.

  Returns:
    Title of the panel -> label of the line -> evaluations of each trial.
  """
  students = [g for g in groups if not g.is_teacher] or list(groups)
  made: dict[str, dict[str, list[list[dict]]]] = {}
  for data_name, student in dict.fromkeys(g.task for g in students):
    members = [g for g in students if g.task == (data_name, student)]
    used = {entry["name"] for g in members for entry in g.first["teachers"]}
    teachers = [
      g
      for g in groups
      if g.is_teacher and g.task[0] == data_name and g.first["student"] in used
    ]
    networks = [g.first["student"] for g in teachers]
    lines = {}
    for g, network in zip(teachers, networks):
      several = f", {g.label}" if networks.count(network) > 1 else ""
      lines[f"teacher {network}{several}"] = [row["evals"] for row in g.rows]
    lines |= {g.label: [row["evals"] for row in g.rows] for g in members}
    made[f"{student}, {data_name}"] = lines
  return made


def analyse(
  folder: pathlib.Path,
  groups: Sequence[runs.Group],
  data_dir: str | None = None,
) -> dict[tuple[str, str, str], analysis.Pair]:
  """Compares students with their teacher; those without one with every teacher.

  Args:
    folder: that the groups were collected from.
    groups: of `runs.group`.
    data_dir: folder of the data set; None: as the runs had it.

  Returns:
    (data, network, teacher) -> the comparison. Students of several teachers at
    once are left out.

  Raises:
    ValueError: if no student has a teacher, or if a model or the data cannot be
      read.
    ImportError: if a teacher needs PyTorch and it is not installed.
  """
  students = [g for g in groups if not g.is_teacher]
  made = {}
  for task in dict.fromkeys(g.task for g in students):
    members = [g for g in students if g.task == task]
    taught: dict[str, runs.Group] = {}
    for g in members:
      if len(g.first["teachers"]) == 1:
        taught.setdefault(g.teacher_weights, g)
    networks = [g.teacher for g in taught.values()]
    for weights, g in taught.items():
      name = weights if networks.count(g.teacher) > 1 else g.teacher
      source = _test_set(g.first["config"]["data"], data_dir)
      made[*task, name] = analysis.compare(
        analysis.open_teacher(
          folder / g.first["run"], g.first["teachers"][0], source
        ),
        {
          member.label: [folder / row["run"] for row in member.rows]
          for member in members
          if member.teacher_weights in ("", weights)
        },
        source,
      )
  if not made:
    raise ValueError(
      f"{folder}: expected a run with a teacher, to compare students with it,"
      " found none"
    )
  return made


def _test_set(config, data_dir):
  options = {
    name: config.get(name) for name in (*card.DATA_OPTIONS, "on_bad_image")
  }
  folder = data_dir or config.get("dir")
  return data.load(config["name"], split="test", dir=folder, **options)


def _tables(groups, pairs, damaged) -> list[tuple[str, pd.DataFrame, str]]:
  """Title, table and note of each part of the report."""
  made = [
    ("Accuracy", tables.accuracy(groups), tables.ACCURACY_NOTE),
    ("Comparison", tables.comparisons(groups), tables.COMPARISONS_NOTE),
    ("Student and teacher", tables.analysed(pairs), tables.ANALYSIS_NOTE),
    ("Damaged", tables.damaged(damaged), tables.DAMAGED_NOTE),
  ]
  return [part for part in made if len(part[1])]


def text(
  groups: Sequence[runs.Group],
  pairs: tables.Pairs | None = None,
  damaged: Mapping[str, str] | None = None,
) -> str:
  """The tables of the report and their notes in Markdown.

  Args:
    groups: of `runs.group`.
    pairs: of `analyse`, to include the comparison with teachers.
    damaged: of `runs.collect_whole`, to list the runs that were left out.
  """
  return "\n".join(
    f"{tables.markdown(table)}\n{note}\n"
    for _, table, note in _tables(groups, pairs or {}, damaged or {})
  )


# File, title and note of each figure, and its function.
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
    "The first trial, for each two classes; dark means like the teacher.",
    figures.correlations,
  ),
  (
    "features",
    "Features before the classifier (t-SNE)",
    f"The first trial: the first {analysis.SHOWN_EACH} test images of each of"
    f" the first {analysis.SHOWN_CLASSES} classes. Neighbours have similar"
    " features; sizes of groups and distances between them mean little.",
    figures.embeddings,
  ),
)


def write_report(
  folder: pathlib.Path,
  to: pathlib.Path | None = None,
  *,
  analysed: bool = False,
  data_dir: str | None = None,
) -> tuple[str, list[pathlib.Path]]:
  """Writes the whole report of the finished runs at or below a folder.

  Args:
    folder: of a run or of many.
    to: folder to write into, made if need be; None: `folder`.
    analysed: whether to compare students with their teachers, see `analyse`.
    data_dir: folder of the data set for that; None: as the runs had it.

  Returns:
    The tables in Markdown, and the paths: `table.md`, `table.csv`, `curves`,
    with an analysis `agreement`, `correlations` and `features` (all as .png
    and .svg), `report.html` and the folder `hparams`.

  Raises:
    ValueError: see `runs.collect_whole` and `analyse`. Nothing is written then.
    ImportError: see `analyse`.
    OSError: if a file cannot be written.
  """
  (rows, damaged), to = runs.collect_whole(folder), to or folder
  groups = runs.group(rows)
  pairs = analyse(folder, groups, data_dir) if analysed else {}
  return text(groups, pairs, damaged), write(rows, to, pairs, damaged)


def write(
  rows: Sequence[dict],
  to: pathlib.Path,
  pairs: tables.Pairs,
  damaged: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
  """Writes the files of `write_report`.

  Args:
    rows: of `runs.collect`.
    to: folder to write into, made if need be.
    pairs: of `analyse`; empty to leave out the comparison with teachers.
    damaged: of `runs.collect_whole`.

  Returns:
    Their paths.

  Raises:
    ValueError: if the folder `hparams` holds other files.
    OSError: if a file cannot be written; no half of one is left.
  """
  groups = runs.group(rows)
  to.mkdir(parents=True, exist_ok=True)
  hparams.write(rows, to / "hparams")
  contents: dict[str, bytes | str] = {
    "table.md": text(groups, pairs, damaged),
    "table.csv": tables.csv(groups),
  }
  shown = _tables(groups, pairs, damaged or {})
  sections = [html.Section(*part) for part in shown]
  titled = {f"{n}, {d}, teacher {t}": p for (d, n, t), p in pairs.items()}
  for (name, title, note, draw), content in [
    (_CURVES, panels(groups)),
    *((figure, titled) for figure in _ANALYSES if pairs),
  ]:
    png, svg = draw(content)
    contents |= {f"{name}.png": png, f"{name}.svg": svg}
    sections.append(html.Section(title, svg.decode(), note))
  contents["report.html"] = html.write(sections)
  for name, content in contents.items():
    storage.write_whole(to / name, content)
  return [to / name for name in (*contents, "hparams")]
