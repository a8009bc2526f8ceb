"""Writes the tables of docs/speed.md from the results of `benchmarks.step`.

    python -m benchmarks.speed_table [results/benchmarks] [--docs docs/speed.md]

Reads every JSON file of the folder, not of the folders below it. A figure is
images/s of the whole step: the median of the turns and, in brackets, the least
and the most. kd_jax's is of float32 on a CPU and of bfloat16 on a GPU. A cell
that no file has is "not run". A run with other XLA_FLAGS than benchmarks/cpu.sh
sets was an experiment, and is left out.
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
SIDES = {
  "jax": "kd_jax",
  "eager": "PyTorch, eager",
  "compiled": "PyTorch, compiled",
}
LARGE = "ResNet50:ResNet18"
WORKS = [
  *((pair, batch) for pair in work_lib.PAIRS for batch in (64, 256)),
  (LARGE, 256),
]
# What benchmarks/cpu.sh sets.
FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
NOT_RUN = "not run"
# Whether on a GPU, pair, batch, method, side.
Key = tuple[bool, str, int, str, str]


def key_of(row: Mapping[str, Any]) -> Key | None:
  """The place of a measured cell in the tables, or None if it has none."""
  cell, result = row["cell"], row["result"]
  work, side = cell["work"], cell["side"]
  on_gpu = result["platform"] != "cpu"
  pair = f"{work['teacher']}:{work['student']}"
  pad, size = (0, 224) if step.is_large(pair) else (4, 32)
  whole = work["flip"] and (work["pad"], work["image_size"]) == (pad, size)
  dtype = "bfloat16" if on_gpu else "float32"
  as_a_run = cell["dtype"] == dtype and not cell["steps_per_dispatch"]
  if not whole or side not in SIDES or (side == "jax" and not as_a_run):
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
    if content.get("xla_flags", "") not in ("", FLAGS):
      continue
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
  if key not in found:
    return NOT_RUN
  least, median, most = (
    f"{1e3 * key[2] / found[key][name]:,.0f}"
    for name in ("ms_per_step_most", "ms_per_step", "ms_per_step_least")
  )
  return f"{median} ({least}-{most})"


def _table(
  head: Sequence[str], rows: Sequence[Sequence[str]], left: int
) -> str:
  first, *lines = (f"| {' | '.join(line)} |\n" for line in [head, *rows])
  align = "|---" * left + "|---:" * (len(head) - left) + "|\n"
  return "".join([first, align, *lines])


def _of_device(found: Mapping[Key, dict[str, Any]], on_gpu: bool) -> str:
  """A line for each work and side, a column for each method of both sides."""
  methods = work_lib.COMMON
  rows, absent = [], 0
  for pair, batch in WORKS:
    for side, title in SIDES.items():
      figures = [
        _figure(found, (on_gpu, pair, batch, m, side)) for m in methods
      ]
      if set(figures) == {NOT_RUN}:
        absent += 1
      else:
        rows.append((pair.replace(":", " -> "), str(batch), title, *figures))
  names = [work_lib.title(method) for method in methods]
  text = _table(("pair", "batch", "side", *names), rows, 3) if rows else ""
  if absent:
    text += f"\nNot run: the other {absent} of {len(rows) + absent} lines.\n"
  return text


def make(found: Mapping[Key, dict[str, Any]]) -> str:
  """The tables, in Markdown."""
  pair, batch = WORKS[0]
  parts = ["On a CPU, images/s:\n", _of_device(found, on_gpu=False)]
  others = []
  for method in work_lib.methods():
    keys = [(on_gpu, pair, batch, method, "jax") for on_gpu in (False, True)]
    if method not in work_lib.COMMON:
      figures = [_figure(found, key) for key in keys]
      others.append((work_lib.title(method), *figures))
  others = [row for row in others if set(row[1:]) != {NOT_RUN}]
  parts += ["On a GPU, images/s:\n", _of_device(found, on_gpu=True)]
  parts += [
    f"Other methods in kd_jax, {pair.replace(':', ' -> ')}, batch {batch},"
    " images/s (not run: methods without a line):\n",
    _table(("method", "CPU", "GPU"), others, 1),
  ]
  return "\n".join(parts)


def put(text: str, table: str) -> str:
  """The document with this text between its marks.

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
