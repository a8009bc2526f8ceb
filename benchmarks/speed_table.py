"""Writes docs/speed.md's table of what `benchmarks.step` has measured.

    python -m benchmarks.speed_table [results/benchmarks] [--docs docs/speed.md]

Reads every JSON file of the folder, not of those below it, and puts images/s
of the whole step, median, least and most of the turns, between the two marks of
the document. On a CPU kd_jax's figure is that of float32, on a GPU of bfloat16.
What no file has is "not run", "-" what PyTorch's side does not have. Files of
runs with XLA_FLAGS are of things that were tried, and left out.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import step
from benchmarks import work as work_lib

BEGIN = "<!-- speed: written by python -m benchmarks.speed_table -->\n"
END = "<!-- speed: end -->\n"
SIDES = ("jax", "eager", "compiled")
LARGE = "ResNet50:ResNet18"
NAMES = {
  "none": "student alone",
  "kd": "KD",
  "crd": "CRD",
  "semckd": "SemCKD",
  "simkd": "SimKD",
  "fitnet": "FitNet",
  "at": "AT",
  "sp": "SP",
  "vid": "VID",
  "srrl": "SRRL",
  "reviewkd": "KR",
}
# Whether on a GPU, pair, batch, method, side.
Key = tuple[bool, str, int, str, str]


def lines_of_table() -> list[tuple[str, int, str]]:
  """The pair, batch and method of each line."""
  works = [(pair, batch) for pair in work_lib.PAIRS for batch in (64, 256)]
  works.append((LARGE, 256))
  lines = [(*work, method) for work in works for method in work_lib.COMMON]
  others = [m for m in work_lib.METHODS if m not in work_lib.COMMON]
  return lines + [(*works[0], method) for method in others]


def key_of(row: Mapping[str, Any]) -> Key | None:
  """Where a measured cell has its place, or None if it has none."""
  cell, result = row["cell"], row["result"]
  work, side = cell["work"], cell["side"]
  on_gpu = result["platform"] != "cpu"
  pair = f"{work['teacher']}:{work['student']}"
  large = step.is_large(pair)
  pad, size = (0, 224) if large else (4, 32)
  whole = work["flip"] and (work["pad"], work["image_size"]) == (pad, size)
  if not whole or side not in SIDES:
    return None
  if side == "jax" and cell["dtype"] != ("bfloat16" if on_gpu else "float32"):
    return None
  if side == "jax" and cell["steps_per_dispatch"]:
    return None
  return on_gpu, pair, work["batch"], work["method"], side


def read(folder: pathlib.Path) -> dict[Key, dict[str, Any]]:
  """The results of a folder's files, by their places.

  Raises:
    SystemExit: if two files have the same place.
  """
  found: dict[Key, dict[str, Any]] = {}
  origins: dict[Key, str] = {}
  for path in sorted(folder.glob("*.json")):
    content = json.loads(path.read_text())
    if content.get("xla_flags"):
      continue  # what was tried
    for row in content.get("rows", []):
      if "cell" not in row or "error" in row["result"]:
        continue
      key = key_of(row)
      if key is None:
        continue
      if key in found:
        raise SystemExit(
          f"{path}: expected a cell that no other file has, got"
          f" {' '.join(map(str, key[1:]))}, which {origins[key]} has too. Move"
          " one of the files away"
        )
      found[key], origins[key] = row["result"], path.name
  return found


def _figure(found: Mapping[Key, dict[str, Any]], key: Key) -> str:
  *_, batch, method, side = key
  if side != "jax" and method not in work_lib.COMMON:
    return "-"
  if key not in found:
    return "not run"
  least, median, most = (
    f"{1e3 * batch / found[key][name]:,.0f}"
    for name in ("ms_per_step_most", "ms_per_step", "ms_per_step_least")
  )
  return f"{median} ({least}-{most})"


def make(found: Mapping[Key, dict[str, Any]]) -> str:
  """The table, in Markdown."""
  kinds = {False: "CPU", True: "GPU"}
  columns = [f"{k}, {side}" for k in kinds.values() for side in SIDES]
  lines = [
    f"| pair | batch | method | {' | '.join(columns)} |",
    f"|---|---:|---|{'---:|' * len(columns)}",
  ]
  for pair, batch, method in lines_of_table():
    figures = [
      _figure(found, (on_gpu, pair, batch, method, side))
      for on_gpu in kinds
      for side in SIDES
    ]
    pair = pair.replace(":", " -> ")
    cells = [pair, str(batch), NAMES[method], *figures]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def put(text: str, table: str) -> str:
  """The document with this table between its marks.

  Raises:
    SystemExit: if it has not both marks.
  """
  pattern = f"({re.escape(BEGIN)}).*({re.escape(END)})"
  if len(re.findall(pattern, text, re.S)) != 1:
    raise SystemExit(
      f"expected the marks {BEGIN.strip()!r} and {END.strip()!r} in the"
      " document, got a text without them"
    )
  return re.sub(pattern, lambda m: f"{m[1]}\n{table}\n{m[2]}", text, flags=re.S)


def main(arguments: Sequence[str] | None = None) -> None:
  """Reads and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", nargs="?", default="results/benchmarks")
  parser.add_argument("--docs", default="docs/speed.md")
  args = parser.parse_args(arguments)
  docs = pathlib.Path(args.docs)
  table = make(read(pathlib.Path(args.folder)))
  docs.write_text(put(docs.read_text(encoding="utf-8"), table), "utf-8")
  print(f"written: {docs}")


if __name__ == "__main__":
  main()
