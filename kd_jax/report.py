"""Tables, figures and a page from finished runs.

    python -m kd_jax.report RUNS
    python -m kd_jax.report RUNS --analysis

Runs that differ in their seed alone are trials of one line. Accuracies are of
the test set, in percent: after the last epoch, and at the best one, which was
chosen on the test set.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kd_jax import (
  analysis,
  data,
  export,
  figures,
  hparams,
  metrics,
  page,
  published,
  record,
)

# What a run writes line by line, and the same as `kd_jax.results` keeps it.
METRICS = "metrics.jsonl"
PACKED = "metrics.jsonl.gz"

# The p below which one mean is called better than another.
_LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Group:
  """Trials: runs that differ in their seed alone.

  Attributes:
    rows: of `collect`, by seed.
    label: the method, its teacher if those of the task have several, and the
      settings by which it differs from other groups of the same method. No
      other group of the task has the same.
  """

  rows: list[dict[str, Any]]
  label: str = ""

  @property
  def first(self) -> dict[str, Any]:
    """The trial of the lowest seed."""
    return self.rows[0]

  @property
  def teacher(self) -> str:
    """The teacher's network, or those of several; "" if there is none."""
    return _names(self.first)

  @property
  def task(self) -> tuple[str, str]:
    """Data set and student: what methods are compared on."""
    return self.first["config"]["data"]["name"], self.first["student"]

  @property
  def is_teacher(self) -> bool:
    """Whether it was trained because others needed it."""
    return "teachers" in pathlib.Path(self.first["run"]).parts

  def values(self, epoch: str, name: str) -> np.ndarray:
    """[n]: a score of the "final" or the "best" epoch of each trial."""
    return np.array([row[epoch][name] for row in self.rows], np.float64)


@dataclasses.dataclass(frozen=True)
class Welch:
  """Welch's test of two means that need not have the same variance."""

  t: float
  degrees: float
  p: float


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
  """The finished runs at or below a folder: teachers first, then by age.

  What `kd_jax.results` has gathered is in the order of its names: files that
  were committed are as old as their checkout.
  """

  def order(run):
    gathered = (run / PACKED).exists()
    age = 0.0 if gathered else (run / "result.json").stat().st_mtime
    return "teachers" not in run.parts, age, run

  return sorted((p.parent for p in folder.rglob("result.json")), key=order)


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
  """One row for each finished run at or below a folder.

  Args:
    folder: of a run or of many.

  Returns:
    The content of each `result.json`, with `run` (its path below `folder`),
    `config` (the content of its `config.json`) and `evals` (its evaluations,
    in order).

  Raises:
    ValueError: if there is no finished run, or one without its config or its
      metrics.
  """
  rows = []
  for run in find_runs(folder):
    lines = run / (PACKED if (run / PACKED).exists() else METRICS)
    for path in (run / "config.json", lines):
      if not path.exists():
        raise ValueError(
          f"{run}: expected {path.name} beside result.json, found none. Copy it"
          " from the run, or remove this folder"
        )
    config = record.read_json(run / "config.json")
    records = metrics.read(lines)
    rows.append(
      {
        "run": str(run.relative_to(folder)),
        **(record.result(run) or {}),
        "config": config,
        "evals": [r for r in records if r["kind"] == "eval"],
      }
    )
  if not rows:
    raise ValueError(
      f"{folder}: expected finished runs (result.json) at or below it, found"
      " none. Give the --workdir of launch.py, or the folder above it"
    )
  return rows


def group(rows: Iterable[dict[str, Any]]) -> list[Group]:
  """Puts trials together; a seed that was run twice counts once.

  Trials of one line have had the same teacher's weights.

  Args:
    rows: of `collect`.

  Returns:
    Teachers first, then student by student, in the order of the rows.
  """
  found: dict[str, dict[int, dict[str, Any]]] = {}
  for row in rows:
    same = {**record.identity(row["config"]), "seed": None}
    key = json.dumps([same, _fingerprints(row)], sort_keys=True)
    trials = found.setdefault(key, {})
    trials.setdefault(row["seed"], row)
  groups = [
    Group([trials[seed] for seed in sorted(trials)])
    for trials in found.values()
  ]
  tasks = list(dict.fromkeys(g.task for g in groups))
  groups.sort(key=lambda g: (not g.is_teacher, tasks.index(g.task)))
  return [dataclasses.replace(g, label=_label(g, groups)) for g in groups]


