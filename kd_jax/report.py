"""Tables and figures from finished runs.

python -m kd_jax.report RUNS
"""

import argparse
import pathlib
from typing import Any

from kd_jax import metrics, record

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


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
  """The finished runs at or below a folder: teachers first, then by age."""

  def order(path):
    return "teachers" not in path.parts, path.stat().st_mtime

  return [p.parent for p in sorted(folder.rglob("result.json"), key=order)]


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
  """One row for each finished run at or below a folder.

  Args:
    folder: of a run or of many.

  Returns:
    The content of each `result.json`, with `run` (its path below `folder`).

  Raises:
    ValueError: if there is no finished run.
  """
  rows = []
  for run in find_runs(folder):
    rows.append(
      {"run": str(run.relative_to(folder)), **(record.result(run) or {})}
    )
  if not rows:
    raise ValueError(
      f"{folder}: expected finished runs (result.json) at or below it, found"
      " none. Give the --workdir of launch.py, or the folder above it"
    )
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """A Markdown table of rows that `collect` made.

  Accuracies are of the test set, in percent, after the last epoch and at the
  best one (chosen on the test set, as the published figures are); the
  cross-entropy is in nats, after the last epoch. Parameters are those of the
  network alone plus those that the method adds while it trains.
  """
  header = (
    "| run | network | method | top-1 last | top-1 best (epoch) |"
    " cross-entropy | parameters | seconds |"
  )
  lines = [header, "|---|---|---|---:|---:|---:|---:|---:|"]
  for row in rows:
    extra = row["distiller_parameters"]
    parameters = f"{row['parameters']:,}" + (f" + {extra:,}" if extra else "")
    final, best = row["final"], row["best"]
    lines.append(
      f"| {row['run']} | {row['student']} | {row['method']}"
      f" | {final['top1']:.2f} | {best['top1']:.2f} ({best['epoch']})"
      f" | {final['ce']:.4f} | {parameters} | {row['seconds']:.1f} |"
    )
  return "\n".join(lines) + "\n"


def curves(folder: pathlib.Path, path: pathlib.Path) -> None:
  """Draws test cross-entropy and top-1 against epochs, a line per run.

  Args:
    folder: finished runs are looked for at and below it.
    path: .png or .svg to write.
  """
  import matplotlib.figure  # only who draws needs it
  from matplotlib import ticker

  figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
  left, right = figure.subplots(1, 2)
  for number, run in enumerate(find_runs(folder)):
    records = metrics.read(run / "metrics.jsonl")
    evals = [r for r in records if r["kind"] == "eval"]
    result = record.result(run) or {}
    label = f"{run.relative_to(folder)} ({result['student']})"
    style = {
      "color": _COLOURS[number % len(_COLOURS)],
      "linestyle": _LINES[number % len(_LINES)],
      "label": label,
      "marker": "o" if len(evals) == 1 else "",
    }
    epochs = [r["epoch"] for r in evals]
    left.plot(epochs, [r["ce"] for r in evals], **style)
    right.plot(epochs, [r["top1"] for r in evals], **style)
  left.set_yscale("log")
  # Plain numbers: a run rarely spans a power of ten.
  left.yaxis.set_major_formatter(ticker.LogFormatter())
  left.yaxis.set_minor_formatter(ticker.LogFormatter())
  left.set_ylabel("test cross-entropy (nats)")
  right.set_ylabel("test top-1 (%)")
  for axes in (left, right):
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
  handles, labels = left.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=2)
  figure.savefig(path, dpi=150)


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m kd_jax.report",
    description="Prints a table of the finished runs below a folder.",
  )
  parser.add_argument("runs", type=pathlib.Path, help="folder of runs")
  parser.add_argument(
    "--curves", type=pathlib.Path, help="also draw them to this .png or .svg"
  )
  args = parser.parse_args()
  try:
    text = table(collect(args.runs))
    if args.curves:
      curves(args.runs, args.curves)
  except ValueError as error:
    parser.exit(2, f"{error}\n")
  print(text)


if __name__ == "__main__":
  main()
