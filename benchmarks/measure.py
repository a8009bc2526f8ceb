"""Timings, machines and tables: what all benchmarks share."""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

_HOPPER_SXM = {"float32": 494.7, "bfloat16": 989.4}
_A100 = {"float32": 156.0, "bfloat16": 312.0}
# Dense TFLOP/s, without sparsity, of the vendor's data sheets, by the whole
# name of the card: its other variants, and parts of it (MIG), have other peaks.
# "float32" is TF32, which both sides' convolutions take by default.
PEAKS: dict[str, dict[str, float]] = {
  "NVIDIA H200": _HOPPER_SXM,
  "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
  "NVIDIA H100 PCIe": {"float32": 378.0, "bfloat16": 756.0},
  "NVIDIA A100-SXM4-80GB": _A100,
  "NVIDIA A100-SXM4-40GB": _A100,
  "NVIDIA A100 80GB PCIe": _A100,
  "NVIDIA A100-PCIE-40GB": _A100,
  "NVIDIA L4": {"float32": 60.0, "bfloat16": 121.0},
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")


def peak(device: str, dtype: str) -> float | None:
  """FLOP/s that a device could reach, None where no table says.

  Args:
    device: its name, as JAX or PyTorch gives it.
    dtype: "float32" or "bfloat16".
  """
  rates = PEAKS.get(device)
  return None if rates is None else rates[dtype] * 1e12


def commit() -> str:
  """The commit of the code that runs, marked if files differ from it."""
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=40"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
  """Of Python and of the packages, by name, where they are there."""
  found = {"python": platform.python_version()}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  return found


def summary(name: str, turns: Sequence[float]) -> dict[str, Any]:
  """Every figure, the median and the spread, for JSON.

  Args:
    name: of the figure, with its unit.
    turns: the figure of each turn.

  Returns:
    The median as `name`, the others as `name` and _least, _most, _turns.
  """
  return {
    name: statistics.median(turns),
    f"{name}_least": min(turns),
    f"{name}_most": max(turns),
    f"{name}_turns": list(turns),
  }


def take_turns(
  run: Callable[[int], Any],
  *,
  steps: int,
  turns: int,
  before: Callable[[], Any] = lambda: None,
) -> list[float]:
  """Times `run(steps)`, which has to wait for its end, several times.

  Args:
    run: what is timed.
    steps: of a turn.
    turns: how many.
    before: called before each turn, and not timed.

  Returns:
    Milliseconds of one step, of each turn.
  """
  found = []
  for _ in range(turns):
    before()
    begin = time.perf_counter()
    run(steps)
    found.append(1e3 * (time.perf_counter() - begin) / steps)
  return found


def peak_resident_bytes() -> int:
  """The most memory that this process has held, its children left out."""
  # Linux counts in KiB.
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cpu_seconds() -> float:
  """CPU time of this process and of its living children."""
  ticks = 0
  pids = [child.pid for child in multiprocessing.active_children()]
  for pid in [os.getpid(), *pids]:
    # The fields behind the name, which may hold blanks: utime and stime are
    # the 14th and the 15th of all.
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
    ticks += sum(map(int, fields.split()[11:13]))
  return ticks / os.sysconf("SC_CLK_TCK")


def processor() -> str:
  """The CPU's model name where Linux gives one."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  for line in lines:
    if line.startswith("model name"):
      return line.split(":", 1)[1].strip()
  return platform.processor() or platform.machine()


def gpus() -> list[str]:
  """The names of NVIDIA's cards, told by the driver: no process takes one."""
  command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return []
  return done.stdout.splitlines()


def hardware() -> dict[str, Any]:
  """The machine, and how busy it is; no device is touched."""
  return {
    "cpu": processor(),
    "cores": len(os.sched_getaffinity(0)),
    "gpus": gpus(),
    "load_average": list(os.getloadavg()),
  }


def command() -> list[str]:
  """What was started: the program as the repository has it, and arguments."""
  program, *arguments = sys.argv
  root = pathlib.Path(__file__).resolve().parent.parent
  path = pathlib.Path(program).resolve()
  if path.is_relative_to(root):
    program = path.relative_to(root).as_posix()
  return [program, *arguments]


def head(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
  """What a benchmark's JSON begins with: of what, when, where, by what.

  Args:
    packages: whose versions it has.
  """
  return {
    "commit": commit(),
    "date": datetime.date.today().isoformat(),
    "hardware": hardware(),
    "versions": versions(packages),
    "command": command(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes a benchmark's JSON: the whole file, or none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(".part")
  part.write_text(json.dumps(result, indent=2) + "\n")
  part.rename(path)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Text in columns, the first one flush left."""
  lines = [head, *rows]
  widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

  def line_of(cells: Sequence[str]) -> str:
    first, *rest = zip(cells, widths)
    columns = [f"{first[0]:<{first[1]}}"]
    return "  ".join([*columns, *(f"{c:>{w}}" for c, w in rest)])

  return "\n".join(map(line_of, lines))


def medians_table(
  first: str, rows: Sequence[dict[str, Any]], **columns: str
) -> str:
  """Text of what `summary` made: medians, and the least and the most.

  Args:
    first: the key of the rows' names.
    rows: with this key and those of the summaries.
    **columns: the title of each summary.
  """
  head = [first]
  for title in columns.values():
    head += [title, "least-most"]
  lines = []
  for row in rows:
    line = [row[first]]
    for key in columns:
      least, most = row[f"{key}_least"], row[f"{key}_most"]
      line += [f"{row[key]:,.0f}", f"{least:,.0f}-{most:,.0f}"]
    lines.append(line)
  return table(head, lines)
