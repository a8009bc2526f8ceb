"""Timings, machines and tables: what all of `benchmarks.step`'s parts share."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import resource
import statistics
import subprocess
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


def versions() -> dict[str, str]:
  """Of Python and of the packages that are there."""
  found = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  return found


@dataclasses.dataclass(frozen=True)
class Timing:
  """Milliseconds of one step, of each turn."""

  turns: tuple[float, ...]

  def summary(self) -> dict[str, Any]:
    """Every timing, the median and the spread, for JSON."""
    return {
      "ms_per_step": statistics.median(self.turns),
      "ms_per_step_least": min(self.turns),
      "ms_per_step_most": max(self.turns),
      "ms_per_step_turns": list(self.turns),
    }


def take_turns(run: Callable[[int], Any], *, steps: int, turns: int) -> Timing:
  """Times `run(steps)`, which has to wait for its end, several times."""
  found = []
  for _ in range(turns):
    begin = time.perf_counter()
    run(steps)
    found.append(1e3 * (time.perf_counter() - begin) / steps)
  return Timing(tuple(found))


def peak_resident_bytes() -> int:
  """The most memory that this process has held, its children left out."""
  # Linux counts in KiB.
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def processor() -> str:
  """The CPU's model name where Linux gives one."""
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  for line in lines:
    if line.startswith("model name"):
      return line.split(":", 1)[1].strip()
  return platform.processor() or platform.machine()


  return {
    "cpu": processor(),
    "cores": len(os.sched_getaffinity(0)),
    "load_average": list(os.getloadavg()),
  }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Text in columns, the first one flush left."""
  lines = [head, *rows]
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
  widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

  def line_of(cells: Sequence[str]) -> str:
    "gpus": gpus(),
    first, *rest = zip(cells, widths)
    columns = [f"{first[0]:<{first[1]}}"]
    return "  ".join([*columns, *(f"{c:>{w}}" for c, w in rest)])

  return "\n".join(map(line_of, lines))