def _teachers(row):
  """What a row says of its teachers: a list of dicts."""
  teacher = row["teacher"] or []
  return teacher if isinstance(teacher, list) else [teacher]


def _fingerprints(row):
  """Those of its teachers' weights; None of one that was noted without."""
  return [entry.get("fingerprint") for entry in _teachers(row)]


def _names(row, *, precise=False):
  """The networks of its teachers; if precise, with their fingerprints."""
  return " + ".join(
    f"{entry['name']} {entry['fingerprint']:08x}"
    if precise and entry.get("fingerprint") is not None
    else entry["name"]
    for entry in _teachers(row)
  )


def _label(one, groups):
  """The method, and what tells it from the task's other groups."""
  settings = record.identity(one.first["config"])
  differ: dict[str, str] = {}
  taught = [g.first for g in groups if g.task == one.task and g.teacher]
  if one.teacher and len({_names(row, precise=True) for row in taught}) > 1:
    same = [row for row in taught if _names(row) == one.teacher]
    precise = len({_names(row, precise=True) for row in same}) > 1
    differ["teacher"] = f"teacher={_names(one.first, precise=precise)}"
  for other in groups:
    alike = (other.task, other.first["method"], other.teacher)
    if alike != (one.task, one.first["method"], one.teacher):
      continue
    theirs = record.identity(other.first["config"])
    for name in sorted(settings.keys() | theirs.keys()):
      if name != "seed" and settings.get(name) != theirs.get(name):
        short = name.removeprefix("distiller.")
        differ[short] = f"{short}={settings.get(name)}"
  method = one.first["method"]
  return f"{method} ({', '.join(differ.values())})" if differ else method


def welch(a: np.ndarray, b: np.ndarray) -> Welch | None:
  """Welch's two-sided t-test (Biometrika, 1947) of two means.

  Args:
    a: [n] values.
    b: [m] values.

  Returns:
    t (above 0 if a's mean is higher), the degrees of freedom of Welch and
    Satterthwaite, and p; None if a sample has one value, or neither varies.
  """
  from scipy import stats  # takes half a second

  if min(len(a), len(b)) < 2:
    return None
  parts = np.array([np.var(x, ddof=1) / len(x) for x in (a, b)])
  if not parts.sum():
    return None
  t = (np.mean(a) - np.mean(b)) / math.sqrt(parts.sum())
  freedoms = np.array([len(a) - 1, len(b) - 1])
  degrees = parts.sum() ** 2 / (parts**2 / freedoms).sum()
  return Welch(float(t), float(degrees), float(2 * stats.t.sf(abs(t), degrees)))


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


def _cells(groups: Sequence[Group]) -> list[list[str]]:
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
        spread(g.values("final", "top1"), 2),
        f"{spread(g.values('best', 'top1'), 2)} ({span})",
        "; ".join(f"{v.top1:.2f} ({_words(v)})" for v in values) or "-",
        "; ".join(f"{_difference(g, v):+.2f}" for v in values) or "-",
        spread(g.values("final", "ce"), 4),
        f"{g.first['parameters']:,}" + (f" + {extra:,}" if extra else ""),
        f"{np.mean([row['seconds'] for row in g.rows]):.1f}",
        _hardware(g),
      ]
    )
  return cells


def spread(values: np.ndarray, digits: int) -> str:
  """The mean of trials in words, ± their sample standard deviation."""
  text = f"{values.mean():.{digits}f}"
  if len(values) > 1:
    text += f" ± {values.std(ddof=1):.{digits}f}"
  return text


def _words(value):
  return f"{value.source}, {'last' if value.epoch == 'final' else value.epoch}"


def _difference(g, value):
  return g.values(value.epoch, "top1").mean() - value.top1


def _hardware(g):
  return "; ".join(dict.fromkeys(row["hardware"] for row in g.rows))


def table(rows: Iterable[dict[str, Any]]) -> str:
  """The Markdown table of rows that `collect` made, a line for each group."""
  return _table(group(rows)).markdown()


def _table(groups):
  return page.Table(_HEADER, _cells(groups), _RIGHT)


def table_of(groups: Sequence[Group], columns: Sequence[str]) -> str:
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
  return page.Table(
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


def _comparisons(groups: Sequence[Group]) -> list[list[str]]:
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
      test, numbers = welch(ours, theirs), ["-"] * 3
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


def _csv(groups: Sequence[Group]) -> str:
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


def panels(groups: Sequence[Group]) -> dict[str, dict[str, list[list[dict]]]]:
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
  folder: pathlib.Path, groups: Sequence[Group], data_dir: str | None = None
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
        teachers.setdefault(_names(g.first, precise=True), g.first)
    networks = [_names(row) for row in teachers.values()]
    for row in teachers.values():
      name = _names(row, precise=networks.count(_names(row)) > 1)
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
  ours = ("", _names(taught, precise=True))
  return {
    g.label: [folder / row["run"] for row in g.rows]
    for g in groups
    if _names(g.first, precise=True) in ours
  }


def _test_set(config, data_dir):
  options = {
    name: config[name] for name in (*export.DATA_OPTIONS, "on_bad_image")
  }
  folder = data_dir or config["dir"]
  return data.load(config["name"], split="test", dir=folder, **options)


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
      spread(student.agreement, 2),
      spread(student.distances, 4),
    ]
    for task, pair in pairs.items()
    for label, student in pair.students.items()
  ]


def _tables(groups, pairs) -> list[tuple[str, page.Table, str]]:
  """Title, table and note of each part of the report."""
  made = [("Accuracy", _table(groups), _NOTE)]
  if compared := _comparisons(groups):
    table = page.Table(_COMPARED, compared, _COMPARED_RIGHT)
    made.append(("Comparison", table, _COMPARED_NOTE))
  if pairs:
    table = page.Table(_ANALYSED, _analysed(pairs), _ANALYSED_RIGHT)
    made.append(("Student and teacher", table, _ANALYSED_NOTE))
  return made


def text(groups: Sequence[Group], pairs: Pairs | None = None) -> str:
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
  folder: pathlib.Path, to: pathlib.Path, pairs: Pairs | None = None
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
  rows, pairs = collect(folder), pairs or {}
  groups = group(rows)
  to.mkdir(parents=True, exist_ok=True)
  drafts: dict[pathlib.Path, pathlib.Path] = {}

  def draft(name):
    # Several processes of a grid may write at once: each file is one's whole.
    drafts[to / name] = record.draft(to / name)
    return drafts[to / name]

  draft("table.md").write_text(text(groups, pairs), encoding="utf-8")
  draft("table.csv").write_text(_csv(groups), encoding="utf-8")
  sections = [page.Section(*part) for part in _tables(groups, pairs)]
  titled = {f"{n}, {d}, teacher {t}": p for (d, n, t), p in pairs.items()}
  for (name, title, note, draw), content in [
    (_CURVES, panels(groups)),
    *((figure, titled) for figure in _ANALYSES if pairs),
  ]:
    paths = [draft(f"{name}.png"), draft(f"{name}.svg")]
    draw(content, paths)
    svg = paths[1].read_text(encoding="utf-8")
    sections.append(page.Section(title, svg, note))
  draft("report.html").write_text(page.write(sections), encoding="utf-8")
  hparams.write(rows, to / "hparams")
  for path, written in drafts.items():
    written.replace(path)
  return [*drafts, to / "hparams"]


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m kd_jax.report",
    description="Prints a table of the finished runs at or below a folder, and"
    " writes it (table.md, table.csv), their curves (.png, .svg), a page with"
    " both (report.html) and TensorBoard's view of their settings (hparams).",
  )
  parser.add_argument("runs", type=pathlib.Path, help="folder of runs")
  parser.add_argument(
    "--to", type=pathlib.Path, help="folder to write into (default: RUNS)"
  )
  parser.add_argument(
    "--analysis",
    action="store_true",
    help="compare students with their teachers on the test set too: agreement,"
    " correlations of logits, features",
  )
  parser.add_argument(
    "--data_dir",
    help="of --analysis: folder of the data set (default: as the runs had it)",
  )
  args = parser.parse_args()
  try:
    groups = group(collect(args.runs))
    pairs = {}
    if args.analysis:
      pairs = analyse(args.runs, groups, args.data_dir)
    paths = write(args.runs, args.to or args.runs, pairs)
  except (ValueError, ImportError) as error:
    parser.exit(2, f"{error}\n")
  print(text(groups, pairs))
  print(*paths, sep="\n")


if __name__ == "__main__":
  main()
